"""The only file that touches private names of TRL, transformers, peft and datasets.

`CONTRACTS` lists every name and signature relied on; `tests/test_contracts.py` checks them and says what to do when
one has changed. Subclasses elsewhere override the public names that the classes here give to TRL's private hooks.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.state import GradientState
from accelerate.utils import gather_object
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import GenerationMixin, Trainer
from transformers.distributed.fsdp import is_fsdp_managed_module
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints
from trl import RewardTrainer, RLOOTrainer, SFTTrainer
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer.utils import disable_dropout_in_model, pad

# name -> (object that has it, its parameters). A change here means: read TRL's diff, adapt this file, move the bound.
CONTRACTS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "RLOOTrainer._generate": (RLOOTrainer, ("self", "prompts")),
    "RLOOTrainer._generate_single_turn": (RLOOTrainer, ("self", "prompt_ids", "images", "multimodal_fields")),
    "RLOOTrainer._tokenize_prompts": (RLOOTrainer, ("self", "prompts")),
    "RLOOTrainer._get_train_sampler": (RLOOTrainer, ("self", "dataset")),
    "RLOOTrainer._generate_and_score_completions": (RLOOTrainer, ("self", "inputs")),
    "RLOOTrainer._calculate_rewards": (
        RLOOTrainer,
        ("self", "inputs", "prompts", "completions", "completion_ids_list"),
    ),
    "RLOOTrainer._compute_loss": (RLOOTrainer, ("self", "model", "inputs")),
    "RLOOTrainer._prepare_inputs": (RLOOTrainer, ("self", "generation_batch")),
    "RLOOTrainer._save": (RLOOTrainer, ("self", "output_dir", "state_dict")),
    "RLOOTrainer._save_checkpoint": (RLOOTrainer, ("self", "model", "trial")),
    "RLOOTrainer._load_from_checkpoint": (RLOOTrainer, ("self", "resume_from_checkpoint", "model")),
    "Trainer.save_model": (Trainer, ("self", "output_dir", "_internal_call")),
    "Trainer._load_optimizer_and_scheduler": (Trainer, ("self", "checkpoint")),
    "Trainer._get_grad_norm": (Trainer, ("self", "model", "grad_norm")),
    "Trainer._get_output_dir": (Trainer, ("self", "trial")),
    "Trainer._push_from_checkpoint": (Trainer, ("self", "checkpoint_folder")),
    "Trainer.init_hf_repo": (Trainer, ("self", "token", "private")),
    "sort_checkpoints": (
        sort_checkpoints,
        ("output_dir", "checkpoint_prefix", "use_mtime", "best_model_checkpoint"),
    ),
    "RLOOTrainer.training_step": (RLOOTrainer, ("self", "model", "inputs", "num_items_in_batch")),
    "RewardTrainer._prepare_dataset": (
        RewardTrainer,
        ("self", "dataset", "processing_class", "args", "dataset_name"),
    ),
    "RewardTrainer._set_signature_columns_if_needed": (RewardTrainer, ("self",)),
    "SFTTrainer._save_checkpoint": (SFTTrainer, ("self", "model", "trial")),
    "SFTTrainer.create_model_card": (SFTTrainer, ("self", "model_name", "dataset_name", "tags")),
    "GradientState._set_sync_gradients": (GradientState, ("self", "sync_gradients")),
    "GenerationMixin._update_model_kwargs_for_generation": (
        GenerationMixin,
        ("self", "outputs", "model_kwargs", "is_encoder_decoder", "num_new_tokens"),
    ),
    "VLLMGeneration._iter_named_params": (VLLMGeneration, ("self",)),
    "disable_dropout_in_model": (disable_dropout_in_model, ("model",)),
    "pad": (pad, ("tensors", "padding_value", "padding_side", "pad_to_multiple_of")),
}
# Attributes that RLOOTrainer's constructor sets and this package reads or writes.
RLOO_ATTRIBUTES = (
    "_metrics",
    "_logs",
    "_step",
    "_current_train_step_time",
    "_buffered_inputs",
    "_pending_extra_logs",
    "_pending_metrics",
    "ref_model",
    "reward_weights",
    "reward_func_names",
    "eos_token_ids",
)
# Attributes that the Trainer's training loop sets and this package reads or writes.
LOOP_ATTRIBUTES = ("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged")
REFERENCE_ADAPTER = "ref"
# What a layer of PEFT reads, in every forward pass, to know which adapters to apply: a name or a list of names.
ADAPTER_CHOICE = "_active_adapter"
ADAPTED = (BaseTunerLayer, AuxiliaryTrainingWrapper)

__all__ = ["CONTRACTS", "REFERENCE_ADAPTER", "RLOO_ATTRIBUTES", "disable_dropout_in_model", "pad"]


def dataset_fingerprint(dataset: Any) -> str:
    """The hash that `datasets` keeps of how a dataset came about, for data that are not local files."""
    return str(dataset._fingerprint)


def adapter_layers(model: Any) -> list[Any]:
    """The layers of a PEFT model that carry adapters, or a whole module of each adapter's own (`modules_to_save`)."""
    names = tuple(model.peft_config)
    kept = model.__dict__.get("_instructgpt_adapter_layers")
    if kept is None or kept[0] != names:  # another adapter may have wrapped more layers
        kept = names, [module for module in model.modules() if isinstance(module, ADAPTED)]
        model.__dict__["_instructgpt_adapter_layers"] = kept
    return kept[1]


def applied_adapters(layers: list[Any]) -> list[str]:
    """Names of the adapters that the layers apply; it is the same in all of them."""
    return list(layers[0].active_adapters)


def apply_adapters(layers: list[Any], names: list[str]) -> None:
    """Choose the adapters of the layers, and leave alone which weights are trained."""
    for layer in layers:
        setattr(layer, ADAPTER_CHOICE, names)


def use_one_device(args: Any) -> None:
    """Train on the first GPU where a single process sees several, instead of in the Trainer's `DataParallel`.

    `DataParallel` splits tensors by rows, which takes batches of another shape apart; `accelerate launch` starts a
    process for each GPU.
    """
    if args.n_gpu > 1:
        args._n_gpu = 1


def next_inputs(model: Any, outputs: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of `model.prepare_inputs_for_generation` for the next token, as `generate` makes them."""
    updated: dict[str, Any] = model._update_model_kwargs_for_generation(outputs, inputs)
    return updated


def has_sharded_weights(model: torch.nn.Module) -> bool:
    """Whether a forward pass needs all processes to take part: FSDP and DeepSpeed ZeRO-3."""
    return is_deepspeed_zero3_enabled() or any(is_fsdp_managed_module(module) for module in model.modules())


def set_vllm_weights(vllm: VLLMGeneration, weights: Callable[[], Iterator[tuple[str, torch.Tensor]]]) -> None:
    """Let a vLLM engine take its weights, by the names of a plain model, from `weights` at every synchronisation."""
    vllm._iter_named_params = weights


class QuietCard:
    """Keeps TRL from writing its own model card; the card comes from stage.json."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL calls this at every checkpoint."""


class PrivateRepository:
    """A repository that a trainer creates is private unless `hub_private_repo` is False."""

    args: Any

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """What the Trainer calls before it pushes."""
        if private is None:
            private = self.args.hub_private_repo is not False
        super().init_hf_repo(token=token, private=private)  # type: ignore[misc]


class WholeCheckpoints:
    """A checkpoint's folder has its name once every process has written its part, and not before.

    transformers writes into the folder with the final name, so a process that is killed leaves a folder that
    `get_last_checkpoint` takes for a checkpoint.
    """

    UNFINISHED = ".unfinished"
    _unfinished = False
    args: Any
    state: Any
    accelerator: Any

    def _get_output_dir(self, trial: Any) -> str:
        folder = str(super()._get_output_dir(trial))  # type: ignore[misc]
        return os.path.join(folder, self.UNFINISHED) if self._unfinished else folder

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._unfinished:
            super()._push_from_checkpoint(checkpoint_folder)  # type: ignore[misc]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial))
        unfinished = folder / self.UNFINISHED
        local_main = self.accelerator.is_local_main_process
        if local_main:
            shutil.rmtree(unfinished, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._unfinished = True
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
        finally:
            self._unfinished = False
        self.accelerator.wait_for_everyone()
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.state.best_model_checkpoint == str(unfinished / name):
            self.state.best_model_checkpoint = str(folder / name)
            if self.args.should_save:
                self.state.save_to_json(str(unfinished / name / TRAINER_STATE_NAME))
        if local_main:
            _move_into_place(unfinished / name, folder / name)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder / name))
        if self.args.should_save and (self.args.save_total_limit or 0) > 0:
            _keep_newest(folder, self.args.save_total_limit, self.state.best_model_checkpoint, unfinished)


def _keep_newest(folder: Path, limit: int, best: str | None, trash: Path) -> None:
    """Delete older checkpoints but the best one, as the Trainer does; renamed first, so that what a process that is
    killed has deleted half of is not taken for a checkpoint."""
    names = sort_checkpoints(str(folder), use_mtime=True, best_model_checkpoint=best)
    kept = max(limit, len({names[-1], str(Path(best)) if best else names[-1]}))  # the best one comes before the newest
    trash.mkdir(exist_ok=True)
    for name in names[:-kept]:
        with contextlib.suppress(FileNotFoundError):  # on a disk that machines share, another one has done it
            os.replace(name, trash / Path(name).name)
    shutil.rmtree(trash, ignore_errors=True)


def _move_into_place(unfinished: Path, final: Path) -> None:
    """Rename a folder. On a disk that machines share, the first one has done it for all."""
    with contextlib.suppress(FileNotFoundError):
        if final.exists() and unfinished.exists():
            os.replace(final, unfinished.with_name("replaced"))
        os.replace(unfinished, final)
    shutil.rmtree(unfinished.parent, ignore_errors=True)


class CleanEnd:
    """Ends a run of several processes without a deadlock."""

    model: Any
    model_wrapped: Any

    def end(self) -> None:
        """Let go of the wrapped model, then do what the Trainer does at the end.

        DDP's reducer holds the process group, and where it outlives `destroy_process_group` it destroys the group with
        Python's lock taken: torch then waits for the group's thread, and that thread for the lock to free a tensor.
        """
        self.model_wrapped = self.model
        super().end()  # type: ignore[misc]


class SeveralBackwards:
    """Several backward passes in one step of the training loop."""

    accelerator: Any

    @contextlib.contextmanager
    def without_gradient_sync(self, model: torch.nn.Module) -> Iterator[None]:
        """Backward passes inside only add to this process's gradients, because another one follows in the step.

        Without it, DDP would synchronise twice, and DeepSpeed would take the optimizer step after the first one.
        """
        state = self.accelerator.gradient_state
        before = state.sync_gradients
        state._set_sync_gradients(False)
        try:
            with self.accelerator.no_sync(model):
                yield
        finally:
            state._set_sync_gradients(before)


class SupervisedTrainer(QuietCard, PrivateRepository, WholeCheckpoints, CleanEnd, SFTTrainer):
    """TRL's SFTTrainer without its model card."""


class RankingTrainer(QuietCard, PrivateRepository, WholeCheckpoints, CleanEnd, SeveralBackwards, RewardTrainer):
    """TRL's RewardTrainer with the hooks that a dataset of token ids and ranks needs."""

    dataset_columns: tuple[str, ...] = ()
    _signature_columns: list[str] | None

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        return dataset  # tokenized by instructgpt_hf.data, with every stage's one prompt rendering

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = list(self.dataset_columns)

    def record(self, name: str, value: float) -> None:
        """Add a value to a metric that is averaged until the next log."""
        self._metrics["train" if self.model.training else "eval"][name].append(value)


class OnPolicyTrainer(QuietCard, PrivateRepository, WholeCheckpoints, CleanEnd, SeveralBackwards, RLOOTrainer):
    """TRL's RLOOTrainer with public names for the hooks that another on-policy algorithm replaces.

    Subclasses define `render_prompt`, `in_batches`, `continuous_batching`, `episode_sampler`, `rollout`,
    `minibatches`, `minibatch_loss`, `gradient_done`, `save_models`, `load_models`, `set_learning_rates`, and
    `load_state`, which is all that is called where DeepSpeed reads weights and optimizer itself.
    """

    # The loss is normalised over the whole minibatch, so the Trainer must not divide it by the accumulation steps.
    loss_is_scaled_for_ga = True
    _buffered_inputs: list[dict[str, Any]] | None
    _rolled_out: int | None = None
    _current_train_step_time: float
    optimizer: Any
    lr_scheduler: Any
    reward_func_names: list[str]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's `train`; what an earlier one that was interrupted had sampled is not used."""
        self._step, self._buffered_inputs, self._rolled_out = 0, None, None
        return super().train(*args, **kwargs)

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [self.render_prompt(prompt) for prompt in prompts], None, {}

    def _generate_single_turn(self, prompt_ids: list[list[int]], images: Any, multimodal_fields: Any) -> Any:
        # TRL's own call rounds the trained weights to half precision in place.
        if self.use_transformers_continuous_batching:
            return self.continuous_batching(prompt_ids)
        generate = functools.partial(super()._generate_single_turn, images=images, multimodal_fields=multimodal_fields)
        return generate(prompt_ids) if self.use_vllm else self.in_batches(generate, prompt_ids)

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        return self.episode_sampler(self.train_dataset if dataset is None else dataset)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        return self.rollout(inputs)

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        if not self.model.training:
            return self.rollout(generation_batch)
        steps = self.args.steps_per_generation
        due = self._step % (steps * self.num_iterations) == 0 or self._buffered_inputs is None
        if due and self._rolled_out != self._step:
            self._buffered_inputs = self.minibatches(self.rollout(generation_batch))
            self._rolled_out = self._step
        return self._buffered_inputs[self._step % steps]  # type: ignore[index]

    @contextlib.contextmanager
    def before_training_step(self, generation_batch: Any) -> Iterator[None]:
        """What comes before TRL's `training_step` in a step and is part of its `step_time`; the rollouts, if they are
        due, come first."""
        start = time.perf_counter()
        self._prepare_inputs(generation_batch)
        yield
        self._current_train_step_time += time.perf_counter() - start

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        return self.minibatch_loss(model, inputs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:
            self.save_models(output_dir if output_dir is not None else self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.load_models(resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.is_deepspeed_enabled:
            self.load_state(checkpoint)
        elif checkpoint is not None:
            self.set_learning_rates()

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        self.gradient_done(norm)
        return norm

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradient of a loss that is divided by the accumulation steps already."""
        options = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
        self.accelerator.backward(loss, **options)

    def unlogged(self) -> dict[str, Any]:
        """What was measured since the last log, and the sum of the losses, as plain JSON; for `save_models`."""
        loss = {"sum": self._tr_loss.item(), "total": self._total_loss_scalar, "step": self._globalstep_last_logged}
        return {"metrics": dict(self._metrics["train"]), "loss": loss}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the models for use; a checkpoint, which the Trainer writes through here too, is for resuming."""
        if _internal_call and output_dir is not None:  # without a folder it is about to push the models
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            self.save_pretrained(Path(output_dir if output_dir is not None else self.args.output_dir))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """A checkpoint holds no model to push while training goes on; `push_to_hub` writes and pushes it."""

    def restore_unlogged(self, state: dict[str, Any]) -> None:
        """Continue the next log where `unlogged` was taken; once the Trainer has set up its own."""
        for name, values in state["metrics"].items():
            self._metrics["train"][name] = list(values)
        self._tr_loss += state["loss"]["sum"]
        self._total_loss_scalar, self._globalstep_last_logged = state["loss"]["total"], state["loss"]["step"]

    @property
    def mean_loss(self) -> float:
        """Of all steps; the Trainer's own is that of the steps since it was resumed."""
        return float(self._total_loss_scalar / max(self.state.global_step, 1))

    def generate(self, prompts: list[Any]) -> tuple[list[list[int]], list[list[int]], list[Any]]:
        """Sample one completion for each prompt.

        Returns:
            Prompt ids, completion ids (up to and with EOS), and completions as text or messages.
        """
        # The wrapper that applies autocast is around the whole module, which generation unwraps; without it here,
        # tokens would be drawn in another precision than the one their log-probabilities are taken in.
        with self.accelerator.autocast():
            return self._generate(prompts)

    def rewards(
        self, inputs: list[dict[str, Any]], prompts: list[Any], completions: list[Any], completion_ids: list[list[int]]
    ) -> torch.Tensor:
        """Rewards [episodes of all processes, reward functions]; NaN where a function does not apply.

        What a function passed to `log_metric` is logged, what it passed to `log_extra` joins TRL's table.
        """
        found = self._calculate_rewards(inputs, prompts, completions, completion_ids)
        for column, values in self._pending_extra_logs.items():
            self._logs["extra"][column].extend(values)
        self._pending_extra_logs.clear()
        # In one order on all processes, which take part in every gathering.
        for name in sorted(set(gather_object(list(self._pending_metrics)))):
            values = self._pending_metrics.get(name, [])
            sums = torch.tensor([float(sum(values)), float(len(values))], device=self.accelerator.device)
            total, count = self.accelerator.gather(sums).view(-1, 2).sum(0).tolist()
            # Not through a subclass's `record`: such a value need not be finite.
            OnPolicyTrainer.record(self, name, total / count)
        self._pending_metrics.clear()
        return found

    def record(self, name: str, value: float) -> None:
        """Add a value to a metric that is averaged until the next log."""
        self._metrics["train" if self.model.training else "eval"][name].append(value)

    def record_samples(
        self, prompts: list[Any], completions: list[Any], rewards: torch.Tensor, advantages: Any
    ) -> None:
        """Keep rollouts for TRL's table of completions."""
        self._logs["prompt"].extend(prompts)
        self._logs["completion"].extend(completions)
        for index, name in enumerate(self.reward_func_names):
            self._logs["rewards"][name].extend(rewards[:, index].tolist())
        self._logs["advantages"].extend(advantages)

    @property
    def micro_step(self) -> int:
        """Forward and backward passes taken so far."""
        return int(self._step)

    @property
    def tokenizer(self) -> Any:
        """The policy's tokenizer."""
        return self._tokenizer


@contextlib.contextmanager
def quiet_environment() -> Iterator[None]:
    """Silence messages of the libraries below that a user cannot act on, for the length of the block."""
    import logging
    import warnings

    names = ("transformers", "bitsandbytes", "trl")
    levels = {name: logging.getLogger(name).level for name in names}
    advisory = os.environ.get("TRANSFORMERS_NO_ADVISORY_WARNINGS")
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # TRL asks for the old name of gradient checkpointing; pinned memory has no meaning on a CPU.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
            warnings.filterwarnings("ignore", message=".*pin_memory.*")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if advisory is None:
            os.environ.pop("TRANSFORMERS_NO_ADVISORY_WARNINGS", None)
        else:
            os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = advisory
