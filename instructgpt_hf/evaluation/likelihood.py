"""Multiple choice by likelihood, loss on text and KL between policies (InstructGPT App. D)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from instructgpt_hf.data.pretraining import leading_ids
from instructgpt_hf.data.special_text import encode_text
from instructgpt_hf.errors import InstructGPTError, Problems
from instructgpt_hf.evaluation.intervals import Estimate, bootstrap_mean, wilson
from instructgpt_hf.functional import kl_estimate, token_log_probs
from instructgpt_hf.models.inputs import evaluation_mode, map_by_length, model_device, padded
from instructgpt_hf.models.vocabulary import Vocabulary

_KEYS = ("task", "prompt", "options", "answer")
# Logits of one forward pass, half a gigabyte in float32: 64 rows of 384 tokens over a vocabulary of 50k have ten times
# as many, more than a machine of 8 GB holds.
_LOGITS = 2**27


def option_accuracy(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Mapping[str, Any]], batch_size: int = 16
) -> dict[str, Any]:
    """Share of questions whose right option has the highest mean log-probability per token.

    Appendix D prints "lowest average per-token log-probability", which must mean the lowest loss. Text is read
    without a chat template, and with a beginning-of-text token only if the tokenizer adds one by default.

    Args:
        tasks: dicts with `task` (a name), `prompt`, `options` (at least two different texts, each with the space that
            separates it from the prompt) and `answer`, the index of the right one.
        batch_size: sequences per forward pass; every option is one.

    Returns:
        `accuracy` with Wilson's 95 % interval in `accuracy_low` and `accuracy_high`, `correct`, `count`, `chance` (the
        mean of 1 / number of options), `by_task` (these numbers for each task, by name) and `hits`, one bool per
        question in the order given, for `paired_difference`.

    Raises:
        InstructGPTError: if there are no tasks or some are malformed; the message names each one.
    """
    _check_tasks(tasks)
    pairs = [_split(tokenizer, item["prompt"], option) for item in tasks for option in item["options"]]
    prompts, options = ([pair[side] for pair in pairs] for side in (0, 1))
    means = iter([logps.mean().item() for logps in continuation_log_probs(model, prompts, options, batch_size)])
    hits: list[bool] = []
    by_task: dict[str, list[int]] = {}
    for number, item in enumerate(tasks):
        of_options = [next(means) for _ in item["options"]]
        hits.append(of_options.index(max(of_options)) == item["answer"])
        by_task.setdefault(item["task"], []).append(number)
    return {
        **_summary(tasks, hits, range(len(tasks))),
        "by_task": {name: _summary(tasks, hits, numbers) for name, numbers in sorted(by_task.items())},
        "hits": hits,
    }


def text_loss(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int, batch_size: int = 8
) -> float:
    """Mean next-token loss on held-out pretraining text, in nats per token, over the tokens of all texts.

    Args:
        texts: documents; each is cut to `max_length` tokens.
        batch_size: documents per forward pass.

    Raises:
        InstructGPTError: if no text has two tokens.
    """
    rows = [(leading_ids(tokenizer) + encode_text(text, tokenizer))[:max_length] for text in texts]
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise InstructGPTError(f"pretraining loss: none of {len(texts)} texts has two tokens to predict one from.")
    logps = continuation_log_probs(model, [row[:1] for row in rows], [row[1:] for row in rows], batch_size)
    return -torch.cat(logps).double().mean().item()


def _summary(tasks: Sequence[Mapping[str, Any]], hits: Sequence[bool], numbers: Sequence[int]) -> dict[str, Any]:
    correct = sum(hits[number] for number in numbers)
    chance = sum(1 / len(tasks[number]["options"]) for number in numbers) / len(numbers)
    share = wilson(correct, len(numbers))
    return {**share.entries("accuracy"), "correct": correct, "count": len(numbers), "chance": chance}


def _split(tokenizer: PreTrainedTokenizerBase, prompt: str, option: str) -> tuple[list[int], list[int]]:
    """Token ids of `prompt + option`, tokenized as one and split; a token across the border belongs to the option."""
    prompt_ids, whole = encode_text(prompt, tokenizer), encode_text(prompt + option, tokenizer)
    shared = 0
    while shared < min(len(prompt_ids), len(whole) - 1) and prompt_ids[shared] == whole[shared]:
        shared += 1
    lead = leading_ids(tokenizer)
    if not shared and not lead:
        # The first token has no predecessor, thus no log-probability; it is the same for (almost) every option.
        shared = 1
    return lead + whole[:shared], whole[shared:]


def _check_tasks(tasks: Sequence[Mapping[str, Any]]) -> None:
    if not tasks:
        raise InstructGPTError("task accuracy: there are no questions.")
    problems = Problems("task accuracy: malformed questions")
    for number, item in enumerate(tasks):
        missing = [key for key in _KEYS if key not in item]
        options, answer = item.get("options", ()), item.get("answer")
        if missing:
            problems.add(f"question {number}: missing {', '.join(missing)}; expected {', '.join(_KEYS)}")
        elif len(options) < 2 or len(set(options)) < len(options) or not all(options):
            problems.add(f"question {number}: options must be at least two different texts, got {options!r}")
        elif isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(options):
            problems.add(f"question {number}: answer must be an index below {len(options)}, got {answer!r}")
        elif not item["prompt"]:
            problems.add(f"question {number}: the prompt is empty")
    problems.raise_if_any()


def _vocabulary(model: nn.Module) -> int:
    """Number of logits for a token; 1 for a model without a config."""
    config = getattr(model, "config", None)
    return int(config.get_text_config().vocab_size) if config is not None else 1


@torch.no_grad()
def continuation_log_probs(
    model: nn.Module,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    batch_size: int,
    temperature: float = 1.0,
    vocabulary: Vocabulary | None = None,
) -> list[Tensor]:
    """Log-probability of every completion token, given its prompt and the tokens before it.

    Rows of similar length share a batch, padded on the right and masked: up to rounding, results depend neither on
    the tokenizer's padding side nor on the batch size.

    Args:
        model: takes `input_ids` and `attention_mask` [B, T]; its output's `logits` are [B, T, V].
        prompt_ids: N lists of at least one token.
        completion_ids: N lists of at least one token.
        batch_size: sequences per forward pass, at most; fewer where they are long and the vocabulary is large.
        temperature: divides the logits.
        vocabulary: of the tokenizer; ids that are no token's have probability 0. None allows every id.

    Returns:
        N float32 vectors on the CPU, one number per token, in nats.

    Raises:
        ValueError: if the numbers of prompts and completions differ or one of them is empty.
    """
    if len(prompt_ids) != len(completion_ids):
        raise ValueError(f"Expected a completion for every prompt, got {len(completion_ids)} for {len(prompt_ids)}.")
    for row, (prompt, completion) in enumerate(zip(prompt_ids, completion_ids, strict=True)):
        if not prompt or not completion:
            raise ValueError(f"Row {row}: prompt and completion need at least one token each.")
    rows = [[*prompt, *completion] for prompt, completion in zip(prompt_ids, completion_ids, strict=True)]
    device = model_device(model)

    def log_probs(batch: Sequence[Sequence[int]]) -> list[Tensor]:
        ids, mask = padded(batch, 0, device)
        logits = model(input_ids=ids, attention_mask=mask).logits
        if vocabulary is not None:
            logits = vocabulary.exclude_others(logits)
        logps = token_log_probs(logits[:, :-1], ids[:, 1:], temperature).cpu()
        return [values[: len(row) - 1] for values, row in zip(logps, batch, strict=True)]

    longest = max(map(len, rows), default=1)
    with evaluation_mode(model):
        results = map_by_length(log_probs, rows, max(1, min(batch_size, _LOGITS // (longest * _vocabulary(model)))))
    return [logps[len(prompt) - 1 :] for logps, prompt in zip(results, prompt_ids, strict=True)]


def sequence_kl(
    policy: nn.Module,
    reference: nn.Module,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    batch_size: int = 16,
    temperature: float = 1.0,
    seed: int = 0,
    vocabulary: Vocabulary | None = None,
) -> Estimate:
    """KL(policy, reference) per completion: the mean of the log ratio of equation 2, summed over tokens.

    The estimate is unbiased if `completion_ids` were sampled from the policy at this temperature, EOS included.

    Args:
        policy: a causal language model; the other arguments are those of `continuation_log_probs`.
        reference: another one; the SFT model in InstructGPT.
        seed: of the bootstrap.

    Returns:
        Nats per completion, with the 95 % bootstrap interval over completions. May be negative in a small sample.

    Raises:
        ValueError: if the numbers of prompts and completions differ or one of them is empty.
    """
    logps, ref_logps = (
        continuation_log_probs(model, prompt_ids, completion_ids, batch_size, temperature, vocabulary)
        for model in (policy, reference)
    )
    sums = [kl_estimate(a, b, "k1").sum().item() for a, b in zip(logps, ref_logps, strict=True)]
    return bootstrap_mean(sums, seed)
