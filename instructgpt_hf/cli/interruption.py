"""A command that ends before its time: SIGTERM is Ctrl-C, and what to run to go on, also under a launcher."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from instructgpt_hf.errors import Interrupted, end_worker

LOST_PEER = re.compile("Connection (closed|reset) by peer|remote process exited|Broken pipe")
LOST_PEER_TYPES = ("DistBackendError", "DistNetworkError", "DistStoreError")


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Context in which SIGTERM (Slurm, `docker stop`, Colab) raises `Interrupted`, as Ctrl-C raises KeyboardInterrupt.

    Where the block ends with an error of one of several training processes, later ones are ignored, so that the
    process can say what it has to say: launchers send it to the others when one has ended.
    """

    process = os.getpid()

    def interrupt(number: int, _frame: Any) -> NoReturn:
        end_worker(process, number)
        raise Interrupted(number)

    try:
        previous = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread, which alone may handle signals
        yield
        return
    after = previous
    try:
        yield
    except BaseException:
        after = signal.SIG_IGN if launched() else previous
        raise
    finally:
        signal.signal(signal.SIGTERM, after)


def launched() -> bool:
    """Whether torchrun or `accelerate launch` started this process."""
    return "LOCAL_RANK" in os.environ


def speaks() -> bool:
    """Whether this process says the last word for all training processes of its machine: the first one that asks.

    Any of them may have been killed, the main one too; the others end at about the same time, in any order.
    """
    if not launched():
        return True
    import psutil

    launcher = psutil.Process(os.getppid())
    said = Path(tempfile.gettempdir()) / f"instructgpt-hf-{launcher.pid}-{launcher.create_time():.2f}"
    try:
        said.touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # then several may speak
        return True
    return True


def lost_peer(error: BaseException) -> bool:
    """Whether an error of torch's communication says that another training process has ended."""
    return launched() and (type(error).__name__ in LOST_PEER_TYPES or bool(LOST_PEER.search(str(error))))


def resume_command(words: Sequence[str]) -> str:
    """The command to repeat: `instructgpt-hf` with its arguments `words`, or what launched it as several processes."""
    own = shlex.join(["instructgpt-hf", *words])
    if not words or not (launched() or any(name.startswith("ACCELERATE_") for name in os.environ)):
        return own
    import psutil

    launcher: list[str] = []
    for parent in psutil.Process().parents():
        with contextlib.suppress(psutil.Error):
            line = parent.cmdline()
            if line[-len(words) :] == list(words):
                launcher = line  # the outermost one
    if launcher:
        return shlex.join(_as_typed(launcher))
    return f"{own}, started by the launcher as before" if launched() else own


def _as_typed(line: list[str]) -> list[str]:
    """A process's command line without the interpreter that runs a script such as `bin/torchrun`."""
    interpreter, *rest = line
    if not Path(interpreter).name.startswith("python"):
        return line
    while rest and rest[0] == "-u":
        rest = rest[1:]
    script = Path(rest[0]) if rest else Path()
    return [script.name, *rest[1:]] if script.is_absolute() and not script.suffix else ["python", *rest]
