"""The command line of experiments/compile.py, without libtpu; tests/tpu has the rest."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from memjax.tpu import report
from tests.tpu.test_report import summary

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = "--config=configs/titans.py:smoke"


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    """The environment of a machine that has no libtpu."""
    folder = tmp_path_factory.mktemp("fake")
    (folder / "libtpu.py").write_text("raise ImportError('not here')\n")
    paths = [str(folder), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def script(environment, *arguments):
    command = [sys.executable, "experiments/compile.py", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give --config=FILE and --topology=v5p:2x2x1"),
        ((CONFIG, "--topology=v5p"), "topology 'v5p' must be one of v5e, v5p, v6e, tpu7x"),
        ((CONFIG, "--topology=v5p:2x2x1"), 'needs libtpu: pip install -U "memjax[tpu]"'),
        ((CONFIG, "--topology=v5p:2x2x1", "--mesh=pipe=2"), "--mesh=pipe=2: give sizes of data"),
        ((CONFIG, "--topology=v5p:2x2x1", "--batch=2"), "--batch is of --kind=decode"),
        (("--compare=runs/nowhere,runs/nothing",), "report.json does not exist: make it with"),
        (("--compare=one",), "--compare takes two directories, got 1"),
    ],
)
def test_mistakes_are_explained(without, arguments, message):
    done = script(without, *arguments)
    assert done.returncode == 1, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert message in line
    assert "Traceback" not in done.stderr


def test_reports_are_compared_without_a_compiler(without, tmp_path):
    for name in ("one", "two"):
        report.write(summary(), str(tmp_path / name), "a command")
    content = json.loads((tmp_path / "two" / "report.json").read_text())
    content["seconds"]["step"] *= 3
    (tmp_path / "two" / "report.json").write_text(json.dumps(content))
    done = script(without, f"--compare={tmp_path / 'one'},{tmp_path / 'two'}")
    assert done.returncode == 0, done.stderr
    assert next(line for line in done.stdout.splitlines() if line.startswith("step")).endswith(
        "3.000"
    )
