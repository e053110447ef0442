"""Kernels compile for TPU, where libtpu is installed (tests/README.md lists the skip)."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason='no libtpu: pip install "memjax[tpu]"'
)
TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")


def compiled(topology, which):
    """The cases that a child process has compiled."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.tpu.mosaic", topology, which],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout.split()


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_every_kernel_compiles(topology):
    assert len(compiled(topology, "small")) == 2 * 3 * 3 + 3 + 2 * 2


@pytest.mark.slow
@pytest.mark.parametrize("which", ["bfloat16", "float32"])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_steps_of_the_table_fit(topology, which):
    deep = 2 if which == "float32" else 3
    assert len(compiled(topology, which)) == 2 * 3 * 3 + deep + 2 * 2
