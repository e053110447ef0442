"""Placeholder until generated."""

TABLE: dict[str, dict[str, dict[str, dict[int, tuple[int, int, int]]]]] = {
    "delta_rule": {
        "none": {"v5p": {128: (64, 2, 8), 256: (64, 1, 4)}},
        "head": {"v5p": {128: (64, 2, 8), 256: (64, 1, 4)}},
        "channel": {"v5p": {128: (64, 1, 8), 256: (64, 1, 4)}},
    },
    "linear_attention": {
        "none": {"v5p": {128: (128, 1, 8), 256: (128, 1, 4)}},
        "head": {"v5p": {128: (128, 1, 8), 256: (128, 1, 4)}},
        "channel": {"v5p": {128: (64, 1, 8), 256: (64, 1, 4)}},
    },
}
