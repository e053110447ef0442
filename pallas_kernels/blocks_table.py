"""Sizes of steps: op -> decay -> chip -> widest dimension -> `Blocks`.

The delta rule's with decays of heads or none are the best that `python
experiments/benchmarks/kernel_blocks.py --chips=v5p --candidates=128x1x8,64x2x8,64x1x8 --keep=1`
found (JAX 0.10.2, libtpu 0.0.42.1, 2026-11-22); the others were tried at dimension 128 only, and
that script has not gone over them.
"""

# Beside each the cycles of a token and head, forward + backward, where they were measured.
TABLE: dict[str, dict[str, dict[str, dict[int, tuple[int, ...]]]]] = {
    "delta_rule": {
        "none": {
            "v5p": {
                64: (128, 1, 8),  # 5.84 + 8.04
                128: (128, 1, 8),  # 5.80 + 7.63
                256: (128, 1, 8),  # 7.38 + 11.60
            }
        },
        "head": {
            "v5p": {
                64: (64, 2, 8),  # 5.32 + 8.89
                128: (64, 2, 8),  # 5.56 + 8.93
                256: (64, 2, 8),  # 9.25 + 15.12
            }
        },
        "channel": {"v5p": {128: (64, 1, 8), 256: (64, 1, 4)}},  # 12.3 + 23.7
    },
    "linear_attention": {
        "none": {"v5p": {128: (128, 1, 8), 256: (128, 1, 4)}},
        "head": {"v5p": {128: (128, 1, 8), 256: (128, 1, 4)}},  # 2.03 + 3.26
        "channel": {"v5p": {128: (64, 1, 8), 256: (64, 1, 4)}},  # 5.41 + 13.07
    },
}
