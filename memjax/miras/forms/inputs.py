"""What every form does to its arguments: checks and dtypes."""

import operator

import jax
import jax.numpy as jnp

from memjax.miras.fit import fits, shapes_of
from memjax.miras.precision import accumulation_dtype
from memjax.miras.rule import Gates, Rule, State
from memjax.typing import Array, Float, Int


def check(
    rule: Rule,
    state: State,
    q: Float[Array, "B T H K"] | None,
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    gates: Gates,
    segment_ids: Int[Array, "B T"] | None,
) -> tuple[State, Gates]:
    """Raises ValueError where an argument does not fit.

    Returns:
        (the state in its accumulation dtype, with its chunk's start: that may be one of a longer
        chunk, which its next token then ends; the gates in the state's dtype, `lr` as the learner's
        step sizes).
    """
    state = widened(state)
    for name, array in (("q", k if q is None else q), ("k", k), ("v", v)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} has dtype {array.dtype}: it must be floating-point")
    batch, heads = state.weights[0].shape[:2]
    if k.ndim != 4 or k.shape[0] != batch or k.shape[2] != heads:
        raise ValueError(
            f"k has shape {k.shape}, but the state is for [batch, time, heads, dim] with "
            f"batch {batch} and heads {heads}"
        )
    if k.shape[1] < 1:
        raise ValueError("the sequence is empty: time must be at least 1")
    if q is not None and q.shape != k.shape:
        raise ValueError(f"q has shape {q.shape} and k {k.shape}: they must be equal")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v has shape {v.shape} and k {k.shape}: batch, time, heads must be equal")
    fits(rule, state.weights, state.slow, k.shape[3], v.shape[3])
    momentum = jax.eval_shape(rule.learner.start, state.begin.weights)
    if shapes_of(momentum) != shapes_of(state.begin.momentum):
        raise ValueError(
            f"the state's momentum is not that of {rule.learner}: use a state of miras.start with "
            "this rule"
        )
    _check_loss(rule, v.shape[3], state.weights[0].dtype)
    for name, gate in gates._asdict().items():
        if (gate is None and name == "lr") or not (gate is None or hasattr(gate, "shape")):
            raise ValueError(f"gates.{name} must be an array, got {gate!r}")
    retain = rule.retention.factors(gates.retain)
    if rule.learner.needs_momentum and gates.momentum is None:
        raise ValueError(f"gates.momentum is None, but {rule.learner} needs it")
    if not rule.learner.needs_momentum and gates.momentum is not None:
        raise ValueError(f"gates.momentum was given, but {rule.learner} has no momentum")
    if rule.bias.needs_threshold != (gates.threshold is not None):
        raise ValueError(
            f"gates.threshold {'is None, but' if rule.bias.needs_threshold else 'was given, but'} "
            f"the rule's bias {rule.bias} {'needs' if rule.bias.needs_threshold else 'has no'} one"
        )
    window = rule.learner.window
    if gates.window is not None and (window == 1 or gates.window.shape != (*k.shape[:3], window)):
        raise ValueError(
            f"gates.window has shape {gates.window.shape}, but {rule.learner} learns a window of "
            f"{window}: " + (f"it must be {(*k.shape[:3], window)}" if window > 1 else "leave it")
        )
    if bool(state.pairs) != (window > 1) or (window > 1 and state.pairs.k.shape[2] != window - 1):
        raise ValueError(
            f"the state's window is not that of {rule.learner}: use a state of miras.start with "
            "this rule"
        )
    if window > 1 and (state.pairs.k.shape[-1], state.pairs.v.shape[-1]) != (
        dims := (k.shape[3], v.shape[3])
    ):
        raise ValueError(
            f"the state's window is for keys and values of dim {state.pairs.k.shape[-1]} and "
            f"{state.pairs.v.shape[-1]}, but k and v have {dims}: give miras.start dims={dims}"
        )
    if rule.learner.exchanges != (gates.write is not None):
        raise ValueError(
            f"gates.write {'is None' if rule.learner.exchanges else 'was given'}, but "
            f"{rule.learner} {'needs' if rule.learner.exchanges else 'has no'} one"
        )
    if (rule.learner.exchanges or rule.learner.solves) and gates.scale is not None:
        raise ValueError(f"gates.scale was given, but {rule.learner} does not read it")
    for name in ("lr", "momentum", "retain", "scale", "threshold", "write"):
        gate = getattr(gates, name)
        by_channel = name == "write" or (name == "lr" and rule.learner.exchanges)
        if gate is None or gate.shape == (k.shape if by_channel else k.shape[:3]):
            continue
        if by_channel:
            raise ValueError(f"gates.{name} has shape {gate.shape}, must be {k.shape}")
        if name == "retain" and rule.learner.solves:
            raise ValueError(f"gates.retain has shape {gate.shape}, must be {k.shape[:3]}")
        if name == "retain" and gate.shape == k.shape:
            if not rule.structure.channelwise:
                raise ValueError(
                    f"gates.retain is channel-wise, but {rule.structure} has no row per key "
                    "channel: use matrix(), mlp(depth=1), or a gate of shape [B, T, H]"
                )
            continue
        raise ValueError(f"gates.{name} has shape {gate.shape}, must be {k.shape[:3]}")
    if segment_ids is not None:
        if not jnp.issubdtype(getattr(segment_ids, "dtype", None), jnp.integer):
            raise ValueError(f"segment_ids must be an array of integers, got {segment_ids!r}")
        if segment_ids.shape != k.shape[:2]:
            raise ValueError(f"segment_ids has shape {segment_ids.shape}, must be {k.shape[:2]}")
    dtype = accumulation_dtype(state.weights[0].dtype)
    cast = [None if g is None else g.astype(dtype) for g in gates._replace(retain=retain)]
    gates = Gates(*cast)
    place = jnp.minimum(state.place, rule.chunk - 1)
    state = state._replace(base=state.began, place=place)
    return state, gates._replace(lr=rule.learner.rates(gates.lr, k))


def as_given(rule: Rule, given: State, state: State) -> State:
    """The `state` after a call, holding its chunk's start where the `given` one did.

    Where that one did not, but chunks are of more than one token, it has to from now on.
    """
    return state._replace(base=()) if rule.chunk == 1 and not given.base else state


def widened(state: State) -> State:
    """The state in its accumulation dtype, as after storage in a narrower one.

    Raises:
        ValueError: a part that it cannot hold, by name.
    """
    dtype = accumulation_dtype(state.weights[0].dtype)

    def wide(name):
        def cast(x):
            if x.dtype == dtype or x.dtype == bool:
                return x
            if not _holds(dtype, x.dtype):
                raise ValueError(
                    f"the state's {name} has dtype {x.dtype}, which {dtype}, the dtype that its "
                    f"weights of {state.weights[0].dtype} are computed in, cannot hold: cast it"
                )
            return x.astype(dtype)

        return jax.tree.map(cast, operator.attrgetter(name)(state))

    begin = state.begin._replace(weights=wide("begin.weights"), momentum=wide("begin.momentum"))
    names = ("base", "weights", "momentum", "slow", "pairs")
    return state._replace(begin=begin, **{name: wide(name) for name in names})


def _holds(dtype: jnp.dtype, other: jnp.dtype) -> bool:
    """Whether every number of the `other` dtype is one of `dtype`."""
    return jnp.issubdtype(other, jnp.floating) and jnp.promote_types(dtype, other) == dtype


def _check_loss(rule: Rule, dim_v: int, dtype: jnp.dtype) -> None:
    """Raises ValueError where the bias's loss is not one number per token."""
    values, tokens = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((2, dim_v), (2,)))
    more = (tokens,) if rule.bias.needs_threshold else ()
    loss = jax.eval_shape(rule.bias.loss, values, values, *more)
    if loss.shape != tokens.shape:
        raise ValueError(
            f"the loss of {rule.bias} has shape {loss.shape} for answers and values of shape "
            f"{values.shape}: it must be {tokens.shape}, a number per token, such as a sum over "
            "axis=-1"
        )
