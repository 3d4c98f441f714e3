"""The folder of a run: one run at a time writes into it, what killed ones left is removed, a full disk is named."""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
import platform
import shlex
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from instructgpt_hf.artifacts import STAGE_FOLDERS, atomic_text, remove_unfinished
from instructgpt_hf.errors import InstructGPTError, full_disk, read_only_cache

LOCK_FILE = ".lock"
HOLDER_FILE = ".running.json"
WRITTEN_AS_A_WHOLE = (*STAGE_FOLDERS, "evaluation", "data", "data-seed*")
_held: dict[tuple[int, Path], int] = {}  # process and folder -> thread


@contextlib.contextmanager
def hold(folder: Path, console: Console) -> Iterator[None]:
    """Context in which no other run writes into a run's folder; of several training processes, the main one holds it.

    A process loses the lock when it ends, in whatever way. A folder that cannot be written is left to later checks,
    and one that was created for the lock alone is removed again. Within the block the same thread may call it again.

    Raises:
        InstructGPTError: if another run holds the folder, naming its process; or if a disk is full inside the block.
    """
    here = (os.getpid(), folder.resolve())
    # Not through accelerate's state: the training arguments set that up later.
    if os.environ.get("RANK", "0") != "0" or _held.get(here) == threading.get_ident():
        with _named_disk_errors(folder):
            yield
        return
    if here in _held:
        raise InstructGPTError(_busy(folder, "another thread of this process"))
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    lock = _lock(folder, console)
    _held[here] = threading.get_ident()
    try:
        if lock is not None:
            _announce(folder)
            for name in WRITTEN_AS_A_WHOLE:
                remove_unfinished(folder, name)
        with _named_disk_errors(folder):
            yield
    finally:
        del _held[here]
        if lock is not None:
            _release(folder, lock, created)


@contextlib.contextmanager
def _named_disk_errors(folder: Path) -> Iterator[None]:
    """Raise what comes of a full disk or a read-only cache as one `InstructGPTError`.

    `folder` is named where the error names no file.
    """
    try:
        yield
    except Exception as error:
        # What is one already names the cache; the full disk behind it may be unnamed.
        explained = None if isinstance(error, InstructGPTError) else read_only_cache(error)
        if (text := full_disk(error, folder) or explained) is None:
            raise
        raise InstructGPTError(f"{text}, then run the same command again: it resumes.") from error


def _lock(folder: Path, console: Console) -> int | None:
    """Descriptor of the locked file, or None where the folder cannot be written or its file system has no locks."""
    file = folder / LOCK_FILE
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            return None
        try:
            _lock_descriptor(descriptor)
            # Otherwise the run that held it has just removed it.
            if file.exists() and file.stat().st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise InstructGPTError(_busy(folder, _holder(folder))) from None
            text = f"{folder}: its file system has no locks; let no other run write there"
            console.print(text, highlight=False, markup=False, soft_wrap=True)
            return None
        os.close(descriptor)


def _lock_descriptor(descriptor: int) -> None:
    """Lock a file for this process, without waiting.

    A lock of the process, not of the open file: a forked worker that outlives its killed parent must not keep it.
    """
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _announce(folder: Path) -> None:
    """Write who holds the folder, for the message of a run that finds it held."""
    started = datetime.datetime.now().astimezone().isoformat(" ", timespec="seconds")
    holder = {"process": os.getpid(), "host": platform.node(), "started": started, "command": shlex.join(sys.argv)}
    with contextlib.suppress(OSError):
        atomic_text(folder / HOLDER_FILE, json.dumps(holder))


def _holder(folder: Path) -> str:
    try:
        holder = json.loads((folder / HOLDER_FILE).read_text(encoding="utf-8"))
        return "process {process} on {host}, since {started}: {command}".format(**holder)
    except (OSError, ValueError, KeyError):  # it has just begun, or is ending
        return "another process"


def _busy(folder: Path, holder: str) -> str:
    return f"{folder}: another run writes here ({holder}). Wait for its end, stop it, or choose another --output_dir."


def _release(folder: Path, lock: int, created: list[Path]) -> None:
    """Remove the files, while no other process can hold the lock, and folders that were created for them alone."""
    for name in (HOLDER_FILE, LOCK_FILE):
        with contextlib.suppress(OSError):
            (folder / name).unlink()
    os.close(lock)
    with contextlib.suppress(OSError):  # the first that is not empty
        for path in created:
            path.rmdir()
