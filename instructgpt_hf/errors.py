"""Errors a user can act on, all of one family so that the command line prints them without a traceback."""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import re
import shutil
import signal
from collections.abc import Iterable, Iterator, Sequence

NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
CACHE_VARIABLES = ("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_XET_CACHE")
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
# Of libraries that pass on the system's message in an error of their own; the last two are all that torch.save says.
_SYSTEM = "|".join(re.escape(os.strerror(number)) for number in NO_SPACE)
NO_SPACE_TEXT = re.compile(
    f"{_SYSTEM}|Not enough disk space|inline_container.*unexpected pos|StreamWriter failed writing"
)


class InstructGPTError(ValueError):
    """Something in the user's input is wrong; the message says what, where, and what would be right."""


class Interrupted(KeyboardInterrupt):
    """The user, or a scheduler, stopped the program; `signal` says by what (`SIGINT` is Ctrl-C)."""

    def __init__(self, signal: int = signal.SIGINT) -> None:
        super().__init__()
        self.signal = signal


def end_worker(process: int, number: int) -> None:
    """In a forked worker, which has inherited the signal handler of `process`, let SIGTERM end it as by default.

    Pools end their workers so.
    """
    if os.getpid() != process and number == signal.SIGTERM:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


class Problems:
    """Collects every problem of one check so that all of them are reported at once."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.items: list[str] = []

    def add(self, problem: str) -> None:
        self.items.append(problem)

    def raise_if_any(self, limit: int = 20) -> None:
        """Raise one `InstructGPTError` that lists the problems added, up to `limit`; the rest is counted."""
        if not self.items:
            return
        lines = [f"  - {item}" for item in self.items[:limit]]
        if len(self.items) > limit:
            lines.append(f"  ... and {len(self.items) - limit} more")
        raise InstructGPTError("\n".join([self.title, *lines]))


def first_line(error: BaseException) -> str:
    """First line of an error's message, or the name of its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def full_disk(error: BaseException, folder: str | os.PathLike[str]) -> str | None:
    """What to say of an error that comes of a full disk, or of a user's quota on it; None for any other.

    Args:
        error: as it was raised; what it was raised from counts too.
        folder: where the program was writing, in case the error names no file.
    """
    for cause in _causes(error):
        full = isinstance(cause, OSError) and cause.errno in NO_SPACE
        if full or NO_SPACE_TEXT.search(str(cause)):
            place = getattr(cause, "filename", None) or os.fspath(folder)
            existing = place
            while not os.path.exists(existing):
                existing = os.path.dirname(os.path.abspath(existing))
            free = shutil.disk_usage(existing).free / 2**20
            return f"{place}: the disk is full ({first_line(cause)}; {free:.0f} MiB are free). Free some space"
    return None


def read_only_cache(error: BaseException) -> str | None:
    """What to say of an error that comes of a Hugging Face cache that cannot be written; None for any other.

    Args:
        error: as it was raised; what it was raised from counts too.
    """
    home = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache"), "huggingface")
    caches = [home, *filter(None, map(os.environ.get, CACHE_VARIABLES))]
    places = [os.path.abspath(os.path.expanduser(cache)) for cache in caches]
    for cause in _causes(error):
        file = os.path.abspath(os.fsdecode(getattr(cause, "filename", None) or os.sep))
        inside = any(file == place or file.startswith(place + os.sep) for place in places)
        if isinstance(cause, OSError) and cause.errno in NOT_WRITABLE and inside:
            return (
                f"{file}: the cache of Hugging Face cannot be written ({cause.strerror}). Set HF_HOME, or for "
                "datasets alone HF_DATASETS_CACHE, to a folder that can; models that are in the cache are read "
                "without writing under HF_HUB_OFFLINE=1"
            )
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, and what it was raised from."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


@contextlib.contextmanager
def loading_errors(message: str, *kinds: type[Exception]) -> Iterator[None]:
    """Raise a library's errors inside the block as `InstructGPTError`: `message` and the first line of the error.

    `kinds` are the types of errors, by default `OSError` and `ValueError`.
    """
    kinds = kinds or (OSError, ValueError)
    try:
        yield
    except kinds as error:
        raise InstructGPTError(f"{message}: {read_only_cache(error) or first_line(error)}") from error


def nearest(word: str, choices: Iterable[str]) -> str:
    """A hint that names the choice closest to `word`, or all of them where none is close and they are few."""
    known: Sequence[str] = sorted(choices)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"choose from {', '.join(known)}" if 0 < len(known) <= 12 else ""
