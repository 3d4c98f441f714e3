"""The identity of a stage in a run: its settings, where it reads and where it writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from instructgpt_hf import lab
from instructgpt_hf.artifacts import atomic_folder
from instructgpt_hf.config.recipe import StageSettings
from instructgpt_hf.stages.processes import is_main, main_first


@dataclass(frozen=True)
class StageRun:
    """One stage of one run.

    Attributes:
        recipe: the recipe's name.
        settings: the stage's checked settings.
        run_folder: folder of the whole run.
        name: folder name of the stage, one of `artifacts.STAGE_FOLDERS`.
        console: where progress is printed.
    """

    recipe: str
    settings: StageSettings
    run_folder: Path
    name: str
    console: Console

    @property
    def folder(self) -> Path:
        """Folder of the finished stage."""
        return self.run_folder / self.name

    @property
    def checkpoint_folder(self) -> Path:
        """Folder of the stage's checkpoints until it is finished."""
        return self.run_folder / ".work" / self.name

    @property
    def seed(self) -> int:
        """Seed of models, data order and sampling."""
        return int(self.settings.training_args.seed)

    def log(self, text: str) -> None:
        """Print a line for the user, marked with the stage; only the main process prints."""
        if is_main():
            self.console.print(f"[bold]{self.name:>8}[/bold]  {text}", highlight=False, soft_wrap=True)

    def lab_folder(self) -> Path:
        """Folder of the lab's data files of this seed, `data/` for seed 0; written where they are missing."""
        folder = self.run_folder / (f"data-seed{self.seed}" if self.seed else "data")
        with main_first():
            if not folder.is_dir():
                with atomic_folder(folder) as temporary:
                    lab.write(temporary, seed=self.seed)
        return folder
