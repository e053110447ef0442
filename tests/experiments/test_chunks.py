"""The curve of chunks, end to end: both stages, going on, what it refuses."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


def script(tmp_path, *arguments, config="configs/tnt.py:smoke"):
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax-scripts"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    command = [
        sys.executable, "experiments/chunks.py", f"--config={config}", "--seeds=0",
        "--chunks=8,4", "--stage_two=4", f"--workdir={tmp_path}", *arguments,
    ]  # fmt: skip
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=600
    )


def test_both_stages_are_measured_at_every_chunk_and_not_trained_twice(tmp_path):
    first = script(tmp_path)
    assert first.returncode == 0, first.stderr
    rows = json.loads((tmp_path / "chunks.json").read_text())
    assert [(row["stage"], row["trained"], row["chunk"], row["step"]) for row in rows] == [
        (1, 8, 8, 4), (1, 8, 4, 4), (2, 4, 8, 5), (2, 4, 4, 5)
    ]  # fmt: skip
    values = [row["bits_per_byte"] for row in rows]
    assert all(0 < value < 12 for value in values)
    assert len(set(values)) == 4  # chunks and stages are not the same model
    assert (tmp_path / "chunks.png").stat().st_size > 1000
    assert f"| stage 2, trained at 4 | {values[3]:.3f} | {values[2]:.3f} |" in first.stdout
    other = script(tmp_path, "--stage_two=8")
    assert other.returncode == 1
    assert "checkpoints/5 was made with model.memory.local_chunks = [4]" in other.stderr
    assert json.loads((tmp_path / "chunks.json").read_text()) == rows
    saved = {
        path: path.stat().st_mtime for path in tmp_path.rglob("*") if "checkpoints" in str(path)
    }
    again = script(tmp_path)
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "chunks.json").read_text()) == rows
    assert saved == {path: path.stat().st_mtime for path in saved}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--chunks=4,x"], "--chunks must list integers of at least 1, got '4,x'"),
        (["--seeds="], "--seeds must list integers of at least 0, got ''"),
        (["--more=0"], "--more must be a number above 0, got 0.0"),
        (["--stage_two=3"], "memory.shard 16 must be a multiple of each"),
        (["--config.train.stepz=3"], "unknown field --config.train.stepz"),
    ],
)
def test_bad_flags_are_named_before_training(tmp_path, arguments, message):
    result = script(tmp_path, *arguments)
    assert result.returncode in (1, 2)
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_help_lists_the_flags_and_the_fields(tmp_path):
    result = script(tmp_path, "--help")
    assert result.returncode == 0, result.stderr
    assert "--stage_two" in result.stdout
    assert "--config.model.memory.local_chunks" in result.stdout


def test_more_than_one_local_memory_is_refused(tmp_path):
    result = script(tmp_path, config="configs/compare.py:lmm_smoke")
    assert result.returncode != 0
    assert "one local memory" in result.stderr
    assert "Traceback" not in result.stderr
