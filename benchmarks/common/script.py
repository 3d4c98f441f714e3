"""What every script does: read its command line, then measure into a result file, or draw that file."""

from __future__ import annotations

import argparse
import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from datasets.utils.logging import disable_progress_bar
from transformers.utils import logging as transformers_logging

from common.memory import BenchmarkError
from common.models import NEED_GPU
from common.results import read_runs
from instructgpt_hf._compat.quirks import quiet_environment

RESULTS = Path(__file__).parents[1] / "results"


def command_line(description: str | None, results: str) -> argparse.ArgumentParser:
    """A parser with the options of every script.

    Args:
        description: the script's docstring.
        results: name of its result file, for the help.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help=f"result file; results/{results}.json by default")
    parser.add_argument("--draw", action="store_true", help="only draw the result file, and print its table")
    return parser


def two_numbers(text: str) -> tuple[int, int]:
    """`"128:32"` as (128, 32)."""
    first, _, second = text.partition(":")
    return int(first), int(second)


def measure_or_draw(
    options: argparse.Namespace,
    name: str,
    measure: Callable[[argparse.Namespace, Path], None],
    draw: Callable[[list[dict[str, Any]], Path], None],
    table: Callable[[list[dict[str, Any]]], str],
) -> None:
    """Measure, or with `--draw` print the table of the result file and draw its picture beside it.

    Args:
        options: the command line.
        name: of the result file without `--output`.
        measure: takes the options and the path of the result file.
        draw: takes the runs of the result file and the path of the picture.
        table: the same runs in Markdown.

    Raises:
        BenchmarkError: if the file to draw has no runs.
    """
    path: Path = options.output or RESULTS / f"{name}.json"
    with quiet():
        if not options.draw:
            measure(options, path)
            return
        runs, chart = read_runs(path), path.with_suffix(".png")
        if not runs:
            raise BenchmarkError(f"{path}: nothing has been measured yet")
        draw(runs, chart)
        print(chart, table(runs), sep="\n")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no messages of the libraries within the block."""
    disable_progress_bar()
    transformers_logging.set_verbosity_error()
    with quiet_environment():
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing. is deprecated.*", category=FutureWarning)
        yield


def start(main: Callable[[], None]) -> None:
    """Run a script's `main`; a `BenchmarkError` becomes its exit message."""
    try:
        main()
    except BenchmarkError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")


def device_name() -> str:
    """`"cuda"` or `"cpu"`, as in the names of the result files."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def lacks_gpu(model: str, *trains: str) -> bool:
    """Whether the model or one way to train it needs a GPU that torch does not see; if so, print it."""
    lacking = device_name() == "cpu" and (model in NEED_GPU or "qlora" in trains)
    if lacking:
        print(f"skipped: {model} with {' and '.join(trains)} training needs a GPU, and torch sees none")
    return lacking
