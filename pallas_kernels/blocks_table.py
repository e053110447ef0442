"""Sizes of steps: op -> decay -> chip -> widest dimension -> `Blocks`.

Generated: python experiments/benchmarks/kernel_blocks.py \\
    --chips=v5p --candidates=128x1x8,64x2x8,64x1x8 --keep=1 \\
    --table=pallas_kernels/blocks_table.py
JAX 0.10.2, libtpu 0.0.42.1, 2026-11-22.
"""

# Beside each the cycles of a token and head, forward + backward.
TABLE: dict[str, dict[str, dict[str, dict[int, tuple[int, ...]]]]] = {
    "delta_rule": {
        "none": {
            "v5p": {
                64: (128, 1, 8),  # 5.84 + 8.04
                128: (128, 1, 8),  # 5.80 + 7.63
                256: (128, 1, 8),  # 7.38 + 11.60
            },
        },
        "head": {
            "v5p": {
                64: (64, 2, 8),  # 5.32 + 8.89
                128: (64, 2, 8),  # 5.56 + 8.93
                256: (64, 2, 8),  # 9.25 + 15.12
            },
        },
        "channel": {
            "v5p": {
                64: (64, 1, 8),  # 10.08 + 22.41
                128: (64, 1, 8),  # 10.05 + 22.20
                256: (64, 1, 8),  # 15.50 + 39.59
            },
        },
    },
    "linear_attention": {
        "none": {
            "v5p": {
                64: (128, 1, 8),  # 1.26 + 1.99
                128: (128, 1, 8),  # 1.26 + 1.70
                256: (128, 1, 8),  # 2.31 + 3.97
            },
        },
        "head": {
            "v5p": {
                64: (128, 1, 8),  # 2.08 + 3.43
                128: (128, 1, 8),  # 2.03 + 3.26
                256: (128, 1, 8),  # 3.14 + 4.53
            },
        },
        "channel": {
            "v5p": {
                64: (128, 1, 8),  # 4.83 + 12.00
                128: (128, 1, 8),  # 4.47 + 11.81
                256: (128, 1, 8, 4),  # 8.14 + 22.07
            },
        },
    },
}
