"""A rule names a memory by its four choices; a state is what it holds while it reads a sequence."""

import dataclasses
from typing import NamedTuple

from memjax import checks
from memjax.miras.bias import Bias
from memjax.miras.learner import Learner
from memjax.miras.retention import Retention
from memjax.miras.structure import Structure, Weights, least_squares
from memjax.typing import Array, Bool, Float, Int, Key, PyTree


class Gates(NamedTuple):
    """Data-dependent rates, one per token and head.

    Attributes:
        lr: theta, the inner learning rate, > 0, [B, T, H].
        momentum: eta, 0 = none, [B, T, H]; read by `momentum()`, `muon()`, `delta_momentum()`,
            `chunk_muon()`, and `omega()` over one of them.
        retain: a = 1 - alpha, 1 = keep everything, [B, T, H], or per key channel [B, T, H, K];
            read by `decay()`, `lq()`, `simplex()` and `elastic_net()`; None = 1.
        scale: c, the factor on the chunk's update as token t sees it: the memory read is
            `W' + c_t (W_t - W')`, with W' the weights at the chunk's start, and the chunk's last
            factor is the one that stays (TTT's learned rate by position), [B, T, H]; None = 1.
            `exchange()` and `normal_equations()` refuse it.
        threshold: d or D of the biases that have one, `huber()` and `robust()`, > 0, [B, T, H].
        window: w_{t,i}, how much of the gradients of itself and of the tokens before it a token
            takes under `learner=omega(c)`: of itself first, [B, T, H, c]; None = 1.
        write: the key that values are written along under `learner=exchange()`, whose lr is per
            key channel as well, [B, T, H, K].
    """

    lr: Float[Array, "B T H *K"]
    momentum: Float[Array, "B T H"] | None = None
    retain: Float[Array, "B T H *K"] | None = None
    scale: Float[Array, "B T H"] | None = None
    threshold: Float[Array, "B T H"] | None = None
    window: Float[Array, "B T H W"] | None = None
    write: Float[Array, "B T H K"] | None = None


class Pairs(NamedTuple):
    """The last tokens of a document, which `learner=omega(c)` learns again: c - 1 of them.

    Attributes:
        k, v: keys and values, [B, H, c - 1, K] and [B, H, c - 1, V]; the last token is the last.
        threshold: as in `Gates`, [B, H, c - 1], or None.
        live: whether there was such a token in the document, [B, c - 1]; where there was none, k
            and v are 0, the threshold 1.
    """

    k: Float[Array, "B H N K"]
    v: Float[Array, "B H N V"]
    threshold: Float[Array, "B H N"] | None
    live: Bool[Array, "B N"]


class Begin(NamedTuple):
    """What every document starts from: fast weights and momentum, [H, ...] without batch axis."""

    weights: tuple[Array, ...]
    momentum: PyTree


class State(NamedTuple):
    """A memory between two calls: all that exact continuation needs.

    Attributes:
        base: W', the fast weights when the current chunk began, each [B, H, ...]; where the
            retention decays first, as the tokens since have left them. Where it has a link, this
            and `weights` are what it accumulates. () where chunks are of one token, as between
            two of them it is `weights`: ask `began`.
        weights: W_t, the fast weights now (inside a chunk: before `Gates.scale`), each [B, H, ...].
        momentum: S_t like the weights, or () for a learner without.
        place: place in its chunk of the next token, 0 to chunk - 1, [B].
        segment: document id of the last token, -1 when there was none, [B].
        begin: what a document starts from.
        slow: the structure's weights that do not learn at test time, each [H, ...].
        pairs: the window of `omega(c)`, or () for other learners and c = 1.
    """

    base: tuple[Array, ...]
    weights: tuple[Array, ...]
    momentum: PyTree
    place: Int[Array, " B"]
    segment: Int[Array, " B"]
    begin: Begin
    slow: dict[str, Array]
    pairs: Pairs | tuple[()] = ()

    @property
    def began(self) -> PyTree:
        """W', the fast weights when the current chunk began, held or not."""
        return self.base or self.weights


@dataclasses.dataclass(frozen=True)
class Rule:
    """A test-time memory: structure, bias, retention and learner, and when gradients are taken.

    Token by token, with W' the weights held when the token's chunk began:

        g_t = d/dW bias(M(k_t; W), v_t)  at W = W'        (decay first: at (prod a_m) W')
        S_t = e_t S_{t-1} - lr_t g_t                      (momentum; without: S_t = -lr_t g_t)
        W_t = a_t W_{t-1} + S_t
        y_t = M(q_t; W_t)                                 (read="before": W_{t-1}; "chunk": W')

    Other learners have another second line, and retentions with a link another third one.

    Args:
        structure: what the memory is: `vector()`, `matrix()`, `mlp(...)`, `gated_mlp(...)`.
        bias: what it minimises: `l2()`, `dot()`, `lp()`, `huber()`, `robust()`.
        retention: how it forgets: `decay()`, `none()`, `lq()`, `simplex()`, `elastic_net()`,
            `renormalise()`.
        learner: how it steps: `gd()`, `momentum()`, `omega(...)`, `muon()`, `chunk_muon()`,
            `delta_gd()`, `delta_momentum()`, `implicit()`, `exchange()`, `normal_equations()`.
        chunk: tokens that share their gradients' weights; semantic, 1 = fully online.
        read: "after" or "before" the token is written, or as the "chunk" began (LaCT).
    Raises:
        ValueError, TypeError: naming the argument that does not fit.
    Source: Miras (arXiv:2504.13173), the framework; Titans (arXiv:2501.00663), chunks.
    """

    structure: Structure
    bias: Bias
    retention: Retention
    learner: Learner
    chunk: int = 64
    read: str = "after"

    def __post_init__(self):
        for name, kind in (
            ("structure", Structure),
            ("bias", Bias),
            ("retention", Retention),
            ("learner", Learner),
        ):
            part = getattr(self, name)
            if not isinstance(part, kind):
                hint = f"; write {part.__name__}()" if isinstance(part, type) else ""
                raise TypeError(f"Rule {name} {part!r} is not a {kind.__name__}{hint}")
        checks.whole("Rule chunk", self.chunk)
        if self.read == "chunk" and (self.learner.solves or self.learner.exchanges):
            raise ValueError(
                f'Rule read "chunk" is not there for {self.learner}, which has chunks of one token:'
                ' use "before"'
            )
        if self.read not in ("after", "before", "chunk"):
            raise ValueError(f'Rule read {self.read!r} must be "after", "before" or "chunk"')
        if isinstance(self.structure, least_squares) and not self.learner.solves:
            raise ValueError(
                f"least_squares() has a ridge for normal_equations(), which {self.learner} does not"
                " read: use matrix()"
            )
        self.learner.check(self.structure, self.bias, self.retention, self.chunk)
        self.retention.check(self.structure)

    def init(self, key: Key, dim_k: int, dim_v: int) -> Weights:
        """Learned initial memory W_0, no batch axis; `jax.vmap` over keys adds a heads axis."""
        checks.whole("dim_k", dim_k)
        checks.whole("dim_v", dim_v)
        return self.structure.init(key, dim_k, dim_v)
