"""The zoo: published memories as rules, a few lines each."""

from memjax.miras.bias import l2
from memjax.miras.learner import gd, momentum
from memjax.miras.retention import decay, none
from memjax.miras.rule import Rule
from memjax.miras.structure import mlp


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
