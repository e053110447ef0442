"""Which contracts are slow."""

import pytest

from tests.contracts import rules


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Cases that are there for their parts run as the fast form; in others they are slow.

    `recurrent` and `step` are one body, which every other case holds to every check. That this
    body is the oracle's is checked with the parts as well.
    """
    for item in items:
        chosen = getattr(item, "callspec", None)
        which = chosen and chosen.params.get("which")
        if which in ("recurrent", "step") and chosen.params.get("case") in rules.PARTS:
            if which == "recurrent" and "oracle" in item.name:
                continue
            item.add_marker(pytest.mark.slow)
