"""Names and signatures of TRL, transformers and PEFT that this package relies on although they are private."""

from __future__ import annotations

from collections.abc import Callable

from accelerate.state import GradientState
from transformers import GenerationMixin, Trainer
from transformers.trainer_utils import sort_checkpoints
from trl import RewardTrainer, RLOOTrainer, SFTTrainer
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer.utils import disable_dropout_in_model

_STEP = "self outputs model_kwargs is_encoder_decoder num_new_tokens"
# Name -> (object that has it, its parameters). After a change: read the upstream diff of the named function, adapt
# `_compat` and the trainers, then move the version bound in pyproject.toml.
CONTRACTS: dict[str, tuple[Callable[..., object], tuple[str, ...]]] = {
    (f"{owner.__name__}.{name}" if name else owner.__name__): (owner, tuple(parameters.split()))
    for owner, name, parameters in (
        (RLOOTrainer, "_generate", "self prompts"),
        (RLOOTrainer, "_generate_single_turn", "self prompt_ids images multimodal_fields"),
        (RLOOTrainer, "_tokenize_prompts", "self prompts"),
        (RLOOTrainer, "_get_train_sampler", "self dataset"),
        (RLOOTrainer, "_calculate_rewards", "self inputs prompts completions completion_ids_list"),
        (RLOOTrainer, "_compute_loss", "self model inputs"),
        (RLOOTrainer, "_prepare_inputs", "self generation_batch"),
        (RLOOTrainer, "_save", "self output_dir state_dict"),
        (RLOOTrainer, "_save_checkpoint", "self model trial"),
        (RLOOTrainer, "_load_from_checkpoint", "self resume_from_checkpoint model"),
        (RLOOTrainer, "training_step", "self model inputs num_items_in_batch"),
        (Trainer, "save_model", "self output_dir _internal_call"),
        (Trainer, "_load_optimizer_and_scheduler", "self checkpoint"),
        (Trainer, "_get_grad_norm", "self model grad_norm"),
        (Trainer, "_get_output_dir", "self trial"),
        (Trainer, "_push_from_checkpoint", "self checkpoint_folder"),
        (RewardTrainer, "_prepare_dataset", "self dataset processing_class args dataset_name"),
        (RewardTrainer, "_set_signature_columns_if_needed", "self"),
        (SFTTrainer, "_save_checkpoint", "self model trial"),
        (SFTTrainer, "create_model_card", "self model_name dataset_name tags"),
        (GradientState, "_set_sync_gradients", "self sync_gradients"),
        (GenerationMixin, "_update_model_kwargs_for_generation", _STEP),
        (VLLMGeneration, "_iter_named_params", "self"),
        (sort_checkpoints, "", "output_dir checkpoint_prefix use_mtime best_model_checkpoint"),
        (disable_dropout_in_model, "", "model"),
    )
}

# Attributes that RLOOTrainer's constructor sets and this package reads or writes.
_LOGS = ("_metrics", "_logs", "_pending_extra_logs", "_pending_metrics", "reward_func_names", "reward_weights")
RLOO_ATTRIBUTES = (*_LOGS, "_step", "_current_train_step_time", "_buffered_inputs", "ref_model", "eos_token_ids")
# Attributes that the Trainer's training loop sets and this package reads or writes.
LOOP_ATTRIBUTES = ("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged")
# Attributes that the constructors of SFTTrainer and RewardTrainer set and this package reads or writes.
SUPERVISED_ATTRIBUTES = ("_metrics", "_total_train_tokens")
