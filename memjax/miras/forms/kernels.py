"""Where a Pallas kernel computes what a form does, and the calls of it.

The kernels take log gates: a gate below `SMALLEST` counts as that, and has no derivative there.
"""

import jax
import jax.numpy as jnp

from memjax import sharding
from memjax.miras import features, kinds
from memjax.miras.bias import dot, l2
from memjax.miras.forms import linear
from memjax.miras.learner import gd, momentum
from memjax.miras.retention import decay, none
from memjax.miras.rule import Gates, Rule, State
from memjax.miras.structure import mlp
from memjax.typing import Array, Bool, Float
from pallas_kernels import dispatch
from pallas_kernels.deep_memory import deep_memory, fits
from pallas_kernels.delta_rule import delta_rule
from pallas_kernels.linear_attention import linear_attention

SMALLEST = 1e-13  # e^-30


def wanted(
    rule: Rule, state: State, q: Array, v: Array, gates: Gates, implementation: str | None, *,
    loss: bool,
) -> bool:  # fmt: skip
    """Whether to run a kernel.

    Args:
        implementation: "xla" = no; None = on TPU, where one fits; "pallas" = yes.
        loss: whether the losses are wanted.
    Raises:
        ValueError: "pallas" where no kernel fits, with the reason; a deep memory on a mesh whose
            sequence axis is split; or another word.
    """
    if implementation not in (None, "pallas", "xla"):
        raise ValueError(f'implementation {implementation!r} must be None, "pallas" or "xla"')
    if implementation == "xla" or (implementation is None and sharding.platform() != "tpu"):
        return False
    reason = _misfit(rule, state, q, v, gates, loss)
    if reason is None and not linear.fits(rule, gates) and sharding.devices_along("time") > 1:
        raise ValueError(
            "a deep memory goes through its tokens one chunk after another, and no device can begin"
            " before the one before it has ended: give the mesh sequence=1, and more to data, fsdp"
            ' or tensor; implementation="xla" gathers the tokens on every device'
        )
    if reason is not None and implementation == "pallas":
        raise ValueError(f'{reason}; use implementation="xla" or None')
    return reason is None


def _misfit(rule: Rule, state: State, q, v, gates: Gates, loss: bool) -> str | None:
    """Why no kernel computes this call, or None."""
    if q.dtype not in (jnp.float32, jnp.bfloat16) or state.weights[0].dtype != jnp.float32:
        return f"kernels take float32 and bfloat16 and states of float32, not {q.dtype}"
    if q.dtype != v.dtype:  # k is made like them
        return f"a kernel takes q and v of one dtype, not {q.dtype} and {v.dtype}"
    if q.shape[1] == 1:
        return "a kernel is for sequences, not for one token"
    closed = linear.fits(rule, gates)
    if closed and rule.learner.exchanges:
        return f"there is no kernel for {rule.learner}"
    if closed and loss and isinstance(rule.bias, dot):
        return "the kernel of linear attention has no losses"
    if not closed and (reason := _not_deep(rule, gates)):
        return reason
    dims = state.weights[0].shape[-2], v.shape[-1]
    heads, along = q.shape[2], sharding.devices_along("heads")
    heads = heads if heads % along else heads // along  # of a device
    try:
        dispatch.heads_of_step(heads, dims, heads)
    except ValueError as error:
        return str(error).partition(";")[0]
    if closed:
        op = "delta_rule" if isinstance(rule.bias, l2) else "linear_attention"
        if not dispatch.fits(op, heads, dims, gates.retain, q.dtype):
            return f"a step of heads of {dims} in {q.dtype} may not fit in VMEM"
    maps = [w.shape[-2:] for w in state.weights]
    if not closed and not fits(maps, heads, rule.chunk, q.dtype):
        return f"a head of weights {maps} at chunk {rule.chunk} in {q.dtype} does not fit in VMEM"
    return None


def _not_deep(rule: Rule, gates: Gates) -> str | None:
    """Why the kernel of the deep memory does not compute this rule."""
    structure, retention, learner = rule.structure, rule.retention, rule.learner
    deep = kinds.keeps(structure, (mlp,), "forward") and structure.depth == 2
    if not deep or structure.features is not None:
        return f"there is no kernel for {structure}, but for mlp(depth=2) without features"
    if not kinds.keeps(rule.bias, (l2,), "loss", "signal"):
        return f"the kernel of the deep memory has the bias l2(), not {rule.bias}"
    if type(learner) not in (gd, momentum):
        return f"there is no kernel for {learner}, but for gd() and momentum()"
    if type(retention) not in (decay, none) or retention.to_initial or retention.first:
        return f"there is no kernel for {retention}"
    if rule.read == "chunk" or gates.scale is not None:
        return 'the kernel of the deep memory has no gates.scale and does not read="chunk"'
    if rule.chunk < 16 or rule.chunk & (rule.chunk - 1):
        return f"the kernel wants a chunk that is a power of two of at least 16, not {rule.chunk}"
    return None


def _log(gate):
    return None if gate is None else jnp.log(jnp.maximum(gate, SMALLEST))


def affine(
    rule: Rule, state: State, q: Array, k: Array, v: Array, gates: Gates,
    starts: Bool[Array, "B T"] | None, *, loss: bool, unit: bool,
    interpret: bool,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"] | None, State]:  # fmt: skip
    """A rule that the closed form computes (`linear.fits`): (y, loss or None, state).

    Args:
        starts: the tokens that documents begin with; None = none.
        loss: whether the losses are wanted.
        unit: whether q and k are to be divided by their norms first.
        interpret: for tests.
    """
    (weights,), (begin,) = state.weights, state.begin.weights
    k = k.astype(q.dtype)

    def mapped(x):
        over = jax.vmap(rule.structure.mapped, in_axes=(0, 1), out_axes=1)
        rows = jax.vmap(over, in_axes=(None, 0))(state.slow, x.astype(weights.dtype))
        return rows.astype(q.dtype)

    corrects = isinstance(rule.bias, l2)
    if unit and not (corrects and rule.structure.features is None):
        q, k, unit = features.unit(q), features.unit(k), False
    if rule.structure.features is not None:
        q, k = mapped(q), mapped(k)
    options = {
        "initial": None if starts is None else begin,
        "starts": starts,
        "read": rule.read,
        "implementation": "pallas",
        "interpret": interpret,
    }
    losses, tokens = None, (q, k, v, gates.lr, _log(gates.retain))
    if corrects:
        y, losses, weights = delta_rule(
            *tokens, weights, decay_first=rule.retention.first, surprise=loss,
            unit_eps=features.UNIT_EPSILON if unit else None, **options,
        )  # fmt: skip
    else:
        y, weights = linear_attention(*tokens, weights, **options)
    return y, losses, state._replace(base=(weights,), weights=(weights,))


def deep(
    rule: Rule, state: State, q: Array, k: Array, v: Array, gates: Gates,
    starts: Bool[Array, "B N"] | None, *, unit: bool, interpret: bool,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"], State]:  # fmt: skip
    """Whole chunks of a deep memory, from a chunk's start on: (y, loss, state).

    Args:
        starts: the chunks that documents begin with; None = none.
        unit: whether q and k are to be divided by their norms first.
        interpret: for tests.
    """
    structure, learns = rule.structure, rule.learner.needs_momentum
    norm = (state.slow["scale"], state.slow["bias"]) if structure.norm else None
    begin = state.begin.weights + (state.begin.momentum if learns else ())
    y, losses, weights, velocity = deep_memory(
        q, k.astype(q.dtype), v, gates.lr, _log(gates.momentum), _log(gates.retain),
        state.weights, state.momentum if learns else None, norm,
        chunk=rule.chunk,
        initial=None if starts is None else begin,
        starts=starts,
        activation=structure.activation,
        residual=structure.residual,
        read=rule.read,
        unit_eps=features.UNIT_EPSILON if unit else None,
        implementation="pallas",
        interpret=interpret,
    )  # fmt: skip
    after = state._replace(base=weights, weights=weights, momentum=velocity if learns else ())
    return y, losses, after
