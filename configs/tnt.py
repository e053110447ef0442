"""TNT in miniature: one global and one local memory, for the curve of chunks.

What:     two layers of dimension 128 on the embedded corpus; a global memory of chunk 64, a local
          one of chunk 32 that begins anew every 64 tokens.
Command:  python experiments/chunks.py      (both stages, three seeds, and the curve)
Hardware: two CPU cores, a few minutes each.
Result:   held-out bits per byte at local chunks 2 and 32 (means of three seeds): 2.577 and 2.569
          after stage 1, 2.548 and 2.547 after stage 2; docs/architectures/tnt.md has the curve.

Variants: `:smoke`, for a run of seconds. The rate never falls below a tenth of its peak, so that
stage 2, which goes on where stage 1 ended, still learns.
"""

from ml_collections import ConfigDict

from memjax.training import complete


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "smoke"):
        raise ValueError(f"configs/tnt.py has no variant {variant!r}; there is smoke")
    model = {
        "pattern": ("tnt",),
        "dim": 128,
        "layers": 2,
        "heads": 4,
        "hidden": 384,
        "context": 256,
        "memory": {"chunk": 64, "local_chunks": (32,), "shard": 64, "expansion": 2},
        "dtype": "float32",
    }
    train = {
        "steps": 300,
        "batch": 8,
        "lr": 2e-3,
        "warmup": 30,
        "evaluate_every": 100,
        "checkpoint_every": 100,
        "keep": None,
    }
    evaluate = {"batches": 32}
    if variant == "smoke":
        model |= {"dim": 32, "heads": 2, "hidden": 64, "context": 32}
        model["memory"] |= {"chunk": 16, "local_chunks": (8,), "shard": 16}
        train |= {"steps": 4, "batch": 4, "warmup": 2, "log_every": 2}
        evaluate = {"batches": 1}
    return complete(
        {
            "model": model,
            "data": {"source": "stdlib", "tokenizer": "byte"},
            "train": train,
            "evaluate": evaluate,
            "workdir": f"runs/tnt{'-smoke' if variant else ''}",
        }
    )
