"""Fixtures of the training tests."""

import pytest

from tests.training import helpers


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    return helpers.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def saved(corpus, tmp_path):
    """A run and its two checkpoints, of steps 1 and 2, with different parameters."""
    run = helpers.make_run(corpus)
    checkpoints = helpers.open_checkpoints(run, tmp_path / "checkpoints")
    for n in (1, 2):
        checkpoints.save(helpers.start(corpus, seed=n, step=n), {**helpers.DATA, "batches": n})
    checkpoints.close()
    return run, tmp_path / "checkpoints"
