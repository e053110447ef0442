"""Memories that learn at test time, as values: structure, bias, retention, learner.

    rule = miras.Rule(miras.mlp(depth=2), miras.l2(), miras.decay(), miras.momentum(), chunk=64)
    state = miras.start(rule, rule.init(key, dim_k, dim_v), batch, heads)
    y, state = miras.chunkwise(rule, state, q, k, v, gates)

Source of the framework: Miras (arXiv:2504.13173).
"""

from memjax.miras import zoo
from memjax.miras.bias import dot, l2
from memjax.miras.forms.chunkwise import chunkwise, surprise, trace
from memjax.miras.forms.recurrent import read, recurrent, step
from memjax.miras.learner import gd, implicit, momentum
from memjax.miras.retention import decay, none
from memjax.miras.rule import Begin, Gates, Rule, State, begin_from, start
from memjax.miras.structure import Weights, matrix, mlp

__all__ = [
    "Begin", "Gates", "Rule", "State", "Weights", "begin_from", "chunkwise", "decay", "dot", "gd",
    "implicit", "l2", "matrix", "mlp", "momentum", "none", "read", "recurrent", "start", "step",
    "surprise", "trace", "zoo",
]  # fmt: skip
