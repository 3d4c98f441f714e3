"""What every stage does: find its data and models, decide whether there is work, record what was done."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from datasets.utils import disable_progress_bars, enable_progress_bars
from huggingface_hub import metadata_load
from rich.console import Console
from transformers.utils import logging

from instructgpt_hf import __version__, lab
from instructgpt_hf.artifacts import STAGE_FILE, StageArtifact, atomic_folder, fingerprint
from instructgpt_hf.config.device import world_size
from instructgpt_hf.config.model import quantization_config
from instructgpt_hf.config.recipe import StageSettings
from instructgpt_hf.config.settings import neutral_keys
from instructgpt_hf.data.pretraining import pretraining_rows, split_stream, with_text
from instructgpt_hf.data.sources import describe, describe_stream, load_split
from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.lab import LAB_MODEL, LAB_PREFIX, lab_kind
from instructgpt_hf.models.loading import resolve_source
from instructgpt_hf.stages.processes import is_main, main_first, shards_weights, wait
from instructgpt_hf.stages.ranking_data import HELD_BACK_LIMIT, read_rankings

PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes", "huggingface_hub")
LONG_DATASET = 5_000
SLOW_TO_LOAD = 2**30


@dataclass
class StageRun:
    """One stage of one run: its settings, where it reads and where it writes.

    Attributes:
        recipe: the recipe's name.
        settings: the stage's checked settings.
        run_folder: folder of the whole run.
        name: folder name of the stage, one of `artifacts.STAGES`.
        console: where progress goes.
        data: what was read, by role, for stage.json.
    """

    recipe: str
    settings: StageSettings
    run_folder: Path
    name: str
    console: Console
    data: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where the finished stage stands."""
        return self.run_folder / self.name

    @property
    def checkpoint_folder(self) -> Path:
        """Where the stage's checkpoints are until it is finished."""
        return self.run_folder / ".work" / self.name

    @property
    def seed(self) -> int:
        """Seed of models, data order and sampling."""
        return int(self.settings.training_args.seed)

    def log(self, text: str) -> None:
        """A line for the user, marked with the stage."""
        if is_main():
            self.console.print(f"[bold]{self.name:>8}[/bold]  {text}", highlight=False, soft_wrap=True)

    def training_arguments(self) -> Any:
        """The stage's TRL configuration, writing into the work folder and never to the Hub.

        The finished stage is pushed as a whole; the Trainer would create a repository of its own and push
        checkpoints.
        """
        args = self.settings.training_args
        args.output_dir, args.push_to_hub = str(self.checkpoint_folder), False
        check_launch(args, self.name)
        return args

    # Data

    def dataset(
        self, name: str, config: str | None, split: str, role: str, streaming: bool = False
    ) -> Dataset | IterableDataset:
        """Load one dataset and note it for stage.json.

        The content of a stream is not read, so its fingerprint is that of its name and revision; of a local file, also
        of its size and samples.

        Raises:
            InstructGPTError: if it cannot be read or has no rows.
        """
        source, split = self._lab_file(name, split, role) if name.startswith(LAB_PREFIX) else (name, split)
        if Path(source).is_file():
            disable_progress_bars()
        dataset = load_split(source, split, config, role, streaming)
        if streaming:
            self.data[role] = describe_stream(source, split, config)
        else:
            (enable_progress_bars if len(dataset) > LONG_DATASET else disable_progress_bars)()
            self.data[role] = describe(dataset, source, split)
        self.data[role] |= {"source": name, "config": config}
        return dataset

    def _lab_file(self, name: str, split: str, role: str) -> tuple[str, str]:
        kind = lab_kind(name, role)
        return str(lab_folder(self.run_folder, self.seed) / f"{kind}.{split}.jsonl"), split

    def test_split(self) -> str | None:
        """The split to measure on, or None if a part of the train split must be held back.

        A single local file has no splits, so a part of it is held back whatever the split is called.
        """
        arguments = self.settings.data_args
        name: str = arguments.dataset_name
        split: str | None = arguments.dataset_test_split or ("test" if name.startswith(LAB_PREFIX) else None)
        return None if Path(name).expanduser().is_file() else split

    def train_and_test(self, role: str) -> tuple[Dataset | IterableDataset, Dataset]:
        """The stage's dataset, and the rows held back from training for measuring.

        Held back is `dataset_test_split`, the lab's own test split, or a tenth of the train split, at most 200 rows.
        Rankings come in their one form (`data.rankings.ranking_rows`).

        Raises:
            InstructGPTError: if there are too few rows to hold one back.
        """
        if self.name == "reward":
            return read_rankings(self, role)
        arguments = self.settings.data_args
        name, config = arguments.dataset_name, arguments.dataset_config
        train = self.dataset(name, config, arguments.dataset_train_split, role)
        if (test_split := self.test_split()) is not None:
            return train, self.dataset(name, config, test_split, f"{role}_test")
        if len(train) < 2:
            raise InstructGPTError(
                f"{role}: {name} has {len(train)} row; at least 2 are needed to hold one back for measuring."
            )
        held_back = min(HELD_BACK_LIMIT, max(1, len(train) // 10))
        parts = train.train_test_split(test_size=held_back, seed=0)
        self.data[role]["held_back"] = held_back
        return parts["train"], parts["test"]

    def pretraining_text(self, setting: str, value: float) -> tuple[Dataset | IterableDataset, Dataset] | None:
        """Pretraining text to train on and some held back for measuring, or None if `value` is 0.

        The split is the same in every stage, so no stage trains on what another one measures. Of a stream the first
        rows are held back.

        Raises:
            InstructGPTError: if `value` is set but no dataset is.
        """
        arguments = self.settings.data_args
        name, config = arguments.pretraining_dataset_name, arguments.pretraining_dataset_config
        if not value:
            return None
        if name is None:
            raise InstructGPTError(
                f"{setting} = {value}: needs pretraining_dataset_name, the text to mix in; {setting}: 0 does without."
            )
        split, streaming = arguments.pretraining_dataset_split, arguments.pretraining_streaming
        text, where = self.dataset(name, config, split, "pretraining", streaming), f"pretraining: {name}"
        text = with_text(text, arguments.pretraining_dataset_text_field, where)
        if not isinstance(text, IterableDataset):
            text = pretraining_rows(text, where)
        if name.startswith(LAB_PREFIX):
            held_back = self.dataset(name, config, "test", "pretraining_test")
            return text, pretraining_rows(held_back, "pretraining test")
        if isinstance(text, IterableDataset):
            return split_stream(text, HELD_BACK_LIMIT, where)
        if len(text) < 2:
            raise InstructGPTError(f"pretraining: {name} has {len(text)} document; at least 2 are needed.")
        parts = text.train_test_split(test_size=min(HELD_BACK_LIMIT, max(1, len(text) // 20)), seed=0)
        return parts["train"], parts["test"]

    # Whether there is anything to do

    def fingerprint(self, inputs: dict[str, Any], without: Sequence[str] = ()) -> str:
        """Hash of all that determines the result: settings but those `without`, data, models read, package version."""
        left_out = neutral_keys(self.settings.stage).union(without)
        values = {key: value for key, value in self.settings.changed().items() if key not in left_out}
        data = {role: item["fingerprint"] for role, item in self.data.items()}
        if world_size() > 1:  # which the batch grows with
            values["processes"] = world_size()
        return fingerprint({"stage": self.name, "values": values, "data": data, "version": __version__, **inputs})

    def finished(self, mark: str) -> StageArtifact | None:
        """The stage's record if it is finished and nothing that determines it has changed."""
        if not (self.folder / STAGE_FILE).is_file():
            return None
        artifact = StageArtifact.load(self.folder)
        if artifact.fingerprint != mark:
            self.log("finished before, but its settings, data or earlier stages have changed: training again")
            return None
        if is_main() and self.worked_on(mark):  # the process was killed before it dropped its checkpoints
            self._drop_work()
        self.log(f"already finished and unchanged, skipped ({self.folder})")
        return artifact

    def worked_on(self, mark: str) -> bool:
        """Whether the work folder is that of exactly this stage."""
        note = self.checkpoint_folder / "fingerprint"
        return note.is_file() and note.read_text(encoding="utf-8") == mark

    def check_folder(self) -> None:
        """Make sure that the stage's folder can be written, without writing anything.

        Raises:
            InstructGPTError: if it cannot, or if a file has its name.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise InstructGPTError(
                f"{self.folder}: is a file where the stage's folder goes; choose another --output_dir."
            )
        # `os.path.exists`, because `Path.exists` raises inside a folder that may not be searched.
        parents = (self.run_folder, *self.run_folder.absolute().parents)
        existing = next(path for path in parents if os.path.exists(path))
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            reason = "no permission" if existing.is_dir() else "is a file"
            raise InstructGPTError(
                f"{self.run_folder}: cannot be written ({existing}: {reason}); choose another --output_dir."
            )

    def prepare_work(self, mark: str, keep: bool = False) -> None:
        """Empty the work folder unless it holds checkpoints of exactly this stage, which may go on from them.

        Called once the models are loaded, so that a stage that is refused before leaves nothing behind.

        Args:
            keep: it holds checkpoints that this stage goes on from although its fingerprint is another one.

        Raises:
            InstructGPTError: if the folder cannot be written.
        """
        if is_main():
            self._prepare_work(mark, keep)
        wait()

    def _prepare_work(self, mark: str, keep: bool) -> None:
        try:
            for unfinished in self.run_folder.glob(f".{self.name}.*"):  # what a killed process was writing
                shutil.rmtree(unfinished, ignore_errors=True)
            from_the_start = self.settings.training_args.resume_from_checkpoint is False
            if self.checkpoint_folder.exists() and (from_the_start or not (keep or self.worked_on(mark))):
                shutil.rmtree(self.checkpoint_folder)
            self.checkpoint_folder.mkdir(parents=True, exist_ok=True)
            (self.checkpoint_folder / "fingerprint").write_text(mark, encoding="utf-8")
        except OSError as error:
            raise InstructGPTError(
                f"{self.run_folder}: cannot be written ({error.strerror}); choose another --output_dir."
            ) from None

    # The record

    def finish(self, artifact: StageArtifact, save_models: Any) -> StageArtifact:
        """Write models and stage.json in one step, then drop the checkpoints.

        Args:
            save_models: called with the folder to write into.
        """
        artifact.finished_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        if is_main():
            with atomic_folder(self.folder) as folder:
                save_models(folder)
                artifact.save(folder)
            self._drop_work()
        wait()
        return artifact

    def _drop_work(self) -> None:
        shutil.rmtree(self.checkpoint_folder, ignore_errors=True)
        if not any(self.checkpoint_folder.parent.iterdir()):
            self.checkpoint_folder.parent.rmdir()

    def artifact(self, mark: str, **values: Any) -> StageArtifact:
        """A record with what is the same for every stage filled in."""
        changed = self.settings.changed()
        defaults = {
            key: list(item) for key, item in self.settings.defaults_with_source().items() if key not in changed
        }
        return StageArtifact(
            stage=self.name,
            recipe=self.recipe,
            config=changed,
            paper_defaults=defaults,
            seed=self.seed,
            fingerprint=mark,
            data=self.data,
            versions=versions(),
            hardware=hardware(),
            **values,
        )


def check_launch(args: Any, stage: str) -> None:
    """Raise where a stage cannot do with how its processes were launched.

    Raises:
        InstructGPTError: if they would not train together, or the weights that a stage needs whole to average, score
            and save them are split; naming what works.
    """
    if args.world_size != world_size():
        raise InstructGPTError(
            f"{world_size()} processes were launched, but without GPUs each would train for itself. Add --use_cpu "
            "for training on several CPU processes, or launch one."
        )
    found = shards_weights(args)
    if found and stage != "sft":
        raise InstructGPTError(
            f"{found} splits the weights over the processes, and the {stage} stage needs them whole. Launch it with "
            "ddp.yaml or deepspeed_zero2.yaml (recipes/accelerate_configs), or train adapters (use_peft)."
        )


def lab_folder(run_folder: Path, seed: int) -> Path:
    """The lab's datasets of a seed in a run, `data/` for seed 0, written if they are not there yet."""
    folder = run_folder / (f"data-seed{seed}" if seed else "data")
    with main_first():
        if not folder.is_dir():
            with atomic_folder(folder) as temporary:
                lab.write(temporary, seed=seed)
    return folder


def uses_lab(settings: StageSettings) -> bool:
    """Whether a stage reads one of the lab's datasets."""
    return str(settings.data_args.dataset_name).startswith(LAB_PREFIX)


def model_folder(source: str, revision: str | None, role: str) -> Path:
    """Local folder of a model; `lab` is the base model that comes with the package."""
    return lab.base_model_path() if source == LAB_MODEL else resolve_source(source, revision, role)


def show_loading_progress(folder: Path) -> None:
    """Let transformers draw its bars for weights that take a while to read, and only for those."""
    size = sum(item.stat().st_size for item in folder.rglob("*.safetensors"))
    (logging.enable_progress_bar if size > SLOW_TO_LOAD else logging.disable_progress_bar)()


def previous_stage(source: str | None, default: Path, stage: str) -> tuple[Path, StageArtifact]:
    """Folder and record of an earlier stage, from this run or from a path or Hub id.

    Raises:
        InstructGPTError: if it is missing or is another stage.
    """
    if source is None and not (default / STAGE_FILE).is_file():
        raise InstructGPTError(
            f"{default}: the {stage} stage has not been run here. Run it first, or set {stage}_model_path to the "
            "folder or Hub id of a finished one."
            if stage == "sft"
            else f"{default}: the {stage} stage has not been run here. Run it first, or set {stage}_model_path."
        )
    folder = default if source is None else resolve_source(source, role=f"{stage} stage")
    artifact = StageArtifact.load(folder)
    if artifact.stage != stage:
        raise InstructGPTError(f"{folder}: is a finished {artifact.stage!r} stage, expected {stage!r}.")
    return folder, artifact


def model_license(folder: Path) -> str | None:
    """The licence that a model's card states, or None."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    found = (metadata_load(card) or {}).get("license")
    return found if isinstance(found, str) else None


def vocabulary_fingerprint(tokenizer: Any) -> str:
    """Hash of a tokenizer's vocabulary: equal for models that read the same token ids."""
    return fingerprint(tokenizer.get_vocab())


def model_options(settings: StageSettings) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained` from a stage's settings."""
    config = settings.model_args
    options: dict[str, Any] = {"dtype": _dtype(config.dtype), "attn_implementation": config.attn_implementation}
    quantization = quantization_config(config)
    if quantization is not None:
        options["quantization_config"] = quantization
        options["device_map"] = {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}
    if settings.training_args.trust_remote_code:
        options["trust_remote_code"] = True
    return {key: value for key, value in options.items() if value is not None}


def _dtype(name: str | None) -> Any:
    return name if name in (None, "auto") else getattr(torch, str(name))


def versions() -> dict[str, str]:
    """Versions of this package, Python and the libraries that decide the numbers."""
    found = {"instructgpt_hf": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """Device and number of processes; nothing that names the machine."""
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"
    processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    return {"device": device, "processes": processes, "platform": platform.system()}
