"""Configurations: what is refused, what comes back from plain data, and the registries."""

import dataclasses
import json
import math
import pathlib
import re

import jaxtyping
import pytest
from flax import nnx

from memjax.models import LanguageModel, LanguageModelConfig, MemoryConfig, feed_forwards, mixers
from memjax.models.config import memory_fields
from memjax.models.registry import Registry
from tests.models.toys import config_of

# before other tests register theirs
BLOCKS = [name for name in mixers.registry.names() if not name.startswith("toy_")]


def test_round_trip_through_json():
    config = config_of(
        pattern=("toy_average", "transformer"),
        feed_forward=("swiglu", "none"),
        memory=MemoryConfig(depth=3),
    )
    plain = json.loads(json.dumps(config.to_dict()))
    assert LanguageModelConfig.from_dict(plain) == config
    assert plain["memory"]["depth"] == 3
    assert hash(LanguageModelConfig.from_dict(plain)) == hash(config)


@pytest.mark.parametrize(
    "pattern", ["swa,transformer", "swa, transformer", ("swa,transformer",), ["swa", "transformer"]]
)
def test_names_may_stand_in_one_string(pattern):
    values = config_of().to_dict() | {"layers": 2, "pattern": pattern}
    assert LanguageModelConfig.from_dict(values).pattern == ("swa", "transformer")
    values |= {"pattern": "swa", "feed_forward": "swiglu"}
    single = LanguageModelConfig.from_dict(values)
    assert (single.pattern, single.feed_forward) == (("swa",), "swiglu")
    values |= {"pattern": pattern, "feed_forward": "swiglu,none"}
    assert LanguageModelConfig.from_dict(values).feed_forward == ("swiglu", "none")
    with pytest.raises(ValueError, match="unknown mixer 'transformr'; did you mean 'transformer'"):
        LanguageModelConfig.from_dict(values | {"pattern": "swa,transformr"})


def test_memory_round_trip():
    memory = MemoryConfig(heads=2, chunk=8)
    assert MemoryConfig.from_dict(memory.to_dict()) == memory


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contxt": 8}, "unknown key contxt; did you mean 'context'"),
        ({"zzz": 8}, "unknown key zzz; valid: vocab, dim"),
        ({"memory": {"depht": 1}}, "unknown key memory.depht; did you mean 'depth'"),
        ({"vocab": None}, "missing key vocab of LanguageModelConfig"),
    ],
)
def test_from_dict_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        LanguageModelConfig.from_dict(config_of().to_dict() | changes)


def test_from_dict_names_what_is_missing():
    with pytest.raises(ValueError, match="missing key heads"):
        LanguageModelConfig.from_dict({"vocab": 8, "dim": 8, "layers": 1})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 3, "pattern": ("swa", "transformer")}, "layers 3 must be a multiple of the 2"),
        ({"pattern": ("transformr",)}, "unknown mixer 'transformr'; did you mean 'transformer'"),
        (
            {"pattern": ("titans",)},
            "mixer 'titans': it is a rule, of the blocks 'lmm', .* 'mal' with",
        ),
        ({"pattern": ()}, "pattern must be a tuple of at least one"),
        ({"feed_forward": "swigl"}, "unknown feed_forward 'swigl'; did you mean 'swiglu'"),
        ({"feed_forward": ("swiglu", "none")}, "one for each of the 1 names in pattern"),
        ({"dim": 15}, "dim 15 must be a multiple of heads 2"),
        ({"kv_heads": 3}, "heads 2 must be a multiple of kv_heads 3"),
        ({"remat": "ful"}, "unknown remat 'ful'; did you mean 'full'"),
        ({"dtype": "float16"}, "unknown dtype 'float16'; did you mean 'bfloat16' or 'float32'"),
        ({"vocab": 0}, "vocab must be an integer of at least 1, got 0"),
        ({"hidden": 0}, "hidden must be an integer of at least 1 or None, got 0"),
        ({"rope_base": 0}, "rope_base must be a number above 1, got 0"),
    ],
)
def test_bad_fields(changes, message):
    with pytest.raises(ValueError, match=message):
        config_of(**changes)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("pattern", "swa", "pattern must be a tuple of at least one"),
        ("window", 2.5, "window must be an integer of at least 1, got 2.5"),
        ("layers", True, "layers must be an integer of at least 1, got True"),
        ("tied", 1, "tied must be True or False, got 1"),
        ("rope_base", "big", "rope_base must be a number above 1, got 'big'"),
        ("memory", {"rule": "yaad"}, r"write MemoryConfig\(rule=\.\.\.\), or .*Config\.from_dict"),
    ],
)
def test_bad_types(field, value, message):
    config = config_of()
    object.__setattr__(config, field, value)  # past the type checks of the tests
    with pytest.raises(ValueError, match=message):
        config.__post_init__()


def test_bad_memory():
    with pytest.raises(ValueError, match=r"memory.chunk must be .* at least 1 or None, got 0"):
        MemoryConfig(chunk=0)


def test_a_chunk_of_none_is_that_of_the_rule():
    chunks = {"titans": 64, "ttt_mlp": 16, "lact": 2048}
    for rule, chunk in chunks.items():
        assert MemoryConfig(rule=rule).build().chunk == chunk
        assert MemoryConfig(rule=rule, chunk=8).build().chunk == 8


def test_a_block_that_bears_the_name_of_a_rule_is_checked_with_its_memory():
    with pytest.raises(ValueError, match=r"block .hope.: memory\.depth is fixed there"):
        config_of(pattern=("hope",), memory=MemoryConfig(depth=3))
    with pytest.raises(ValueError, match=r"block .atlas.: memory\.depth is fixed there: set"):
        config_of(pattern=("atlas",), memory=MemoryConfig(depth=3))


def test_a_field_that_one_block_of_a_pattern_fixes_is_for_the_others():
    memory = MemoryConfig(depth=3, momentum=False)
    config = config_of(layers=3, pattern=("lmm", "yaad", "tnt"), memory=memory)
    model = nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
    rules = [block.mixer.rule for block in model.blocks[:2]]
    assert rules[0].structure.depth == 3
    assert rules[1] == MemoryConfig(rule="yaad").build()


def test_the_page_of_blocks_says_which_fields_each_reads():
    page = (pathlib.Path(__file__).parents[2] / "docs" / "blocks.md").read_text()
    rows = [row.split("|") for row in page.splitlines() if row.startswith("| `")]
    found = {
        name: set(re.findall(r"`(\w+)`", fields))
        for _, names, _, fields, _ in rows
        for name in re.findall(r"`(\w+)`", names)
    }
    assert found == {name: memory_fields(name, MemoryConfig()) for name in BLOCKS}
    assert memory_fields("mine", MemoryConfig()) is None


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_reads_the_fields_that_it_is_said_to(name):
    """Another value of one of them makes another module, of any other the same."""
    others = {
        "rule": "yaad", "heads": 4, "depth": 1, "expansion": 3, "norm": False, "residual": False,
        "momentum": False, "decay": False, "chunk": 32, "window": 3, "degree": 3, "memories": 3,
        "active": 1, "balance": 0.5, "local_chunks": (4, 8), "shard": 64, "slots": 5,
        "periods": (4,), "projection_chunk": 32, "lr_max": 0.3, "continuum_lr_max": 0.3,
        "combine": "sum", "value_dim": 6, "negative_eigenvalues": True,
    }  # fmt: skip
    assert set(others) == {field.name for field in dataclasses.fields(MemoryConfig)}

    def built(**fields):
        config = config_of(dim=16, heads=2, memory=MemoryConfig(**fields))
        module = nnx.eval_shape(lambda: mixers.build(name, config, nnx.Rngs(0)))
        return re.sub(r" at 0x\w+", "", repr(module))

    usual = built()
    changed = {field for field, value in others.items() if built(**{field: value}) != usual}
    assert changed == memory_fields(name, MemoryConfig())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(
            ({name: 0}, f"memory.{name} must be an integer of at least 1, got 0")
            for name in ("window", "degree", "memories", "active", "shard", "slots")
        ),
        ({"balance": -1}, "memory.balance must be a finite number of at least 0, got -1"),
        ({"balance": float("inf")}, "memory.balance must be a finite"),
        (
            {"rule": "delta_net"},
            "memory.rule 'delta_net' is a block of its own: name it in pattern",
        ),
        ({"rule": "titan"}, "unknown memory.rule 'titan'; did you mean 'titans'"),
        ({"active": 5}, "memory.active 5 must be at most memory.memories 4"),
        ({"memories": 1}, "memory.active 2 must be at most memory.memories 1"),
        ({"local_chunks": (8, 0)}, r"memory.local_chunks must be .* at least 1, .*got \(8, 0\)"),
        ({"local_chunks": (True,)}, r"memory.local_chunks must be .*got \(True,\)"),
        ({"periods": ()}, r"memory.periods must be .*got \(\)"),
        ({"periods": (8, 0)}, r"memory.periods must be .* at least 1, .*got \(8, 0\)"),
        ({"projection_chunk": 0}, r"memory.projection_chunk"),
        ({"projection_chunk": 48}, "memory.chunk 64 and memory.projection_chunk 48 one must be"),
        ({"lr_max": math.inf}, "memory.lr_max inf must be a finite number above 0"),
        ({"continuum_lr_max": 0}, "memory.continuum_lr_max 0 must be a finite number above 0"),
        ({"local_chunks": (8, 3)}, r"memory.shard 2048 must be a multiple of each .*\(8, 3\)"),
        ({"shard": 24}, r"memory.shard 24 must be a multiple of each .*\(8, 16\)"),
    ],
)
def test_bad_fields_of_the_memory(changes, message):
    with pytest.raises(ValueError, match=message):
        MemoryConfig(**changes)


@pytest.mark.parametrize(
    ("given", "chunks"),
    [
        ([4, 8], (4, 8)),
        ("4,8", (4, 8)),
        ("4, 8,", (4, 8)),
        (("4,8",), (4, 8)),
        ("8", (8,)),
        (8, (8,)),
        ("", ()),
        ([], ()),
    ],
)
def test_numbers_may_stand_in_one_string(given, chunks):
    assert MemoryConfig.from_dict({"local_chunks": given}).local_chunks == chunks


@pytest.mark.parametrize("given", ["4,x", "four", None, 4.0, "4.5", {"a": 1}, [4, None]])
def test_what_are_no_numbers_is_named(given, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for a user
    with pytest.raises(ValueError, match=r"memory.local_chunks must be a tuple of integers"):
        MemoryConfig.from_dict({"local_chunks": given})


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        config_of().dim = 3


def test_hidden_units():
    assert config_of(hidden=None, dim=768).hidden_dim == 2048
    assert config_of(hidden=None, dim=1024).hidden_dim == 2816  # 2730.7, rounded up
    assert config_of(hidden=40).hidden_dim == 40


def test_registry():
    registry = Registry("thing", reserved=("none",))

    @registry.register("double")
    def double(x):
        return 2 * x

    assert registry.build("double", 4) == 8
    assert double(4) == 8
    assert registry.names() == ("double", "none")
    with pytest.raises(ValueError, match=r"the thing 'double' is registered already, by .*double;"):
        registry.register("double")(lambda x: x)
    with pytest.raises(ValueError, match="the thing 'none' is registered already; choose"):
        registry.register("none")(double)
    with pytest.raises(ValueError, match="unknown thing 'duoble'; did you mean 'double'"):
        registry.build("duoble", 4)


def test_a_builder_that_is_defined_again_replaces_itself():
    """As a notebook cell or a config file that runs twice does."""
    registry = Registry("thing")
    for factor in (2, 3):

        @registry.register("scaled")
        def scaled(x, factor=factor):
            return factor * x

    assert registry.build("scaled", 4) == 12
    assert registry.names() == ("scaled",)
    scaled.__module__ = "another"
    with pytest.raises(ValueError, match=r"registered already, by another\."):
        registry.register("scaled")(lambda x: x)


def test_builtin_names():
    assert {"transformer", "swa"} <= set(mixers.registry.names())
    assert {"swiglu", "none"} <= set(feed_forwards.registry.names())
