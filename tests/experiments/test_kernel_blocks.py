"""experiments/benchmarks/kernel_blocks.py without a compiler: flags, search and the table."""

import argparse
import importlib.util
import pathlib
import subprocess
import sys

import pytest

from pallas_kernels.blocks import Blocks

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "experiments" / "benchmarks"
SMALL, LARGE, HALF = Blocks(64, 1, 4), Blocks(64, 1, 8), Blocks(64, 1, 8, 4)


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("kernel_blocks", FOLDER / "kernel_blocks.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def options(**changes):
    plain = {"ops": ["delta_rule"], "decays": ["head"], "chips": ["v5p", "v6e"], "dims": [128, 64]}
    return argparse.Namespace(**plain | {"candidates": [LARGE, SMALL], "keep": 2} | changes)


class Compiler:
    """Fits widths up to a limit, of packed documents up to half as much more; large is fast."""

    def __init__(self, script, limit, packed):
        self.script, self.limits, self.calls = script, {False: limit, True: packed}, []

    def __call__(self, op, decay, chip, dim, blocks, packed):
        self.calls.append((chip, dim, blocks, packed))
        if self.script.width(dim, blocks) > self.limits[packed]:
            return None
        forward, backward = 16 / blocks.heads, 32 / (blocks.backward or blocks.heads)
        where = {"op": op, "decay": decay, "chip": chip, "dim": dim, "blocks": blocks}
        return where | {"forward": forward, "backward": backward, "mxu": 0.5}


def test_the_best_of_each_is_found(script):
    compiler = Compiler(script, 10**9, 10**9)
    rows = [*script.search(options(), compiler)]
    found = [(row["chip"], row["dim"], row["blocks"]) for row in rows]
    first = [("v5p", dim, blocks) for dim in (128, 64) for blocks in (LARGE, SMALL)]
    assert found == [
        *first, ("v6e", 128, LARGE), ("v6e", 128, SMALL), ("v6e", 64, LARGE)
    ]  # fmt: skip
    assert {row["blocks"] for row in script.best(rows)} == {LARGE}
    assert len([call for call in compiler.calls if call[3]]) == 2, "packed: the best, on v5p"


@pytest.mark.parametrize(("limit", "packed"), [(40_000, 40_000), (10**9, 40_000)])
def test_what_does_not_fit_is_halved_backward(script, limit, packed):
    """The large one is too wide, with documents or always; nothing as wide is tried again."""
    compiler = Compiler(script, limit, packed)
    rows = [*script.search(options(dims=[128, 256]), compiler)]
    table = {(row["chip"], row["dim"]): row["blocks"] for row in script.best(rows)}
    assert table[("v5p", 128)] == table[("v6e", 128)] == HALF
    widths = [script.width(dim, blocks) for _, dim, blocks, kind in compiler.calls if not kind]
    assert sum(width > 40_000 for width in widths) <= 2


def test_nothing_fits(script):
    with pytest.raises(RuntimeError, match="delta_rule head 128 v5p: no candidate fits in VMEM"):
        [*script.search(options(), Compiler(script, 1, 1))]


def test_the_table_is_python(script, tmp_path):
    rows = script.best([*script.search(options(), Compiler(script, 40_000, 40_000))])
    versions = {"jax": "1.2", "libtpu": "3.4"}
    text = script.module(
        rows, {"command": "python here", "date": "2020-02-03T04", "versions": versions}
    )
    assert "python here\nJAX 1.2, libtpu 3.4, 2020-02-03." in text
    assert "128: (64, 1, 8, 4),  # 2.00 + 8.00" in text
    scope: dict = {}
    exec(text, scope)
    assert scope["TABLE"]["delta_rule"]["head"]["v6e"][128] == (64, 1, 8, 4)
    assert len(script.show(rows).splitlines()) == 2 + len(rows)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ops=gru"], "--ops: no 'gru'; there are delta_rule, linear_attention"),
        (["--chips=v3"], "--chips: no 'v3'; there are v5p, v5e, v6e"),
        (["--dims=96"], "--dims: no 96; there are 128, 64, 256"),
        (["--candidates=64x2"], "'64x2' must be BLOCKxTILESxHEADS"),
        (["--table=new.py", "--dims=64"], "--table wants all of --dims, got 64"),
    ],
)
def test_mistakes_are_explained(script, flags, message, capsys):
    with pytest.raises(SystemExit):
        script.arguments(flags)
    assert message in capsys.readouterr().err


def test_help():
    done = subprocess.run(
        [sys.executable, str(FOLDER / "kernel_blocks.py"), "--help"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "python experiments/benchmarks/kernel_blocks.py --table=" in done.stdout
