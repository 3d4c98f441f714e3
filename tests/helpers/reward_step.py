"""A few optimizer steps of the reward model in one process or, under torchrun, in several.

Usage: reward_step.py MODEL TOKENIZER OUTPUT PROMPTS_PER_DEVICE ACCUMULATION. Writes weights and the log to OUTPUT.
"""

import gc
import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from instructgpt_hf.config.training import RewardConfig
from instructgpt_hf.trainers.reward import RewardTrainer


def rankings(count=16):
    """Prompts of 1 to 8 tokens with 2 to 9 completions of 1 to 20; unlike lengths make unlike numbers of passes."""
    draw = torch.Generator().manual_seed(0)

    def ids(low, high):
        size = int(torch.randint(low, high, (1,), generator=draw))
        return torch.randint(3, 64, (size,), generator=draw).tolist()

    rows = []
    for index in range(count):
        size = 2 + index % 8
        ranks = torch.randperm(size, generator=draw).add(1).tolist()
        # The first token keeps them apart: equal completions would score equal or not by rounding.
        completions = [[3 + place, *ids(0, 20 if index % 2 else 4), 1] for place in range(size)]
        rows.append({"prompt_ids": ids(1, 9), "completion_ids": completions, "ranks": ranks})
    return rows


def main(model, tokenizer, output, batch, accumulation):
    torch.set_num_threads(1)
    args = RewardConfig(
        output_dir=output,
        per_device_train_batch_size=int(batch),
        gradient_accumulation_steps=int(accumulation),
        per_device_eval_batch_size=3,
        max_tokens_per_forward=60,
        optim="sgd",  # Adam would blow rounding up where a gradient is 0
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_steps=3,
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    data = Dataset.from_list(rankings())
    trainer = RewardTrainer(
        AutoModelForSequenceClassification.from_pretrained(model),
        args,
        processing_class=AutoTokenizer.from_pretrained(tokenizer),
        train_dataset=data,
        eval_dataset=data.select(range(7)),
        compute_metrics=lambda result: {"prompts": len(result.label_ids), "first": result.predictions[0][0]},
    )
    trainer.train()
    evaluated = trainer.evaluate()
    if trainer.accelerator.is_main_process:
        log = [record for record in trainer.state.log_history if "loss" in record]
        weights = {name: item.detach() for name, item in trainer.model.named_parameters()}
        save_file(weights, f"{output}/end.safetensors")
        record = {"log": log, "evaluation": evaluated, "processes": trainer.accelerator.num_processes}
        Path(output, "log.json").write_text(json.dumps(record), encoding="utf-8")
    trainer.end()
    # A reducer that still holds the process group can deadlock when it goes.
    assert not [item for item in gc.get_objects() if type(item) is DistributedDataParallel]


if __name__ == "__main__":
    main(*sys.argv[1:])
