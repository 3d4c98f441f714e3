"""Judges against single forward passes, and one policy measured by them."""

from __future__ import annotations

import pytest
import torch

from instructgpt_hf import lab
from instructgpt_hf.config.ppo import PPOConfig
from instructgpt_hf.data.prompts import PromptFormat
from instructgpt_hf.evaluation.judges import GoldLabeler, RewardModelJudge, SampledCompletions, TextRewardModelJudge
from instructgpt_hf.evaluation.policies import MeasuredPolicy, PolicyEvaluation, alignment_tax
from instructgpt_hf.evaluation.results import PolicyRow
from instructgpt_hf.models.scoring import TextRewardModel

SAMPLED = SampledCompletions(["a b", "c"], [[5, 6], [7]], [[8, 9, 1], [10, 11]], ["d e", "f g"], [True, False])


def alone(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([ids])).logits.item()


@pytest.fixture
def scorer(make_scorer):
    model = make_scorer().eval()
    model.config.pad_token_id = 0
    return model


def test_reward_model_reads_the_ids(scorer):
    expected = [alone(scorer, [5, 6, 8, 9, 1]), alone(scorer, [7, 10, 11])]
    assert RewardModelJudge(scorer, 0, 2).scores(SAMPLED) == pytest.approx(expected, abs=1e-5)


def test_reward_model_with_a_format_of_its_own_reads_the_text(scorer, tokenizer):
    rendered = PromptFormat.create("raw", tokenizer)
    reward = TextRewardModel(scorer, tokenizer, rendered)
    expected = [
        alone(scorer, rendered.prompt_ids(p, tokenizer) + rendered.completion_ids(p, c, tokenizer, finished=ended))
        for p, c, ended in zip(SAMPLED.prompts, SAMPLED.texts, SAMPLED.finished, strict=True)
    ]
    assert TextRewardModelJudge(reward, 2).scores(SAMPLED) == pytest.approx(expected, abs=1e-5)


def test_only_the_gold_labeler_is_independent_of_training(scorer):
    prompt = "Name four dishes."
    sampled = SAMPLED._replace(prompts=[prompt, prompt], texts=["", "The bowl."])
    assert GoldLabeler().scores(sampled) == lab.gold_scores([prompt, prompt], ["", "The bowl."])
    assert GoldLabeler().independent and not RewardModelJudge(scorer, 0, 2).independent


@pytest.fixture
def evaluation(make_policy, scorer, tokenizer):
    reward = RewardModelJudge(scorer, 0, 2)
    return PolicyEvaluation(
        args=PPOConfig(
            output_dir="unused", max_completion_length=4, min_completion_length=0, use_cpu=True, bf16=False
        ),
        tokenizer=tokenizer,
        prompt_format=PromptFormat.create("raw", tokenizer),
        prompts=["a b", "c", "d e f"],
        tasks=[{"task": "letters", "prompt": "a", "options": [" b", " c"], "answer": 0}],
        texts=["w1 w2 w3"],
        reference=make_policy().eval(),
        reward=reward,
        judge=reward,
    )


def test_a_policy_ties_with_itself(evaluation):
    first = evaluation.measure("SFT", evaluation.reference)
    again = evaluation.measure("PPO", evaluation.reference, first.judged)
    assert first.row.win_rate is None and first.row.kl is None
    assert again.row.win_rate.value == 0.5 and again.row.kl.value == pytest.approx(0.0, abs=1e-5)
    assert again.texts == first.texts and again.judged == first.judged
    assert again.row.gold_score is None  # the reward model is not independent
    assert again.row.mean_reward.value == pytest.approx(sum(first.judged) / 3)
    assert {"eos_rate", "mean_length", "pretraining_loss"} <= set(again.row.metrics())


def test_an_independent_judge_decides_and_is_reported(evaluation):
    class Longest:
        name, independent = "length", True

        def scores(self, sampled):
            return [float(len(ids)) for ids in sampled.completion_ids]

    object.__setattr__(evaluation, "judge", Longest())
    measured = evaluation.measure("PPO", evaluation.reference, [9.0, 9.0, 9.0])
    assert measured.row.win_rate.value == 0.0
    assert measured.row.gold_score.value == pytest.approx(measured.row.extra["mean_length"])
    assert evaluation.notes()["judge"] == "length"


def test_alignment_tax_is_the_paired_difference():
    def policy(hits, loss):
        return MeasuredPolicy(PolicyRow("", extra={"pretraining_loss": loss} if loss else {}), [], [], hits)

    sft, ppo = policy([True] * 10, 2.0), policy([False] * 10, 2.5)
    assert alignment_tax({"SFT": sft, "PPO": ppo}) == {
        "task accuracy, PPO minus SFT": "-100.0 points (-100.0 to -100.0)",
        "pretraining loss, PPO minus SFT": "+0.500 nats per token",
    }
    assert list(alignment_tax({"PPO": ppo, "PPO-ptx": policy([], None), "SFT": sft})) == [
        "task accuracy, PPO minus SFT",
        "pretraining loss, PPO minus SFT",
    ]
    assert alignment_tax({"SFT": policy([], None), "PPO": policy([], None)}) == {}
