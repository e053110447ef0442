"""Named builders, so that new families of layers plug in without a change to the model."""

import difflib
from collections.abc import Callable, Collection
from typing import Any, TypeVar

Builder = TypeVar("Builder", bound=Callable[..., Any])


class Registry:
    """A table from names to builders.

    Args:
        kind: what it builds, for error messages.
        reserved: names that are valid but that the caller handles itself.
    """

    def __init__(self, kind: str, reserved: tuple[str, ...] = ()):
        self.kind = kind
        self.reserved = reserved
        self._builders: dict[str, Callable[..., Any]] = {}

    def names(self) -> tuple[str, ...]:
        """All valid names, in order of registration."""
        return (*self._builders, *self.reserved)

    def register(self, name: str) -> Callable[[Builder], Builder]:
        """A decorator that registers a builder: `@register("name")`.

        A function that is defined again, in the same module and by the same name, takes the place
        of its older self: a notebook cell or a config file may run twice.

        Args:
            name: how configurations call it.

        Raises:
            ValueError: the name is taken by another builder.
        """

        def add(builder: Builder) -> Builder:
            known = self._builders.get(name)
            if name in self.reserved or (known is not None and _origin(known) != _origin(builder)):
                by = "" if known is None else ", by {}.{}".format(*_origin(known))
                raise ValueError(
                    f"the {self.kind} {name!r} is registered already{by}; choose another name"
                )
            self._builders[name] = builder
            return builder

        return add

    def check(self, name: str) -> None:
        """Raises ValueError, with the nearest valid names, if a name is not registered."""
        if name not in self.names():
            raise ValueError(f"unknown {self.kind} {name!r}; {nearest(name, self.names())}")

    def build(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Calls the builder of that name.

        Raises:
            ValueError: the name is not registered.
        """
        self.check(name)
        return self._builders[name](*args, **kwargs)


def _origin(builder: Callable[..., Any]) -> tuple[Any, Any]:
    """Where a builder was defined: its module and its name there, or itself if it has none."""
    name = getattr(builder, "__qualname__", "<lambda>")
    return builder.__module__, builder if name.endswith("<lambda>") else name


def nearest(name: str, valid: Collection[str]) -> str:
    """The end of an error message: the valid names like `name`, or all of them."""
    close = difflib.get_close_matches(name, valid, n=3)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    return f"valid: {', '.join(valid)}"
