"""Models: blocks chosen by name, the language model, its configurations and sampling."""

from memjax.models import feed_forwards, mixers, presets
from memjax.models.blocks import Block
from memjax.models.config import LanguageModelConfig, MemoryConfig
from memjax.models.generation import generate, sample
from memjax.models.language_model import LanguageModel, LanguageModelState
from memjax.models.presets import parameter_count, preset
from memjax.models.reports import AUXILIARY_LOSS, auxiliary_loss, statistics

__all__ = [
    "AUXILIARY_LOSS",
    "Block",
    "LanguageModel",
    "LanguageModelConfig",
    "LanguageModelState",
    "MemoryConfig",
    "auxiliary_loss",
    "feed_forwards",
    "generate",
    "mixers",
    "parameter_count",
    "preset",
    "presets",
    "sample",
    "statistics",
]
