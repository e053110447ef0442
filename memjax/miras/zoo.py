"""The zoo: published memories as rules, a few lines each."""

from memjax.miras.bias import dot, l2
from memjax.miras.learner import gd, implicit, momentum
from memjax.miras.retention import decay, none
from memjax.miras.rule import Rule
from memjax.miras.structure import matrix, mlp


def titans(
    *,
    depth: int = 2,
    expansion: int = 4,
    activation: str = "gelu",
    norm: bool = True,
    residual: bool = True,
    chunk: int = 64,
    read: str = "after",
) -> Rule:
    """Titans' long-term memory: a deep MLP that learns surprise with momentum and weight decay.

        S_t = e_t S_{t-1} - lr_t grad 1/2 ||M(k_t; W') - v_t||^2,   W_t = a_t W_{t-1} + S_t

    The paper leaves the MLP open; norm and residual are the form of its authors' later Miras paper,
    and what keeps four layers stable (docs/deviations.md).

    Args:
        depth, expansion, activation, norm, residual: the memory network, see `structure.mlp`.
        chunk: tokens that share their gradients' weights.
        read: "after" (the paper's y_t = M(q_t; W_t)) or "before" the write.
    Source: Titans (arXiv:2501.00663), equations 9 to 15.
    """
    structure = mlp(
        depth=depth, expansion=expansion, activation=activation, norm=norm, residual=residual
    )
    return Rule(structure, l2(), decay(), momentum(), chunk=chunk, read=read)


def ttt_linear(*, chunk: int = 16) -> Rule:
    """TTT-Linear: `M(x) = x + LayerNorm(x W)`, gradient descent in minibatches, no forgetting.

    The layer's rates are `lr_j = sigmoid(.) base / D` by token and `Gates.scale`
    `c_i = max(0, 1/(i+1) + learned_i)` by place in the minibatch.

    Source: TTT (arXiv:2407.04620), sections 2.4, 2.5 and 2.7.
    """
    return Rule(mlp(depth=1, norm=True, residual=True), l2(), none(), gd(), chunk=chunk)


def ttt_mlp(*, chunk: int = 16, expansion: int = 4) -> Rule:
    """TTT-MLP: as `ttt_linear` with a two-layer MLP of hidden dimension `expansion * D`, GELU.

    Source: TTT (arXiv:2407.04620), sections 2.4, 2.5 and 2.7.
    """
    structure = mlp(depth=2, expansion=expansion, norm=True, residual=True)
    return Rule(structure, l2(), none(), gd(), chunk=chunk)


def linear_attention() -> Rule:
    """Linear attention: `W_t = W_{t-1} + lr_t k_t^T v_t`, with lr = 1.

    Source: Katharopoulos et al. (arXiv:2006.16236), equations 16 to 20.
    """
    return Rule(matrix(), dot(), none(), gd(), chunk=1)


def retnet() -> Rule:
    """RetNet: `W_t = a W_{t-1} + k_t^T v_t`, a fixed per head; `Gates.retain` is [B, T, H].

    Source: RetNet (arXiv:2307.08621), equation 6.
    """
    return Rule(matrix(), dot(), decay(), gd(), chunk=1)


def gla() -> Rule:
    """Gated linear attention: `W_t = diag(a_t) W_{t-1} + k_t^T v_t`, `Gates.retain` [B, T, H, K].

    Source: Yang et al. (arXiv:2312.06635), equation 3.
    """
    return Rule(matrix(), dot(), decay(), gd(), chunk=1)


def mamba2() -> Rule:
    """Mamba-2 (SSD): `W_t = a_t W_{t-1} + dt_t B_t^T x_t`; keys B, queries C, lr = dt.

    Source: Dao and Gu (arXiv:2405.21060), section 2.
    """
    return Rule(matrix(), dot(), decay(), gd(), chunk=1)


def delta_net() -> Rule:
    """DeltaNet: `W_t = W_{t-1} - b_t k_t^T (k_t W_{t-1} - v_t)`, b = lr.

    Source: Schlag et al. (arXiv:2102.11174), equation 24; Yang et al. (arXiv:2406.06484).
    """
    return Rule(matrix(), l2(), none(), gd(), chunk=1)


def gated_delta_net() -> Rule:
    """Gated DeltaNet: `W_t = a_t W_{t-1} - b_t k_t^T (a_t k_t W_{t-1} - v_t)`, decay first.

    Source: Yang, Kautz and Hatamizadeh (arXiv:2412.06464), equation 10.
    """
    return Rule(matrix(), l2(), decay(before="gradient"), gd(), chunk=1)


def kda() -> Rule:
    """Kimi delta attention: as `gated_delta_net` with `a_t` per key channel [B, T, H, K].

    Source: Kimi Linear (arXiv:2510.26692), equation 1.
    """
    return Rule(matrix(), l2(), decay(before="gradient"), gd(), chunk=1)


def longhorn() -> Rule:
    """Longhorn: the implicit step of `miras.implicit`, no decay.

    Source: Liu et al. (arXiv:2407.14207), theorem 3.1, without its diagonal approximation.
    """
    return Rule(matrix(), l2(), none(), implicit(), chunk=1)
