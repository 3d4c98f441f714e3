"""Data arguments of each stage: its datasets and the earlier stages it reads. Standard library only.

A dataset is a Hub id, a local file (`.jsonl`, `.json`, `.csv`, `.parquet`), a local folder, or one of the generated
datasets of the lab: `lab:demonstrations`, `lab:rankings`, `lab:prompts`, `lab:pretraining`.
"""

# ruff: noqa: RUF009  `setting` returns a dataclass field.

from __future__ import annotations

from dataclasses import dataclass

from instructgpt_hf.config.fields import setting
from instructgpt_hf.config.ranges import AT_LEAST_ONE

# name -> (what the model reads, with {prompt} where the prompt goes; what separates it from the completion). The paper
# does not state its own format.
PLAIN_TEMPLATES: dict[str, tuple[str, str]] = {
    "raw": ("{prompt}", ""),
    "instruction": ("### Instruction:\n{prompt}\n\n### Response:\n", ""),
    "user-assistant": ("User: {prompt}\nAssistant:", " "),
}
PROMPT_TEMPLATES: tuple[str, ...] = ("chat", *PLAIN_TEMPLATES)
TEMPLATE_NAMES = (*PROMPT_TEMPLATES, "chat:<name>")  # some tokenizers have several chat templates with names
LONG_PROMPTS = "App C: prompts over 1k tokens are dropped"


@dataclass
class DataArguments:
    """Data arguments that all stages share."""

    dataset_name: str | None = setting(None, "Hub id, local file or folder, or lab:<name> of the dataset.", "ours")
    dataset_config: str | None = setting(None, "Configuration name of a Hub dataset.", "ours")
    dataset_train_split: str = setting("train", "Split to train on.", "ours")
    dataset_test_split: str | None = setting(None, "Held-out split; by default a part of the train split.", "ours")


@dataclass
class PretrainingArguments(DataArguments):
    """Data arguments of the stages that also train on pretraining text."""

    pretraining_dataset_name: str | None = setting(None, "Pretraining text; see pretraining_mix or ptx_coef.", "ours")
    pretraining_dataset_config: str | None = setting(None, "Configuration name of that Hub dataset.", "ours")
    pretraining_dataset_split: str = setting("train", "Split of that dataset.", "ours")
    pretraining_dataset_text_field: str = setting("text", "Column of that dataset that holds the text.", "ours")
    pretraining_streaming: bool = setting(False, "Read that text while training, 1,000 documents at a time.", "ours")


@dataclass
class LaterStageArguments(DataArguments):
    """Data arguments of the stages that start from the SFT model."""

    sft_model_path: str | None = setting(
        None, "Folder or Hub id of an SFT stage, or of an SFT model made elsewhere; this run's by default.", "§3.5"
    )
    sft_model_revision: str | None = setting(
        None, "Branch, tag or commit of sft_model_path on the Hub; `main` by default.", "ours"
    )
    prompt_template: str | None = setting(
        None,
        "Taken from the SFT stage, where another value is an error; names that of a model made elsewhere.",
        "ours",
        choices=TEMPLATE_NAMES,
    )


@dataclass
class SFTArguments(PretrainingArguments):
    """Data of the SFT stage: demonstrations (`prompt`, `completion`, or `messages`)."""

    prompt_template: str = setting(
        "chat",
        "How a prompt becomes tokens: by the tokenizer's chat template, or as in PLAIN_TEMPLATES; for every stage.",
        "ours: the paper does not state its separator",
        choices=TEMPLATE_NAMES,
    )
    max_prompt_length: int | None = setting(1024, "Longer prompts are left out.", LONG_PROMPTS, AT_LEAST_ONE)


@dataclass
class RewardArguments(LaterStageArguments):
    """Data of the reward stage: rankings, pairs, or one of the published schemas (docs/data.md)."""

    max_prompt_length: int | None = setting(1024, "Longer prompts are left out.", LONG_PROMPTS, AT_LEAST_ONE)
    streaming: bool = setting(False, "Read the rankings while training; needs max_steps.", "ours")


@dataclass
class PPOArguments(LaterStageArguments, PretrainingArguments):
    """Data of the PPO stage: prompts, and pretraining text for PPO-ptx."""

    pretraining_dataset_name: str | None = setting(None, "Text of the pretraining gradient; see ptx_coef.", "§3.5")
    reward_model_path: str | None = setting(
        None, "Folder or Hub id of the reward model; by default this run's.", "§3.5"
    )
    reward_model_revision: str | None = setting(
        None, "Branch, tag or commit of reward_model_path on the Hub; `main` by default.", "ours"
    )
    extra_reward_model_paths: list[str] | None = setting(
        None, "Folders or Hub ids of further reward models, whose scores are added; see reward_weights.", "ours"
    )
    reward_functions: list[str] | None = setting(
        None, "`module:function` of reward functions as TRL calls them; their values are added to the score.", "ours"
    )
    value_model_path: str | None = setting(
        None, "Folder or Hub id of the value model's start, of the policy's tokenizer.", "§3.5: the reward model"
    )
    eval_num_prompts: int = setting(200, "Held-out prompts of the evaluation.", "ours", AT_LEAST_ONE, neutral=True)
