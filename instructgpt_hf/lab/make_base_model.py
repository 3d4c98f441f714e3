"""Make the lab's base model: a byte-level BPE tokenizer and a small Llama trained on the micro-world's text.

    python -m instructgpt_hf.lab.make_base_model --seed 0 --output_dir base_model

The packaged model comes from the default number of steps on two CPU threads. The same seed, thread count and torch
version give the same weights.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from instructgpt_hf.lab import corpus
from instructgpt_hf.lab.answers import demonstrate
from instructgpt_hf.lab.instructions import draw_prompts, parse
from instructgpt_hf.lab.tasks import tasks

VOCABULARY, POSITIONS = 1024, 256
BATCH, WINDOW = 32, 128
STEPS, WARMUP, PEAK_LEARNING_RATE = 1500, 100, 3e-3

README = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# The lab's base model

A Llama-architecture causal language model of about one million parameters and its byte-level BPE tokenizer, trained
from scratch on generated text about a micro-world of 48 things: prose, and few-shot blocks of nine small tasks. It has
never seen an instruction. It exists so that SFT, reward model and PPO-ptx can be run on two CPU cores without a
network; it knows nothing about the real world.

Made by `python -m instructgpt_hf.lab.make_base_model --seed {seed} --steps {steps}`: held-out loss {loss:.3f} nats per
token, accuracy on {items} held-out few-shot items {accuracy:.1%} (chance 25 %); by task: {by_task}.

The text comes from this project's own generator. Licence: Apache-2.0.
"""


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with `<pad>` (id 0) and `<eos>` (id 1), without BOS.

    Its merges are learned from the pretraining text and, so that prompts stay short, from instructions and answers,
    which the model is not trained on.
    """
    rng = random.Random(f"tokenizer {seed}")
    texts = corpus.documents(f"tokenizer {seed}", 4000)
    for prompt in draw_prompts(rng, 1000, test=False):
        texts.append(f"User: {prompt}\nAssistant: {demonstrate(parse(prompt), rng)}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special, alphabet = ["<pad>", "<eos>"], sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokens = {"pad_token": "<pad>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=POSITIONS, **tokens)


def make_model(seed: int, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained model of about one million parameters; its weights depend on `seed` only."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def batches(tokenizer: PreTrainedTokenizerFast, seed: str) -> Iterator[torch.Tensor]:
    """Endless batches [BATCH, WINDOW] of token ids: new documents, each ended by EOS, packed."""
    stream: list[int] = []
    for part in itertools.count():
        for ids in tokenizer(corpus.documents(f"{seed} part {part}", 1000))["input_ids"]:
            stream += [*ids, tokenizer.eos_token_id]
        while len(stream) >= BATCH * WINDOW:
            yield torch.tensor(stream[: BATCH * WINDOW]).view(BATCH, WINDOW)
            del stream[: BATCH * WINDOW]


def learning_rate(step: int, steps: int) -> float:
    """Learning rate at `step`: linear warm-up, then a cosine from the peak to a hundredth of it."""
    warmup = min(WARMUP, steps // 10 + 1)
    if step < warmup:
        return PEAK_LEARNING_RATE * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return PEAK_LEARNING_RATE * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, steps: int) -> None:
    """Next-token training on `steps` batches of packed text, in place."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.05)
    data = batches(tokenizer, f"base {seed}")
    start = time.monotonic()
    model.train()
    for step, ids in enumerate(itertools.islice(data, steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            line = f"step {step + 1}/{steps}  loss {loss.item():.3f}  {time.monotonic() - start:.0f} s"
            if (step + 1) % 500 == 0:
                line += f"  held-out loss {held_out_loss(model, tokenizer):.3f}"
                line += f"  task accuracy {task_accuracy(model, tokenizer, tasks(1, 180))[0]:.3f}"
            print(line, flush=True)
    model.eval()


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> float:
    """Mean next-token loss in nats on text of another seed."""
    data = itertools.islice(batches(tokenizer, "held out"), 4)
    return sum(float(model(input_ids=ids, labels=ids).loss) for ids in data) / 4


def _option_log_probs(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, items: list[dict[str, Any]]
) -> list[list[float]]:
    """Mean log-probability per token of each option of each item."""
    prompts = [tokenizer(item["prompt"])["input_ids"] for item in items for _ in item["options"]]
    options = [tokenizer(option)["input_ids"] for item in items for option in item["options"]]
    rows = [torch.tensor(prompt + option) for prompt, option in zip(prompts, options, strict=True)]
    # Padding is on the right, after every token that counts, so no attention mask is needed.
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    log_probs = model(input_ids=padded).logits[:, :-1].float().log_softmax(-1)
    token_log_probs = log_probs.gather(-1, padded[:, 1:, None])[..., 0]
    means = [
        row[len(prompt) - 1 : len(prompt) + len(option) - 1].mean().item()
        for row, prompt, option in zip(token_log_probs, prompts, options, strict=True)
    ]
    width = len(items[0]["options"])
    return [means[start : start + width] for start in range(0, len(means), width)]


@torch.no_grad()
def task_accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, items: list[dict[str, Any]]
) -> tuple[float, dict[str, float]]:
    """Share of items whose right option has the highest mean log-probability per token; overall and by task."""
    hits: dict[str, list[bool]] = {}
    for start in range(0, len(items), 16):
        part = items[start : start + 16]
        for item, means in zip(part, _option_log_probs(model, tokenizer, part), strict=True):
            hits.setdefault(item["task"], []).append(means.index(max(means)) == item["answer"])
    return sum(map(sum, hits.values())) / len(items), {task: sum(own) / len(own) for task, own in hits.items()}


def main(arguments: list[str] | None = None) -> None:
    """Make the tokenizer and the model, print how well it does, and save both."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args(arguments)

    tokenizer = make_tokenizer(args.seed)
    model = make_model(args.seed, tokenizer)
    print(f"{sum(weights.numel() for weights in model.parameters()):,} parameters", flush=True)
    train(model, tokenizer, args.seed, args.steps)
    loss, items = held_out_loss(model, tokenizer), tasks(0, 450)
    accuracy, by_task = task_accuracy(model, tokenizer, items)
    print(f"held-out loss {loss:.3f}, task accuracy {accuracy:.3f}:")
    for task, share in by_task.items():
        print(f"  {task:10} {share:.2f}")
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    shares = ", ".join(f"{task} {share:.0%}" for task, share in by_task.items())
    measured = {"loss": loss, "accuracy": accuracy, "items": len(items), "by_task": shares}
    card = README.format(seed=args.seed, steps=args.steps, **measured)
    (args.output_dir / "README.md").write_text(card, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
