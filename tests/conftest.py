"""Test-wide settings: eight simulated devices, checked shapes, a persistent compilation cache."""

import gc
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


# A process may have some 65,000 memory mappings (vm.max_map_count), and each compiled program takes
# several: past that, mmap fails inside LLVM and the process dies. Let go of them long before.
MAPPINGS = 16_000


def _mappings() -> int:
    try:
        return pathlib.Path("/proc/self/maps").read_bytes().count(b"\n")
    except OSError:  # not Linux
        return 0


@pytest.fixture(autouse=True)
def few_compiled_programs():
    """Forgets the compiled programs after a test that leaves too many of them."""
    yield
    if _mappings() > MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs():
    """Forgets a module's compiled programs: the next module has its own."""
    yield
    jax.clear_caches()
