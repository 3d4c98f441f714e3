"""Result files and the statistics in them: date, versions, machine, ratios, means with intervals."""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import operator
import os
import platform
import re
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from instructgpt_hf.stages.lifecycle import versions

# 97.5 % points of Student's t by degrees of freedom.
_STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def header() -> dict[str, Any]:
    """Date, command, versions and machine of this run."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "versions": versions(),
        "machine": machine(),
    }


def machine() -> dict[str, Any]:
    """The hardware that decides the numbers, without names that identify the machine."""
    hardware: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": f"{platform.system()} {platform.machine()}",
    }
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        hardware |= {"gpu": gpu.name, "gpu_memory_gib": round(gpu.total_memory / 2**30, 1), "cuda": torch.version.cuda}
    return hardware


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def write_run(path: Path, run: dict[str, Any], same: Sequence[str]) -> None:
    """Write a run into a result file, in place of the earlier run with equal values of the keys `same`."""
    runs = read_runs(path)
    for index, other in enumerate(runs):
        if all(other[name] == run[name] for name in same):
            runs[index] = run
            break
    else:
        runs.append(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"runs": rounded(runs)}, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_runs(path: Path) -> list[dict[str, Any]]:
    """The runs in a result file; none if it does not exist."""
    runs: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.is_file() else []
    return runs


def rounded(value: Any, digits: int = 5) -> Any:
    """`value` with every float in it rounded to significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item, digits) for item in value]
    return value


def interleave(functions: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds that each function returns, run in turns (A B A B), so that a disturbance affects all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            seconds[name].append(function())
    return seconds


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Minimum, median and all values."""
    return {"min": min(values), "median": statistics.median(values), "all": list(values)}


def ratios(slow: Sequence[float], fast: Sequence[float]) -> dict[str, Any]:
    """How many times longer `slow` takes than `fast`: ratio of the minima, of the medians, and of each round."""
    return {
        "min": min(slow) / min(fast),
        "median": statistics.median(slow) / statistics.median(fast),
        "all": list(map(operator.truediv, slow, fast)),
    }


def mean_interval(values: Sequence[float]) -> dict[str, float]:
    """Mean with its 95 % interval by Student's t, for at most ten independent runs; a single run has no interval."""
    mean = statistics.fmean(values)
    half = _STUDENT[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return {"mean": mean, "low": mean - half, "high": mean + half}


def paired(
    ends: dict[tuple[str, int], dict[str, float]], first: str, second: str, measures: Sequence[str]
) -> dict[str, Any]:
    """Two arms over the seeds that both have, as means with 95 % intervals.

    Args:
        ends: measures by arm and seed.
        first: an arm.
        second: the other arm.
        measures: those whose differences are taken.

    Returns:
        The common `seeds`, every measure of each arm, and under `<second>_minus_<first>` the differences by seed.
    """
    seeds = sorted({seed for _, seed in ends if {(first, seed), (second, seed)} <= ends.keys()})
    summary: dict[str, Any] = {"seeds": seeds}
    if not seeds:
        return summary
    for arm in (first, second):
        names = ends[arm, seeds[0]]
        summary[arm] = {name: mean_interval([ends[arm, seed][name] for seed in seeds]) for name in names}
    summary[f"{second}_minus_{first}"] = {
        name: mean_interval([ends[second, seed][name] - ends[first, seed][name] for seed in seeds])
        for name in measures
    }
    return summary
