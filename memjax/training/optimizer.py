"""Optimisers by name: AdamW and Muon from optax, warm-up and cosine, clipping, decay masks."""

import jax
import optax

from memjax import sharding
from memjax.training.config import TrainConfig, nearest
from memjax.typing import PyTree

# Tables and small learned inputs: their rows are not multiplied with each other as a matrix is.
_NOT_MATRICES = ("vocab", "persistent", "conv")
OPTIMIZERS = ("adamw", "muon")


def learning_rate(config: TrainConfig) -> optax.Schedule:
    """Linear warm-up from 0, then a cosine to a fraction of the peak.

        lr(n) = lr n / warmup                                               n < warmup
        lr(n) = lr (f + (1 - f) (1 + cos(pi (n - warmup) / (steps - warmup))) / 2)   after

    with f = final_lr and n the number of steps already taken.

    Args:
      config: `lr`, `warmup`, `steps`, `final_lr` are read.

    Returns:
      A function of the step.
    """
    return optax.schedules.warmup_cosine_decay_schedule(
        init_value=0.0 if config.warmup else config.lr,
        peak_value=config.lr,
        warmup_steps=config.warmup,
        # optax needs a decay longer than the warm-up; a run that is all warm-up never reaches it.
        decay_steps=max(config.steps, config.warmup + 1),
        end_value=config.lr * config.final_lr,
    )


def _matrix(axes: tuple[str | None, ...]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The dimensions that are inputs and outputs of a parameter's matrix; None if it has none."""
    if any(name in _NOT_MATRICES for name in axes):
        return None
    dims = tuple(i for i, name in enumerate(axes) if name != "layers")
    names = [axes[i] for i in dims]
    if len(dims) < 2:
        return None
    if names[0] == "embed":  # a projection, perhaps to several heads
        return dims[:1], dims[1:]
    if names[-1] == "embed":
        return dims[:-1], dims[-1:]
    if names[0] == "heads":  # one matrix for each head: an initial memory
        dims, names = dims[1:], names[1:]
    # Two dimensions are a matrix, unless they are the (heads, kv) of a bias or of a norm.
    return (dims[:1], dims[1:]) if len(dims) == 2 and names != ["heads", "kv"] else None


def _by_axes(params: PyTree, function) -> PyTree:
    """`function(axes)` at each leaf of `params`, as a tree of the same structure."""
    axes = jax.tree.leaves(sharding.param_axes(params), is_leaf=lambda x: isinstance(x, tuple))
    leaves, structure = jax.tree.flatten(params)
    return jax.tree.unflatten(structure, [function(a) for a, _ in zip(axes, leaves, strict=True)])


def decay_mask(params: PyTree) -> PyTree:
    """Which parameters weight decay reaches: those used as matrices, and no others.

    Norm scales, biases and other vectors, embedding and output tables ("vocab"), persistent tokens
    and convolution filters do not decay. The initial weights of a neural memory do. Stacked layers
    ("layers") and heads of three-dimensional parameters do not count as dimensions.

    Args:
      params: the parameters, with their logical axes.

    Returns:
      The same tree with True or False at each leaf.
    """
    return _by_axes(params, lambda axes: _matrix(axes) is not None)


def muon_dimensions(params: PyTree) -> PyTree:
    """What Muon orthogonalises: the matrices of `decay_mask`, each layer and head on its own.

    Args:
      params: the parameters, with their logical axes.

    Returns:
      The same tree with `optax.contrib.MuonDimensionNumbers`, or None where Adam is used.
    """

    def dimensions(axes):
        matrix = _matrix(axes)
        return None if matrix is None else optax.contrib.MuonDimensionNumbers(*matrix)

    return _by_axes(params, dimensions)


def make(config: TrainConfig, params: PyTree) -> optax.GradientTransformation:
    """The optimiser of a run.

        optax.chain(clip_by_global_norm(clip), adamw | muon)

    "muon" is `optax.contrib.muon` (Jordan, 2024), scaled so that an update has the size of AdamW's
    (0.2 sqrt(max(in, out)), arXiv 2502.16982): the same `lr` and `weight_decay` serve both. What is
    not a matrix takes AdamW without decay.

    Args:
      config: the `train` section.
      params: the parameters or their shapes, with logical axes: the masks are made from them.

    Returns:
      The transformation.

    Raises:
      ValueError: an unknown `optimizer`.
    """
    rate = learning_rate(config)
    if config.optimizer == "adamw":
        update = optax.adamw(
            rate,
            b1=config.beta1,
            b2=config.beta2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decay_mask(params),
        )
    elif config.optimizer == "muon":
        update = optax.contrib.muon(
            rate,
            weight_decay=config.weight_decay,
            adam_b1=config.beta1,
            adam_b2=config.beta2,
            eps=config.eps,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=muon_dimensions(params),
        )
    else:
        raise ValueError(
            f"unknown train.optimizer {config.optimizer!r}: {nearest(config.optimizer, OPTIMIZERS)}"
        )
    if config.clip is None:
        return update
    return optax.chain(optax.clip_by_global_norm(config.clip), update)
