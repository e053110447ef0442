"""The models of Titans (arXiv 2501.00663) at the sizes of the paper.

What:     pretraining as in section 5.1 of the paper: context 4096, half a million tokens a step,
          AdamW at 4e-4 with a cosine and weight decay 0.1; 15B tokens (170M, 340M) or 30B (760M).
Command:  python experiments/train.py --config=configs/titans.py:mac_340m --config.mesh.fsdp=16 \
              --config.data.tokenizer=tokenizer.json --distributed
Hardware: a TPU pod slice; not measured, so which one and for how long is not known here.
Result:   not run yet: no number is claimed. The paper's perplexities are of another tokenizer.

Variants: a block (mac, mag, mal, lmm, transformer) and a size (170m, 340m, 760m, 1.3b), such as
`:mac_340m`; `:smoke` is a MAC of toy size on the embedded corpus that runs in seconds. A size is
the papers' label, not a count: docs/architectures/titans.md has the parameters of each.

The paper's tokenizer is that of Llama 2, which is not byte-level. Train one of 32,000 tokens on the
same text instead: `memjax.data.BPETokenizer.train(memjax.data.texts(config), 32000).save(path)`.
"""

import dataclasses

from ml_collections import ConfigDict

from memjax import models
from memjax.training import complete

TOKENS_PER_STEP = 1 << 19
BILLIONS = {"170m": 15, "340m": 15, "760m": 30, "1.3b": 30}


def get_config(variant: str = "mac_170m") -> ConfigDict:
    if variant == "smoke":
        return complete(
            {
                "model": {
                    "pattern": ("mac",),
                    "dim": 32,
                    "layers": 2,
                    "heads": 2,
                    "hidden": 64,
                    "context": 64,
                    "segment": 32,
                    "window": 32,
                    "persistent": 4,
                    "memory": {"chunk": 16, "expansion": 2},
                },
                "train": {"steps": 4, "batch": 8, "warmup": 2, "log_every": 2},
                "evaluate": {"batches": 1},
                "workdir": "runs/titans-smoke",
            }
        )
    model = dataclasses.asdict(models.preset(variant, remat="full"))
    model["vocab"] = None  # the tokenizer's
    tokens = BILLIONS[variant.rpartition("_")[2]] * 10**9
    return complete(
        {
            "model": model,
            "data": {
                "source": "hf:HuggingFaceFW/fineweb-edu",
                "subset": "sample-100BT",
                "tokenizer": "tokenizer.json",
                "validation_fraction": 0.001,
                "cache": "~/.cache/memjax",
            },
            "train": {
                "steps": tokens // TOKENS_PER_STEP,
                "batch": TOKENS_PER_STEP // 4096,
                "lr": 4e-4,
                "warmup": 1000,
                "weight_decay": 0.1,
                "log_every": 20,
                "evaluate_every": 1000,
                "checkpoint_every": 500,
            },
            "evaluate": {"batches": 8},
            "workdir": f"runs/titans-{variant}",
        }
    )
