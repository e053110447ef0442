"""One run at a time in a work directory."""

import contextlib
import fcntl
import os
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def exclusive(workdir: str) -> Iterator[None]:
    """Holds a work directory for this run; the system lets go of it however the run ends.

    Only the first process of a run holds it, and only against runs on the same file system.

    Args:
      workdir: an existing local directory.

    Raises:
      ValueError: another run holds it.
    """
    if jax.process_index() != 0:
        yield
        return
    path = os.path.join(workdir, ".lock")
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"{workdir} is in use by another run (process {file.read().strip() or 'unknown'}):"
                " wait for it, or give another --workdir"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
