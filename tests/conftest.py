"""Test-wide settings: eight simulated devices, checked shapes, a persistent compilation cache."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from jaxtyping import install_import_hook

install_import_hook(["memjax", "pallas_kernels"], "beartype.beartype")

import jax  # noqa: E402
import pytest  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parent.parent

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
# The tests compile thousands of small programs and run each for a moment: half the time to compile
# is worth more to them than the last optimisation. `make quickstart` and the benchmarks have it.
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs():
    """Lets go of a module's programs: a process may map only so many pieces of code at once."""
    yield
    jax.clear_caches()
