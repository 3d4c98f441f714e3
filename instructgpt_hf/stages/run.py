"""The identity of a stage in a run: its settings, where it reads and where it writes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from instructgpt_hf import lab
from instructgpt_hf.artifacts import atomic_folder
from instructgpt_hf.config.recipe import StageSettings
from instructgpt_hf.models.inputs import watch_batches
from instructgpt_hf.stages.output import Output, Phase
from instructgpt_hf.stages.processes import is_main, main_first


@dataclass(frozen=True)
class StageRun:
    """One stage of one run.

    Attributes:
        recipe: the recipe's name.
        settings: the stage's checked settings.
        run_folder: folder of the whole run.
        name: folder name of the stage, one of `artifacts.STAGE_FOLDERS`.
        output: where results, log lines and bars go.
    """

    recipe: str
    settings: StageSettings
    run_folder: Path
    name: str
    output: Output

    @property
    def folder(self) -> Path:
        """Folder of the finished stage."""
        return self.run_folder / self.name

    @property
    def checkpoint_folder(self) -> Path:
        """Folder of the stage's checkpoints until it is finished."""
        return self.run_folder / ".work" / self.name

    @property
    def events_folder(self) -> Path:
        """Folder of TensorBoard's files, which outlive the checkpoints."""
        return self.run_folder / "tensorboard" / self.name

    @property
    def seed(self) -> int:
        """Seed of models, data order and sampling."""
        return int(self.settings.training_args.seed)

    def open_log(self) -> None:
        """Append what is shown to the log file of the run's folder; only the main process does."""
        if is_main():
            self.output.open_log(self.run_folder)

    def log(self, text: str) -> None:
        """Print a line for the user, marked with the stage; only the main process prints."""
        if is_main():
            self.output.log(text, self.name)

    def result(self, text: str) -> None:
        """Print a result, marked with the stage; only the main process prints."""
        if is_main():
            self.output.result(text, self.name)

    @contextlib.contextmanager
    def phase(self, text: str, total: int | None = None, unit: str = "", bar: bool = True) -> Iterator[Phase]:
        """Show how far the block is, which takes a while; see `Phase`. Only the main process shows it."""
        phase = Phase(text, total, unit, self.name, bar)
        with self.output.phase(phase) if is_main() else contextlib.nullcontext():
            yield phase

    @contextlib.contextmanager
    def measuring(self, text: str) -> Iterator[None]:
        """A phase that counts the rows that go through a model, batch by batch."""
        with self.phase(text, unit="rows") as phase, watch_batches(phase.at):
            yield

    @property
    def lab_path(self) -> Path:
        """Where the run keeps the lab's data files of this seed: `data/` for seed 0."""
        return self.run_folder / (f"data-seed{self.seed}" if self.seed else "data")

    def lab_folder(self) -> Path:
        """Folder of the lab's data files; written where they are missing."""
        folder = self.lab_path
        with main_first():
            if not folder.is_dir():
                with atomic_folder(folder) as temporary:
                    lab.write(temporary, seed=self.seed)
        return folder
