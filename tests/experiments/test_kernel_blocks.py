"""experiments/benchmarks/kernel_blocks.py without a compiler: flags, search and the table."""

import argparse
import importlib.util
import json
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import pytest

from memjax.tpu import kernels
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
    plain |= {"candidates": [LARGE, SMALL], "deep": [SMALL], "keep": 1}
    return argparse.Namespace(**plain | changes)


def width(dim, blocks):
    return dim * blocks.block * blocks.tiles * (blocks.backward or blocks.heads)


class Compiler:
    """Fits widths up to a limit, of packed documents up to half as much more; large is fast."""

    def __init__(self, limit=10**9, packed=10**9):
        self.limits, self.calls = {False: limit, True: packed}, []

    def __call__(self, op, decay, chip, dim, blocks, packed):
        self.calls.append((chip, dim, blocks, packed))
        if width(dim, blocks) > self.limits[packed]:
            return None
        forward, backward = 16 / blocks.heads, 32 / (blocks.backward or blocks.heads)
        where = {"op": op, "decay": decay, "chip": chip, "dim": dim, "blocks": blocks}
        return where | {"forward": forward, "backward": backward, "mxu": 0.5}


def found(rows):
    return [(row["chip"], row["dim"], row["blocks"]) for row in rows]


def test_the_best_of_each_is_found(script):
    compiler = Compiler()
    rows = [*script.search(options(), compiler)]
    first = [("v5p", dim, blocks) for dim in (128, 64) for blocks in (LARGE, SMALL)]
    assert found(rows) == [*first, ("v6e", 128, LARGE), ("v6e", 64, LARGE)]
    assert found(script.best(rows)) == [
        (chip, dim, LARGE) for chip in ("v5p", "v6e") for dim in (64, 128)
    ]
    packed = [call[:3] for call in compiler.calls if call[3]]
    assert packed == [(chip, dim, LARGE) for chip in ("v5p", "v6e") for dim in (128, 64)]
    assert len([*script.search(options(keep=2), Compiler())]) == 8


def test_ops_have_their_own_decays_and_candidates(script):
    ops = {"ops": ["deep_memory", "delta_rule"], "decays": ["none", "head"], "deep": [HALF]}
    rows = script.best([*script.search(options(**ops), Compiler())])
    kinds = {(row["op"], row["decay"], row["blocks"]) for row in rows}
    assert kinds == {
        ("deep_memory", "none", HALF), ("delta_rule", "none", LARGE), ("delta_rule", "head", LARGE)
    }  # fmt: skip


@pytest.mark.parametrize(("limit", "packed"), [(40_000, 40_000), (10**9, 40_000)])
def test_what_does_not_fit_is_halved_backward(script, limit, packed):
    """The large one is too wide, with documents or always; nothing as large is tried again."""
    compiler = Compiler(limit, packed)
    rows = [*script.search(options(dims=[128, 64, 256]), compiler)]
    best = {(row["chip"], row["dim"]): row["blocks"] for row in script.best(rows)}
    assert best[("v5p", 128)] == best[("v6e", 128)] == HALF
    assert best[("v5p", 64)] == best[("v6e", 64)] == LARGE
    assert best[("v5p", 256)] == best[("v6e", 256)] == SMALL._replace(backward=2)
    assert ("v5p", 256, LARGE, False) not in compiler.calls
    tried = [blocks for chip, dim, blocks, kind in compiler.calls if (dim, kind) == (256, False)]
    fitting = SMALL._replace(backward=2)
    assert tried == [HALF, SMALL, fitting, fitting], "on v5p, the last on v6e too"


def test_a_search_goes_on_where_it_was(script, tmp_path):
    """What an earlier run has measured is read, what did not fit included, but of these sources."""
    out = str(tmp_path / "made" / "rows.json")

    def searched(compiler, sources="a", **changes):
        result = {"versions": {"jax": "1.2"}, "sources": sources}
        return [*script.search(options(**changes), script.remembering(out, result, compiler))]

    class Stopped(Compiler):
        def __call__(self, *args, **kwargs):
            if len(self.calls) == 5:
                raise KeyboardInterrupt
            return super().__call__(*args, **kwargs)

    rest, whole, other = (Compiler(40_000, 40_000) for _ in range(3))
    stopped, nothing = Stopped(40_000, 40_000), Compiler()
    with pytest.raises(KeyboardInterrupt):
        searched(stopped)
    assert len(json.loads(pathlib.Path(out).read_text())["measured"]) == 5
    assert searched(rest) == [*script.search(options(), whole)]
    assert stopped.calls + rest.calls == whole.calls
    searched(nothing)
    assert not nothing.calls
    searched(nothing, keep=2)
    assert {call[0] for call in nothing.calls} == {"v6e"}, "other flags: what is missing"
    searched(other, sources="b")
    assert other.calls == whole.calls


@pytest.mark.parametrize("packed", [False, True])
def test_every_op_is_traced_with_both_kernels(script, packed):
    args = script.arguments([])
    assert len(script.cases(args)) == 7
    for op, decay in script.cases(args):
        traced = script.kernels_of(
            op, decay, 64, (1, 128, 4), jnp.bfloat16, packed, Blocks(64, 1, 4, 2)
        )
        calls = [*kernels.calls(traced)]
        assert {kernels.kernel_name(call) for call in calls} == {
            f"{op}_{decay}", f"{op}_{decay}_backward"
        }  # fmt: skip
        grids = {call.params["grid_mapping"].grid for call in calls}
        assert grids == {(1, 1, 2), (1, 2, 2)}, "4 heads forward, 2 backward"


def test_nothing_fits(script):
    with pytest.raises(RuntimeError, match="delta_rule head 128 v5p: no candidate fits in VMEM"):
        [*script.search(options(), Compiler(1, 1))]


def test_the_table_is_python(script, tmp_path):
    rows = script.best([*script.search(options(), Compiler(40_000, 40_000))])
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
        (["--ops=gru"], "--ops: no 'gru'; there are deep_memory, delta_rule, linear_attention"),
        (["--chips=v3"], "--chips: no 'v3'; there are v5p, v5e, v6e"),
        (["--dims=96"], "--dims: no 96; there are 128, 64, 256"),
        (["--candidates=64x2"], "'64x2' must be BLOCKxTILESxHEADS"),
        (["--deep=64x1x8,128x1x8x4"], "--deep: 128x1x8x4 must begin with 64, the chunk"),
        (["--ops=deep_memory", "--decays=head"], "--decays: deep_memory is of none alone"),
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
