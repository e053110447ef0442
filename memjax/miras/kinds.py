"""Of which kind a part is."""

from typing import Any


def keeps(part: Any, kinds: tuple[type, ...], *methods: str) -> bool:
    """Whether `part` is of one of these kinds, and defines none of these methods anew.

    A form that stands on the equation of a part may only serve a subclass that keeps the equation.
    """
    return any(
        isinstance(part, kind)
        and all(getattr(type(part), name) is getattr(kind, name) for name in methods)
        for kind in kinds
    )
