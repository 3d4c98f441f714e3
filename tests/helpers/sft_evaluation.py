"""A training step and an evaluation of the SFT trainer in one process or, under torchrun, in several.

Usage: python -m helpers.sft_evaluation MODEL TOKENIZER OUTPUT EVALUATION_BATCH; OUTPUT gets result.json.
"""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from instructgpt_hf.config.training import SFTConfig
from instructgpt_hf.trainers.sft import SFTTrainer

# Prompt and completion tokens of every demonstration.
LENGTHS = [(3, 1), (1, 12), (5, 2), (2, 7), (4, 20)]


def demonstrations():
    """Token ids and labels of five demonstrations whose completions differ in length."""
    draw = torch.Generator().manual_seed(0)
    rows = []
    for prompt, completion in LENGTHS:
        ids = torch.randint(3, 64, (prompt + completion,), generator=draw).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return Dataset.from_list(rows)


def main(model, tokenizer, output, batch):
    torch.set_num_threads(1)
    args = SFTConfig(
        output_dir=f"{output}/work",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        per_device_eval_batch_size=int(batch),
        learning_rate=1e-9,  # one step, for the wrapper of several processes
        max_steps=1,
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model),
        args=args,
        train_dataset=demonstrations(),
        eval_dataset=demonstrations(),
        processing_class=AutoTokenizer.from_pretrained(tokenizer),
    )
    trainer.train()
    result = trainer.evaluate() | {"processes": trainer.accelerator.num_processes}
    if trainer.accelerator.is_main_process:
        Path(output, "result.json").write_text(json.dumps(result), encoding="utf-8")
    trainer.end()


if __name__ == "__main__":
    main(*sys.argv[1:])
