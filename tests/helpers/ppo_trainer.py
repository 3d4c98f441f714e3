"""The one builder of tiny PPO trainers: data, a reward that can be climbed, settings for seconds, what they log."""

from datasets import Dataset

from instructgpt_hf.config.ppo import PPOConfig
from instructgpt_hf.data.prompts import PromptFormat
from instructgpt_hf.trainers.ppo.trainer import PPOTrainer

PROMPTS = Dataset.from_dict(
    {"prompt": [f"a b w{index % 35}" if index % 2 else f"c w{index % 35}" for index in range(64)]}
)
TEXT = Dataset.from_dict({"text": ["a b c d e f g h i j"] * 20})
SETTINGS = dict(
    generation_batch_size=16,
    per_device_train_batch_size=8,
    gradient_accumulation_steps=1,
    per_device_eval_batch_size=16,
    total_episodes=32,
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


def count_c(prompts, completions, completion_ids, **_):
    """A reward that a policy can climb: how often token 5 ("c") occurs."""
    return [float(sum(token == 5 for token in ids)) for ids in completion_ids]


def build_trainer(
    policy,
    reward,
    value_model,
    tokenizer,
    output_dir,
    prompts=PROMPTS,
    text=TEXT,
    template="raw",
    ref_model=None,
    **changes,
):
    """A trainer on models of a few thousand parameters; `changes` are settings of PPOConfig."""
    return PPOTrainer(
        policy,
        reward,
        PPOConfig(**{**SETTINGS, "output_dir": str(output_dir), **changes}),
        value_model=value_model,
        train_dataset=prompts,
        processing_class=tokenizer,
        prompt_format=PromptFormat.create(template, tokenizer),
        pretraining_dataset=text,
        ref_model=ref_model,
    )


def snapshot(module):
    """Copies of the parameters, by name."""
    return {name: item.detach().clone() for name, item in module.named_parameters()}


def records(trainer):
    """The log's records of iterations."""
    return [record for record in trainer.state.log_history if "objective/kl" in record]
