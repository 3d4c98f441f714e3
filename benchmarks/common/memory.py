"""Clock and peak memory of a process. Runs in the peer's environment too, so it needs torch only."""

from __future__ import annotations

import contextlib
import re
import time
from pathlib import Path

import torch

MIB = 2**20


class BenchmarkError(Exception):
    """A benchmark cannot continue, most often because its contenders do not compute the same thing."""


def now(cuda: bool) -> float:
    """Seconds of the clock, after the GPU has finished its work."""
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


class PeakMemory:
    """Peak memory of this process above its memory at `start` (after imports, or after model loading as well).

    On a GPU the bytes that torch has allocated, else the resident set, whose high-water mark Linux lets a process
    reset.
    """

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda
        self.baseline = 0

    def start(self) -> None:
        """Take the baseline."""
        self.reset()
        self.baseline = self._held()

    def reset(self) -> None:
        """Forget the peak so far; the baseline stays."""
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            return
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")

    def peak_mib(self) -> float:
        """Highest memory since the last reset, in MiB above the baseline."""
        peak = torch.cuda.max_memory_allocated() if self.cuda else _resident("VmHWM")
        return (peak - self.baseline) / MIB

    def held_mib(self) -> float:
        """Present memory, in MiB above the baseline."""
        return (self._held() - self.baseline) / MIB

    def _held(self) -> int:
        return torch.cuda.memory_allocated() if self.cuda else _resident("VmRSS")


def _resident(name: str) -> int:
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        raise BenchmarkError("memory on a CPU is read from /proc, which this system does not have") from None
    return 1024 * int(re.search(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE)[1])  # type: ignore[index]
