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
        ((CONFIG, "--topology=v5e:2x2x2"), "a slice of v5e has 2 dimensions, such as v5e:2x2"),
        ((CONFIG, "--topology=v5p:2x2x1"), 'needs libtpu: pip install -U "memjax[tpu]"'),
        ((CONFIG, "--topology=v5p:2x2x1", "--mesh=pipe=2"), "--mesh=pipe=2: give sizes of data"),
        ((CONFIG, "--topology=v5p:2x2x1", "--mesh=fsdp=--4"), "--mesh=fsdp=--4: give sizes of"),
        ((CONFIG, "--topology=v5p:2x2x1", "--batch=2"), "--batch is of --kind=decode"),
        (
            (CONFIG, "--topology=v5p:2x2x1", "--out=README.md/here"),
            "README.md: Not a directory): give another directory as --out",
        ),
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


@pytest.mark.parametrize("content", ["{}", "[]", '{"title": "cut', '{"seconds": {"step": 0}}'])
def test_what_is_no_report_is_named(tmp_path, content):
    for name in ("one", "two"):
        report.write(summary(), str(tmp_path / name), "a command")
    path = tmp_path / "two" / "report.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"^{path} does not hold a report: make it again with"):
        report.read(str(path.parent))
    assert report.read(str(tmp_path / "one"))["title"] == "toy"


# The script, with an analysis that takes no compiler and the directory away.
SHOWN = """
import importlib.util, os, sys
from memjax.tpu import report
from tests.tpu.test_report import summary

def analyse(*arguments, **options):
    os.rmdir(sys.argv[-1].partition("=")[2])
    open(sys.argv[-1].partition("=")[2], "w").close()
    return summary()

report.analyse = analyse
spec = importlib.util.spec_from_file_location("compile", "experiments/compile.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.cli.run(module.main)
"""


def test_a_report_that_cannot_be_written_after_all_is_shown(tmp_path):
    """Its directory turns into a file while it is made."""
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, "-c", SHOWN, CONFIG, "--topology=v5p:2x2x1", f"--out={out}"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "train step of toy" in done.stdout
    assert "written" not in done.stdout
    assert done.stderr.count("error:") == 1
