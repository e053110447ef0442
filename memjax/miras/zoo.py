"""The zoo: published memories as rules, a few lines each."""

from memjax.miras import learner as learners
from memjax.miras import retention as retentions
from memjax.miras.bias import dot, huber, l2, lp
from memjax.miras.features import Features, polynomial, taylor_exp
from memjax.miras.learner import (
    chunk_muon,
    exchange,
    gd,
    implicit,
    muon,
    normal_equations,
    omega,
)
from memjax.miras.retention import decay, lq, none, renormalise, simplex
from memjax.miras.rule import Rule
from memjax.miras.structure import gated_mlp, least_squares, matrix, mlp


def titans(
    *,
    depth: int = 2,
    expansion: int = 4,
    activation: str = "gelu",
    norm: bool = True,
    residual: bool = True,
    momentum: bool = True,
    decay: bool = True,
    chunk: int = 64,
    read: str = "after",
) -> Rule:
    """Titans' long-term memory: a deep MLP that learns surprise with momentum and weight decay.

        S_t = e_t S_{t-1} - lr_t grad 1/2 ||M(k_t; W') - v_t||^2,   W_t = a_t W_{t-1} + S_t

    The paper leaves the MLP open; norm and residual are the form of its authors' later Miras paper,
    and what keeps four layers stable (docs/deviations.md).

    Args:
        depth, expansion, activation, norm, residual: the memory network, see `structure.mlp`.
        momentum, decay: False leaves out S's past, e_t = 0, or what is forgotten, a_t = 1.
        chunk: tokens that share their gradients' weights.
        read: "after" (the paper's y_t = M(q_t; W_t)) or "before" the write.
    Source: Titans (arXiv:2501.00663), equations 9 to 15.
    """
    structure = mlp(
        depth=depth, expansion=expansion, activation=activation, norm=norm, residual=residual
    )
    retention = retentions.decay() if decay else none()
    learner = learners.momentum() if momentum else gd()
    return Rule(structure, l2(), retention, learner, chunk=chunk, read=read)


def ttt_linear(*, chunk: int = 16) -> Rule:
    """TTT-Linear: `M(x) = x + LayerNorm(x W)`, gradient descent in minibatches, no forgetting.

    The authors' layer has the rates `lr_j = sigmoid(.) base / D` by token and as `Gates.scale`
    `c_i = max(0, 1/(i+1) + learned_i)` by place in the minibatch; `layers.NeuralMemory` has
    `lr_max sigmoid(.)` and no scale.

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

    The rule is the numerator alone: phi on queries and keys, and the normaliser, are added by
    `layers.matrix_memory.linear_attention`.

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


def rwkv7() -> Rule:
    """RWKV-7: `W_t = diag(a_t) W_{t-1} - (b_t o k_t)^T (k_t W_{t-1}) + w_t^T v_t`.

    k is the unit key that is erased, b = lr its rate per channel, w = `Gates.write` the key that
    is written, a = retain per channel; the erasure finds what stood there before the decay.

    Source: RWKV-7 (arXiv:2503.14456), equation 17.
    """
    return Rule(matrix(), l2(), decay(), exchange(), chunk=1)


def mesa_net(*, steps: int = 30) -> Rule:
    """MesaNet: the least-squares memory of all pairs so far, see `miras.normal_equations`.

    Args:
        steps: iterations of conjugate gradients for each query.
    Source: MesaNet (arXiv:2506.05233), equations 6 to 9.
    """
    return Rule(least_squares(), l2(), decay(), normal_equations(steps), chunk=1)


def moneta(*, p: float = 3.0, q: float = 4.0, expansion: int = 4, chunk: int = 64) -> Rule:
    """Moneta: the p-norm of the error, retained by the q-norm of the weights.

        A_t = a_t A_{t-1} - lr_t grad ||M(k_t; W') - v_t||_p^p,   W_t = A_t / ||A_t||_q^(q-2)

    Source: Miras (arXiv:2504.13173), equations 24 and 25; normalised at every token
        (docs/deviations.md).
    """
    return Rule(_deep(expansion), lp(p), lq(q), gd(), chunk=chunk)


def yaad(*, expansion: int = 4, chunk: int = 64) -> Rule:
    """Yaad: Huber's loss, its threshold from the token (`Gates.threshold`), weight decay.

    Source: Miras (arXiv:2504.13173), equations 16 and 26.
    """
    return Rule(_deep(expansion), huber("switch"), decay(), gd(), chunk=chunk)


def memora(*, expansion: int = 4, chunk: int = 64) -> Rule:
    """Memora: weights that are probabilities, retained by the Kullback-Leibler divergence.

        W_t = softmax(a_t log W_{t-1} - lr_t grad 1/2 ||M(k_t; W') - v_t||^2)

    Source: Miras (arXiv:2504.13173), equation 27; exact at every token (docs/deviations.md).
    """
    return Rule(_deep(expansion), l2(), simplex(), gd(), chunk=chunk)


def dla(*, expansion: int = 4, chunk: int = 64) -> Rule:
    """Deep linear attention: a deep memory that learns similarity instead of regression.

        W_t = a_t W_{t-1} + lr_t grad <M(k_t; W'), v_t>

    Source: ATLAS (arXiv:2505.23735), section 4.1.
    """
    return Rule(_deep(expansion), dot(), decay(), gd(), chunk=chunk)


def swdt(*, window: int = 4, degree: int = 2, expansion: int = 4, chunk: int = 64) -> Rule:
    """Sliding-window deep transformer: `dla` over the last tokens, on features of exp.

    Source: ATLAS (arXiv:2505.23735), section 4.2; the exponential map by its Taylor polynomial of
        `degree` (docs/deviations.md).
    """
    structure = _deep(expansion, taylor_exp(degree))
    return Rule(structure, dot(), decay(), omega(window, gd()), chunk=chunk)


def deep_omega_transformer(
    *, window: int = 4, degree: int = 2, expansion: int = 4, chunk: int = 64
) -> Rule:
    """Dot, the deep Omega transformer: `omega_net` on features of exp.

    Source: ATLAS (arXiv:2505.23735), section 4.3; the map as for `swdt`.
    """
    structure = _deep(expansion, taylor_exp(degree))
    return Rule(structure, l2(), decay(), omega(window, gd()), chunk=chunk)


def omega_net(*, window: int = 4, degree: int = 2, expansion: int = 4, chunk: int = 64) -> Rule:
    """OmegaNet: learns the last `window` tokens at every token, on polynomial features.

        W_t = a_t W_{t-1} - lr_t grad sum_{t-c < i <= t} w_{t,i} 1/2 ||M(phi(k_i); W') - v_i||^2

    Args:
        window: c.
        degree: of the polynomial features; 1 = keys and queries with a constant.
        expansion, chunk: see `titans`.
    Source: ATLAS (arXiv:2505.23735), section 3.
    """
    structure = _deep(expansion, polynomial(degree))
    return Rule(structure, l2(), decay(), omega(window, gd()), chunk=chunk)


def atlas(
    *, window: int = 4, degree: int = 2, expansion: int = 4, chunk: int = 64, steps: int = 5
) -> Rule:
    """ATLAS: `omega_net` with momentum whose matrices are orthogonalised at every token.

        S_t = e_t S_{t-1} - grad of the window,   W_t = a_t W_{t-1} + lr_t NS(S_t)

    Args:
        window, degree, expansion, chunk: see `omega_net`.
        steps: Newton-Schulz iterations.
    Source: ATLAS (arXiv:2505.23735), equations 32 and 33.
    """
    structure = _deep(expansion, polynomial(degree))
    return Rule(structure, l2(), decay(), omega(window, muon(steps)), chunk=chunk)


def lact(*, expansion: int = 2, chunk: int = 2048, steps: int = 5) -> Rule:
    """LaCT: a SwiGLU memory that is read for a large chunk, then takes one Muon step on it.

    Args:
        expansion, chunk: see `titans`.
        steps: Newton-Schulz iterations; 0 = plain momentum by chunk.
    Source: LaCT (arXiv:2505.23884), section 3.
    """
    return Rule(
        gated_mlp(expansion=expansion), dot(), renormalise(), chunk_muon(steps), chunk=chunk,
        read="chunk",
    )  # fmt: skip


def self_referential_titans(*, expansion: int = 4, chunk: int = 64, read: str = "chunk") -> Rule:
    """The memories of HOPE's self-referential Titans, all of one rule: delta gradient descent.

        W_t = W_{t-1} (a_t I - lr_t z_t z_t^T) - lr_t grad 1/2 ||M(k_t; W') - v_t||^2
        M(x) = x + gelu(x W_1) W_2

    Where keys, values and gates come from, see `memjax.layers.SelfReferentialMemory`.

    Args:
        expansion, chunk: see `titans`.
        read: "chunk" (equation 90: y_t = M(q_t; W')), "before" (equation 86), or "after" the write.
    Source: nested learning (arXiv:2512.24695), equations 86 to 91.
    """
    structure = mlp(expansion=expansion, residual=True)
    return Rule(structure, l2(), decay(), learners.delta_gd(), chunk=chunk, read=read)


def continuum(*, expansion: int = 4, chunk: int = 512) -> Rule:
    """A level of the continuum memory system: an MLP that takes one step every `chunk` tokens.

        W <- W - sum over the chunk of lr_t grad 1/2 ||M(k_t; W) - v_t||^2,   y_t = M(q_t; W')

    Args:
        expansion, chunk: see `titans`.
    Source: nested learning (arXiv:2512.24695), equation 71, with a loss of its own
        (docs/deviations.md).
    """
    return Rule(mlp(expansion=expansion), l2(), none(), gd(), chunk=chunk, read="chunk")


def _deep(expansion: int, features: Features | None = None) -> mlp:
    """The memory network of Miras and ATLAS: `x + LN(gelu(phi(x) W_1) W_2)`."""
    return mlp(expansion=expansion, norm=True, residual=True, features=features)
