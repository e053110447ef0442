"""Which contracts are slow."""

import pytest

from tests.contracts import rules


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Cases that are not among `FEW` run as the fast form; as the others they are slow.

    `recurrent` and `step` are one body, which the few hold to every check. That this body is the
    oracle's is checked with every case.
    """
    for item in items:
        if item.path.name != "test_rules.py" or not hasattr(item, "callspec"):
            continue
        case, which = (item.callspec.params.get(name) for name in ("case", "which"))
        if case in rules.FEW or which not in ("recurrent", "step"):
            continue
        if which == "step" or "oracle" not in item.name:
            item.add_marker(pytest.mark.slow)
