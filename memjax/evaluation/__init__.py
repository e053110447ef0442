"""Evaluation: loss, bits per byte, perplexity, and loss by position in the context."""

from memjax.evaluation.perplexity import Result, evaluate

__all__ = ["Result", "evaluate"]
