"""The one builder of tiny reward trainers: settings of one plain SGD step on a CPU."""

from datasets import Dataset

from instructgpt_hf.config.training import RewardConfig
from instructgpt_hf.trainers.reward import RewardTrainer

SETTINGS = dict(
    gradient_accumulation_steps=1,
    learning_rate=0.1,
    lr_scheduler_type="constant",
    max_steps=1,
    optim="sgd",  # Adam would blow rounding up where a gradient is 0
    use_cpu=True,
    bf16=False,
    save_strategy="no",
    logging_steps=1,
    disable_tqdm=True,
)


def build_trainer(model, tokenizer, output_dir, rows, held_back=None, compute_metrics=None, **changes):
    """A trainer on tokenized rankings, which are also held back by default; `changes` are settings of RewardConfig."""
    return RewardTrainer(
        model,
        RewardConfig(**{**SETTINGS, "output_dir": str(output_dir), **changes}),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows if held_back is None else held_back),
        compute_metrics=compute_metrics,
    )
