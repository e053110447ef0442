"""Text data: sources, tokenizers, packing, and pipelines that resume with the same batches."""

from memjax.data.packing import DTYPES, Batch, Plan, make_plan, render
from memjax.data.pipeline import DataConfig, Pipeline, make_pipeline, texts
from memjax.data.tokenizers import (
    BPETokenizer,
    ByteTokenizer,
    StreamDecoder,
    Tokenizer,
    make_tokenizer,
)

__all__ = [
    "DTYPES",
    "BPETokenizer",
    "Batch",
    "ByteTokenizer",
    "DataConfig",
    "Pipeline",
    "Plan",
    "StreamDecoder",
    "Tokenizer",
    "make_pipeline",
    "make_plan",
    "make_tokenizer",
    "render",
    "texts",
]
