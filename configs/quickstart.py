"""A small Titans MAC model on the text of the Python standard library.

What:     memory as context (arXiv 2501.00663, section 4.1), byte-level, about 1M parameters.
Command:  python experiments/quickstart.py        (the same with a stop, a resume and a sample)
          python experiments/train.py --config=configs/quickstart.py
Hardware: two CPU cores, a few minutes.
Result:   README.md, section Measured.

Variants: `:smoke` runs in seconds.
"""

from ml_collections import ConfigDict

from memjax.training import complete


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "smoke"):
        raise ValueError(f"configs/quickstart.py has no variant {variant!r}; there is :smoke")
    config = {
        "model": {
            "pattern": ("mac",),
            "dim": 128,
            "layers": 4,
            "heads": 4,
            "context": 256,
            "segment": 64,
            "window": 64,
            "persistent": 4,
            "memory": {"chunk": 32, "expansion": 2},
            "dtype": "float32",
        },
        "data": {"source": "stdlib", "tokenizer": "byte"},
        "train": {
            "steps": 300,
            "batch": 8,
            "lr": 2e-3,
            "warmup": 30,
            "log_every": 10,
            "evaluate_every": 100,
            "checkpoint_every": 100,
        },
        "evaluate": {"batches": 16},
        "workdir": "runs/quickstart",
    }
    if variant == "smoke":
        config["model"] |= {"dim": 32, "layers": 2, "heads": 2, "context": 64, "segment": 32}
        config["model"] |= {"window": 32, "hidden": 64}
        config["train"] |= {"steps": 6, "batch": 8, "warmup": 2, "log_every": 2}
        config["train"] |= {"evaluate_every": 3, "checkpoint_every": 3}
        config["evaluate"] = {"batches": 2}
        config["workdir"] = "runs/quickstart-smoke"
    return complete(config)
