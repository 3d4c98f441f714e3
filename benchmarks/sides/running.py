"""Starts the sides' processes and asks them for iterations."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.memory import BenchmarkError

from sides.job import OURS, PEER, Job

FOLDER = Path(__file__).parent
SCRIPTS = {PEER: "peer.py", OURS: "ours.py"}
PEER_VERSION = "1.12.0"


class SideProcess:
    """A running side.

    Args:
        name: `PEER` or `OURS`.
        python: of its environment.
        job: written to `folder`.
        folder: for the job and the process's messages.
    """

    def __init__(self, name: str, python: str, job: Job, folder: Path) -> None:
        self.name = name
        self.messages = folder / f"{name}.log"
        job.write(folder / f"{name}.json")
        # `common` and `sides` stand in the folder of the scripts.
        path = os.pathsep.join(filter(None, [str(FOLDER.parent), os.environ.get("PYTHONPATH")]))
        with self.messages.open("w", encoding="utf-8") as messages:
            self.process = subprocess.Popen(
                [python, str(FOLDER / SCRIPTS[name]), str(folder / f"{name}.json")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=messages,
                text=True,
                env={**os.environ, "PYTHONPATH": path},
            )

    def read(self) -> dict[str, Any]:
        """The next report.

        Raises:
            BenchmarkError: if the process ends instead.
        """
        line = self.process.stdout.readline()
        if not line:
            raise BenchmarkError(f"{self.name} ended:\n{self.messages.read_text(encoding='utf-8')[-3000:]}")
        return json.loads(line)

    def iterate(self) -> dict[str, Any]:
        """Run one iteration; its report."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.read()

    def stop(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()


@contextmanager
def running(name: str, python: str, job: Job) -> Iterator[tuple[SideProcess, dict[str, Any]]]:
    """A side with its models loaded, and its report of their memory."""
    with tempfile.TemporaryDirectory() as folder:
        side = SideProcess(name, python, job, Path(folder))
        try:
            yield side, side.read()
        finally:
            side.stop()


def both_pythons(peer: str) -> dict[str, str]:
    """The Python of each side."""
    return {PEER: peer, OURS: sys.executable}


def peer_versions(python: str | None) -> dict[str, str]:
    """Versions of the libraries in the peer's environment.

    Raises:
        BenchmarkError: if there is none, it does not run, or it has another TRL than `PEER_VERSION`.
    """
    if python is None:
        raise BenchmarkError("--peer_python is needed to measure")
    names = ["torch", "transformers", "trl", "peft", "accelerate", "datasets"]
    code = f"import json, importlib.metadata as m; print(json.dumps({{n: m.version(n) for n in {names}}}))"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise BenchmarkError(f"--peer_python {python}: {getattr(error, 'stderr', None) or error}") from None
    versions = json.loads(done.stdout)
    if versions["trl"] != PEER_VERSION:
        raise BenchmarkError(f"--peer_python {python} has trl {versions['trl']}; the peer is trl {PEER_VERSION}")
    return versions
