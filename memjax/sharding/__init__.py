"""Meshes, the one table of logical axis rules, and placements made from it."""

from memjax.sharding.manual import compiler_axes, devices_along, on_each_device
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
    "compiler_axes",
    "constrain",
    "constrain_params",
    "devices_along",
    "make_mesh",
    "on_each_device",
    "param_axes",
    "platform",
    "shardings",
    "spec",
]
