"""Names and signatures of TRL, transformers and PEFT that this package relies on although they are private."""

from __future__ import annotations

from typing import Any

from accelerate.state import GradientState
from transformers import GenerationMixin, Trainer
from transformers.trainer_utils import sort_checkpoints
from trl import RewardTrainer, RLOOTrainer, SFTTrainer
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer.utils import disable_dropout_in_model, pad

# Name -> (object that has it, its parameters). After a change: read the upstream diff of the named method, adapt
# `_compat` and the trainers, then move the version bound in pyproject.toml.
CONTRACTS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "RLOOTrainer._generate": (RLOOTrainer, ("self", "prompts")),
    "RLOOTrainer._generate_single_turn": (RLOOTrainer, ("self", "prompt_ids", "images", "multimodal_fields")),
    "RLOOTrainer._tokenize_prompts": (RLOOTrainer, ("self", "prompts")),
    "RLOOTrainer._get_train_sampler": (RLOOTrainer, ("self", "dataset")),
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
