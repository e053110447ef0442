"""Evaluation: loss, bits per byte, perplexity, loss by position in the context, synthetic tasks."""

from memjax.evaluation import recall
from memjax.evaluation.perplexity import Result, evaluate

__all__ = ["Result", "evaluate", "recall"]
