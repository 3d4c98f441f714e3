"""The models and prompts of benchmarks/ppo.py: one folder that both sides load, and how long its answers are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from ppo_side import NEVER, POLICY, SCALAR, WEIGHTS, model_options, set_biases
from random_models import RANDOM, write_random

from instructgpt_hf import lab
from instructgpt_hf.models.loading import load_policy, load_tokenizer
from instructgpt_hf.models.reward_model import create_reward_model, save_reward_model

# Answers of which the logits are held at a time when lengths are calibrated.
CALIBRATION_BATCH = 8
ADAPTER = dict(r=16, lora_alpha=32, target_modules="all-linear")


def prepare(model: str, train: str, dtype: str, folder: Path) -> Path:
    """Write `policy` and `scalar`, the reward model and start of the value model, and for adapters their `base`.

    Args:
        model: lab, a key of `RANDOM`, or a model folder.
        train: full, lora or qlora.
        dtype: a key of `WEIGHTS`.
        folder: to write into.
    """
    source = lab.base_model_path() if model == "lab" or model in RANDOM else Path(model)
    tokenizer = load_tokenizer(source)
    base = folder / ("base" if train != "full" else POLICY)
    if model in RANDOM:
        write_random(model, base, WEIGHTS[dtype])
    else:
        load_policy(source, tokenizer, dtype=WEIGHTS[dtype]).save_pretrained(base)
        tokenizer.save_pretrained(base)
    options = model_options(train, dtype, torch.cuda.is_available())
    torch.manual_seed(0)
    adapter = LoraConfig(task_type="CAUSAL_LM", **ADAPTER) if train != "full" else None
    if adapter is not None:
        policy = load_policy(base, tokenizer, peft_config=adapter, **options)
        _fill_adapter(policy)
        policy.save_pretrained(folder / POLICY)
        tokenizer.save_pretrained(folder / POLICY)
        del policy
        adapter = LoraConfig(task_type="SEQ_CLS", **ADAPTER)
    scalar = create_reward_model(base, tokenizer, seed=0, peft_config=adapter, **options)
    if adapter is not None:
        _fill_adapter(scalar)
    save_reward_model(scalar, folder / SCALAR)
    return folder


def _fill_adapter(model: Any) -> None:
    """A fresh adapter changes nothing, so half of its gradient is 0; give it weights of some training."""
    draw = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = (0.01 * torch.randn(parameter.shape, generator=draw)).to(parameter)


def make_prompts(count: int, shortest: int, longest: int, tokenizer: Any, vocabulary: int) -> list[list[int]]:
    """Random token ids, with lengths evenly spread from `shortest` to `longest`."""
    draw = torch.Generator().manual_seed(0)
    special = set(tokenizer.all_special_ids)
    words = torch.tensor([token for token in range(min(vocabulary, len(tokenizer))) if token not in special])
    lengths = [shortest + round(index * (longest - shortest) / max(1, count - 1)) for index in range(count)]
    return [words[torch.randint(len(words), (length,), generator=draw)].tolist() for length in lengths]


def biases(
    folder: Path, dtype: str, prompts: list[list[int]], completion: int, mean: float | None
) -> dict[str, float]:
    """Biases under which the policy's answers have `completion` tokens each, or `mean` tokens on average.

    The policy answers the prompts with EOS and padding excluded; from EOS's distance to the other logits follow the
    chance that an answer ends at each token and the expected length, for any bias of EOS.

    Args:
        folder: what `prepare` wrote.
        dtype: a key of `WEIGHTS`.
        prompts: token ids.
        completion: most tokens of an answer.
        mean: None excludes EOS.
    """
    tokenizer = load_tokenizer(folder / POLICY)
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    never = {str(eos): NEVER, str(pad): NEVER}
    if mean is None:
        return never
    policy = load_policy(folder / POLICY, tokenizer, dtype=WEIGHTS[dtype])
    set_biases(policy, never)
    if torch.cuda.is_available():
        policy.to("cuda")
    torch.manual_seed(0)
    parts = [prompts[start : start + CALIBRATION_BATCH] for start in range(0, len(prompts), CALIBRATION_BATCH)]
    margins = torch.cat([_margins(policy, part, completion, eos, pad) for part in parts])
    return {**never, str(eos): bias_for_mean(margins, mean)}


@torch.no_grad()
def _margins(policy: Any, prompts: list[list[int]], completion: int, eos: int, pad: int) -> torch.Tensor:
    """Logarithm of the odds against EOS at each token of a sampled answer, with a bias of 0: [prompts, completion]."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=policy.device)
    settings = dict(do_sample=True, top_k=0, max_new_tokens=completion, return_dict_in_generate=True)
    # Prompts are made without the padding token.
    found = policy.generate(ids, attention_mask=(ids != pad).long(), output_logits=True, **settings)
    logits = torch.stack(found.logits, dim=1).float()
    return (logits.logsumexp(-1) - (logits[..., eos] - NEVER)).cpu()


def expected_length(margins: torch.Tensor, bias: float) -> float:
    """Mean number of tokens, EOS included, of answers that end with the odds exp(bias - margin) at each token.

    Args:
        margins: [answers, tokens].
        bias: of EOS.
    """
    goes_on = torch.sigmoid(margins.double() - bias).cumprod(1)
    return 1.0 + float(goes_on[:, :-1].sum(1).mean())


def bias_for_mean(margins: torch.Tensor, mean: float) -> float:
    """The bias of EOS with which `expected_length` is `mean`, by bisection."""
    low, high = float(margins.min()) - 50, float(margins.max()) + 50
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_length(margins, middle) > mean else (low, middle)
    return low
