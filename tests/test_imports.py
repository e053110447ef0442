"""Imports go one way: every import of the tree is read (not run) and held against one table."""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
OURS = ("memjax", "pallas_kernels", "experiments", "configs", "tests")

# What each package may import, besides itself and what is not ours. Read top-down: a row names only
# packages above it.
CORE = ("memjax.typing", "memjax.checks", "memjax.documents", "memjax.sharding", "pallas_kernels")
PURE = ("memjax.miras", "memjax.attention", "memjax.sparse", "memjax.segment")
ALLOWED: dict[str, tuple[str, ...]] = {
    "memjax": (),
    "memjax.typing": (),
    "memjax.checks": (),
    "memjax.documents": ("memjax.typing",),
    "memjax.sharding": ("memjax.typing",),
    "pallas_kernels": (),
    "memjax.data": ("memjax.typing", "memjax.checks"),
    **dict.fromkeys(PURE, CORE),
    "memjax.layers": (*CORE, *PURE),
    "memjax.models": (*CORE, *PURE, "memjax.layers"),
}
_MODELS = (*ALLOWED, "memjax.models")
ALLOWED |= {
    "memjax.evaluation": _MODELS,
    "memjax.training": (*_MODELS, "memjax.evaluation"),
    "memjax.tpu": (*_MODELS, "memjax.evaluation", "memjax.training"),
}
ALLOWED |= {
    "configs": tuple(ALLOWED),
    "experiments": (*ALLOWED, "configs"),
}

# Packages that stand alone: they import JAX and NumPy, or what is named here.
OUTSIDE = {
    "pallas_kernels": {"jax", "jaxlib", "numpy"},
    "memjax.typing": {"jax", "jaxtyping"},
    "memjax.checks": set(),
    "memjax.documents": {"jax", "jaxtyping"},
    "memjax.miras": {"jax", "jaxtyping", "numpy"},
    "memjax.attention": {"jax", "jaxtyping", "numpy"},
}


def package(module: str) -> str:
    """The row of the table that a module belongs to; "memjax" is its `__init__.py` alone."""
    parts = module.split(".")
    if parts[0] != "memjax":
        return parts[0]
    return ".".join(parts[:2])


def module_of(path: pathlib.Path, root: pathlib.Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: pathlib.Path, root: pathlib.Path):
    """(line, dotted name) of everything that a file imports, wherever in the file."""
    module = module_of(path, root)
    here = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = here[: len(here) - node.level + 1]
                base = ".".join([*up, base] if base else up)
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def violations(root: pathlib.Path) -> list[str]:
    """One line for each import below `root` that the table does not allow."""
    found = []
    for top in OURS[:-1]:
        for path in sorted((root / top).rglob("*.py")):
            importer = package(module_of(path, root))
            where = path.relative_to(root)
            if importer not in ALLOWED:
                found.append(
                    f"{where}: {importer} has no row in the table of tests/test_imports.py"
                )
                continue
            for line, name in imports(path, root):
                outside = name.split(".")[0]
                if outside not in OURS:
                    standard = outside in sys.stdlib_module_names
                    if importer in OUTSIDE and not standard and outside not in OUTSIDE[importer]:
                        found.append(f"{where}:{line}: {importer} must not import {outside}")
                    continue
                imported = package(name)
                if imported == "memjax.__version__":
                    continue
                if imported != importer and imported not in ALLOWED[importer]:
                    found.append(f"{where}:{line}: {importer} must not import {imported}")
    return found


def test_imports_go_one_way():
    assert violations(ROOT) == []


def test_the_tree_is_read():
    files = list((ROOT / "memjax").rglob("*.py"))
    read = [name for path in files for _, name in imports(path, ROOT)]
    assert "memjax.layers.Linear" in read or "memjax.layers.linear.Linear" in read
    assert len(files) > 20


PLANTED = {
    "memjax/miras/bad.py": ("from memjax.layers import Linear", "memjax.miras must not import"),
    "memjax/layers/bad.py": ("from memjax import models", "must not import memjax.models"),
    "memjax/models/bad.py": (
        "def f():\n    import memjax.training.loop",
        "memjax/models/bad.py:2: memjax.models must not import memjax.training",
    ),
    "memjax/attention/bad.py": (
        "from ..layers.norm import RMSNorm",
        "must not import memjax.layers",
    ),
    "memjax/data/bad.py": ("from memjax.sharding import spec", "must not import memjax.sharding"),
    "memjax/sharding/bad.py": ("import pallas_kernels", "must not import pallas_kernels"),
    "pallas_kernels/op/bad.py": ("import flax", "pallas_kernels must not import flax"),
    "memjax/evaluation/bad.py": ("import experiments.train", "must not import experiments"),
    "memjax/training/bad.py": ("from tests import oracles", "must not import tests"),
    "memjax/novel/bad.py": ("import jax", "memjax.novel has no row in the table"),
}


@pytest.mark.parametrize("file", PLANTED)
def test_a_planted_violation_is_found(tmp_path, file):
    source, message = PLANTED[file]
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    (found,) = violations(tmp_path)
    assert message in found


def test_what_is_allowed_passes(tmp_path):
    path = tmp_path / "memjax" / "layers" / "good.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import os, jax\nfrom flax import nnx\nfrom memjax import miras\nfrom . import x\n"
    )
    assert violations(tmp_path) == []
