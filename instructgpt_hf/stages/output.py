"""What the user sees: results on standard output; log lines and bars on standard error, and all of it in log.txt."""

from __future__ import annotations

import contextlib
import datetime
import io
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from instructgpt_hf._compat.quirks import no_library_bars

LOG_FILE = "log.txt"
SECONDS_BETWEEN_LINES = 20  # where no bar can redraw itself: log files, pipes
SHORT_PHASE = 5  # seconds; the end of a phase that took less is not logged


class Phase:
    """Something that takes a while: what it is, how far it is, and for how long it has been running.

    Args:
        text: what happens, in lower case, without a full stop.
        total: how many `unit` there are; None if that is unknown.
        unit: what is counted, in the plural.
        stage: label of the line.
        bar: whether a terminal shows a bar for it; False where libraries draw bars of their own.
    """

    def __init__(self, text: str, total: int | None = None, unit: str = "", stage: str = "", bar: bool = True) -> None:
        self.text, self.total, self.unit, self.stage, self.bar = text, total, unit, stage, bar
        self.started = self._counted_from = time.monotonic()
        self.done = self._first = 0
        self.latest = ""  # newest measurements, shown behind the counts
        self.part = ""  # what it does at the moment, if that takes long itself

    def begin(self, done: int, total: int) -> None:
        """Begin to count; `done` were done before, by another process."""
        self.done = self._first = done
        self.total, self._counted_from = total, time.monotonic()

    def at(self, done: int, total: int | None = None) -> None:
        """Set how far it is; a smaller count than before starts another pass."""
        if done < self.done:
            self._first, self._counted_from = 0, time.monotonic()
        self.done, self.total = done, self.total if total is None else total

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def _seconds_each(self) -> float | None:
        counted = self.done - self._first
        return (time.monotonic() - self._counted_from) / counted if counted > 0 else None

    def short(self) -> str:
        """`40/156 3.1/s 0:13<0:37`: count, rate, time since the start, time left."""
        each = self._seconds_each()
        left = "" if each is None or not self.total else f"<{_clock(each * (self.total - self.done))}"
        count = f"{self.done}/{self.total}" if self.total else ""
        return " ".join(part for part in (count, _rate(each), _clock(self.seconds) + left, self.part) if part)

    def long(self) -> str:
        """`training: 40 of 156 steps, 3.1/s, 0:13 elapsed, 0:37 left: loss 1.234`."""
        each, parts = self._seconds_each(), []
        if self.total:
            parts.append(f"{self.done:,} of {self.total:,} {self.unit}".rstrip())
        if each is not None:
            parts.append(_rate(each))
        parts.append(f"{_clock(self.seconds)} elapsed")
        if each is not None and self.total:
            parts.append(f"{_clock(each * (self.total - self.done))} left")
        if self.part:
            parts.append(self.part)
        return f"{self.text}: {', '.join(parts)}" + (f": {self.latest}" if self.latest else "")

    def end(self) -> str:
        """`training: 156 steps in 0:50: loss 1.234`."""
        counted = f"{self.done:,} {self.unit}" if self.unit else "done"
        return f"{self.text}: {counted} in {_clock(self.seconds)}" + (f": {self.latest}" if self.latest else "")


class Output:
    """Where the words of a run go.

    Results are printed on standard output. Log lines are printed on standard error, where a terminal also gets a bar
    for every phase, and anything else a line for it every `SECONDS_BETWEEN_LINES`. Everything is appended to the log
    file with the time, once `open_log` has named its folder and the folder exists. Values are printed as they are,
    without markup.

    Use it as a context manager: it ends with the phases' bars gone, and notes an error in the log file.

    Args:
        console: takes results and log lines alike, instead of standard output and standard error.
        quiet: print results only. The log file is written all the same.
    """

    def __init__(self, console: Console | None = None, quiet: bool = False) -> None:
        self.console, self.results = console or Console(stderr=True), console or Console()
        self.quiet = quiet
        self._folder: Path | None = None
        self._opens = 0.0
        self._unwritten: list[str] = []
        self._lock = threading.RLock()
        self._phases: list[Phase] = []
        self._stop: threading.Event | None = None
        self._bars: Progress | None = None
        self._silenced = contextlib.ExitStack()

    def __enter__(self) -> Output:
        if self.quiet:
            self._silenced.enter_context(no_library_bars())
        return self

    def __exit__(self, _kind: Any, error: BaseException | None, _trace: Any) -> None:
        self._silenced.close()
        self._phases.clear()
        self._end_bars()
        if error is not None:
            self._write(f"ended: {str(error).strip() or type(error).__name__}")

    def open_log(self, folder: Path, after: float = 0) -> None:
        """Append all lines, earlier ones too, to the log file in `folder` as soon as the folder exists.

        Args:
            after: seconds to wait first, so that a run that is refused at once leaves no file.
        """
        self._folder, self._opens = folder, time.monotonic() + after

    def log(self, text: str, stage: str = "") -> None:
        """Print a line on standard error, marked with the stage."""
        if not self.quiet:
            self.console.print(_labelled(stage, text), soft_wrap=True)
        self._write(_labelled(stage, text).plain)

    def result(self, shown: RenderableType, stage: str = "") -> None:
        """Print a result on standard output: a line as it is, marked with the stage, or a table."""
        line = isinstance(shown, str)
        shown = _labelled(stage, shown) if isinstance(shown, str) else shown
        self.results.print(shown, soft_wrap=line)
        plain = Console(file=io.StringIO(), width=80, color_system=None)
        plain.print(shown, soft_wrap=line)
        lines = plain.file.getvalue().splitlines()  # type: ignore[attr-defined]
        self._write("\n".join(line.rstrip() for line in lines).rstrip())

    @contextlib.contextmanager
    def phase(self, phase: Phase) -> Iterator[Phase]:
        """Show inside the block how far a phase is; phases may stand inside others."""
        self._line(phase, phase.text)
        self._phases.append(phase)
        task = self._begin_bar(phase)
        try:
            yield phase
        finally:
            if phase in self._phases:
                self._phases.remove(phase)
            if task is not None and self._bars is not None:
                self._bars.remove_task(task)
            if not self._phases:
                self._end_bars()
        if phase.seconds >= SHORT_PHASE:
            self._line(phase, phase.end())

    def _begin_bar(self, phase: Phase) -> Any:
        if self._stop is None:
            self._stop = threading.Event()
            threading.Thread(target=self._show_life, args=(self._stop,), daemon=True).start()
        if self.quiet or not phase.bar or not self._animated:
            return None
        if self._bars is None:
            redirect = self.results.is_terminal  # else what is printed meanwhile would leave a redirected output
            self._bars = Progress(*_columns(), console=self.console, transient=True, redirect_stdout=redirect)
            self._bars.start()
        return self._bars.add_task(phase.text, total=None, phase=phase)

    def _end_bars(self) -> None:
        if self._stop is not None:
            self._stop.set()
        if self._bars is not None:
            self._bars.stop()
        self._stop = self._bars = None

    def _show_life(self, stop: threading.Event) -> None:
        """Log how far the innermost phase is, again and again; also while one step of it takes very long."""
        while not stop.wait(SECONDS_BETWEEN_LINES):
            for phase in self._phases[-1:]:
                self._line(phase, phase.long())

    def _line(self, phase: Phase, text: str) -> None:
        """Log a line about a phase; a terminal shows it only where there is no bar."""
        if self._animated and (phase.bar or phase.seconds >= SHORT_PHASE):
            self._write(_labelled(phase.stage, text).plain)
        else:
            self.log(text, phase.stage)

    @property
    def _animated(self) -> bool:
        return self.console.is_terminal and not self.console.is_dumb_terminal

    def _write(self, text: str) -> None:
        now = datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S")
        with self._lock:
            self._unwritten += [f"{now}  {line}\n" for line in text.split("\n")]
            if self._folder is None or time.monotonic() < self._opens or not self._folder.is_dir():
                return
            # What the models need more than this log is checked where it is written.
            with contextlib.suppress(OSError), (self._folder / LOG_FILE).open("a", encoding="utf-8") as stream:
                stream.writelines(self._unwritten)
                self._unwritten.clear()


class _Bar(BarColumn):
    """A bar whose length is that of the task's phase."""

    def render(self, task: Task) -> Any:
        phase: Phase = task.fields["phase"]
        task.completed, task.total = phase.done, phase.total
        return super().render(task)


class _State(ProgressColumn):
    """Count, rate, time and measurements of the task's phase."""

    def render(self, task: Task) -> Text:
        phase: Phase = task.fields["phase"]
        return Text(f"{phase.short()}  {phase.latest}".rstrip())


def _columns() -> list[ProgressColumn]:
    return [
        TextColumn("{task.fields[phase].stage:>8}", style="bold", markup=False),
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
        _Bar(bar_width=10),
        _State(table_column=Column(ratio=1, no_wrap=True, overflow="crop")),
    ]


def _labelled(stage: str, text: str) -> Text:
    return Text.assemble((f"{stage:>8}", "bold"), "  ", text) if stage else Text(text)


def _rate(each: float | None) -> str:
    if each is None or each <= 0:
        return ""
    return f"{1 / each:.1f}/s" if each < 1 else f"{each:.1f} s each"


def _clock(seconds: float) -> str:
    """`1:05`, `2:00:05`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
