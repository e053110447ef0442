"""The delta family: DeltaNet, Gated DeltaNet, KDA, Longhorn, MesaNet."""

from flax import nnx

from memjax import miras
from memjax.layers import shell
from memjax.layers.gates import GateHead, Gating, SoftplusDecay
from memjax.layers.matrix_memory.layer import MatrixMemory


def delta_net(
    dim: int,
    heads: int,
    head_dim: int | None = None,
    value_dim: int | None = None,
    *,
    conv: int = 4,
    negative_eigenvalues: bool = False,
    rngs: nnx.Rngs,
) -> MatrixMemory:
    """DeltaNet: unit keys behind convolution and SiLU, `lr = sigmoid(x W)`, norm, no output gate.

    Args:
        dim, heads, head_dim, value_dim, conv: see `MatrixMemory`.
        negative_eigenvalues: lr up to 2, so that a step may reflect and states can be tracked.
        rngs: the stream `params` draws the weights.
    Source: Yang et al. (arXiv:2406.06484), section 3; arXiv:2411.12537 for the option.
    """
    return _delta(
        dim, heads, head_dim, value_dim, miras.zoo.delta_net(), None, conv, negative_eigenvalues,
        rngs, gate=None,
    )  # fmt: skip


def gated_delta_net(
    dim: int,
    heads: int,
    head_dim: int | None = None,
    value_dim: int | None = None,
    *,
    conv: int = 4,
    negative_eigenvalues: bool = False,
    rngs: nnx.Rngs,
) -> MatrixMemory:
    """Gated DeltaNet: DeltaNet with a decay per head before the step, and a SiLU output gate.

    Args:
        dim, heads, head_dim, value_dim, conv: see `MatrixMemory`.
        negative_eigenvalues: lr up to 2, as for `delta_net`.
        rngs: the stream `params` draws the weights.
    Source: Yang, Kautz and Hatamizadeh (arXiv:2412.06464), equation 10 and section 3.4.
    """
    decay = SoftplusDecay(dim, heads, rngs=rngs)
    rule = miras.zoo.gated_delta_net()
    return _delta(dim, heads, head_dim, value_dim, rule, decay, conv, negative_eigenvalues, rngs)


def kda(
    dim: int,
    heads: int,
    head_dim: int | None = None,
    value_dim: int | None = None,
    *,
    conv: int = 4,
    negative_eigenvalues: bool = False,
    rngs: nnx.Rngs,
) -> MatrixMemory:
    """Kimi delta attention: decay per key channel before the step, low-rank sigmoid output gate.

    Args:
        dim, heads, head_dim, value_dim, conv: see `MatrixMemory`.
        negative_eigenvalues: lr up to 2, as for `delta_net`.
        rngs: the stream `params` draws the weights.
    Source: Kimi Linear (arXiv:2510.26692), equation 1 and section 4.
    """
    head_dim = shell.head_size(dim, heads, head_dim)
    decay = SoftplusDecay(dim, heads, channels=head_dim, rank=head_dim, rngs=rngs)
    return _delta(
        dim, heads, head_dim, value_dim, miras.zoo.kda(), decay, conv, negative_eigenvalues, rngs,
        gate="sigmoid", gate_rank=head_dim,
    )  # fmt: skip


def longhorn(
    dim: int,
    heads: int,
    head_dim: int | None = None,
    value_dim: int | None = None,
    *,
    conv: int = 4,
    rngs: nnx.Rngs,
) -> MatrixMemory:
    """Longhorn's implicit step, exact, in the shell of DeltaNet with a SiLU output gate.

    Keys are not of unit length: the step is stable for any. The paper's own layer is Mamba's, and
    keeps only the diagonal of `k^T k` (docs/deviations.md).

    Source: Liu et al. (arXiv:2407.14207), theorem 3.1.
    """
    return MatrixMemory(
        dim,
        heads,
        head_dim,
        value_dim,
        rule=miras.zoo.longhorn(),
        gates=Gating(GateHead(dim, heads, initial=0.5, rngs=rngs), None, heads),
        conv=conv,
        features="silu",
        rngs=rngs,
    )


def mesa_net(
    dim: int,
    heads: int,
    head_dim: int | None = None,
    value_dim: int | None = None,
    *,
    conv: int = 4,
    steps: int = 30,
    rngs: nnx.Rngs,
) -> MatrixMemory:
    """MesaNet: the least-squares memory, unit keys behind convolution and SiLU, norm.

    Args:
        dim, heads, head_dim, value_dim, conv: see `MatrixMemory`.
        steps: iterations of conjugate gradients for each query.
        rngs: the stream `params` draws the weights.
    Source: MesaNet (arXiv:2506.05233), section 3 and figure 2.
    """
    rate = GateHead(dim, heads, initial=0.5, rngs=rngs)
    decay = GateHead(dim, heads, initial=0.99, rngs=rngs)
    return MatrixMemory(
        dim,
        heads,
        head_dim,
        value_dim,
        rule=miras.zoo.mesa_net(steps=steps),
        gates=Gating(rate, decay, heads),
        conv=conv,
        features="silu",
        unit_keys=True,
        scale=1.0,
        gate=None,
        rngs=rngs,
    )


def _delta(
    dim, heads, head_dim, value_dim, rule, decay, conv, negative_eigenvalues, rngs, **options
) -> MatrixMemory:
    """The shell of the delta family."""
    rate = GateHead(dim, heads, initial=0.5, rngs=rngs)
    gates = Gating(rate, decay, heads, most=2.0 if negative_eigenvalues else 1.0)
    return MatrixMemory(
        dim, heads, head_dim, value_dim, rule=rule, gates=gates, conv=conv, features="silu",
        unit_keys=True, rngs=rngs, **options,
    )  # fmt: skip
