"""Measurement of one policy on held-out prompts, tasks and text; the alignment tax between two policies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from instructgpt_hf.config.ppo import PPOConfig
from instructgpt_hf.data.prompts import Prompt, PromptFormat
from instructgpt_hf.evaluation.intervals import Estimate, bootstrap_mean, paired_difference, win_rate
from instructgpt_hf.evaluation.judges import Judge, SampledCompletions
from instructgpt_hf.evaluation.likelihood import option_accuracy, sequence_kl, text_loss
from instructgpt_hf.evaluation.results import PolicyRow
from instructgpt_hf.evaluation.tasks import exact_match
from instructgpt_hf.models.sampling import is_finished, sample_completions
from instructgpt_hf.models.vocabulary import Vocabulary

BATCH_SIZE = 64


class MeasuredPolicy(NamedTuple):
    """Results of one policy, its completions, the judge's score of each, and whether each task question was hit."""

    row: PolicyRow
    texts: list[str]
    judged: list[float]
    hits: list[bool]


@dataclass(frozen=True)
class PolicyEvaluation:
    """Held-out prompts, tasks, text and judges, the same for every policy.

    Attributes:
        args: seed and lengths of the completions.
        tokenizer: of every policy.
        prompt_format: of every policy.
        prompts: held out from training.
        tasks: few-shot questions for the alignment tax; may be empty.
        texts: pretraining documents held back from training; may be empty.
        reference: the SFT model, which KL is measured to.
        reward: the reward model of PPO.
        judge: decides the win rate; the same object as `reward` where no other judge is known.
        watch: context of each measurement, called with what is measured, to show progress.
    """

    args: PPOConfig
    tokenizer: PreTrainedTokenizerBase
    prompt_format: PromptFormat
    prompts: Sequence[Prompt]
    tasks: Sequence[Mapping[str, Any]]
    texts: Sequence[str]
    reference: PreTrainedModel | PeftModel
    reward: Judge
    judge: Judge
    watch: Callable[[str], AbstractContextManager[Any]] = nullcontext

    @cached_property
    def prompt_ids(self) -> list[list[int]]:
        """Token ids of each prompt."""
        return [self.prompt_format.prompt_ids(prompt, self.tokenizer) for prompt in self.prompts]

    def measure(
        self, name: str, policy: PreTrainedModel | PeftModel, sft_judged: Sequence[float] | None = None
    ) -> MeasuredPolicy:
        """Measure one policy on everything; `sft_judged` are the judge's scores of the SFT model's completions.

        Without `sft_judged`, win rate and KL are left out.
        """
        with self.watch(f"measuring {name}: sampling completions"):
            sampled = self._sample(policy)
        with self.watch(f"measuring {name}: scoring them"):
            rewards = self.reward.scores(sampled)
            judged = rewards if self.judge is self.reward else self.judge.scores(sampled)
        row = PolicyRow(name, mean_reward=bootstrap_mean(rewards))
        if self.judge.independent:
            row.gold_score = bootstrap_mean(judged)
        if sft_judged is not None:
            rate = win_rate(judged, sft_judged)
            row.win_rate = Estimate(rate["win_rate"], rate["win_rate_low"], rate["win_rate_high"])
            completions, vocabulary = (sampled.prompt_ids, sampled.completion_ids), Vocabulary(self.tokenizer)
            with self.watch(f"measuring {name}: KL to SFT"):
                row.kl = sequence_kl(policy, self.reference, *completions, BATCH_SIZE, vocabulary=vocabulary)
        row.extra["eos_rate"] = sum(sampled.finished) / len(sampled.finished)
        row.extra["mean_length"] = sum(map(len, sampled.completion_ids)) / len(sampled.completion_ids)
        hits: list[bool] = []
        if self.tasks:
            with self.watch(f"measuring {name}: tasks"):
                row.task_accuracy, row.task_accuracy_by_task, hits = exact_match(policy, self.tokenizer, self.tasks)
                options = option_accuracy(policy, self.tokenizer, self.tasks, batch_size=256)
            row.extra["option_accuracy"] = {key: options[key] for key in ("accuracy", "accuracy_low", "accuracy_high")}
        if self.texts:
            length = self.args.ptx_max_length
            with self.watch(f"measuring {name}: loss on pretraining text"):
                row.extra["pretraining_loss"] = text_loss(policy, self.tokenizer, self.texts, length, BATCH_SIZE)
        return MeasuredPolicy(row, sampled.texts, judged, hits)

    def _sample(self, policy: PreTrainedModel | PeftModel) -> SampledCompletions:
        """One completion per prompt at temperature 1."""
        eos = [self.tokenizer.eos_token_id]
        ids = sample_completions(
            policy,
            self.tokenizer,
            self.prompt_ids,
            eos,
            self.args.max_completion_length,
            seed=self.args.seed,
            batch_size=BATCH_SIZE,
            min_new_tokens=self.args.min_completion_length,
        )
        texts = [
            self.prompt_format.completion_text(prompt, item, self.tokenizer)
            for prompt, item in zip(self.prompts, ids, strict=True)
        ]
        return SampledCompletions(self.prompts, self.prompt_ids, ids, texts, is_finished(ids, eos))

    def notes(self) -> dict[str, str]:
        """Facts about the measurement, for the report."""
        return {
            "judge": self.judge.name,
            "prompts": f"{len(self.prompts)}, held out",
            "sampling": "temperature 1",
            **({"task questions": f"{len(self.tasks)}, greedy exact match"} if self.tasks else {}),
            **({"pretraining documents": f"{len(self.texts)}, held back"} if self.texts else {}),
        }


def alignment_tax(measured: Mapping[str, MeasuredPolicy]) -> dict[str, str]:
    """Alignment tax: PPO minus SFT and PPO-ptx minus PPO on the pretraining tasks and text, as text by label."""
    notes = {}
    for first, second in (("PPO", "SFT"), ("PPO-ptx", "PPO")):
        if first not in measured or second not in measured:
            continue
        label = f"{first} minus {second}"
        pair = measured[first], measured[second]
        if pair[0].hits:
            value, low, high = (100 * part for part in paired_difference(pair[0].hits, pair[1].hits))
            notes[f"task accuracy, {label}"] = f"{value:+.1f} points ({low:+.1f} to {high:+.1f})"
        losses = [item.row.extra["pretraining_loss"] for item in pair if "pretraining_loss" in item.row.extra]
        if len(losses) == 2:
            notes[f"pretraining loss, {label}"] = f"{losses[0] - losses[1]:+.3f} nats per token"
    return notes
