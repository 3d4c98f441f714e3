"""What the benchmarks share: command line, machine and versions, interleaved timing, JSON results, the house style."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

# Nothing is fetched, and a timing holds no progress bars. Before any of the libraries is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import matplotlib
import torch
from datasets.utils.logging import disable_progress_bar
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from process import BenchmarkError, PeakMemory
from transformers.utils import logging as transformers_logging

from instructgpt_hf._compat.quirks import quiet_environment
from instructgpt_hf.evaluation.plots.style import STYLE
from instructgpt_hf.stages.lifecycle import versions

__all__ = ["BenchmarkError", "PeakMemory"]  # from process, for the scripts of this environment
RESULTS = Path(__file__).parent / "results"
# 97.5 % points of Student's t by degrees of freedom.
_STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def command_line(description: str | None, results: str) -> argparse.ArgumentParser:
    """A parser with the options that every script has.

    Args:
        description: the script's docstring.
        results: name of its result file, for the help.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help=f"result file; results/{results}.json by default")
    parser.add_argument("--draw", action="store_true", help="only draw the result file, and print its table")
    return parser


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, and no messages of the libraries, for the length of the block."""
    disable_progress_bar()
    transformers_logging.set_verbosity_error()
    with quiet_environment():
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing. is deprecated.*", category=FutureWarning)
        yield


def measure_or_draw(
    options: argparse.Namespace,
    path: Path,
    measure: Callable[[argparse.Namespace, Path], None],
    draw: Callable[[Path], Path],
    table: Callable[[Path], str],
) -> None:
    """What a script does: measure, or with `--draw` the picture and the table of its result file."""
    with quiet():
        if options.draw:
            print(draw(path))
            print(table(path))
        else:
            measure(options, path)


def start(main: Callable[[], None]) -> None:
    """Run a script's `main`; a `BenchmarkError` is its last line."""
    try:
        main()
    except BenchmarkError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")


def device_name(cuda: bool | None = None) -> str:
    """`"cuda"` or `"cpu"`, as in the names of the result files."""
    return "cuda" if (torch.cuda.is_available() if cuda is None else cuda) else "cpu"


def machine() -> dict[str, Any]:
    """Hardware that decides the numbers; nothing that names the machine."""
    found: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": f"{platform.system()} {platform.machine()}",
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "gpu_memory_gib": round(properties.total_memory / 2**30, 1)}
        found |= {"cuda": torch.version.cuda}
    return found


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def header(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Date, command, versions and machine of a run.

    Args:
        arguments: the command line after the script's name; that of this process by default.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    script = Path(sys.argv[0]).name if arguments is None else ""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", f"benchmarks/{script}", *words]),
        "versions": versions(),
        "machine": machine(),
    }


def interleave(functions: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds that each function returns, measured A B A B so that a disturbance hits all of them.

    Args:
        functions: each does its work once and returns how long it took.
        rounds: how often all of them run.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            seconds[name].append(function())
    return seconds


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Minimum, median and all values."""
    return {"min": min(values), "median": statistics.median(values), "all": list(values)}


def ratios(slow: Sequence[float], fast: Sequence[float]) -> dict[str, Any]:
    """How many times longer `slow` takes than `fast`: of the minima, of the medians, and round by round."""
    return {
        "min": min(slow) / min(fast),
        "median": statistics.median(slow) / statistics.median(fast),
        "all": [a / b for a, b in zip(slow, fast, strict=True)],
    }


def mean_interval(values: Sequence[float]) -> dict[str, float]:
    """Mean with its 95 % interval by Student's t, for at most ten independent runs; no interval for a single one."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return {"mean": mean, "low": mean, "high": mean}
    half = _STUDENT[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def in_subprocess(script: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Run a script in a process of its own and return the JSON of its last line of output.

    Raises:
        BenchmarkError: if it fails, with the end of what it said.
    """
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        raise BenchmarkError(f"{shlex.join(arguments)} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def write_run(path: Path, run: dict[str, Any], same: Sequence[str]) -> None:
    """Put a run into a result file in the place of the one that agrees with it in the keys `same`, or at the end."""
    runs = read_runs(path)
    key = [run[name] for name in same]
    places = [index for index, other in enumerate(runs) if [other[name] for name in same] == key]
    if places:
        runs[places[0]] = run
    else:
        runs.append(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"runs": rounded(runs)}, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_runs(path: Path) -> list[dict[str, Any]]:
    """The runs in a result file; none if it does not exist."""
    if not path.is_file():
        return []
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["runs"]
    return found


def measured_runs(path: Path) -> list[dict[str, Any]]:
    """The runs in a result file.

    Raises:
        BenchmarkError: if there are none.
    """
    runs = read_runs(path)
    if not runs:
        raise BenchmarkError(f"{path}: nothing has been measured yet")
    return runs


def table_row(cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def rounded(value: Any, digits: int = 5) -> Any:
    """`value` with every float, however deep, cut to significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item, digits) for item in value]
    return value


@contextlib.contextmanager
def figure(path: Path, width: float, height: float) -> Iterator[Any]:
    """An empty figure in the style of the package's pictures, written to `path` at the end of the block."""
    with matplotlib.rc_context(STYLE):
        made = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(made)
        yield made
        path.parent.mkdir(parents=True, exist_ok=True)
        made.savefig(path, dpi=160)
