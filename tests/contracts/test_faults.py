"""Every check of the contracts fails under the faults that it is there for."""

import pytest

from tests.contracts import faults, gradients, rules, scenes, streams, transforms, values
from tests.contracts.faults import plant

MATRIX = rules.BY_NAME["matrix_before"]  # every gate, read before the write
ATTENTION = rules.BY_NAME["linear_attention_channelwise"]  # every gate, read after
OMEGA = rules.BY_NAME["omega_by_chunk"]  # has thresholds and a window
TITANS = rules.BY_NAME["titans_linear"]  # has slow weights
WHICH = ("recurrent", "chunkwise", "step")
SEQUENCE = ("recurrent", "chunkwise")


@pytest.fixture(scope="module", autouse=True)
def _forget():
    yield
    scenes.forget()


def fails(check, forms, *args, **options):
    """The check rejects these forms, by an assertion and not by breaking down."""
    with pytest.raises(AssertionError):
        check(forms, *args, **options)


@pytest.mark.parametrize(
    "fault",
    ["place_off", "scale_ignored", "ids_ignored", "carried_id_forgotten", "momentum_dropped",
     "base_dropped", "segment_dropped", "imprecise"],
)  # fmt: skip
def test_oracle(fault):
    fails(values.check_oracle, plant("chunkwise", getattr(faults, fault)), MATRIX, "chunkwise")


@pytest.mark.parametrize("fault", ["window_turned", "pairs_dropped"])
def test_oracle_of_a_window(fault):
    fails(values.check_oracle, plant("chunkwise", getattr(faults, fault)), OMEGA, "chunkwise")


@pytest.mark.parametrize("fault", ["place_off", "scale_ignored", "ids_ignored"])
@pytest.mark.parametrize("which", ["recurrent", "step"])
def test_oracle_of_other_forms(which, fault):
    fails(values.check_oracle, plant(which, getattr(faults, fault)), MATRIX, which)


def test_oracle_sees_one_token():
    for which in SEQUENCE:
        fails(values.check_oracle, plant(which, faults.lr_off), MATRIX, which)


def test_lengths():
    fails(values.check_lengths, plant("chunkwise", faults.tail_decayed), MATRIX, "chunkwise")


@pytest.mark.parametrize("fault", ["imprecise", "rounded_state"])
def test_float32(fault):
    forms = plant("chunkwise", getattr(faults, fault))
    fails(values.check_precision, forms, MATRIX, "chunkwise", "float32")


def test_bfloat16():
    forms = plant("chunkwise", faults.lr_doubled)
    fails(values.check_precision, forms, TITANS, "chunkwise", "bfloat16")


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("fault", ["wide_output", "narrow_state"])
def test_dtypes(which, fault):
    fails(values.check_dtypes, plant(which, getattr(faults, fault)), MATRIX, which)


def test_read():
    fails(values.check_read, plant("read", faults.reads_the_chunk_start), MATRIX)


def test_surprise():
    fails(values.check_surprise, plant("surprise", faults.surprised_later), MATRIX)


def test_shared_heads():
    fails(values.check_shared_heads, plant("start", faults.heads_differ), MATRIX)


@pytest.mark.parametrize("name", ["q", "k", "v", "lr", "momentum", "retain", "scale", "base",
                                  "weights", "velocity", "begin"])  # fmt: skip
def test_gradients(name):
    """Against the recurrent form, and, for a fault in every form, against the oracle."""
    forms = plant("chunkwise", faults.stopped(name))
    fails(gradients.check_gradients, forms, ATTENTION, "chunkwise")
    fails(gradients.check_differences, forms, ATTENTION, "chunkwise")


def test_gradients_of_slow_weights():
    forms = plant("chunkwise", faults.stopped("slow"))
    fails(gradients.check_gradients, forms, TITANS, "chunkwise")
    fails(gradients.check_differences, forms, TITANS, "chunkwise")


@pytest.mark.parametrize("name", ["threshold", "window", "pairs"])
def test_gradients_of_a_window(name):
    forms = plant("chunkwise", faults.stopped(name))
    fails(gradients.check_gradients, forms, OMEGA, "chunkwise")
    fails(gradients.check_differences, forms, OMEGA, "chunkwise")


def test_gradient_of_the_start():
    fails(gradients.check_start_gradient, plant("start", faults.start_unlearned), MATRIX)


def test_gradient_through_a_split():
    fails(gradients.check_split_gradient, plant("chunkwise", faults.gradient_cut), MATRIX)


@pytest.mark.parametrize("fault", ["future_leak", "future_seen"])
@pytest.mark.parametrize("which", SEQUENCE)
def test_causality(which, fault):
    fails(streams.check_causality, plant(which, getattr(faults, fault)), ATTENTION, which)


def test_causality_of_a_read_before_the_write():
    fails(streams.check_causality, plant("chunkwise", faults.present_leak), MATRIX, "chunkwise")


@pytest.mark.parametrize("fault", ["row_leak", "head_leak", "row_seen", "head_seen"])
def test_isolation(fault):
    forms = plant("chunkwise", getattr(faults, fault))
    fails(streams.check_isolation, forms, ATTENTION, "chunkwise")


@pytest.mark.parametrize("fault", ["ids_ignored", "ids_on_grid", "carried_id_forgotten"])
@pytest.mark.parametrize("which", SEQUENCE)
def test_documents(which, fault):
    fails(streams.check_documents, plant(which, getattr(faults, fault)), MATRIX, which)


@pytest.mark.parametrize(
    "fault", ["momentum_dropped", "place_dropped", "base_dropped", "segment_dropped"]
)
def test_splits(fault):
    fault = getattr(faults, fault)
    fails(streams.check_split, plant("chunkwise", fault), MATRIX, "chunkwise")
    fails(streams.check_mixed_split, plant("step", fault), MATRIX)
    fails(streams.check_mixed_split, plant("chunkwise", fault), MATRIX)


@pytest.mark.parametrize(
    ("fault", "option"), [("block_seen", {"block": 2}), ("remat_seen", {"remat": 1})]
)
def test_options(fault, option):
    forms = plant("chunkwise", getattr(faults, fault))
    fails(gradients.check_option, forms, MATRIX, **option)


def test_jit():
    fails(transforms.check_jit, plant("chunkwise", faults.knows_its_tracing), MATRIX)


def test_vmap():
    fails(transforms.check_vmap, plant("chunkwise", faults.wrong_batching), MATRIX)


def test_checkpoint():
    fails(transforms.check_checkpoint, plant("chunkwise", faults.counts_its_tracings), MATRIX)
