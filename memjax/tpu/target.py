"""Compiling for a TPU slice on a machine that has none: the devices of a topology.

libtpu, which `pip install "memjax[tpu]"` brings, compiles for any slice by its name. It reads its
settings from the environment once, so `prepare` comes before everything else in the process.
"""

import os
from collections.abc import Mapping
from typing import Any

import jax

from memjax.tpu import chips

INSTALL = 'pip install -U "memjax[tpu]"'
# Without these libtpu asks a metadata server, which is not there, where it runs.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several may compile at a time: nothing touches a device
}


def prepare(dump: str | None = None, environment: Mapping[str, str] | None = None) -> None:
    """Sets what libtpu reads when it is loaded, in this process.

    Args:
      dump: directory where it writes the schedules of what it compiles.
      environment: further settings, over those of `ENVIRONMENT`.
    """
    settings = {**ENVIRONMENT, **(environment or {})}
    if dump is not None:
        # Of one pass: to write all of them takes longer than to compile.
        flags = (
            f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
            " --xla_jf_dump_llo_pass_label_regex=pre-delay.*"
        )
        settings["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}".strip()
    os.environ.update(settings)


def devices(topology: str) -> list[Any]:
    """The devices of a slice that is not there: for meshes and shardings to compile with.

    Args:
      topology: such as "v5p:4x4x4".

    Raises:
      ValueError: a name that is no topology, or one that libtpu does not know.
      ImportError: libtpu is missing or of another version than JAX wants, with the command that
        mends it.
    """
    chips.parse(topology)
    try:
        import libtpu  # noqa: F401
    except ImportError as error:
        raise ImportError(f"compiling for TPU needs libtpu: {INSTALL}") from error
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(topology, platform="tpu").devices)
    except Exception as error:
        text = " ".join(str(error).split())
        if "version" in text.lower() or "PJRT" in text:
            raise ImportError(
                f"libtpu does not go with JAX {jax.__version__} ({text[:300]}): {INSTALL}"
            ) from error
        raise ValueError(
            f"libtpu knows no topology {topology!r} ({text[:300]}); try one of {chips.EXAMPLES}"
        ) from error
