"""Write trl_1_12.json: the numbers that TRL 1.12.0, the last release with PPO, computes on random inputs.

TRL's importable functions are called. Formulas that stand inside its methods are cut out of the installed source
between two marker lines and executed, so that nothing is retyped. The script stops if a marker does not occur exactly
once.

Environment and command (Python 3.11, CPU):

    python3.11 -m venv trl-1.12
    trl-1.12/bin/pip install torch==2.13.0 trl==1.12.0 transformers==5.23.0 peft datasets accelerate
    trl-1.12/bin/python tests/functional/data/make_trl_1_12_numbers.py
"""

from __future__ import annotations

import inspect
import json
import platform
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
import trl
from torch import nn
from trl.experimental.ppo import ppo_trainer
from trl.trainer import reward_trainer
from trl.trainer.utils import selective_log_softmax

TARGET = Path(__file__).with_name("trl_1_12.json")


def lines_between(function: Any, first: str, last: str) -> str:
    """The source of `function` from the line that starts with `first` up to the one that starts with `last`."""
    lines = inspect.getsource(function).splitlines()
    starts = [number for number, line in enumerate(lines) if line.strip().startswith(first)]
    ends = [number for number, line in enumerate(lines) if line.strip().startswith(last)]
    if len(starts) != 1 or len(ends) != 1:
        raise SystemExit(f"{first!r} found {len(starts)} times, {last!r} {len(ends)} times; expected once each")
    return textwrap.dedent("\n".join(lines[starts[0] : ends[0] + 1]))


def run(source: str, namespace: dict[str, Any]) -> dict[str, Any]:
    """Execute `source` with the names of `namespace` and return all names after it."""
    names = dict(namespace)
    exec(source, names)
    return names


def advantages_case(seed: int, lengths: list[int], total: int, **settings: Any) -> dict[str, Any]:
    """From log-probabilities, values and scores to whitened advantages, as in PPOTrainer.train."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    batch = len(lengths)
    inputs = {"logprobs": -draw(batch, total).abs(), "ref_logprobs": -draw(batch, total).abs()}
    inputs |= {"values": draw(batch, total), "scores": 3 * draw(batch)}
    args = SimpleNamespace(**settings)
    names = {
        "torch": torch,
        "args": args,
        "self": SimpleNamespace(args=args),
        "responses": torch.zeros(batch, total, dtype=torch.long),
        # TRL's sequence length is the index of the last token.
        "sequence_lengths": torch.tensor(lengths) - 1,
        "INVALID_LOGPROB": ppo_trainer.INVALID_LOGPROB,
        "masked_whiten": ppo_trainer.masked_whiten,
        **{name: value.clone() for name, value in inputs.items()},
    }
    span = ("response_idxs = torch.arange(", "advantages = torch.masked_fill(advantages, padding_mask, 0)")
    source = lines_between(ppo_trainer.PPOTrainer.train, *span)
    whitened = "advantages = masked_whiten(advantages, ~padding_mask)"
    assert source.count(whitened) == 1
    names = run(source.replace(whitened, "raw_advantages = advantages.clone(); " + whitened), names)
    outputs = {key: names[key] for key in ("kl", "rewards", "raw_advantages", "returns", "advantages")}
    masks = {"mask": ~names["padding_mask"], "value_mask": ~names["padding_mask_p1"]}
    return {"settings": settings, "inputs": inputs, "masks": masks, "outputs": outputs}


def losses_case(seed: int, lengths: list[int], total: int, **settings: Any) -> dict[str, Any]:
    """Policy and value loss with their gradients, as in PPOTrainer.train."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    batch = len(lengths)
    position = torch.arange(total).expand(batch, total)
    padding = position >= torch.tensor(lengths)[:, None]
    padding_p1 = position > torch.tensor(lengths)[:, None]
    old = -draw(batch, total).abs() - 1
    inputs = {"old_logps": old, "logps": old + 0.4 * draw(batch, total), "advantages": draw(batch, total)}
    inputs |= {"old_values": draw(batch, total), "returns": draw(batch, total)}
    inputs["values"] = inputs["old_values"] + 0.4 * draw(batch, total)
    new_logprobs = inputs["logps"].clone().requires_grad_()
    vpred = inputs["values"].clone().requires_grad_()
    names = {
        "torch": torch,
        "args": SimpleNamespace(**settings),
        "micro_batch_inds": torch.arange(batch),
        "padding_mask": padding,
        "padding_mask_p1": padding_p1,
        "masked_mean": ppo_trainer.masked_mean,
        "mb_logprobs": old.masked_fill(padding, ppo_trainer.INVALID_LOGPROB),
        "new_logprobs": new_logprobs.masked_fill(padding, ppo_trainer.INVALID_LOGPROB),
        "mb_values": inputs["old_values"].masked_fill(padding_p1, 0),
        "mb_return": inputs["returns"].masked_fill(padding_p1, 0),
        "mb_advantage": inputs["advantages"].masked_fill(padding, 0),
        "vpred": vpred,
    }
    span = ("vpred = torch.masked_fill(vpred", "loss = pg_loss + args.vf_coef * vf_loss")
    names = run(lines_between(ppo_trainer.PPOTrainer.train, *span), names)
    clip_fraction = ppo_trainer.masked_mean((names["pg_losses2"] > names["pg_losses"]).double(), ~padding)
    gradients = torch.autograd.grad(names["loss"], (new_logprobs, vpred))
    outputs = {key: names[key].detach() for key in ("pg_loss", "vf_loss", "loss", "vf_clipfrac")}
    outputs |= {"pg_clipfrac": clip_fraction, "logps_gradient": gradients[0], "values_gradient": gradients[1]}
    return {
        "settings": settings,
        "inputs": inputs,
        "masks": {"mask": ~padding, "value_mask": ~padding_p1},
        "outputs": outputs,
    }


def whitening_case(seed: int, shift_mean: bool) -> dict[str, Any]:
    """masked_mean, masked_var and masked_whiten, called."""
    generator = torch.Generator().manual_seed(seed)
    values = 5 + 2 * torch.randn(3, 7, generator=generator, dtype=torch.float64)
    mask = torch.rand(3, 7, generator=generator) < 0.6
    outputs = {
        "mean": ppo_trainer.masked_mean(values, mask),
        "var_unbiased": ppo_trainer.masked_var(values, mask, unbiased=True),
        "var": ppo_trainer.masked_var(values, mask, unbiased=False),
        "whitened": ppo_trainer.masked_whiten(values, mask, shift_mean=shift_mean),
    }
    return {
        "settings": {"shift_mean": shift_mean},
        "inputs": {"values": values},
        "masks": {"mask": mask},
        "outputs": outputs,
    }


def tokens_case(seed: int, temperature: float) -> dict[str, Any]:
    """Log-probabilities by TRL's selective_log_softmax, called, and the entropy formula of PPOTrainer.train."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, 4, 13, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, 13, (2, 4), generator=generator)
    tempered = logits / temperature
    span = ("prob_dist = torch.nn.functional.softmax", "entropy = torch.logsumexp(logits, dim=-1)")
    names = run(lines_between(ppo_trainer.PPOTrainer.train, *span), {"torch": torch, "logits": tempered})
    return {
        "settings": {"temperature": temperature},
        "inputs": {"logits": logits, "ids": ids},
        "outputs": {"logps": selective_log_softmax(tempered, ids), "entropy": names["entropy"]},
    }


def ranking_case(seed: int, ranks: list[int]) -> dict[str, Any]:
    """The loss of RewardTrainer on every strict pair of one prompt, chosen half first, as its collator lays it out."""
    generator = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(len(ranks), generator=generator, dtype=torch.float64)
    leaf = scores.clone().requires_grad_()
    pairs = [(i, j) for i in range(len(ranks)) for j in range(len(ranks)) if ranks[i] < ranks[j]]
    rows = torch.stack([leaf[i] for i, _ in pairs] + [leaf[j] for _, j in pairs])
    span = (
        "rewards_chosen, rewards_rejected = torch.chunk(",
        "loss = -nn.functional.logsigmoid(rewards_chosen - rewards_rejected).mean()",
    )
    source = lines_between(reward_trainer.RewardTrainer.compute_loss, *span)
    names = {"torch": torch, "nn": nn, "inputs": {}, "outputs": SimpleNamespace(logits=rows[:, None])}
    loss = run(source, names)["loss"]
    (gradient,) = torch.autograd.grad(loss, leaf)
    return {
        "settings": {"ranks": ranks},
        "inputs": {"scores": scores},
        "outputs": {"loss": loss.detach(), "gradient": gradient},
    }


def plain(value: Any) -> Any:
    """`value` as what JSON holds; floats keep every bit."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value.tolist() if isinstance(value, torch.Tensor) else value


def main() -> None:
    ppo = {"gamma": 1.0, "lam": 0.95, "kl_coef": 0.02, "kl_estimator": "k1", "whiten_rewards": False}
    clip = {"cliprange": 0.2, "cliprange_value": 0.2, "vf_coef": 0.1}
    ragged, full = [6, 2, 1, 5, 4], [5, 5, 5]
    record = {
        "versions": {
            "trl": trl.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "advantages": [
            advantages_case(1, full, 5, **ppo),
            advantages_case(2, ragged, 6, **ppo),
            advantages_case(3, ragged, 6, **{**ppo, "gamma": 0.9, "lam": 0.5, "kl_coef": 0.5, "kl_estimator": "k3"}),
            advantages_case(4, ragged, 6, **{**ppo, "whiten_rewards": True}),
        ],
        "losses": [losses_case(5, full, 5, **clip), losses_case(6, ragged, 6, **{**clip, "cliprange_value": 0.05})],
        "whitening": [whitening_case(7, True), whitening_case(8, False)],
        "tokens": [tokens_case(9, 1.0), tokens_case(10, 0.7)],
        "ranking": [
            ranking_case(11, [1, 2]),
            ranking_case(12, [2, 1, 3, 4]),
            ranking_case(13, [3, 1, 1, 2, 3, 5, 4, 9, 2]),
        ],
    }
    # One line per case keeps a change of one case one line of the diff.
    parts = []
    for name, value in plain(record).items():
        cases = ",\n".join(json.dumps(case) for case in value) if isinstance(value, list) else None
        parts.append(f"{json.dumps(name)}: " + (json.dumps(value) if cases is None else f"[\n{cases}\n]"))
    TARGET.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
    print(f"wrote {TARGET}")


if __name__ == "__main__":
    main()
