"""Meshes, the one table of logical axis rules, and placements made from it."""

from memjax.sharding.rules import (
    MESH_AXES,
    RULES,
    Rule,
    constrain,
    constrain_params,
    make_mesh,
    param_axes,
    platform,
    shardings,
    spec,
)

__all__ = [
    "MESH_AXES",
    "RULES",
    "Rule",
    "constrain",
    "constrain_params",
    "make_mesh",
    "param_axes",
    "platform",
    "shardings",
    "spec",
]
