"""A tiny PPO trainer for tests: 64 prompts of known words, a Python reward, checkpoints where a test asks for them."""

from datasets import Dataset

from instructgpt_hf.config.stages import PPOConfig
from instructgpt_hf.data.prompts import PromptFormat
from instructgpt_hf.trainers.ppo import PPOTrainer

PROMPTS = Dataset.from_dict(
    {"prompt": [f"a b w{index % 35}" if index % 2 else f"c w{index % 35}" for index in range(64)]}
)
TEXT = Dataset.from_dict({"text": ["a b c d e f g h i j"] * 20})


def count_c(prompts, completions, completion_ids, **_):
    """How often token 5 ("c") occurs."""
    return [float(sum(token == 5 for token in ids)) for ids in completion_ids]


def build_trainer(tokenizer, policy, value_model, folder, reward=count_c, **changes):
    """Two optimizer steps an iteration, four iterations a pass."""
    settings = dict(
        output_dir=str(folder),
        generation_batch_size=16,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        per_device_eval_batch_size=16,
        total_episodes=64,
        learning_rate=1e-3,
        value_learning_rate=1e-3,
        max_completion_length=6,
        ptx_coef=0.0,
        ptx_episodes_ratio=1,
        ptx_max_length=8,
        warmup_iterations=1,
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=0,
    )
    return PPOTrainer(
        policy,
        reward,
        value_model,
        PPOConfig(**{**settings, **changes}),
        train_dataset=PROMPTS,
        processing_class=tokenizer,
        prompt_format=PromptFormat.create("raw", tokenizer),
        pretraining_dataset=TEXT,
    )


def records(trainer):
    """The log's records of iterations."""
    return [record for record in trainer.state.log_history if "objective/kl" in record]
