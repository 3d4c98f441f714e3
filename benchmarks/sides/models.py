"""The models and prompts of a job: one folder that both sides load, and biases that set the lengths of completions."""

from __future__ import annotations

from pathlib import Path

import torch
from common.models import RANDOM, RandomTokens, model_folder, write_random
from common.training import ADAPTER, WEIGHTS, model_options
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from instructgpt_hf.models.loading import load_policy, load_tokenizer
from instructgpt_hf.models.reward_model import create_reward_model, save_reward_model
from sides.job import BASE, NEVER, POLICY, SCALAR, set_biases

# Completions sampled at a time, with their logits, when lengths are calibrated.
CALIBRATION_BATCH = 8


def prepare(model: str, train: str, dtype: str, folder: Path) -> Path:
    """Write `POLICY` and `SCALAR`, the reward model and start of the value model, and for adapters their `BASE`.

    Args:
        model: lab, a key of `RANDOM`, or a model folder.
        train: full, lora or qlora.
        dtype: a key of `WEIGHTS`.
        folder: to write into.
    """
    source = model_folder("lab" if model in RANDOM else model)
    tokenizer = load_tokenizer(source)
    base = folder / (POLICY if train == "full" else BASE)
    if model in RANDOM:
        write_random(model, base, WEIGHTS[dtype])
    else:
        load_policy(source, tokenizer, dtype=WEIGHTS[dtype]).save_pretrained(base)
        tokenizer.save_pretrained(base)
    options = model_options(train, dtype, torch.cuda.is_available())
    torch.manual_seed(0)
    if train == "full":
        save_reward_model(create_reward_model(base, tokenizer, seed=0, **options), folder / SCALAR)
        return folder
    policy = load_policy(base, tokenizer, peft_config=LoraConfig(task_type="CAUSAL_LM", **ADAPTER), **options)
    _fill_adapter(policy).save_pretrained(folder / POLICY)
    tokenizer.save_pretrained(folder / POLICY)
    del policy
    adapter = LoraConfig(task_type="SEQ_CLS", **ADAPTER)
    scalar = create_reward_model(base, tokenizer, seed=0, peft_config=adapter, **options)
    save_reward_model(_fill_adapter(scalar), folder / SCALAR)
    return folder


def _fill_adapter(model: PeftModel) -> PeftModel:
    """Give a fresh adapter, which has a zero factor and so a gradient that is half 0, random weights."""
    draw = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = (0.01 * torch.randn(parameter.shape, generator=draw)).to(parameter)
    return model


def make_prompts(
    count: int, shortest: int, longest: int, tokenizer: PreTrainedTokenizerBase, vocabulary: int
) -> list[list[int]]:
    """Random token ids, with lengths evenly spread from `shortest` to `longest`."""
    tokens = RandomTokens(tokenizer, vocabulary)
    return [tokens.draw(shortest + round(index * (longest - shortest) / max(1, count - 1))) for index in range(count)]


def biases(
    folder: Path, dtype: str, prompts: list[list[int]], completion: int, mean: float | None
) -> dict[str, float]:
    """Biases under which the policy's completions have `completion` tokens each, or `mean` tokens on average.

    The policy completes the prompts with EOS and padding excluded. The margin between EOS and the other logits gives
    the probability of ending at each token, and so the expected length, for any bias of EOS.

    Args:
        folder: written by `prepare`.
        dtype: a key of `WEIGHTS`.
        prompts: token ids.
        completion: most tokens of a completion.
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
def _margins(policy: PreTrainedModel, prompts: list[list[int]], completion: int, eos: int, pad: int) -> torch.Tensor:
    """[prompts, completion] log-odds against EOS at each token of a sampled completion, with a bias of 0."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=policy.device)
    settings = dict(do_sample=True, top_k=0, max_new_tokens=completion, return_dict_in_generate=True)
    # The mask is exact, because no prompt holds the padding token.
    output = policy.generate(ids, attention_mask=(ids != pad).long(), output_logits=True, **settings)
    logits = torch.stack(output.logits, dim=1).float()
    return (logits.logsumexp(-1) - (logits[..., eos] - NEVER)).cpu()


def expected_length(margins: torch.Tensor, bias: float) -> float:
    """Mean number of tokens, EOS included, of completions that end with the odds exp(bias - margin) at each token.

    Args:
        margins: [completions, tokens].
        bias: of EOS.
    """
    continues = torch.sigmoid(margins.double() - bias).cumprod(1)
    return 1.0 + float(continues[:, :-1].sum(1).mean())


def bias_for_mean(margins: torch.Tensor, mean: float) -> float:
    """The bias of EOS with which `expected_length` is `mean`, by bisection."""
    low, high = float(margins.min()) - 50, float(margins.max()) + 50
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_length(margins, middle) > mean else (low, middle)
    return low
