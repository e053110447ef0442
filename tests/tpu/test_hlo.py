"""The reading of compiled modules, on one written by hand whose costs are known."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.tpu import costs, hlo

TEXT = (pathlib.Path(__file__).parent / "module.hlo").read_text()


@pytest.fixture(scope="module")
def module():
    return hlo.parse(TEXT)


@pytest.fixture(scope="module")
def found(module):
    return {cost.name: cost for cost in costs.costs(module)}


def test_types_have_the_bytes_of_their_tiles_and_a_memory():
    (plain,) = hlo.arrays("f32[3,5]")
    assert (plain.bytes, plain.space) == (60, 0)
    (tiled,) = hlo.arrays("f32[3,5]{1,0:T(8,128)S(1)}")
    assert (tiled.bytes, tiled.space) == (8 * 128 * 4, 1)
    (turned,) = hlo.arrays("f32[300,5]{0,1:T(8,128)}")  # the first dimension is the minor one
    assert turned.bytes == 384 * 8 * 4
    (packed,) = hlo.arrays("bf16[16,128]{1,0:T(8,128)(2,1)}")
    assert packed.bytes == 16 * 128 * 2
    (quarter,) = hlo.arrays("f8e4m3fn[8,128]")
    assert quarter.bytes == 8 * 128
    assert hlo.arrays("s32[]")[0].bytes == 4
    pair = hlo.arrays("(pred[4]{0:T(512)}, /*index=1*/u32[]{:S(2)})")
    assert [(one.dtype, one.bytes) for one in pair] == [("pred", 512), ("u32", 4)]


def test_loops_run_as_often_as_their_conditions_say(module):
    loops = {
        one.name: hlo.trips(module, one)
        for lines in module.computations.values()
        for one in lines
        if one.opcode == "while"
    }
    assert loops == {"loop": 5, "inner": 3, "strange": None}


def test_what_runs_and_how_often(module):
    runs = {one.instruction.name: (one.times, one.certain) for one in hlo.executed(module)}
    assert runs["product"] == (5, True)
    assert runs["cheap"] == (15, False), "the branch where the condition holds"
    assert "dear" not in runs
    assert runs["once"] == (1, False), "a loop of unknown length"
    assert runs["last"] == (1, True)
    assert hlo.cycles(module) == 5 * 100 + 15 * 7 + 11 + 20 + 5


def test_attributes_over_several_lines_stay_with_their_instruction(module):
    lines = module.by_name["main"]
    assert lines["kernel.2"].op_name == "jit(step)/jvp()/mixer.lmm/transpose(jvp())/pallas_call"
    assert lines["x.1"].op_name == "state.params['w'].value"
    assert lines["last"].operands == ("kernel.2", "x.1")


def test_text_that_is_no_module_is_refused():
    with pytest.raises(ValueError, match="no HLO module"):
        hlo.parse("HloModule empty\n")


def test_costs_by_hand(found):
    tile = 8 * 128 * 4
    product = found["product"]
    assert product.flops == 5 * 2 * 8 * 128 * 256
    assert product.bytes == 5 * 2 * (128 * 256 + 8 * 256), "what lies in VMEM is not HBM's"
    assert (product.cycles, product.part, product.backward) == (500, "mixer.lmm", False)
    assert product.operation == "dot_general"
    assert found["taken"].bytes == 2 * tile + 4, "one slice, read and written, and its place"
    assert found["put"].bytes == 2 * tile + 4, "in place"
    assert (found["put"].part, found["put"].backward) == ("head", True)
    assert found["moved"].bytes == tile
    assert "here" not in found, "the other half of a copy"
    assert found["last"].bytes == 3 * tile
    assert found["last"].part == "optimizer"
    assert found["taken"].part == costs.OTHER


def test_a_gradient_that_a_memory_takes_is_not_backward(found):
    kernel = found["kernel.2"]
    assert (kernel.kernel, kernel.part, kernel.backward) == ("kernel", "mixer.lmm", False)
    assert costs.part("jit(step)/transpose(jvp(mixer.lmm))/dot_general") == ("mixer.lmm", True)
    assert costs.part("jit(f)/mixer.overhead/head/dot_general") == ("head", False)
    assert costs.part("jit(f)/ahead/dot_general") == (costs.OTHER, False)


def test_traffic_by_hand(found):
    weight = 128 * 64 * 2
    gathered = found["gathered"].collective
    assert gathered == costs.Collective("all-gather", 4 * weight, 4, False)
    assert gathered.sent == 3 * weight
    scattered = found["scattered"].collective
    assert scattered == costs.Collective("reduce-scatter", 4 * weight, 4, False)
    assert found["scattered"].backward
    permuted = found["begun"].collective
    assert permuted == costs.Collective("collective-permute", 8 * 128 * 4, 2, True)
    assert permuted.sent == 8 * 128 * 4
    assert costs.Collective("all-reduce", 100, 4, False).sent == 150
    assert found["gathered"].bytes == 0, "counted as traffic, not as HBM's"


@pytest.mark.parametrize(
    ("attributes", "group"),
    [
        ("replica_groups={{0,1},{2,3}}", 2),
        ("replica_groups=[4,16]<=[64]", 16),
        ("replica_groups=[2,8]<=[4,4]T(1,0)", 8),
        ("replica_groups=mesh['a'=2,'b'=8,'c'=3] {'a','c'}", 6),
        ("source_target_pairs={{0,1}}", 2),
    ],
)
def test_groups_of_devices(attributes, group):
    assert costs._group(attributes) == group


@pytest.mark.parametrize(
    ("instruction", "name"),
    [
        ("deep_memory_none_backward.12", "deep_memory_none_backward"),
        ("jvp_short_convolution_.1", "short_convolution"),
        ("transpose_jvp_short_convolution_backward__.1.clone", "short_convolution_backward"),
        ("vmap_.3", "vmap_"),
    ],
)
def test_a_kernel_is_told_by_its_own_name(instruction, name):
    assert costs.kernel_name(instruction) == name


def taps_by_loops(size, kernel, out, stride, low, dilate, spread):
    hits = 0
    padded = {low + i * dilate for i in range(size)}
    for place in range(out):
        for tap in range(kernel):
            hits += place * stride + tap * spread in padded
    return hits


def test_convolutions_count_no_padding_and_no_holes():
    random = np.random.default_rng(0)
    for _ in range(200):
        size, kernel, out, stride, dilate, spread = (int(n) for n in random.integers(1, 6, 6))
        low = int(random.integers(0, 6))
        wanted = taps_by_loops(size, kernel, out, stride, low, dilate, spread)
        assert hlo._taps(size, kernel, out, stride, low, dilate, spread) == wanted


def test_a_product_with_batch_dimensions_as_the_compiler_writes_it():
    text = """HloModule m

ENTRY %main (a: f32[2,2,64,32], b: f32[2,2,32,128]) -> f32[2,2,64,128] {
  %a = f32[2,2,64,32] parameter(0)
  %b = f32[2,2,32,128] parameter(1)
  ROOT %c = f32[2,2,64,128] convolution(%a, %b), window={size=2x2 stride=1x1 pad=0_0x0_0 lhs_dilate=2x2}, dim_labels=01bf_01io->01bf
}
"""  # noqa: E501
    module = hlo.parse(text)
    assert hlo.flops(module, "main") == 2 * (2 * 2) * 64 * 32 * 128


def test_a_module_that_was_compiled_here():
    """Loops and products of a program are those of its compiled text, on the CPU too."""

    def f(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=7)[0]

    x, w = jnp.ones((16, 128)), jnp.ones((128, 128))
    module = hlo.parse(jax.jit(f).lower(x, w).compile().as_text())
    loops = [
        hlo.trips(module, one)
        for lines in module.computations.values()
        for one in lines
        if one.opcode == "while"
    ]
    assert loops == [7]
    assert {one.times for one in hlo.executed(module)} == {1, 7}


SHARED = """\
HloModule shared

%begin (p: bf16[128,64]) -> bf16[256,64] {
  %p = bf16[128,64]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[256,64]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, replica_groups={{0,1}}, dimensions={0}
}

%beside (q: bf16[128,64], a: bf16[128,128], b: bf16[128,128]) -> bf16[128,128] {
  %q = bf16[128,64]{1,0:T(8,128)(2,1)} parameter(0)
  %a = bf16[128,128]{1,0:T(8,128)(2,1)} parameter(1)
  %b = bf16[128,128]{1,0:T(8,128)(2,1)} parameter(2)
  %all-gather.2 = bf16[256,64]{1,0:T(8,128)(2,1)} all-gather(%q), channel_id=7, replica_groups={{0,1}}, dimensions={0}
  ROOT %product = bf16[128,128]{1,0:T(8,128)(2,1)} convolution(%a, %b), dim_labels=bf_io->bf
}, execution_thread="sparsecore"

ENTRY %main (x: bf16[128,64], y: bf16[128,128]) -> bf16[128,128] {
  %x = bf16[128,64]{1,0:T(8,128)(2,1)} parameter(0)
  %y = bf16[128,128]{1,0:T(8,128)(2,1)} parameter(1)
  %start = bf16[256,64]{1,0:T(8,128)(2,1)} fusion(%x), kind=kCustom, calls=%begin, metadata={op_name="jit(step)/head/all_gather"}
  ROOT %work = bf16[128,128]{1,0:T(8,128)(2,1)} fusion(%x, %y, %y), kind=kOutput, calls=%beside, metadata={op_name="jit(step)/mixer.lmm/dot_general"}, backend_config={"estimated_cycles":"500"}
}
"""  # noqa: E501


def test_a_collective_in_several_fusions_is_one_and_their_work_is_counted():
    found = costs.costs(hlo.parse(SHARED))
    (traffic,) = [cost for cost in found if cost.collective]
    assert traffic.collective == costs.Collective("all-gather", 2 * 128 * 64 * 2, 2, True)
    assert (traffic.part, traffic.cycles, traffic.flops, traffic.bytes) == ("head", 0, 0, 0)
    work = [cost for cost in found if cost.name == "work"]
    assert [(cost.cycles, cost.flops) for cost in work] == [(500, 2 * 128**3)]
