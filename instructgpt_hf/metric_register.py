"""Every metric that a trainer logs or stage.json holds: its formula and unit, and where it is shown.

The progress bar, the pictures, the policy table, the cards and the test of the documentation all read `METRICS`.
Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

SFT, REWARD, POLICIES = ("sft",), ("reward",), ("ppo", "ppo-ptx")
ALL = (*SFT, *REWARD, *POLICIES)


@dataclass(frozen=True)
class Metric:
    """One metric of one or several stages. The order of `METRICS` is the order wherever several are shown.

    Attributes:
        name: in stage.json; `{}` stands for a number, `<name>` for any text.
        stages: whose log or stage.json holds it.
        formula: what it is, in a few words; docs/ has the whole explanation.
        unit: of the value; none for shares, counts and ratios.
        kind: how a card prints the value: a share in percent, a count without decimals.
        label: in the card's table of results; without one a metric of stage.json is listed there by name.
        terminal: label beside the progress bar, if it is shown there.
        panel: title of its panel in the picture of the training curves, if it has one.
        line: which line of the panel it is, in SFT and the reward model; in PPO each policy is a line.
        column: heading, in two lines, in the table of policies.
        attribute: of `PolicyRow`, where its value comes from.
        measure: part and entry of `evaluate_rankings`' result that it comes from, `part.entry`; the entry is left out
            where it is the name without `eval_`.
        index: metric type and dataset role under which the Hub indexes it.
    """

    name: str
    stages: tuple[str, ...]
    formula: str
    unit: str = ""
    kind: Literal["number", "share", "count", "text"] = "number"
    label: str = ""
    terminal: str = ""
    panel: str = ""
    line: str = ""
    column: str = ""
    attribute: str = ""
    measure: str = ""
    index: tuple[str, str] | None = None

    @property
    def logged(self) -> str:
        """Name in the trainer's log, where everything measured on held-out rankings begins with `eval_`."""
        return f"eval_{self.name.removeprefix('eval_')}" if self.measure else self.name

    def number_in(self, name: str) -> int | None:
        """The number in a name that this entry stands for, 0 if it has none; None for any other name."""
        pattern = re.escape(self.name).replace(r"\{\}", r"(\d+)").replace("<name>", ".+")
        match = re.fullmatch(pattern, name)
        return None if match is None else int((*match.groups(), 0)[0])


# fmt: off
METRICS = (
    # Logged by the Trainer in every stage.
    Metric("step", ALL, "optimizer steps", kind="count"),
    Metric("epoch", ALL, "passes over the training data"),
    Metric("learning_rate", ALL, "of the last step; in PPO the policy's"),
    Metric("grad_norm", ALL, "length of the gradient before clipping"),
    Metric("num_tokens", (*SFT, *POLICIES), "tokens so far, padding left out", "tokens", "count"),
    Metric("train_loss", ALL, "mean loss of the whole training"),
    Metric("train_runtime", ALL, "duration of the training", "s"),
    Metric("train_samples_per_second", ALL, "training examples / train_runtime", "per s"),
    Metric("train_steps_per_second", ALL, "optimizer steps / train_runtime", "per s"),
    Metric("total_flos", ALL, "floating-point operations; 0 where they are not counted"),
    # SFT
    Metric("loss", SFT, "mean of -log p over the trained tokens", "nats per token",
           terminal="loss", panel="SFT: loss", line="training"),
    Metric("entropy", SFT, "mean of -Σ p log p at the trained tokens", "nats per token"),
    Metric("mean_token_accuracy", SFT, "trained tokens that are the model's first choice", kind="share"),
    Metric("eval_loss", SFT, "loss on held-back demonstrations", "nats per token",
           label="Loss on held-out demonstrations (nats per token)",
           panel="SFT: loss", line="held out", index=("loss", "demonstrations")),
    Metric("eval_mean_token_accuracy", SFT, "mean_token_accuracy on held-back demonstrations", kind="share",
           label="Token accuracy on held-out demonstrations"),
    # Reward model: training
    Metric("loss", REWARD, "equation 1", "nats per pair",
           terminal="loss", panel="Reward model: loss", line="training"),
    Metric("accuracy", REWARD, "strict pairs with r(better) > r(worse), equal scores one half", kind="share",
           terminal="accuracy", panel="Reward model: accuracy", line="training"),
    Metric("margin", REWARD, "mean of r(better) - r(worse) over strict pairs", "score"),
    Metric("mean_reward", REWARD, "mean of the raw scores", "score"),
    Metric("std_reward", REWARD, "standard deviation of the raw scores", "score"),
    Metric("min_reward", REWARD, "lowest raw score", "score"),
    Metric("max_reward", REWARD, "highest raw score", "score"),
    # Reward model: held-back rankings
    Metric("eval_loss", REWARD, "equation 1", "nats per pair", label="Pairwise loss on held-out rankings",
           panel="Reward model: loss", line="held out"),
    Metric("eval_accuracy", REWARD, "accuracy", kind="share", label="Pairwise accuracy on held-out rankings",
           panel="Reward model: accuracy", line="held out", measure="accuracy", index=("accuracy", "rankings")),
    Metric("length_baseline_accuracy", REWARD, "the same with the length in place of r", kind="share",
           label="Pairwise accuracy of preferring the longer completion",
           panel="Reward model: accuracy", line="length alone", measure="accuracy"),
    Metric("above_length_baseline", REWARD, "eval_accuracy - length_baseline_accuracy", kind="share",
           label="Difference of these two accuracies", measure="accuracy"),
    Metric("labeler_agreement", REWARD, "pairs ranked strictly by two labelers that both order alike", kind="share",
           label="Pairs that two labelers order alike", measure="labelers.agreement"),
    Metric("eval_accuracy_k{}", REWARD, "accuracy over prompts with that many completions", kind="share",
           label="Pairwise accuracy where a prompt has {} completions", measure="by_completions.completions"),
    Metric("eval_accuracy_gap{}", REWARD, "accuracy over pairs that far apart in dense rank", kind="share",
           label="Pairwise accuracy of completions {} apart in rank", measure="by_gap.gap"),
    Metric("eval_kendall_tau", REWARD, "Kendall's tau-b of scores and ranks, mean over prompts",
           label="Kendall's tau-b of scores and ranks, mean over prompts", measure="kendall_tau"),
    Metric("length_baseline_kendall_tau", REWARD, "the same with the length in place of r",
           label="Kendall's tau-b of lengths and ranks, mean over prompts", measure="kendall_tau"),
    Metric("eval_ece", REWARD, "mean over pairs of |accuracy - mean confidence| of the pair's bin", kind="share",
           label="Expected calibration error", measure="calibration"),
    Metric("eval_ece_by_chance", REWARD, "mean eval_ece of a calibrated model on as many pairs", kind="share",
           label="Calibration error that chance gives a calibrated model", measure="calibration"),
    Metric("eval_overconfidence", REWARD, "mean of σ(|r₁ - r₂|) - accuracy", kind="share",
           label="Mean confidence above accuracy", measure="calibration"),
    Metric("longer_scores_higher", REWARD, "strict pairs of unequal length with r(longer) > r(shorter)", kind="share",
           label="Pairs in which the longer completion has the higher score", measure="length"),
    Metric("longer_ranks_higher", REWARD, "the same pairs: the longer one has the better rank", kind="share",
           label="The same pairs: the longer completion has the better rank", measure="length"),
    Metric("score_length_correlation", REWARD, "Spearman's correlation of score and length, mean over prompts",
           label="Spearman's correlation of score and length, mean over prompts", measure="length"),
    Metric("rank_length_correlation", REWARD, "the same of rank (better is higher) and length",
           label="Spearman's correlation of rank and length (better is higher)", measure="length"),
    Metric("eval_pairs", REWARD, "strict pairs", kind="count",
           label="Strictly ordered pairs in that measurement", measure="accuracy"),
    Metric("eval_prompts", REWARD, "prompts with a strict pair", kind="count",
           label="Prompts in that measurement", measure="accuracy"),
    Metric("tied_pairs", REWARD, "pairs of equal rank", kind="count",
           label="Pairs left out because they tie", measure="accuracy"),
    Metric("equal_scores", REWARD, "strict pairs with equal scores", kind="count",
           label="Pairs to which the model gives equal scores", measure="accuracy"),
    Metric("demonstrations_scored", REWARD, "demonstrations whose mean score is the shift", kind="count",
           label="Demonstrations whose mean score is the shift"),
    # PPO: held-out prompts, and beside it the same of the last rollouts
    Metric("loss", POLICIES, "loss/policy + vf_coef · loss/value", terminal="loss"),
    Metric("win_rate_vs_sft", POLICIES, "prompts with judge(policy) > judge(SFT), a tie one half", kind="share",
           label="Win rate against the SFT model", column="win rate\nvs SFT", attribute="win_rate",
           index=("win_rate", "prompts")),
    Metric("judge", POLICIES, "who judges the win rate", kind="text", label="Judge of the win rate"),
    Metric("gold_score", POLICIES, "mean score of the gold labeler (lab only)", "score",
           label="Mean score by the judge", column="gold\nscore", attribute="gold_score"),
    Metric("mean_reward", POLICIES, "mean score of the reward model", "score", label="Mean reward",
           column="mean\nreward", attribute="mean_reward", index=("mean_reward", "prompts")),
    Metric("objective/scores", POLICIES, "mean of the weighted sum of the rewards", "score",
           label="Mean reward of the last rollouts", terminal="score", panel="Reward of the answers"),
    Metric("kl_to_sft", POLICIES, "mean of Σ (log π - log π_SFT)", "nats per completion",
           label="KL to the SFT model (nats per answer)", column="KL to SFT\n(nats)", attribute="kl",
           index=("kl", "prompts")),
    Metric("objective/kl", POLICIES, "mean of Σ (log π - log π_SFT)", "nats per completion",
           label="KL to the SFT model in the last rollouts (nats per answer)",
           terminal="KL", panel="KL to the SFT model"),
    Metric("task_accuracy", POLICIES, "greedy exact match on the pretraining tasks (lab only)", kind="share",
           label="Accuracy on the pretraining tasks", column="task\naccuracy", attribute="task_accuracy",
           index=("accuracy", "pretraining")),
    Metric("pretraining_loss", POLICIES, "mean of -log p on held-back pretraining text", "nats per token",
           label="Loss on held-back pretraining text (nats per token)"),
    Metric("eos_rate", POLICIES, "completions that end with EOS", kind="share", label="Answers that end"),
    Metric("mean_length", POLICIES, "mean length of the completions, EOS included", "tokens",
           label="Mean length of the answers (tokens)"),
    # PPO: rollouts
    Metric("completions/eos_rate", POLICIES, "completions that end with EOS", kind="share",
           label="Answers of the last rollouts that end", panel="Answers that end"),
    Metric("completions/clipped_ratio", POLICIES, "completions cut at max_completion_length", kind="share"),
    Metric("completions/most_frequent", POLICIES, "completions equal to the most frequent one", kind="share"),
    Metric("completions/mean_length", POLICIES, "mean length", "tokens", panel="Length of the answers"),
    Metric("completions/min_length", POLICIES, "shortest completion", "tokens"),
    Metric("completions/max_length", POLICIES, "longest completion", "tokens"),
    Metric("completions/mean_terminated_length", POLICIES, "mean length of those that end with EOS", "tokens"),
    Metric("completions/min_terminated_length", POLICIES, "shortest of those that end with EOS", "tokens"),
    Metric("completions/max_terminated_length", POLICIES, "longest of those that end with EOS", "tokens"),
    Metric("objective/scores_std", POLICIES, "standard deviation of the scores", "score"),
    Metric("rewards/<name>", POLICIES, "mean of one reward", "score"),
    Metric("objective/beta", POLICIES, "β of these rollouts", "score per nat"),
    Metric("objective/kl_penalty", POLICIES, "mean of β · Σ KL term", "score"),
    Metric("objective/rlhf_reward", POLICIES, "objective/scores - objective/kl_penalty", "score"),
    # PPO: optimizer steps
    Metric("objective/entropy", POLICIES, "mean of -Σ p log p", "nats per token", panel="Entropy of the policy"),
    Metric("loss/policy", POLICIES, "clipped policy loss"),
    Metric("loss/value", POLICIES, "mean clipped value loss", "score²"),
    Metric("loss/ptx", POLICIES, "mean of -log p on pretraining text", "nats per token",
           terminal="ptx loss", panel="Pretraining loss"),
    Metric("policy/ratio", POLICIES, "mean of r = π / π_rollout"),
    Metric("policy/approx_kl", POLICIES, "mean of r - 1 - log r", "nats per token"),
    Metric("policy/clip_fraction", POLICIES, "tokens whose clipped loss counts", kind="share", panel="Clipped tokens"),
    Metric("val/mean_value", POLICIES, "mean over completions of their mean value", "score"),
    Metric("val/clip_fraction", POLICIES, "tokens whose clipped value loss counts", kind="share"),
    Metric("val/explained_variance", POLICIES, "1 - Var(return - value) / Var(return)", kind="share",
           terminal="expl. var.", panel="Value model: explained variance"),
    Metric("grad_norm_ratio_ptx", POLICIES, "|ptx_coef · pretraining gradient| / |PPO gradient|",
           panel="Pretraining gradient"),
    Metric("grad_cosine_ptx", POLICIES, "cosine of the angle between these two gradients"),
    Metric("iteration", POLICIES, "batches of rollouts so far", kind="count"),
    Metric("episode", POLICIES, "completions so far", kind="count"),
    Metric("step_time", POLICIES, "duration of one optimizer step, its rollouts included", "s"),
    Metric("time/generate", POLICIES, "sampling of one iteration", "s"),
    Metric("time/score", POLICIES, "rewards, log-probabilities and values of one iteration", "s"),
    Metric("time/train", POLICIES, "optimizer steps of one iteration", "s"),
    Metric("throughput/generate", POLICIES, "sampled tokens / time/generate", "tokens per s"),
    Metric("throughput/score", POLICIES, "prompt and completion tokens / time/score", "tokens per s"),
    Metric("throughput/train", POLICIES, "trained tokens, pretraining included / time/train", "tokens per s"),
)
# fmt: on


def stage_metrics(stage: str) -> list[Metric]:
    """The metrics of one stage, in the order of `METRICS`."""
    return [metric for metric in METRICS if stage in metric.stages]


def terminal_values(logs: Mapping[str, Any]) -> list[str]:
    """`label value` for each logged metric that the progress bar shows."""
    labels = {metric.name: metric.terminal for metric in METRICS if metric.terminal}
    return [f"{label} {logs[name]:.3f}" for name, label in labels.items() if isinstance(logs.get(name), float)]
