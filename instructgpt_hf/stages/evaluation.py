"""Evaluation of a run: base, SFT and PPO policies side by side, on prompts and text that no stage trained on."""

from __future__ import annotations

import json
from pathlib import Path

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from instructgpt_hf.artifacts import STAGE_FILE, StageArtifact, atomic_folder
from instructgpt_hf.data.prompts import PromptFormat
from instructgpt_hf.data.sources import Sources
from instructgpt_hf.data.splits import read_pretraining, read_prompts
from instructgpt_hf.evaluation.judges import (
    GoldLabeler,
    Judge,
    RewardFunctionsJudge,
    RewardModelJudge,
    TextRewardModelJudge,
)
from instructgpt_hf.evaluation.policies import BATCH_SIZE, MeasuredPolicy, PolicyEvaluation, alignment_tax
from instructgpt_hf.evaluation.report import policy_table, write_report, write_samples
from instructgpt_hf.evaluation.results import PolicyRow
from instructgpt_hf.lab import LAB_PREFIX
from instructgpt_hf.models.loading import load_policy, load_tokenizer
from instructgpt_hf.models.origins import known_model
from instructgpt_hf.models.reward_model import load_reward_model
from instructgpt_hf.models.scoring import TextRewardModel
from instructgpt_hf.stages.inputs import model_options, previous_stage, show_loading_progress
from instructgpt_hf.stages.reward_sources import RewardSource, find_functions, find_reward_models
from instructgpt_hf.stages.run import StageRun
from instructgpt_hf.trainers.ppo.functions import checked

NAMES = {"ppo": "PPO", "ppo-ptx": "PPO-ptx"}


def evaluate_run(run: StageRun) -> list[PolicyRow]:
    """Measure every policy of a run and write `evaluation/`.

    Each policy completes the same held-out prompts at temperature 1. The win rate against SFT is decided by the gold
    labeler in the lab, elsewhere by the reward model that PPO trained on, or without one by its reward functions,
    which are not independent of it. Accuracy on the pretraining tasks is greedy exact match. The loss on held-back
    pretraining text is measured if the run has any.

    Args:
        run: the PPO stage of the run, finished.
    """
    data_args = run.settings.data_args
    previous = previous_stage(run, data_args.sft_model_path, "sft", data_args.sft_model_revision)
    sft_folder, sft = previous.folder, previous.record
    models = find_reward_models(run, sft, PromptFormat.from_dict(sft.prompt_format))
    reward = models[0] if models else None
    advice = f"write where it is as path of base_model into {sft_folder / STAGE_FILE}"
    base = known_model(sft.base_model, "base model of the SFT stage", advice)
    run.open_log()
    with run.phase("loading models, reading held-out prompts", bar=False):
        evaluation = _evaluation(run, sft_folder, sft, reward)
    scored_by = {} if reward is None else {"reward": reward.record}
    policies = _policies(run, {"sft": sft.fingerprint, **{key: item.fingerprint for key, item in scored_by.items()}})
    of_sft = evaluation.measure("SFT", evaluation.reference)

    def measure(name: str, folder: Path) -> MeasuredPolicy:
        with run.phase(f"loading {name}", bar=False):
            policy = _load(run, folder, evaluation.tokenizer)
        return evaluation.measure(name, policy, of_sft.judged)

    own_base = sft.base_model["fingerprint"] == sft.fingerprint  # an SFT model made elsewhere
    measured = {} if own_base else {"base": measure("base", base)}
    measured["SFT"] = of_sft
    measured |= {NAMES[stage]: measure(NAMES[stage], run.run_folder / stage) for stage in policies}
    rows = [item.row for item in measured.values()]
    curves = {name: item.training.get("log", []) for name, item in policies.items()}
    curves |= {name: item.training.get("log", []) for name, item in {"sft": sft, **scored_by}.items()}
    tax, target = alignment_tax(measured), run.run_folder / "evaluation"
    with atomic_folder(target) as folder:
        write_report(folder, rows, curves, {**evaluation.notes(), **tax})
        texts = {"SFT": of_sft.texts} | {name: item.texts for name, item in measured.items()}
        write_samples(folder / "samples.jsonl", evaluation.prompts, texts)
    for stage, artifact in policies.items():  # the cards are rendered from stage.json
        artifact.metrics |= measured[NAMES[stage]].row.metrics() | {"judge": evaluation.judge.name}
        artifact.save(run.run_folder / stage)
    title = f"{run.recipe}: {len(evaluation.prompts)} held-out prompts, judge: {evaluation.judge.name}"
    for shown in (*policy_table(rows, title), *(f"{name}: {value}" for name, value in tax.items())):
        run.output.result(shown)
    run.output.result(f"Pictures and numbers: {target}")
    return rows


def _evaluation(run: StageRun, sft_folder: Path, sft: StageArtifact, reward: RewardSource | None) -> PolicyEvaluation:
    """The run's held-out prompts, tasks and text, its reward model or functions, judge and SFT model."""
    training_args = run.settings.training_args
    tokenizer, prompt_format = load_tokenizer(sft_folder), PromptFormat.from_dict(sft.prompt_format)
    sources, data_args = Sources(run.lab_folder), run.settings.data_args
    limit, functions_score = training_args.max_prompt_length, reward is None
    prompts, _ = read_prompts(sources, data_args, prompt_format, tokenizer, limit, with_columns=functions_score)
    rows = prompts.test.select(range(min(len(prompts.test), data_args.eval_num_prompts)))
    text = read_pretraining(sources, data_args, "ptx_coef", training_args.ptx_coef)
    in_lab, tasks = str(data_args.dataset_name).startswith(LAB_PREFIX), []
    if in_lab:
        file = run.lab_folder() / "tasks.test.jsonl"
        tasks = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    reward_judge = _reward_judge(run, reward, rows, tokenizer)
    return PolicyEvaluation(
        args=training_args,
        tokenizer=tokenizer,
        prompt_format=prompt_format,
        prompts=list(rows["prompt"]),
        tasks=tasks,
        texts=list(text.test["text"]) if text is not None else [],
        reference=_load(run, sft_folder, tokenizer),
        reward=reward_judge,
        watch=run.measuring,
        judge=GoldLabeler() if in_lab else reward_judge,
    )


def _reward_judge(
    run: StageRun, reward: RewardSource | None, rows: Dataset, tokenizer: PreTrainedTokenizerBase
) -> Judge:
    """The reward model, or without one the reward functions, as a judge."""
    if reward is None:
        functions = find_functions(run.settings.data_args.reward_functions or [])
        weights = run.settings.training_args.reward_weights or [1.0] * len(functions)
        columns = {name: list(rows[name]) for name in rows.column_names if name != "prompt"}
        return RewardFunctionsJudge([checked(item) for item in functions.values()], weights, columns)
    model = reward.as_reward(load_reward_model(reward.folder, **model_options(run.settings)))
    if isinstance(model, TextRewardModel):
        return TextRewardModelJudge(model, BATCH_SIZE)
    return RewardModelJudge(model, tokenizer.pad_token_id, BATCH_SIZE)


def _load(run: StageRun, folder: Path, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel | PeftModel:
    show_loading_progress(folder)
    return load_policy(folder, tokenizer, trainable=False, **model_options(run.settings)).eval()


def _policies(run: StageRun, current: dict[str, str]) -> dict[str, StageArtifact]:
    """Records of the finished policies that come from the SFT and reward models with these fingerprints."""
    policies = {}
    for stage in NAMES:
        if not (run.run_folder / stage / STAGE_FILE).is_file():
            continue
        artifact = StageArtifact.load(run.run_folder / stage)
        if all(artifact.previous.get(name, {}).get("fingerprint") == value for name, value in current.items()):
            policies[stage] = artifact
        else:
            run.log(f"{stage}/ is left out: it was trained from an earlier SFT or reward model")
    return policies
