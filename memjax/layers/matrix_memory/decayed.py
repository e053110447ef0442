"""Linear attention and its decays: RetNet, GLA, Mamba-2."""

from flax import nnx

from memjax import miras
from memjax.layers import shell
from memjax.layers.gates import FixedDecay, Gating, PowerDecay, StepSize
from memjax.layers.matrix_memory.layer import MatrixMemory


def linear_attention(
    dim: int,
    heads: int,
    head_dim: int | None = None,
    value_dim: int | None = None,
    *,
    rngs: nnx.Rngs,
) -> MatrixMemory:
    """Linear attention: `y_t = phi(q) sum phi(k)^T v / (phi(q) . sum phi(k))`, phi = elu + 1.

    Args:
        dim, heads, head_dim, value_dim: see `MatrixMemory`.
        rngs: the stream `params` draws the weights.
    Source: Katharopoulos et al. (arXiv:2006.16236), equations 4 to 7.
    """
    return MatrixMemory(
        dim,
        heads,
        head_dim,
        value_dim,
        rule=miras.zoo.linear_attention(),
        gates=Gating(None, None, heads),
        features="elu+1",
        scale=1.0,
        normalised=True,
        gate=None,
        rngs=rngs,
    )


def retnet(
    dim: int,
    heads: int,
    head_dim: int | None = None,
    value_dim: int | None = None,
    *,
    rope_base: float = 10000.0,
    rngs: nnx.Rngs,
) -> MatrixMemory:
    """Multi-scale retention: a fixed decay per head, rotary positions, norm per head, SiLU gate.

    Args:
        dim, heads, head_dim, rope_base: see `MatrixMemory`.
        value_dim: dimension of the values of a head (default twice that of the keys).
        rngs: the stream `params` draws the weights.
    Source: RetNet (arXiv:2307.08621), equations 5 to 8, whose decay is a number per head, so that
        of xPos only the rotation is left.
    """
    head_dim = shell.head_size(dim, heads, head_dim)
    return MatrixMemory(
        dim,
        heads,
        head_dim,
        2 * head_dim if value_dim is None else value_dim,
        rule=miras.zoo.retnet(),
        gates=Gating(None, FixedDecay(heads), heads),
        rope_base=rope_base,
        rngs=rngs,
    )


def gla(
    dim: int,
    heads: int,
    head_dim: int | None = None,
    value_dim: int | None = None,
    *,
    rank: int = 16,
    rngs: nnx.Rngs,
) -> MatrixMemory:
    """Gated linear attention: decay per key channel, norm per head, SiLU gate.

    Args:
        dim, heads, head_dim, value_dim: see `MatrixMemory`; the paper has keys of half and values
            of all of the model's dimension, `head_dim = dim / (2 heads)` and twice that.
        rank: of the decay's projection.
        rngs: the stream `params` draws the weights.
    Source: Yang et al. (arXiv:2312.06635), section 4.4.
    """
    head_dim = shell.head_size(dim, heads, head_dim)
    return MatrixMemory(
        dim,
        heads,
        head_dim,
        value_dim,
        rule=miras.zoo.gla(),
        gates=Gating(None, PowerDecay(dim, heads, head_dim, rank=rank, rngs=rngs), heads),
        rngs=rngs,
    )


def mamba2(
    dim: int,
    heads: int,
    head_dim: int | None = None,
    value_dim: int | None = None,
    *,
    conv: int = 4,
    key_heads: int = 1,
    rngs: nnx.Rngs,
) -> MatrixMemory:
    """Mamba-2: keys B and queries C shared by all heads, step and decay per head, a skip.

    Args:
        dim, heads: see `MatrixMemory`.
        head_dim: the size N of the state (default dim / heads).
        value_dim: the size P of a head (default 2 dim / heads).
        conv: width of the convolutions, 0 for none, nor the SiLU after them.
        key_heads: the groups G that share keys and queries.
        rngs: the stream `params` draws the weights.
    Source: Dao and Gu (arXiv:2405.21060), section 7 and figure 6.
    """
    if value_dim is None:
        if heads < 1 or 2 * dim % heads:
            raise ValueError(
                f"2 dim = {2 * dim} is not a multiple of heads {heads}: change one, or give "
                "value_dim"
            )
        value_dim = 2 * dim // heads
    return MatrixMemory(
        dim,
        heads,
        head_dim,
        value_dim,
        rule=miras.zoo.mamba2(),
        gates=StepSize(dim, heads, rngs=rngs),
        conv=conv,
        features="silu" if conv else "none",
        scale=1.0,  # not free here: the skip beside it has its own size
        key_heads=key_heads,
        gate_first=True,
        skip=True,
        rngs=rngs,
    )
