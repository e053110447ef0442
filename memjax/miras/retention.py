"""Retention: how the memory forgets. `W_t = a_t W_{t-1} + update_t`.

A retention turns the gates into the factors `a_t`, one per token and head, or one per token, head
and key channel (then row `i` of a `[K, V]` matrix memory is multiplied by `a_t[i]`).
"""

import dataclasses

from memjax.typing import Array, Float


@dataclasses.dataclass(frozen=True)
class Retention:
    """What a retention must give; see `decay` and `none`."""

    needs_retain = False

    @property
    def first(self) -> bool:
        """Whether the memory decays before a token's gradient is taken."""
        return False

    def factors(self, retain: Float[Array, "*shape"] | None) -> Float[Array, "*shape"] | None:
        """The factors `a_t` of these gates; None stands for 1."""
        raise TypeError("Retention is the interface: use decay() or none()")


@dataclasses.dataclass(frozen=True)
class decay(Retention):
    """Weight decay from the gate `retain` (`a = 1 - alpha`), per head or per key channel.

    Args:
        before: "update": a token's gradient is taken at W' as it is, and the weights decay when
            it is added (Titans, Miras). "gradient": the weights decay first, W' with them, and
            the gradient is taken at what is left, `(prod a_m) W'` over the chunk's tokens so far;
            at chunk 1 that is `a_t W_{t-1}` (the gated delta rule). For `dot` both are the same.
    Raises:
        ValueError: another word.
    """

    before: str = "update"
    needs_retain = True

    def __post_init__(self):
        if self.before not in ("update", "gradient"):
            raise ValueError(f'decay before {self.before!r} must be "update" or "gradient"')

    @property
    def first(self) -> bool:
        return self.before == "gradient"

    def factors(self, retain: Float[Array, "*shape"] | None) -> Float[Array, "*shape"] | None:
        return retain


@dataclasses.dataclass(frozen=True)
class none(Retention):
    """Nothing is forgotten: `a = 1`."""

    def factors(self, retain: Float[Array, "*shape"] | None) -> None:
        if retain is not None:
            raise ValueError(
                "gates.retain was given, but the rule's retention is none(): "
                "leave it None or use retention=decay()"
            )
        return None
