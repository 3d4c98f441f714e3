"""What came out: base, SFT and the PPO policies side by side, on prompts and text no stage has trained on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instructgpt_hf import lab
from instructgpt_hf.artifacts import STAGE_FILE, StageArtifact, atomic_folder
from instructgpt_hf.data.prompts import PromptFormat, prompt_rows
from instructgpt_hf.data.sources import Sources
from instructgpt_hf.data.splits import read_pretraining, read_split
from instructgpt_hf.evaluation.intervals import Estimate, bootstrap_mean, paired_difference
from instructgpt_hf.evaluation.likelihood import option_accuracy, sequence_kl, text_loss
from instructgpt_hf.evaluation.metrics import WinRate
from instructgpt_hf.evaluation.report import print_table, write_report
from instructgpt_hf.evaluation.results import PolicyRow
from instructgpt_hf.evaluation.tasks import exact_match
from instructgpt_hf.models.loading import load_policy, load_tokenizer, resolve_source
from instructgpt_hf.models.reward_model import load_reward_model
from instructgpt_hf.models.sampling import is_finished, sample_completions
from instructgpt_hf.models.scoring import TextRewardModel, score_token_lists
from instructgpt_hf.stages.inputs import model_options, previous_stage
from instructgpt_hf.stages.reward_sources import RewardSource, find_reward_models
from instructgpt_hf.stages.run import StageRun

NAMES = {"ppo": "PPO", "ppo-ptx": "PPO-ptx"}
GENERATION_BATCH = 64


@dataclass
class _Measured:
    """What is kept of one policy while the others are measured."""

    row: PolicyRow
    judged: list[float]
    hits: list[bool]


def evaluate_run(run: StageRun) -> list[PolicyRow]:
    """Measure every policy of a run and write `evaluation/`.

    Each policy answers the same held-out prompts at temperature 1. The win rate against SFT is the judge's: the gold
    labeler in the lab, elsewhere the reward model that PPO trained on, which is not independent of it. Accuracy on the
    pretraining tasks is greedy exact match; the loss on held-back pretraining text is measured where there is any.

    Args:
        run: the PPO stage of the run, finished.
    """
    sft_folder, sft = previous_stage(run, run.settings.data_args.sft_model_path, "sft")
    reward = find_reward_models(run, sft, PromptFormat.from_dict(sft.prompt_format))[0]
    bench = _Bench.of(run, sft_folder, sft, reward)
    current = {"sft": sft.fingerprint, "reward": reward.record.fingerprint}
    policies = {name: run.run_folder / name for name in NAMES if _belongs(run, run.run_folder / name, current)}
    base = resolve_source(sft.base_model["id"], sft.base_model["revision"], "base model")
    measured = {"SFT": bench.measure("SFT", sft_folder, None)}
    reference = measured["SFT"].judged
    measured = {"base": bench.measure("base", base, reference), **measured}
    for name, folder in policies.items():
        measured[NAMES[name]] = bench.measure(NAMES[name], folder, reference)
    rows = [item.row for item in measured.values()]
    notes = {**bench.notes(), **_tax(measured)}
    curves = {name: StageArtifact.load(folder).training["log"] for name, folder in policies.items()}
    curves["sft"] = sft.training.get("log", [])
    curves["reward"] = reward.record.training.get("log", [])
    target = run.run_folder / "evaluation"
    with atomic_folder(target) as folder:
        write_report(folder, rows, curves, notes)
        bench.write_samples(folder / "samples.jsonl")
    for name, folder in policies.items():
        _record(folder, measured[NAMES[name]].row, bench.judge_name)
    print_table(
        rows, run.console, title=f"{run.recipe}: {len(bench.prompts)} held-out prompts, judge: {bench.judge_name}"
    )
    for name, value in _tax(measured).items():
        run.console.print(f"{name}: {value}", highlight=False)
    run.console.print(f"Pictures and numbers: {target}", highlight=False, soft_wrap=True)
    return rows


@dataclass
class _Bench:
    """The prompts, texts, tasks and judges that every policy meets."""

    run: StageRun
    tokenizer: Any
    prompt_format: PromptFormat
    prompts: list[Any]
    prompt_ids: list[list[int]]
    tasks: list[dict[str, Any]]
    texts: list[str]
    reward_model: Any
    sft: Any
    samples: dict[str, list[str]]

    @classmethod
    def of(cls, run: StageRun, sft_folder: Path, sft: StageArtifact, reward: RewardSource) -> _Bench:
        args, options = run.settings.training_args, model_options(run.settings)
        tokenizer = load_tokenizer(sft_folder)
        prompt_format = PromptFormat.from_dict(sft.prompt_format)
        sources = Sources(run.lab_folder)
        held_out = read_split(sources, run.settings.data_args, "prompts").test
        rows, _ = prompt_rows(held_out, prompt_format, tokenizer, args.max_prompt_length, "held-out prompts")
        prompts = list(rows["prompt"])[: run.settings.data_args.eval_num_prompts]
        text = read_pretraining(sources, run.settings.data_args, "ptx_coef", args.ptx_coef)
        tasks: list[dict[str, Any]] = []
        if _uses_lab(run):
            lines = (run.lab_folder() / "tasks.test.jsonl").read_text(encoding="utf-8").splitlines()
            tasks = [json.loads(line) for line in lines]
        return cls(
            run=run,
            tokenizer=tokenizer,
            prompt_format=prompt_format,
            prompts=prompts,
            prompt_ids=[prompt_format.prompt_ids(prompt, tokenizer) for prompt in prompts],
            tasks=tasks,
            texts=list(text.test["text"]) if text is not None else [],
            reward_model=reward.as_reward(load_reward_model(reward.folder, **options)),
            sft=load_policy(sft_folder, tokenizer, trainable=False, **options).eval(),
            samples={},
        )

    @property
    def judge_name(self) -> str:
        return "the lab's gold labeler" if _uses_lab(self.run) else "the reward model it was trained on"

    def measure(self, name: str, folder: Path, reference: list[float] | None) -> _Measured:
        """Everything about one policy; `reference` is the judge's scores of the SFT model's answers."""
        self.run.log(f"measuring {name}")
        args, batch = self.run.settings.training_args, GENERATION_BATCH
        if name == "SFT":
            policy = self.sft
        else:
            policy = load_policy(folder, self.tokenizer, trainable=False, **model_options(self.run.settings)).eval()
        ids = sample_completions(
            policy,
            self.tokenizer,
            self.prompt_ids,
            [self.tokenizer.eos_token_id],
            args.max_completion_length,
            seed=self.run.seed,
            batch_size=batch,
            min_new_tokens=args.min_completion_length,
        )
        texts = [self.prompt_format.completion_text(item, self.tokenizer) for item in ids]
        self.samples[name] = texts
        rewards = self._rewards(ids, texts, batch)
        gold = lab.gold_scores(self.prompts, texts) if _uses_lab(self.run) else None
        judged = gold if gold is not None else rewards
        row = PolicyRow(name=name, mean_reward=bootstrap_mean(rewards))
        if gold is not None:
            row.gold_score = bootstrap_mean(gold)
        if reference is not None:
            found = WinRate().compute(predictions=judged, references=reference)
            row.win_rate = Estimate(found["win_rate"], found["win_rate_low"], found["win_rate_high"])
            row.kl = sequence_kl(policy, self.sft, self.prompt_ids, ids, batch_size=batch)
        row.extra["eos_rate"] = sum(item[-1] == self.tokenizer.eos_token_id for item in ids) / len(ids)
        row.extra["mean_length"] = sum(map(len, ids)) / len(ids)
        hits: list[bool] = []
        if self.tasks:
            row.task_accuracy, row.task_accuracy_by_task, hits = exact_match(policy, self.tokenizer, self.tasks)
            options = option_accuracy(policy, self.tokenizer, self.tasks, batch_size=256)
            row.extra["option_accuracy"] = {key: options[key] for key in ("accuracy", "accuracy_low", "accuracy_high")}
        if self.texts:
            row.extra["pretraining_loss"] = text_loss(policy, self.tokenizer, self.texts, args.ptx_max_length, batch)
        return _Measured(row, judged, hits)

    def _rewards(self, ids: list[list[int]], texts: list[str], batch: int) -> list[float]:
        """The reward model's scores of answers, as in training: of their token ids, or of their text."""
        reward = self.reward_model
        if isinstance(reward, TextRewardModel):
            whole = reward.token_lists(self.prompts, texts, is_finished(ids, [self.tokenizer.eos_token_id]))
            return score_token_lists(reward.model, whole, reward.tokenizer.pad_token_id, batch)
        whole = [prompt + answer for prompt, answer in zip(self.prompt_ids, ids, strict=True)]
        return score_token_lists(reward, whole, self.tokenizer.pad_token_id, batch)

    def notes(self) -> dict[str, Any]:
        return {
            "judge": self.judge_name,
            "prompts": f"{len(self.prompts)}, held out",
            "sampling": "temperature 1",
            **({"task questions": f"{len(self.tasks)}, greedy exact match"} if self.tasks else {}),
            **({"pretraining documents": f"{len(self.texts)}, held back"} if self.texts else {}),
        }

    def write_samples(self, path: Path) -> None:
        """One line per prompt with every policy's answer."""
        with path.open("w", encoding="utf-8") as stream:
            for index, prompt in enumerate(self.prompts):
                answers = {name: texts[index] for name, texts in self.samples.items()}
                stream.write(json.dumps({"prompt": prompt, **answers}, ensure_ascii=False) + "\n")


def _uses_lab(run: StageRun) -> bool:
    return str(run.settings.data_args.dataset_name).startswith(lab.LAB_PREFIX)


def _belongs(run: StageRun, folder: Path, current: dict[str, str]) -> bool:
    """Whether a policy is there and comes from the present SFT and reward models."""
    if not (folder / STAGE_FILE).is_file():
        return False
    previous = StageArtifact.load(folder).previous
    if all(previous[stage]["fingerprint"] == mark for stage, mark in current.items()):
        return True
    run.log(f"{folder.name}/ is left out: it was trained from an earlier SFT or reward model")
    return False


def _tax(measured: dict[str, _Measured]) -> dict[str, str]:
    """The alignment tax in sentences: what PPO lost on the pretraining tasks and what the pretraining mix kept."""
    pairs = {
        "PPO minus SFT": ("PPO", "SFT"),
        "PPO-ptx minus PPO": ("PPO-ptx", "PPO"),
    }
    notes = {}
    for label, (first, second) in pairs.items():
        if first in measured and second in measured and measured[first].hits:
            difference = paired_difference(measured[first].hits, measured[second].hits)
            low, high = 100 * difference.low, 100 * difference.high
            notes[f"task accuracy, {label}"] = f"{100 * difference.value:+.1f} points ({low:+.1f} to {high:+.1f})"
        first_loss, second_loss = (
            measured[name].row.extra.get("pretraining_loss") if name in measured else None for name in (first, second)
        )
        if first_loss is not None and second_loss is not None:
            notes[f"pretraining loss, {label}"] = f"{first_loss - second_loss:+.3f} nats per token"
    return notes


def _record(folder: Path, row: PolicyRow, judge: str) -> None:
    """Add the measurements to the policy's stage.json, from which its card is rendered."""
    artifact = StageArtifact.load(folder)
    artifact.metrics.update(row.metrics())
    artifact.metrics.update({key: value for key, value in row.extra.items() if isinstance(value, float)})
    if row.win_rate is not None:
        artifact.metrics["judge"] = judge
    artifact.save(folder)
