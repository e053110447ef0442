"""Text from a trained model, as it is made."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx

from memjax import data, models
from memjax.training.run import Run
from memjax.typing import PyTree


def stream(run: Run, params: PyTree, prompt: bytes, **options: Any) -> Iterator[str]:
    """The text that continues a prompt, in the pieces in which it is made.

    Args:
      run, params: of `training.load`.
      prompt: the text to continue, read as the start of a document.
      **options: of `models.generate`.

    Returns:
      An iterator of strings; it ends with the document.
    """
    tokenizer = run.tokenizer
    decoder = data.StreamDecoder(tokenizer)
    ids = np.concatenate([[tokenizer.eos], tokenizer.encode(prompt)]).astype(np.int32)
    model = nnx.merge(run.graphdef, params)
    with jax.set_mesh(run.mesh):
        for token in models.generate(model, ids[None], **options):
            token = int(token[0])
            if token == tokenizer.eos:
                break
            # A vocabulary larger than the tokenizer's has ids that stand for nothing.
            if token < tokenizer.vocab:
                yield decoder.push([token])
    yield decoder.flush()
