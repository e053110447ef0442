"""Memories that learn at test time, as values: structure, bias, retention, learner.

    rule = miras.Rule(miras.mlp(depth=2), miras.l2(), miras.decay(), miras.momentum(), chunk=64)
    state = miras.start(rule, rule.init(key, dim_k, dim_v), batch, heads)
    y, state = miras.chunkwise(rule, state, q, k, v, gates)

Source of the framework: Miras (arXiv:2504.13173).
"""

from memjax.miras import zoo
from memjax.miras.bias import Bias, dot, huber, l2, lp, robust
from memjax.miras.features import Features, dpfp, elu1, polynomial, taylor_exp
from memjax.miras.forms.chunkwise import chunkwise, surprise, trace
from memjax.miras.forms.recurrent import read, recurrent, step
from memjax.miras.learner import (
    Learner,
    chunk_muon,
    delta_gd,
    delta_momentum,
    exchange,
    gd,
    implicit,
    momentum,
    muon,
    normal_equations,
    omega,
)
from memjax.miras.retention import Retention, decay, elastic_net, lq, none, renormalise, simplex
from memjax.miras.rule import Begin, Gates, Pairs, Rule, State
from memjax.miras.state import begin_from, start
from memjax.miras.structure import Structure, Weights, gated_mlp, least_squares, matrix, mlp, vector

__all__ = [
    "Begin", "Bias", "Features", "Gates", "Learner", "Pairs", "Retention", "Rule", "State",
    "Structure", "Weights", "begin_from", "chunk_muon", "chunkwise", "decay", "delta_gd",
    "delta_momentum", "dot", "dpfp", "elastic_net", "elu1", "exchange", "gated_mlp", "gd", "huber",
    "implicit", "l2", "least_squares", "lp", "lq", "matrix", "mlp", "momentum", "muon", "none",
    "normal_equations", "omega", "polynomial", "read", "recurrent", "renormalise", "robust",
    "simplex", "start", "step", "surprise", "taylor_exp", "trace", "vector", "zoo",
]  # fmt: skip
