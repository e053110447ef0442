"""The report made of costs that are known, and the steps that it is about."""

import json
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from memjax import training
from memjax.models import generation
from memjax.tpu import chips, costs, hlo, kernels, report, show, steps
from tests.training import helpers

CHIP = chips.Chip("toy", 1, 1e6, 1e5, 2**30, 1e4, 1000, 1)  # a clock of 1 kHz


def cost(
    part, *, cycles=0, flops=0, moved=0, collective=None, kernel=None, backward=False, **other
):
    fields = {"name": "f", "opcode": "fusion", "operation": "dot", "times": 1, "certain": True}
    return costs.Cost(
        **{**fields, **other}, part=part, backward=backward, cycles=cycles, flops=flops,
        bytes=moved, collective=collective, kernel=kernel,
    )  # fmt: skip


def summary(**changes):
    found = [
        cost("mixer.lmm", cycles=600, flops=400_000, moved=10_000),
        cost("mixer.lmm", cycles=900, flops=800_000, moved=10_000, backward=True, certain=False),
        cost("optimizer", cycles=100, moved=9_000, operation="add"),
        cost("mixer.lmm", kernel="wave", results=((4, 8),), times=2),
        cost("head", kernel="unknown"),
        cost("mixer.lmm", collective=costs.Collective("all-gather", 8_000, 4, False), times=3),
        cost("head", collective=costs.Collective("collective-permute", 5_000, 2, True)),
    ]
    described = {
        "title": "toy", "kind": "train", "topology": "v5e:2x2", "mesh": {"data": 1, "fsdp": 4},
        "devices": 4, "versions": {"jax": "1"}, "model_parameters": 7, "rows": 8, "tokens": 4_000,
    }  # fmt: skip
    held = {"parameters": 2**28, "temporaries": 2**29, "total": 3 * 2**28, "capacity": 2**30}
    schedules = [
        kernels.Schedule("wave", ((4, 8),), 25, (4, 2), 1, {"MXU": 0.5}, 1_000),
        kernels.Schedule("wave", ((4, 16),), 50, (4, 2), 1, {"MXU": 0.5}, 2_000),
    ]
    return report.summarise(
        found, CHIP, schedules=schedules, memory=held | changes, useful=6e5, **described
    )


def test_sums_by_hand():
    found = summary()
    assert found.cycles == 600 + 900 + 100 + 2 * 200
    assert found.seconds["compute"] == pytest.approx(2.0)
    assert found.seconds["collectives"] == pytest.approx(3 * 8_000 * 0.75 / 1e4)
    assert found.seconds["step"] == pytest.approx(3.8)
    assert found.seconds["floor"] == pytest.approx(1.202), "at a million: 1.2 and a kernel's 0.002"
    assert found.utilisation["hardware"] == pytest.approx(1.202 / 3.8)
    assert found.utilisation["model"] == pytest.approx(0.6 / 3.8)
    assert found.guessed == pytest.approx(900 / 2000)
    assert found.fits
    assert found.unmeasured == ("unknown",)
    assert "without a schedule: unknown" in show.text(found)
    forward, backward = (
        next(p for p in found.parts if (p.name, p.backward) == ("mixer.lmm", b)) for b in (0, 1)
    )
    assert (forward.cycles, forward.flops, forward.bytes) == (1000, 402_000, 10_000)
    assert (backward.bound, backward.floor) == ("compute", pytest.approx(0.8))
    assert found.parts[-1].bound == "memory"
    assert [part.name for part in found.operations] == [
        "dot",
        "kernel wave",
        "add",
        "kernel unknown",
    ]
    gathered, permuted = found.traffic
    assert (gathered.kind, gathered.count, gathered.bytes, gathered.group) == (
        "all-gather", 3, 24_000, 4,
    )  # fmt: skip
    assert permuted.asynchronous
    assert "mixer.lmm" in found.bound


def test_a_step_that_does_not_fit_says_so():
    found = summary(total=2**31)
    assert not found.fits
    assert "DOES NOT FIT" in show.text(found)


def test_a_report_in_words_as_data_and_as_a_picture(tmp_path):
    found = summary()
    text = show.text(found)
    for words in (
        "v5e:2x2: 4 devices, mesh fsdp=4",
        "3.80 s predicted",
        "MFU 15.8%",
        "mixer.lmm, backward",
        "25 x 4x2 / 1",
        "all-gather",
        "of 1: fits",
    ):
        assert words in text, words
    paths = report.write(found, str(tmp_path / "out"), "python compile.py")
    kept = json.loads((tmp_path / "out" / "report.json").read_text())
    assert kept["command"] == "python compile.py"
    assert kept["seconds"] == found.seconds
    assert kept["fits"] is True
    assert len(paths) == 3
    assert (tmp_path / "out" / "report.png").stat().st_size > 10_000


def test_two_reports_side_by_side():
    one = report.to_dict(summary())
    other = json.loads(json.dumps(one))
    other["seconds"]["step"] *= 2
    other["parts"] = other["parts"][:1]
    lines = {line.split("  ")[0]: line for line in show.compare([one, other]).splitlines()}
    assert lines["step, ms"].endswith("2.000")
    assert lines["tokens/s"].endswith("0.500")
    assert lines["optimizer, ms"].endswith("0.000"), "what one of them has not"
    assert lines["parameters, GiB"].endswith("1.000")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    corpus = helpers.write_corpus(tmp_path_factory.mktemp("corpus"))
    config = helpers.config(corpus, mesh={"data": 2, "fsdp": 2, "tensor": 2})
    return training.build(config, devices=jax.devices())


def test_the_training_step_is_the_one_that_trains(run):
    traced, arguments = steps.trace(run, "train")
    assert arguments["parameters"] is run.abstract_state.params
    with jax.set_mesh(run.mesh):
        again = run.compiled_step().trace(run.abstract_state, run.abstract_batch)
    assert str(traced.jaxpr) == str(again.jaxpr)
    lowered = traced.lower()
    names = lowered.as_text(debug_info=True)  # a cached program may bear the names of an older one
    for part in ("optimizer", "head", "loss", "embedding", "mixer.transformer"):
        assert re.search(rf"\b{part}\b", names), part
    found = costs.costs(hlo.parse(lowered.compile().as_text()))
    assert any(one.collective for one in found)


def test_the_decoding_step_and_its_memory(run):
    traced, arguments = steps.trace(run, "decode", batch=8)
    compiled = traced.lower().compile()
    arguments = steps.placed(arguments, compiled)
    held = report.memory(arguments, compiled.memory_analysis(), chips.CHIPS["v5e"])
    each = sum(x.size for x in jax.tree.leaves(run.shapes)) * 4
    assert each / 8 <= held["parameters"] <= each
    assert held["total"] >= held["parameters"] + held["state"]
    assert held["capacity"] == 16 * 2**30
    with pytest.raises(ValueError, match=r"batch = 6 rows cannot be split over .* = 4 devices"):
        steps.trace(run, "decode", batch=6)
    with pytest.raises(ValueError, match="kind 'predict' must be one of"):
        steps.trace(run, "predict")


def test_the_decoding_step_is_the_one_that_generates(tmp_path):
    """What it is compiled for is what comes out of `prefill`; as many rows as heads."""
    rows = 4
    config = helpers.config(
        helpers.write_corpus(tmp_path / "corpus"), mesh={"data": 2, "fsdp": 2, "tensor": 2},
        model={"pattern": ("lmm", "transformer"), "layers": 2, "dim": 32, "heads": rows},
    )  # fmt: skip
    run = training.build(config, devices=jax.devices())
    params = jax.tree.map(
        lambda x: jax.device_put(jnp.full(x.shape, 0.01, x.dtype), x.sharding), run.abstract_params
    )
    with jax.set_mesh(run.mesh):
        graphdef, values = nnx.split(nnx.merge(run.graphdef, params))
        state = jax.tree.map(jnp.copy, nnx.merge(graphdef, values).start(rows))
        _, state = generation.prefill(graphdef, values, state, jnp.ones((rows, 2), jnp.int32), 2)
    traced, arguments = steps.trace(run, "decode", batch=rows)
    arguments = steps.placed(arguments, traced.lower().compile())
    found, wanted = (
        {
            jax.tree_util.keystr(path): x.sharding.spec
            for path, x in jax.tree_util.tree_leaves_with_path(tree)
        }
        for tree in (arguments["state"], state)
    )
    memory = ".blocks[0].memory"
    over = ("data", "fsdp")
    assert found[f"{memory}.weights[0]"] == PartitionSpec(None, over, "tensor")
    assert found[f"{memory}.begin.weights[0]"] == PartitionSpec(None, "tensor")
    assert found[".blocks[1].cache.keys"] == PartitionSpec(None, over, None, "tensor")
    # all but the count of tokens, which a fresh state has on every device
    assert found.keys() <= wanted.keys()
    assert {name for name in found if found[name] != wanted[name]} <= {".seen"}


def test_useful_operations_leave_out_what_is_computed_again():
    def step(x, w):
        return jnp.sum(jax.checkpoint(lambda x: jnp.tanh(x @ w))(x))

    x, w = jnp.ones((4, 8)), jnp.ones((8, 8))
    forward = report.operations.products(jax.make_jaxpr(step)(x, w))
    both = report.operations.products(jax.make_jaxpr(jax.grad(step, (0, 1)))(x, w))
    assert (forward, both) == (2 * 4 * 8 * 8, 4 * 2 * 4 * 8 * 8)


def test_a_compiler_that_runs_out_of_memory_is_understood():
    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError(f"{kind}: the temporaries (31.94G) exceed 15.75G.\n\n")

    kind = "RESOURCE_EXHAUSTED"
    with pytest.raises(ValueError, match=r"16 GiB of a device of v5e .*31.94G.*model.remat=full"):
        report._compile(Lowered(), chips.CHIPS["v5e"])
    kind = "INTERNAL"
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        report._compile(Lowered(), chips.CHIPS["v5e"])
