"""Whether weights are a rule's: they are held against what it draws for the same dimensions."""

import jax

from memjax.miras.rule import Rule
from memjax.miras.structure import Weights
from memjax.typing import Array, PyTree


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
    shapes = of_a_head(fast, slow)
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
    if shapes_of(shapes) != shapes_of(plain):
        _name_dims(rule, shapes, dim_k, dim_v)
        of = "fast" if shapes_of(shapes.fast) != shapes_of(plain.fast) else "slow"
        raise ValueError(
            f"the {of} weights are {shapes_of(getattr(shapes, of))}, but {rule.structure} has "
            f"{shapes_of(getattr(plain, of))} for keys of dim {dim_k} and values of dim {dim_v}: "
            "use rule.init and miras.start of this rule"
        )


def reads(rule: Rule, fast: tuple[Array, ...], slow: dict[str, Array], dim_k: int) -> None:
    """Raises ValueError where weights (see `fits`) are not the rule's for queries of this dim."""
    shapes = of_a_head(fast, slow)
    try:
        dim_v = _answered(rule, shapes, dim_k)
    except (TypeError, ValueError) as error:
        if dims := dims_of(rule, shapes):
            raise ValueError(f"the memory has keys of dim {dims[0]}, but q has {dim_k}") from error
        raise ValueError(
            f"the fast weights are {shapes_of(shapes.fast)}, and {rule.structure} cannot read q of "
            f"dim {dim_k} with them: use a state of miras.start with this rule"
        ) from error
    fits(rule, fast, slow, dim_k, dim_v)


def dims_of(rule: Rule, shapes: Weights) -> tuple[int, int] | None:
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
            if shapes_of(_drawn(rule, dim_k, dim_v)) == shapes_of(shapes):
                found.append((dim_k, dim_v))
        except (TypeError, ValueError):
            continue
        if len(found) > 1:
            return None
    return found[0] if found else None


def of_a_head(fast: tuple[Array, ...], slow: dict[str, Array]) -> Weights:
    """Shapes and dtypes of one head's weights."""
    return Weights(
        tuple(jax.ShapeDtypeStruct(w.shape[-2:], w.dtype) for w in fast),
        {name: jax.ShapeDtypeStruct(w.shape[1:], w.dtype) for name, w in slow.items()},
    )


def shapes_of(tree: PyTree) -> PyTree:
    """Its shapes."""
    return jax.tree.map(lambda x: x.shape, tree)


def _drawn(rule: Rule, dim_k: int, dim_v: int) -> Weights:
    """Shapes of `rule.init`."""
    return jax.eval_shape(lambda: rule.init(jax.random.key(0), dim_k, dim_v))


def _answered(rule: Rule, shapes: Weights, dim_k: int) -> int:
    """Dimension of what a head answers to a key of this dimension."""
    key = jax.ShapeDtypeStruct((1, dim_k), shapes.fast[0].dtype)
    return jax.eval_shape(rule.structure.apply, shapes, key).shape[-1]


def _name_dims(
    rule: Rule, shapes: Weights, dim_k: int, dim_v: int, error: ValueError | None = None
) -> None:
    """Raises ValueError where weights are the rule's, but certainly for other dimensions."""
    dims = dims_of(rule, shapes)
    if dims not in (None, (dim_k, dim_v)):
        raise ValueError(
            f"the memory maps dim {dims[0]} to {dims[1]}, but k has {dim_k} and v {dim_v}"
        ) from error
