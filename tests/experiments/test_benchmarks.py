"""The benchmarks in their short form, as a user runs them, and the arithmetic of their tables."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDER = ROOT / "experiments" / "benchmarks"
CACHE = {
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


def run(name, *flags, **options):
    """The finished process."""
    command = [sys.executable, *options.pop("python", ()), str(FOLDER / f"{name}.py"), *flags]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **CACHE})


def smoke(name, tmp_path, *flags):
    """What a smoke run prints, and its JSON."""
    out = tmp_path / "new folder" / f"{name}.json"
    done = run(name, "--smoke", f"--threads={threads()}", f"--out={out}", *flags)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["benchmark"] == name
    assert {"command", "date", "commit", "machine", "settings"} <= result.keys()
    assert {"python", "memjax", "jax", "jaxlib", "flax"} <= result["versions"].keys()
    assert result["machine"]["processors"] == os.cpu_count()
    assert f"written: {out}" in done.stdout
    assert len([line for line in done.stdout.splitlines() if line.startswith("|")]) == (
        len(result["rows"]) + 2
    )
    return done.stdout, result


def threads():
    return min(2, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2)


@pytest.fixture(scope="module")
def module():
    """Loads a file of the folder, which its imports expect on the path."""
    sys.path.insert(0, str(FOLDER))
    before = set(sys.modules)

    def load(name):
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
        made = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(made)
        return made

    yield load
    sys.path.remove(str(FOLDER))
    if "harness" not in before:
        sys.modules.pop("harness", None)


@pytest.fixture
def bare_python(tmp_path):
    """An interpreter without any installed package."""
    path = tmp_path / "python"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    path.chmod(0o755)
    return path


def test_neural_memory_without_the_peer(tmp_path, bare_python):
    printed, result = smoke("neural_memory", tmp_path, f"--peer_python={bare_python}")
    assert f"titans-pytorch cannot be imported by {bare_python}" in printed
    assert 'pip install "memjax[peers]"' in printed
    assert "missing" in result["peer"]
    (row,) = result["rows"]
    assert (row["chunk"], row["contender"]) == (16, "memjax")
    speed = row["tokens_per_second"]
    assert 0 < speed["least"] <= speed["median"] <= speed["most"]
    assert row["peak_bytes"] > 50e6  # at least JAX itself
    assert row["step_bytes"] < row["peak_bytes"]
    assert [sample["tokens"] for sample in row["samples"]] == [64, 64]
    # at least the forward pass of the memories: 11 operations a weight (docs/performance.md)
    assert row["flops_per_token"] > 11 * 2 * (2 * 16 * 64)
    assert row["share_of_product_rate"] == pytest.approx(
        row["flops_per_token"] * speed["median"] / row["product_rate"]
    )


def test_length(tmp_path):
    printed, result = smoke("length", tmp_path)
    short, long = result["rows"]
    assert (short["tokens"], long["tokens"]) == (32, 64)
    assert short["time_ratio"] == short["memory_ratio"] == 1
    assert long["time_ratio"] == pytest.approx(
        long["seconds_per_token"] / short["seconds_per_token"]
    )
    # a sample has the same tokens at every length
    assert {s["tokens"] for row in result["rows"] for s in row["samples"]} == {64}
    assert long["planned_bytes"] > short["planned_bytes"] > 0
    assert "KiB/token" in printed


def test_decode(tmp_path):
    printed, result = smoke("decode", tmp_path)
    assert [(row["pattern"], row["position"]) for row in result["rows"]] == [
        ("lmm", 32), ("lmm", 64), ("mac", 32), ("mac", 64),
    ]  # fmt: skip
    assert all(row["same_bytes"] and row["state_bytes"] > 10_000 for row in result["rows"])
    assert {s["tokens"] for row in result["rows"] for s in row["samples"]} == {8}
    assert "NO" not in printed


def test_rules(tmp_path, bare_python):
    printed, result = smoke("rules", tmp_path, f"--peer_python={bare_python}")
    assert f"flash-linear-attention cannot be imported by {bare_python}" in printed
    assert 'pip install "memjax[peers]"' in printed
    assert [row["rule"] for row in result["rows"]] == ["gated_delta_net", "yaad"]
    for row in result["rows"]:
        assert row["ratio"] == pytest.approx(
            row["tokens_per_second"]["median"] / row["scan_tokens_per_second"]["median"]
        )
        assert row["operations"] > 0
        assert {s["tokens"] for s in row["samples"]["recurrent"]} == {16}
        assert row["rule"] in printed


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("rules", ["--rules=gru"], "no rule 'gru'; there are linear_attention, retnet"),
        ("rules", ["--peer_python=/none"], "--peer_python=/none is no program"),
        ("neural_memory", ["--heads=3"], "--dim=256 must be a multiple of --heads=3"),
        ("neural_memory", ["--tokens=100"], "--tokens=100 must be at least two chunks of 64"),
        ("neural_memory", ["--peer_python=/none"], "--peer_python=/none is no program"),
        ("neural_memory", ["--chunks=0"], "--chunks"),
        ("length", ["--lengths=100,150"], "must divide the longest"),
        ("decode", ["--prefill=100"], "--prefill=100 must be a multiple of --segment=128"),
        ("decode", ["--patern=mac"], "unrecognized arguments: --patern=mac"),
    ],
)
def test_bad_flags(name, flags, message):
    done = run(name, *flags)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.parametrize("name", ["neural_memory", "length", "decode", "rules"])
def test_help_needs_no_package(name):
    done = run(name, "--help", python=["-S"])
    assert done.returncode == 0, done.stderr
    assert f"python experiments/benchmarks/{name}.py" in done.stdout
    assert "--smoke" in done.stdout
    assert "(default: 2)" in done.stdout


CHILD = """\
import sys
sys.path.insert(0, {folder!r})
import harness

def build(spec):
    print("not a reply")
    if spec["fault"] == "missing":
        import a_package_that_is_nowhere
    if spec["fault"] == "crash":
        raise ArithmeticError("planted")
    def answer(x):
        return {{"double": 2 * x if spec["fault"] is None else 1 // (x - x)}}
    return {{"fault": spec["fault"]}}, answer

harness.serve(build)
"""


def test_a_child_answers_and_its_faults_are_told(module, tmp_path):
    harness = module("harness")
    script = tmp_path / "child.py"
    script.write_text(CHILD.format(folder=str(FOLDER)))
    with harness.Child(str(script), {"fault": None}) as child:
        assert child.info == {"fault": None}
        assert [child.ask(x=x)["double"] for x in (1, 5)] == [2, 10]
    assert child.process.returncode == 0
    with pytest.raises(harness.MissingError, match="a_package_that_is_nowhere"):
        harness.Child(str(script), {"fault": "missing"})
    with pytest.raises(harness.ChildError, match=r"(?s)status 1.*ArithmeticError: planted"):
        harness.Child(str(script), {"fault": "crash"})
    with (
        harness.Child(str(script), {"fault": "later"}) as child,
        pytest.raises(harness.ChildError, match="ZeroDivisionError"),
    ):
        child.ask(x=1)
    with pytest.raises(harness.ChildError, match="cannot start /none"):
        harness.Child(str(script), {}, python="/none")


def test_rounds_alternate_in_both_orders(module):
    calls = []

    def contender(name):
        return lambda: calls.append(name) or {"tokens": 6, "seconds": len(calls)}

    harness = module("harness")
    results = harness.alternate({name: contender(name) for name in "ab"}, 3)
    assert "".join(calls) == "abbaab"
    assert [sample["seconds"] for sample in results["a"]] == [1, 4, 5]
    assert harness.rate(results["a"]) == {"median": 1.5, "least": 1.2, "most": 6}


def test_ratios_and_table_of_a_comparison(module):
    bench = module("neural_memory")

    def sample(seconds, growth):
        return {"steps": 1, "tokens": 100, "seconds": seconds, "growth": growth, "largest": 2**30}

    infos = {
        "memjax": {
            "parameters": 5, "compile_seconds": 3.0, "planned_bytes": 7, "flops": 4000,
            "product_rate": 16_000.0,
        },
        "titans-pytorch": {"parameters": 6},
    }  # fmt: skip
    samples = {
        "memjax": [sample(0.5, 2**20), sample(0.25, 2**21), sample(0.5, 2**20)],
        "titans-pytorch": [sample(2.0, 2**23), sample(4.0, 2**22), sample(2.0, 2**23)],
    }
    ours, peer = bench.rows(16, infos, samples)
    assert (ours["tokens_per_second"]["median"], peer["tokens_per_second"]["median"]) == (200, 50)
    assert ours["share_of_product_rate"] == 0.5  # 200 tokens/s of 40 operations
    assert (peer["ratio"], peer["memory_ratio"]) == (4, 4)
    assert "ratio" not in ours
    lines = bench.show([ours, peer]).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[2] == [
        "16", "memjax", "200", "200 to 400", "–", "2", "–", "1,024", "3.0", "50%",
    ]  # fmt: skip
    assert cells[3] == [
        "16", "titans-pytorch", "50", "25 to 50", "4.00", "8", "4.00", "1,024", "–", "–",
    ]  # fmt: skip
    assert len({len(line) for line in lines}) == 1


def test_a_rule_beside_its_pytorch_reference(module):
    bench = module("rules")

    def sample(seconds, growth):
        return {"tokens": 100, "seconds": seconds, "growth": growth}

    ours = {"flops": 4_000_000, "compile_seconds": 3.0, "loss": 2.0}
    infos = {"chunkwise": ours, "recurrent": {}, "peer": {"loss": 2.0006}}
    samples = {
        "chunkwise": [sample(0.25, 10**6), sample(0.5, 2 * 10**6), sample(0.5, 2 * 10**6)],
        "recurrent": [sample(1.0, 0)],
        "peer": [sample(2.0, 5 * 10**6), sample(4.0, 6 * 10**6), sample(2.0, 8 * 10**6)],
    }
    row = bench.row("retnet", 50, 2, infos, samples)
    assert (row["ratio"], row["operations"], row["memory"]) == (2, 40_000, 2 * 10**6)
    assert (row["peer"]["ratio"], row["peer"]["memory_ratio"]) == (4, 4)
    assert row["peer"]["difference"] == pytest.approx(3e-4)
    alone = bench.row("yaad", 50, 2, infos, {k: v for k, v in samples.items() if k != "peer"})
    assert "peer" not in alone
    _title, _, *lines = bench.show_peers([row, alone]).splitlines()
    (cells,) = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells == ["retnet", "naive_chunk_simple_gla", "200", "50", "4.0", "2", "8", "3e-04"]
    assert len(bench.show([row, alone]).splitlines()) == 4


def test_decode_refuses_a_state_that_is_elsewhere(module):
    bench = module("decode")
    place = {"position": 8, "seen": 7, "state_bytes": 1, "prefill_seconds": 1.0}
    with pytest.raises(RuntimeError, match="mac: the state has seen 7, not 8"):
        bench.rows("mac", 1, {"positions": [place], "parameters": 1}, {8: []})


def test_memory_grows_by_what_is_held(module):
    watched = module("harness").Memory()
    block = bytearray(b"x") * (64 * 2**20)
    growth = watched.growth()
    assert len(block) <= growth < 4 * len(block)
