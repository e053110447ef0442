"""What to do when the disk is full."""

import contextlib
import errno
from collections.abc import Iterator

NUMBERS = (errno.ENOSPC, errno.EDQUOT)
_WORDS = ("No space left on device", "Disk quota exceeded")


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that a disk or a quota is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in NUMBERS:
            return True
        if any(words in str(error) for words in _WORDS):  # TensorStore says so in a ValueError
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def explained(directory: str, remedy: str) -> Iterator[None]:
    """Turns the errors of a full disk into one that says what to do.

    Args:
      directory: where is written to, if the error does not say it.
      remedy: the end of the message.

    Raises:
      OSError: what failed was that the disk is full.
    """
    try:
        yield
    except Exception as error:
        if not is_full(error):
            raise
        where = getattr(error, "filename", None) or directory
        raise OSError(f"no space is left on the disk of {where}: {remedy}") from error
