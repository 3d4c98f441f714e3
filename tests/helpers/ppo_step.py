"""A few iterations of PPO in one process or, under torchrun, in several.

Usage: python -m helpers.ppo_step INPUT OUTPUT EPISODES_PER_DEVICE ACCUMULATION. INPUT holds `policy`, `scorer`,
`tokenizer`; for PPO and PPO-ptx, full and LoRA, weights and the log are written to a folder of OUTPUT. Completions are
greedy, so they do not depend on the process's random numbers; everything else is as in training.
"""

import itertools
import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, TaskType, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from helpers.ppo_trainer import build_trainer, snapshot

PROMPTS = Dataset.from_dict({"prompt": [f"{'a b ' * (index % 3)}w{index % 35}" for index in range(56)]})
TEXT = Dataset.from_dict({"text": [f"a b c w{index} " * (1 + index % 4) for index in range(30)]})


def is_clock(name):
    """Whether a metric is what a clock says."""
    return name.startswith(("time/", "throughput/")) or name.endswith(("_time", "_runtime", "_per_second"))


def with_adapter(model, task):
    model = get_peft_model(model, LoraConfig(r=4, task_type=task, target_modules=["q_proj", "v_proj", "up_proj"]))
    # An adapter that starts at 0 has no gradient for one half of itself.
    draw = torch.Generator().manual_seed(0)
    for name, item in model.named_parameters():
        if "lora_" in name:
            item.data = torch.randn(item.shape, generator=draw) * 0.1
    return model


def build(source, output, per_device, accumulation, ptx, lora, **changes):
    policy = AutoModelForCausalLM.from_pretrained(source / "policy")
    value_model = AutoModelForSequenceClassification.from_pretrained(source / "scorer")
    if lora:
        policy = with_adapter(policy, TaskType.CAUSAL_LM)
        value_model = with_adapter(value_model, TaskType.SEQ_CLS)
    settings = dict(
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulation,
        per_device_eval_batch_size=4,
        total_episodes=64,
        num_iterations=2,
        max_completion_length=8,
        missing_eos_penalty=1.0,
        whiten_rewards=True,
        beta=0.1,
        optim="sgd",  # Adam would blow rounding up where a gradient is 0
        learning_rate=0.05,
        value_learning_rate=0.02,
        warmup_iterations=2,
        ema_decay=0.8,
        ptx_coef=2.0 if ptx else 0.0,
        ptx_episodes_ratio=2,
        ptx_max_length=7,
        value_warmup_iterations=int(lora),
        seed=3,
        use_cpu=True,
        bf16=False,
        dataloader_pin_memory=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(source / "tokenizer")
    reward_model = AutoModelForSequenceClassification.from_pretrained(source / "scorer")
    return build_trainer(
        policy, reward_model, value_model, tokenizer, output, PROMPTS, TEXT, **{**settings, **changes}
    )


def record(trainer, output):
    save_file(snapshot(trainer.actor_critic), output / "end.safetensors")
    save_file(trainer.average.tensors(), output / "average.safetensors")
    result = {"log": trainer.state.log_history, "processes": trainer.accelerator.num_processes}
    (output / "log.json").write_text(json.dumps(result), encoding="utf-8")


def main(source, target, per_device, accumulation):
    torch.set_num_threads(1)
    for ptx, lora in itertools.product((False, True), (False, True)):
        output = Path(target, f"{'ppo-ptx' if ptx else 'ppo'}-{'lora' if lora else 'full'}")
        trainer = build(Path(source), output, int(per_device), int(accumulation), ptx, lora)
        trainer.generation_config.do_sample = False
        trainer.train()
        if trainer.accelerator.is_main_process:
            output.mkdir(parents=True, exist_ok=True)
            record(trainer, output)
    trainer.end()


if __name__ == "__main__":
    main(*sys.argv[1:])
