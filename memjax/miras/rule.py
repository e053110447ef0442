"""A rule names a memory by its four choices; a state is what it holds while it reads a sequence."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from memjax.miras import checks
from memjax.miras.bias import Bias
from memjax.miras.learner import Learner
from memjax.miras.precision import accumulation_dtype
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


def start(
    rule: Rule,
    weights: Weights,
    batch: int,
    heads: int | None = None,
    *,
    dims: tuple[int, int] | None = None,
) -> State:
    """The state before the first token: every row holds W_0 (0 for `normal_equations()`).

    Args:
        rule: the memory.
        weights: from `rule.init`, with or without a leading heads axis.
        batch: number of rows.
        heads: number of heads that share `weights`, where these have no heads axis (default 1).
        dims: (K, V), the dimensions of keys and values. Only the window of `omega()` needs them,
            and only of a structure whose weights are the same for several.
    Returns:
        A state in fp32 (fp64 where the weights are).
    Raises:
        ValueError: weights that are not this rule's at `dims`, `heads` that contradicts them, or
            no `dims` where they are needed. Without `dims`, the forms find weights of another rule.
    """
    checks.whole("batch", batch)
    if heads is not None:
        checks.whole("heads", heads)
    axes = weights.fast[0].ndim - 2
    if axes not in (0, 1):
        raise ValueError(
            f"weights have {axes} leading axes: rule.init gives none, a heads axis makes one"
        )
    if axes == 1 and heads not in (None, weights.fast[0].shape[0]):
        raise ValueError(f"heads {heads} contradicts weights for {weights.fast[0].shape[0]} heads")
    if axes == 0:
        copies = heads or 1
        weights = jax.tree.map(lambda w: jnp.broadcast_to(w, (copies, *w.shape)), weights)
    weights = jax.tree.map(lambda w: w.astype(accumulation_dtype(w.dtype)), weights)
    if dims is not None:
        fits(rule, *weights, *dims)
    fast = weights.fast
    if rule.learner.solves:
        fast = jax.tree.map(jnp.zeros_like, fast)
    begin = Begin(fast, rule.learner.start(fast))
    return _at(rule, begin, weights.slow, batch)._replace(pairs=_pairs(rule, weights, batch, dims))


def fits(
    rule: Rule, fast: tuple[Array, ...], slow: dict[str, Array], dim_k: int, dim_v: int
) -> None:
    """Raises ValueError where weights are not the rule's for keys and values of these dimensions.

    Args:
        rule: the memory.
        fast: [..., I, O] each.
        slow: [H, ...] each.
        dim_k, dim_v: K and V.
    """
    shapes = _of_a_head(fast, slow)
    try:
        plain = _drawn(rule, dim_k, dim_v)
    except ValueError as error:
        _name_dims(rule, shapes, dim_k, dim_v, error)
        raise
    if len(plain.fast) != len(fast) or plain.slow.keys() != slow.keys():
        raise ValueError(
            f"there are {len(fast)} fast and {sorted(slow)} slow weights, but {rule.structure} has "
            f"{len(plain.fast)} and {sorted(plain.slow)}: use rule.init and miras.start of this "
            "rule"
        )
    if _shapes(shapes) != _shapes(plain):
        _name_dims(rule, shapes, dim_k, dim_v)
        of = "fast" if _shapes(shapes.fast) != _shapes(plain.fast) else "slow"
        raise ValueError(
            f"the {of} weights are {_shapes(getattr(shapes, of))}, but {rule.structure} has "
            f"{_shapes(getattr(plain, of))} for keys of dim {dim_k} and values of dim {dim_v}: use "
            "rule.init and miras.start of this rule"
        )


def reads(rule: Rule, fast: tuple[Array, ...], slow: dict[str, Array], dim_k: int) -> None:
    """Raises ValueError where weights (see `fits`) are not the rule's for queries of this dim."""
    shapes = _of_a_head(fast, slow)
    try:
        dim_v = _answered(rule, shapes, dim_k)
    except (TypeError, ValueError) as error:
        if dims := _dims(rule, shapes):
            raise ValueError(f"the memory has keys of dim {dims[0]}, but q has {dim_k}") from error
        raise ValueError(
            f"the fast weights are {_shapes(shapes.fast)}, and {rule.structure} cannot read q of "
            f"dim {dim_k} with them: use a state of miras.start with this rule"
        ) from error
    fits(rule, fast, slow, dim_k, dim_v)


def _of_a_head(fast: tuple[Array, ...], slow: dict[str, Array]) -> Weights:
    """Shapes and dtypes of one head's weights."""
    return Weights(
        tuple(jax.ShapeDtypeStruct(w.shape[-2:], w.dtype) for w in fast),
        {name: jax.ShapeDtypeStruct(w.shape[1:], w.dtype) for name, w in slow.items()},
    )


def _shapes(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x.shape, tree)


def _drawn(rule: Rule, dim_k: int, dim_v: int) -> Weights:
    """Shapes of `rule.init`."""
    return jax.eval_shape(lambda: rule.init(jax.random.key(0), dim_k, dim_v))


def _answered(rule: Rule, shapes: Weights, dim_k: int) -> int:
    """Dimension of what a head answers to a key of this dimension."""
    key = jax.ShapeDtypeStruct((1, dim_k), shapes.fast[0].dtype)
    return jax.eval_shape(rule.structure.apply, shapes, key).shape[-1]


def _dims(rule: Rule, shapes: Weights) -> tuple[int, int] | None:
    """The dimensions of keys and values that one head's weights are for, if it can only be these.

    Where a form is called, keys and values tell; these are for what has to be made before, and for
    messages.
    """
    sizes, found = shapes.fast[0].shape, []
    for dim_k in range(1, max(sizes) + 1):
        try:
            if rule.structure.inputs(dim_k) not in sizes:
                continue
            dim_v = _answered(rule, shapes, dim_k)
            if _shapes(_drawn(rule, dim_k, dim_v)) == _shapes(shapes):
                found.append((dim_k, dim_v))
        except (TypeError, ValueError):
            continue
        if len(found) > 1:
            return None
    return found[0] if found else None


def _name_dims(
    rule: Rule, shapes: Weights, dim_k: int, dim_v: int, error: ValueError | None = None
) -> None:
    """Raises ValueError where weights are the rule's, but certainly for other dimensions."""
    dims = _dims(rule, shapes)
    if dims not in (None, (dim_k, dim_v)):
        raise ValueError(
            f"the memory maps dim {dims[0]} to {dims[1]}, but k has {dim_k} and v {dim_v}"
        ) from error


def begin_from(rule: Rule, state: State, batch: int) -> State:
    """Makes what `state` (of one row) has learned the memory that every document starts from.

    Used for a fixed prefix, such as Titans' persistent tokens: the memory reads it once, and the
    chunk in progress ends with it, for a learner that acts at the ends of chunks too.

    Args:
        rule: the memory.
        state: the state of a single row.
        batch: number of rows of the new state.
    Raises:
        ValueError: a state of more than one row, or a batch below 1.
    """
    checks.whole("batch", batch)
    if state.place.shape[0] != 1:
        raise ValueError(f"begin_from takes a state of 1 row, got {state.place.shape[0]}")
    begin = Begin(state.weights, state.momentum)
    if rule.learner.closes or rule.retention.closes:
        inside = state.place[0] > 0
        closed = close_chunk(rule, state.begin, state.began, *begin)
        begin = jax.tree.map(lambda new, old: jnp.where(inside, new, old), Begin(*closed), begin)
    begin = jax.tree.map(lambda w: w[0], begin)
    pairs = jax.tree.map(lambda x: jnp.zeros((batch, *x.shape[1:]), x.dtype), state.pairs)
    return _at(rule, begin, state.slow, batch)._replace(pairs=pairs)


def close_chunk(
    rule: Rule,
    begin: Begin,
    base: PyTree,
    weights: PyTree,
    velocity: PyTree,
    scale: Float[Array, "B H"] | None = None,
) -> tuple[PyTree, PyTree]:
    """The end of a chunk: (weights, momentum) that the next one begins with.

    Args:
        rule: the memory.
        begin: what a document starts from.
        base, weights, velocity: as in `State`, after the chunk's last token.
        scale: `Gates.scale` of its last token.
    """
    weights = scaled(base, weights, scale)
    if rule.learner.closes:
        velocity, change = jax.vmap(jax.vmap(rule.learner.close))(velocity)
        weights = jax.tree.map(jnp.add, weights, change)
    return jax.tree.map(rule.retention.close, weights, begin.weights), velocity


def scaled(base: PyTree, weights: PyTree, scale: Float[Array, "*N"] | None) -> PyTree:
    """`base + scale (weights - base)`: the update of a chunk as seen through `Gates.scale`."""
    if scale is None:
        return weights
    return jax.tree.map(lambda b, w: b + scale[..., None, None] * (w - b), base, weights)


def _pairs(
    rule: Rule, weights: Weights, batch: int, dims: tuple[int, int] | None
) -> Pairs | tuple[()]:
    """An empty window, for weights [H, ...]."""
    count = rule.learner.window - 1
    if not count:
        return ()
    dims = dims or _dims(rule, _of_a_head(*weights))
    if dims is None:
        raise ValueError(
            f"{rule.learner} keeps keys and values, whose dimensions these weights of "
            f"{rule.structure} do not tell: give miras.start dims=(K, V)"
        )
    rows, dtype = (batch, weights.fast[0].shape[0], count), weights.fast[0].dtype
    return Pairs(
        jnp.zeros((*rows, dims[0]), dtype),
        jnp.zeros((*rows, dims[1]), dtype),
        jnp.ones(rows, dtype) if rule.bias.needs_threshold else None,
        jnp.zeros((batch, count), bool),
    )


def _at(rule: Rule, begin: Begin, slow: dict[str, Array], batch: int) -> State:
    """Every row at the beginning of a document, nothing seen."""
    rows = jax.tree.map(lambda w: jnp.broadcast_to(w, (batch, *w.shape)), begin)
    return State(
        base=rows.weights if rule.chunk > 1 else (),
        weights=rows.weights,
        momentum=rows.momentum,
        place=jnp.zeros(batch, jnp.int32),
        segment=jnp.full(batch, -1, jnp.int32),
        begin=begin,
        slow=slow,
    )
