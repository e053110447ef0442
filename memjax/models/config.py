"""Configurations of language models: frozen, checked when made, and plain data on disk."""

import dataclasses
import inspect
import math
from collections.abc import Mapping
from typing import Any

from memjax import checks, miras
from memjax.models import feed_forwards, mixers
from memjax.models.combine import WAYS
from memjax.models.registry import nearest

REMAT = ("none", "full", "dots")
DTYPES = ("bfloat16", "float32")
RULES = {
    name: getattr(miras.zoo, name)
    for name in (
        "titans", "ttt_linear", "ttt_mlp", "moneta", "yaad", "memora", "dla", "swdt",
        "deep_omega_transformer", "omega_net", "atlas", "lact",
    )
}  # fmt: skip
NETWORK = ("depth", "expansion", "norm", "residual", "momentum", "decay")
_SELF_REFERENTIAL = "heads chunk projection_chunk expansion lr_max"
_CONTINUUM = "expansion periods continuum_lr_max"
_READS = {
    **dict.fromkeys(("attention", "transformer", "swa"), ""),
    **dict.fromkeys(
        ("linear_attention", "retnet", "gla", "mamba2", "longhorn", "mesa_net"), "heads value_dim"
    ),
    **dict.fromkeys(
        ("delta_net", "gated_delta_net", "kda"), "heads value_dim negative_eigenvalues"
    ),
    "rwkv7": "heads",
    "mom": "heads memories active balance",
    "tnt": "heads chunk expansion local_chunks shard lr_max",
    "self_referential_titans": _SELF_REFERENTIAL,
    "continuum": _CONTINUUM,
    "hope": f"{_SELF_REFERENTIAL} {_CONTINUUM}",
    "gam": "slots",
}
_TITANS = {"lmm": "rule", "mac": "rule combine", "mag": "rule combine", "mal": "rule"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """The neural memory of the blocks that have one; docs/blocks.md says which reads what.

    Args:
        rule: its row of `memjax.miras.zoo`, one of the deep memories and TTT's; blocks that bear
            the name of one (`pattern=("atlas",)`) take that.
        heads: number of memories side by side; None takes the heads of the model.
        depth, expansion, norm, residual: the memory network, see `memjax.miras.mlp`; None takes
            what the rule has, and a rule that fixes one takes nothing else.
        momentum, decay: False leaves it out of the rule "titans"; None takes what the rule has.
        chunk: tokens between two updates of the weights that gradients are taken at; None takes
            what the rule has: 64, for TTT 16, for LaCT and TNT 2048.
        window, degree: tokens that are learned together and degree of the features, for the rules
            that have them: ATLAS and its kin.
        memories, active: of the mixer "mom": memories that are routed to, and how many a token
            uses.
        balance: of "mom": coefficient of the loss that spreads tokens over the memories.
        local_chunks, shard: of the mixer "tnt", see `layers.TNTMemory`; its `chunk` is `chunk`.
        slots: of the mixer "gam".
        periods: of the mixers "continuum" and "hope": tokens between two steps of each level.
        projection_chunk: of the mixers "self_referential_titans" and "hope": the chunk of the
            memories that give keys, values and gates; None takes `chunk`.
        lr_max: the largest inner learning rate.
        continuum_lr_max: that of the levels of "continuum" and "hope", of the mean over a period.
        combine: how MAC and MAG join attention and memory: "gate", "product" or "sum".
        value_dim: dimension of the values of a head, for the matrix memories; None takes what each
            paper has.
        negative_eigenvalues: lr up to 2 in the delta family, see `layers.gates.Gating`.
    """

    rule: str = "titans"
    heads: int | None = None
    depth: int | None = None
    expansion: int | None = None
    norm: bool | None = None
    residual: bool | None = None
    momentum: bool | None = None
    decay: bool | None = None
    chunk: int | None = None
    window: int = 4
    degree: int = 2
    memories: int = 4
    active: int = 2
    balance: float | int = 0.01
    local_chunks: tuple[int, ...] = (8, 16)
    shard: int = 2048
    slots: int = 512
    periods: tuple[int, ...] = (512, 2048)
    projection_chunk: int | None = None
    lr_max: float | int = 0.1
    continuum_lr_max: float | int = 1.0
    combine: str = "gate"
    value_dim: int | None = None
    negative_eigenvalues: bool = False

    def __post_init__(self):
        _at_least(
            self,
            "memory.",
            1,
            ("window", "degree", "memories", "active", "shard", "slots"),
        )
        sizes = ("heads", "depth", "expansion", "chunk", "value_dim", "projection_chunk")
        _at_least(self, "memory.", 1, sizes, optional=True)
        self._check_sizes()
        if not 0 <= self.balance < math.inf:
            raise ValueError(
                f"memory.balance must be a finite number of at least 0, got {self.balance!r}"
            )
        for name in ("norm", "residual", "momentum", "decay"):
            if getattr(self, name) not in (True, False, None):
                raise ValueError(
                    f"memory.{name} must be True, False or None, got {getattr(self, name)!r}"
                )
        if not isinstance(self.negative_eigenvalues, bool):
            raise ValueError(
                "memory.negative_eigenvalues must be True or False, got "
                f"{self.negative_eigenvalues!r}"
            )
        for name in ("lr_max", "continuum_lr_max"):
            checks.real(f"memory.{name}", getattr(self, name), above=0.0)
        for name, valid in (("rule", RULES), ("combine", WAYS)):
            value = getattr(self, name)
            if name == "rule" and value not in valid and value in _READS:
                raise ValueError(f"memory.rule {value!r} is a block of its own: name it in pattern")
            if value not in valid:
                raise ValueError(f"unknown memory.{name} {value!r}; {nearest(str(value), valid)}")
        self.build()

    def _check_sizes(self):
        """Raises ValueError where the sizes of "mom", "tnt" or "continuum" do not fit."""
        if self.active > self.memories:
            raise ValueError(
                f"memory.active {self.active} must be at most memory.memories {self.memories}"
            )
        chunks = self.local_chunks
        if not _positive_integers(chunks):
            raise ValueError(
                "memory.local_chunks must be a tuple of integers of at least 1, () for no local "
                f"memory, got {chunks!r}"
            )
        if not _positive_integers(self.periods) or not self.periods:
            raise ValueError(
                "memory.periods must be a tuple of integers of at least 1, one for each level, got "
                f"{self.periods!r}"
            )
        if self.projection_chunk is not None:
            pair = (self.chunk or mixers.HOPE_CHUNK, self.projection_chunk)
            if max(pair) % min(pair):
                raise ValueError(
                    f"of memory.chunk {pair[0]} and memory.projection_chunk {pair[1]} one must be "
                    "a multiple of the other"
                )
        if any(self.shard % size for size in chunks):
            raise ValueError(
                f"memory.shard {self.shard} must be a multiple of each of memory.local_chunks "
                f"{chunks}"
            )

    def build(self) -> miras.Rule:
        """The rule.

        Raises:
            ValueError: a field that this rule does not have, or a value that it does not take.
        """
        make = RULES[self.rule]
        options = inspect.signature(make).parameters
        given = {name: getattr(self, name) for name in ("chunk", "window", "degree")}
        given = {
            name: value for name, value in given.items() if name in options and value is not None
        }
        for name in NETWORK:
            if getattr(self, name) is None:
                continue
            if name not in options:
                raise ValueError(f"memory.{name} is fixed by the rule {self.rule}: set it to None")
            given[name] = getattr(self, name)
        return make(**given)

    def of_rule(self, rule: str) -> "MemoryConfig":
        """The same with another rule; what that one fixes of its network is left out.

        Args:
            rule: a name of `RULES`.
        """
        known = inspect.signature(RULES[rule]).parameters
        return dataclasses.replace(
            self, rule=rule, **{name: None for name in NETWORK if name not in known}
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "MemoryConfig":
        """The configuration that `to_dict` wrote; ValueError on an unknown key.

        Args:
            values: the fields; the numbers of `local_chunks` and `periods` may stand in one string,
                "8,16".
        """
        values = dict(values)
        for name in ("local_chunks", "periods"):
            if name in values:
                values[name] = _numbers(values[name])
        return _from_dict(cls, "memory.", values)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data."""
        return _plain(self)


def memory_fields(block: str, memory: MemoryConfig) -> frozenset[str] | None:
    """Which fields of `memory` a block reads; it does not look at the others.

    Args:
        block: a name of `memjax.models.mixers`.
        memory: its `rule` counts, for the blocks that take any.

    Returns:
        Names of fields; None for a block that memjax does not have itself.
    """
    if block in _READS:
        return frozenset(_READS[block].split())
    named = block in RULES
    if not named and block not in _TITANS:
        return None
    known = inspect.signature(RULES[block if named else memory.rule]).parameters
    taken = {name for name in (*NETWORK, "chunk", "window", "degree") if name in known}
    return frozenset({"heads", "lr_max", *taken, *("" if named else _TITANS[block]).split()})


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModelConfig:
    """A language model: an embedding, `layers` blocks, a norm and a head.

    Args:
        vocab: number of token ids.
        dim: model dimension.
        layers: number of blocks, a multiple of the length of `pattern`.
        heads: heads of every attention (and of every memory that does not say otherwise).
        pattern: names of the mixers (see `memjax.models.mixers`) of consecutive blocks, repeated.
        feed_forward: name of the feed-forward layer, or one for each name in `pattern`.
        hidden: hidden units of that layer; None: 8/3 dim, rounded up to a multiple of 128.
        head_dim: dimension of a head; None: dim / heads.
        kv_heads: heads of keys and values; None: `heads`.
        qk_norm: normalise queries and keys of attention.
        rope_base: base of the rotary positions.
        tied: use the embedding as the head.
        context: tokens that full attention can look back on; the length of a training row.
        window: tokens that sliding-window attention looks back on.
        sinks: first tokens of the document that such attention sees besides.
        segment: tokens that MAC reads at once.
        persistent: learned tokens in front of every segment or window of MAC, MAG and MAL, and of
            what the memory reads in `lmm` and the blocks that bear a rule's name.
        conv: width of the convolutions in front of a memory; 0: none.
        memory: the neural memory.
        remat: what the backward pass computes again instead of keeping it: "none", "full" (all
            inside every repeat of the pattern, but for the memory between segments of MAC and its
            output) or "dots" (all but products with weights).
        dtype: of the computation, "bfloat16" or "float32". Parameters and logits are fp32.

    Raises:
        ValueError: a field that is out of range, names nothing known, or contradicts another.
    """

    vocab: int
    dim: int
    layers: int
    heads: int
    pattern: tuple[str, ...] = ("transformer",)
    feed_forward: str | tuple[str, ...] = "swiglu"
    hidden: int | None = None
    head_dim: int | None = None
    kv_heads: int | None = None
    qk_norm: bool = False
    rope_base: float | int = 10000.0
    tied: bool = True
    context: int = 4096
    window: int = 512
    sinks: int = 0
    segment: int = 512
    persistent: int = 16
    conv: int = 4
    memory: MemoryConfig = dataclasses.field(default_factory=MemoryConfig)
    remat: str = "none"
    dtype: str = "bfloat16"

    def __post_init__(self):
        _at_least(self, "", 1, ("vocab", "dim", "layers", "heads"))
        _at_least(self, "", 1, ("context", "window", "segment"))
        _at_least(self, "", 0, ("sinks", "persistent", "conv"))
        _at_least(self, "", 1, ("hidden", "head_dim", "kv_heads"), optional=True)
        if not isinstance(self.rope_base, int | float) or self.rope_base <= 1:
            raise ValueError(f"rope_base must be a number above 1, got {self.rope_base!r}")
        for name in ("tied", "qk_norm"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name, valid in (("remat", REMAT), ("dtype", DTYPES)):
            value = getattr(self, name)
            if value not in valid:
                raise ValueError(f"unknown {name} {value!r}; {nearest(str(value), valid)}")
        if not isinstance(self.memory, MemoryConfig):
            raise ValueError(
                f"memory must be a MemoryConfig, got {self.memory!r}: write MemoryConfig(rule=...),"
                " or LanguageModelConfig.from_dict(...) for plain data"
            )
        self._check_blocks()
        if self.head_dim is None and self.dim % self.heads:
            raise ValueError(
                f"dim {self.dim} must be a multiple of heads {self.heads}; or set head_dim"
            )
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} must be a multiple of kv_heads {self.kv_heads}")

    def _check_blocks(self):
        if not isinstance(self.pattern, tuple) or not self.pattern:
            raise ValueError(
                f"pattern must be a tuple of at least one mixer name, got {self.pattern!r}"
            )
        for name in self.pattern:
            if name in RULES and name not in mixers.registry.names():
                raise ValueError(
                    f"unknown mixer {name!r}: it is a rule, of the blocks 'lmm', 'mac', 'mag' and "
                    f"'mal' with memory.rule={name!r}"
                )
            mixers.registry.check(name)
        if self.layers % len(self.pattern):
            raise ValueError(
                f"layers {self.layers} must be a multiple of the {len(self.pattern)} names in"
                f" pattern {self.pattern}"
            )
        if not isinstance(self.feed_forward, str) and (
            not isinstance(self.feed_forward, tuple) or len(self.feed_forward) != len(self.pattern)
        ):
            raise ValueError(
                f"feed_forward must be a name, or a tuple with one for each of the"
                f" {len(self.pattern)} names in pattern, got {self.feed_forward!r}"
            )
        for name in self.feed_forwards:
            feed_forwards.registry.check(name)
        self._check_network()

    def _check_network(self):
        """Raises ValueError where the memory's network is given, and every memory fixes its own."""
        reads = {name: memory_fields(name, self.memory) for name in dict.fromkeys(self.pattern)}
        for field in NETWORK:
            given = getattr(self.memory, field) is not None
            if not given or any(fields is None or field in fields for fields in reads.values()):
                continue
            deep = [name for name, fields in reads.items() if fields & {"lr_max", "periods"}]
            if deep:
                raise ValueError(
                    f"pattern has the block {deep[0]!r}: memory.{field} is fixed there: set it to "
                    "None"
                )

    @property
    def repeats(self) -> int:
        """How many times the pattern is repeated: the length of the scan over layers."""
        return self.layers // len(self.pattern)

    @property
    def feed_forwards(self) -> tuple[str, ...]:
        """The name of the feed-forward layer for each name in `pattern`."""
        if isinstance(self.feed_forward, str):
            return (self.feed_forward,) * len(self.pattern)
        return self.feed_forward

    @property
    def hidden_dim(self) -> int:
        """Hidden units of the feed-forward layer."""
        if self.hidden is not None:
            return self.hidden
        return -(-8 * self.dim // (3 * 128)) * 128

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LanguageModelConfig":
        """The configuration that `to_dict` wrote, or that a file gives; lists count as tuples.

        Args:
            values: the fields, `memory` as a mapping of its own; the names of `pattern` and
                `feed_forward` may stand in one string, "mac,transformer".

        Raises:
            ValueError: an unknown key (the message names the nearest valid ones), a missing one, or
                a field that does not do.
        """
        values = dict(values)
        if isinstance(values.get("memory"), Mapping):
            values["memory"] = MemoryConfig.from_dict(values["memory"])
        for name in ("pattern", "feed_forward"):
            if name in values:
                values[name] = _split(values[name])
        if isinstance(values.get("pattern"), str):
            values["pattern"] = (values["pattern"],)
        return _from_dict(cls, "", values)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data: numbers, strings, lists and one nested dict."""
        return _plain(self)


def _at_least(
    config: Any, prefix: str, least: int, names: tuple[str, ...], optional: bool = False
) -> None:
    for name in names:
        value = getattr(config, name)
        if value is None and optional:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            extra = " or None" if optional else ""
            raise ValueError(
                f"{prefix}{name} must be an integer of at least {least}{extra}, got {value!r}"
            )


def _split(names: Any) -> Any:
    """Names in a string with commas as a tuple; a single name is left as it is."""
    if isinstance(names, str) and "," in names:
        return tuple(name.strip() for name in names.split(","))
    if isinstance(names, tuple | list):  # a flag gives ("mac,transformer",)
        split = [_split(name) for name in names]
        return tuple(x for name in split for x in (name if isinstance(name, tuple) else (name,)))
    return names


def _positive_integers(values: Any) -> bool:
    """Whether this is a tuple of them, or an empty one."""
    return isinstance(values, tuple) and all(
        isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in values
    )


def _numbers(given: Any) -> Any:
    """Integers, some of them in strings with commas, as a tuple; what is none is left as it is."""
    if isinstance(given, bool) or not isinstance(given, int | str | tuple | list):
        return given
    found = []
    for part in given if isinstance(given, tuple | list) else [given]:
        words = part.split(",") if isinstance(part, str) else [part]
        words = [word.strip() if isinstance(word, str) else word for word in words]
        found += [
            int(word) if isinstance(word, str) and word.isdecimal() else word
            for word in words
            if word != ""
        ]
    return tuple(found)


def _from_dict(cls: type, prefix: str, values: Mapping[str, Any]) -> Any:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            raise ValueError(f"unknown key {prefix}{key}; {nearest(str(key), tuple(fields))}")
    for name, field in fields.items():
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and values.get(name) is None:
            raise ValueError(f"missing key {prefix}{name} of {cls.__name__}")
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _plain(config: Any) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return _plain(value)
        return list(value) if isinstance(value, tuple) else value

    return {field.name: plain(getattr(config, field.name)) for field in dataclasses.fields(config)}
