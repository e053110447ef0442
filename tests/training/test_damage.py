"""Damaged checkpoints: named, refused, never lost, and set aside when told."""

import os
import pathlib
import shutil
import sys
import types

import pytest

from memjax.training import checkpoint
from memjax.training.checkpoint import DamagedError
from tests.training import helpers


def files(folder, step):
    found = [p for p in sorted((folder / str(step)).rglob("*")) if p.is_file()]
    assert len(found) > 5
    return found


def data_files(folder, step):
    """The files that hold array values."""
    found = [p for p in files(folder, step) if p.parent.name == "d"]
    assert found
    return found


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(bytes(content))


def damage_all(kind, folder, step):
    for path in data_files(folder, step):
        kind(path)


@pytest.mark.parametrize("kind", [truncate, flip, pathlib.Path.unlink])
def test_damaged_arrays_are_named_and_nothing_is_lost(saved, corpus, kind):
    run, folder = saved
    damage_all(kind, folder, 2)
    checkpoints = helpers.open_checkpoints(run, folder)
    with pytest.raises(
        DamagedError, match=r"checkpoints/2 is damaged.*one before it is of step 1.*on_damage"
    ):
        checkpoints.restore(run.abstract_state)
    assert checkpoints.steps() == [1, 2]


def test_every_truncated_file_is_noticed_or_harmless(saved, corpus, tmp_path):
    """Whatever file is cut, what comes back is either refused or exactly what was saved."""
    run, folder = saved
    expected = helpers.start(corpus, seed=2, step=2)
    refused = 0
    for path in files(folder, 2):
        if path.stat().st_size == 0:
            continue
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        truncate(copy / path.relative_to(folder))
        try:
            state, data_state = helpers.open_checkpoints(run, copy).restore(run.abstract_state)
        except DamagedError:
            refused += 1
        else:
            if int(state.step) == 2:
                helpers.assert_same(state, expected)
                assert data_state == {**helpers.DATA, "batches": 2}
            else:
                raise AssertionError(f"{path} cut: step {int(state.step)} was taken silently")
        shutil.rmtree(copy)
    assert refused >= 3


def test_a_changed_value_is_found_by_its_checksum(saved, corpus):
    """A wrong value in a well-formed file: the planted fault that Orbax itself cannot see."""
    run, folder = saved
    checkpoints = helpers.open_checkpoints(run, folder)
    state = helpers.start(corpus, seed=5, step=3)
    right = checkpoint.audit

    def wrong(flat):
        finite, sums = right(flat)
        return finite, {**sums, "params/embedding": sums["params/embedding"] + 1}

    checkpoint.audit = wrong
    try:
        checkpoints.save(state, helpers.DATA)
        checkpoints.wait()
    finally:
        checkpoint.audit = right
    with pytest.raises(DamagedError, match=r"checksum of params/embedding does not match"):
        checkpoints.restore(run.abstract_state)


def test_a_damaged_newest_checkpoint_can_be_set_aside(saved, corpus, caplog):
    run, folder = saved
    damage_all(truncate, folder, 2)
    checkpoints = helpers.open_checkpoints(run, folder)
    state, data_state = checkpoints.restore(run.abstract_state, on_damage="previous")
    helpers.assert_same(state, helpers.start(corpus, seed=1, step=1))
    assert data_state["batches"] == 1
    assert "CHECKPOINT DAMAGED" in caplog.text
    assert "continuing from step 1" in caplog.text
    assert checkpoints.steps() == [1]
    assert (folder / "damaged-2" / "state").is_dir()
    # The step can be saved again, and the damaged one stays where it is.
    checkpoints.save(helpers.start(corpus, seed=2, step=2), helpers.DATA)
    checkpoints.wait()
    assert checkpoints.steps() == [1, 2]
    assert (folder / "damaged-2" / "state").is_dir()
    checkpoints.close()


def test_when_all_are_damaged_it_says_so(saved, corpus):
    run, folder = saved
    for n in (1, 2):
        damage_all(truncate, folder, n)
    with pytest.raises(DamagedError, match="No other checkpoint is left"):
        helpers.open_checkpoints(run, folder).restore(run.abstract_state, on_damage="previous")
    assert sorted(p.name for p in folder.iterdir()) == ["damaged-1", "damaged-2"]


def test_damaged_parameters_are_refused(saved, corpus):
    run, folder = saved
    damage_all(truncate, folder, 2)
    with pytest.raises(DamagedError, match="checkpoints/2 is damaged"):
        checkpoint.read_params(str(folder), run.abstract_params, identity=run.identity)


def test_a_read_that_ends_too_late_says_nothing(saved, monkeypatch):
    heard = []
    monkeypatch.setattr(sys, "unraisablehook", heard.append)
    run, folder = saved
    helpers.open_checkpoints(run, folder).restore(run.abstract_state)
    late, other = (
        types.SimpleNamespace(exc_value=RuntimeError(text))
        for text in ("Event loop is closed", "something else")
    )
    for event in (late, other):
        sys.unraisablehook(event)
    assert heard == [other]
