"""Peak memory of a process. Imported in every environment that a benchmark measures, so it needs torch only."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import torch

MIB = 2**20


class BenchmarkError(Exception):
    """A benchmark cannot go on, most of all because its contenders do not compute the same thing."""


class PeakMemory:
    """Peak memory of this process above what it held at `start`: after imports, or after imports and model loading.

    On a GPU torch's allocated bytes; else the resident set, whose high-water mark Linux lets a process set back.
    """

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda
        self.baseline = 0

    def start(self) -> None:
        """Take the baseline."""
        self.reset()
        self.baseline = self._now()

    def reset(self) -> None:
        """Forget the peak so far, and keep the baseline."""
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            return
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")

    def peak_mib(self) -> float:
        """Highest since the last reset, in MiB above the baseline."""
        peak = torch.cuda.max_memory_allocated() if self.cuda else _resident("VmHWM")
        return (peak - self.baseline) / MIB

    def held_mib(self) -> float:
        """Now, in MiB above the baseline."""
        return (self._now() - self.baseline) / MIB

    def _now(self) -> int:
        return torch.cuda.memory_allocated() if self.cuda else _resident("VmRSS")


def _resident(name: str) -> int:
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        raise BenchmarkError("memory on a CPU is read from /proc, which this system does not have") from None
    return 1024 * int(re.search(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE)[1])  # type: ignore[index]
