"""Stage 2: from the SFT model and rankings to the reward model (InstructGPT §3.5, C.2)."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from datasets import IterableDataset

from instructgpt_hf._compat.peft import unwrap_peft
from instructgpt_hf.artifacts import StageArtifact, model_fingerprint
from instructgpt_hf.config.model import peft_config
from instructgpt_hf.data.demonstrations import demonstration_rows
from instructgpt_hf.data.prompts import PromptFormat
from instructgpt_hf.data.rankings.rows import DROPPED, tokenize_rankings
from instructgpt_hf.data.sources import load_split
from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.evaluation.plots.reward_model import draw_rankings
from instructgpt_hf.evaluation.reward_model.evaluate import evaluate_rankings, flat_metrics, labeler_agreement
from instructgpt_hf.lab import LAB_PREFIX
from instructgpt_hf.models.loading import check_adapter_settings, count_parameters, load_config, load_tokenizer
from instructgpt_hf.models.reward_model import create_reward_model, save_reward_model
from instructgpt_hf.models.scoring import reward_shift, score_token_lists
from instructgpt_hf.stages.fit import train
from instructgpt_hf.stages.lengths import usable_length
from instructgpt_hf.stages.resuming import check_resume
from instructgpt_hf.stages.run import (
    StageRun,
    lab_folder,
    model_folder,
    model_license,
    model_options,
    previous_stage,
    show_loading_progress,
    vocabulary_fingerprint,
)

CENTERING_LIMIT = 2_000  # demonstrations; the standard error of their mean is far below one reward unit


def run_reward(run: StageRun) -> StageArtifact:
    """Train the reward model, or find it finished.

    Raises:
        InstructGPTError: if data, earlier stage or settings are unusable; nothing is written then.
    """
    arguments, args = run.settings.data_args, run.training_arguments()
    sft_folder, sft = previous_stage(arguments.sft_model_path, run.run_folder / "sft", "sft")
    start, base = _start(run, sft_folder, sft)
    check_adapter_settings([start], run.settings.values, "reward.yaml")
    tokenizer = load_tokenizer(start)
    prompt_format = recorded_format(sft, arguments.prompt_template, tokenizer, "reward.yaml: prompt_template")
    train_rows, test_rows = run.train_and_test("rankings")
    demonstrations = _demonstrations(run, sft) if args.center_on_demonstrations else None
    mark = run.fingerprint({"sft": sft.fingerprint, "base": base["fingerprint"]})
    if (done := run.finished(mark)) is not None:
        return done

    max_length: Any = usable_length(run, load_config(start), args.max_length)
    limits = {"max_length": max_length, "max_prompt_length": arguments.max_prompt_length}
    rows, dropped = tokenize_rankings(train_rows, prompt_format, tokenizer, where="rankings", **limits)
    held_back, _ = tokenize_rankings(test_rows, prompt_format, tokenizer, where="held-back rankings", **limits)
    if not isinstance(rows, IterableDataset):  # of a stream nothing is known before it is read
        left_out = ", ".join(f"{count} {DROPPED[name]}" for name, count in dropped.items() if count) or "nothing"
        run.log(f"{len(rows)} prompts with {sum(map(len, rows['ranks']))} completions; left out: {left_out}")

    demonstrated = _demonstrated_ids(demonstrations, prompt_format, tokenizer, max_length)

    run.check_folder()
    check_resume(run, mark)
    show_loading_progress(start)
    model = create_reward_model(
        start,
        tokenizer,
        seed=run.seed,
        peft_config=peft_config(run.settings.model_args, "SEQ_CLS"),
        **model_options(run.settings),
    )
    run.prepare_work(mark)
    measured, training = _train(run, model, tokenizer, rows, held_back)
    run.data["rankings"].update(dropped)
    metrics: dict[str, Any] = {}
    if demonstrated:
        scores = score_token_lists(model, demonstrated, tokenizer.pad_token_id, args.per_device_eval_batch_size)
        unwrap_peft(model).config.reward_shift = sum(scores) / len(scores)
        metrics["demonstrations_scored"] = len(scores)
    if "labeler" in (train_rows.column_names or ()) and not isinstance(train_rows, IterableDataset):
        measured["labelers"] = labeler_agreement(itertools.chain(train_rows, test_rows))
    metrics.update(flat_metrics(measured))
    artifact = run.artifact(
        mark,
        prompt_format=prompt_format.to_dict(),
        base_model=base,
        previous={"sft": {"source": arguments.sft_model_path or "sft", "fingerprint": sft.fingerprint}},
        model={
            "kind": "adapter" if hasattr(model, "peft_config") else "full",
            "architecture": type(unwrap_peft(model)).__name__,
            "reward_shift": reward_shift(model),
            "license": base.get("license"),
            **count_parameters(model),
        },
        metrics=metrics,
        training=training,
    )

    def save(folder: Path) -> None:
        save_reward_model(model, folder)
        tokenizer.save_pretrained(folder)
        (folder / "evaluation.json").write_text(
            json.dumps(measured, indent=2, allow_nan=False) + "\n", encoding="utf-8"
        )
        draw_rankings(measured, folder / "evaluation.png")

    run.log(
        f"held-back accuracy {metrics['eval_accuracy']:.3f} "
        f"({metrics['eval_accuracy_low']:.3f} to {metrics['eval_accuracy_high']:.3f}; by length alone "
        f"{metrics['length_baseline_accuracy']:.3f}), shift {reward_shift(model):+.3f}"
    )
    return run.finish(artifact, save)


def _train(
    run: StageRun, model: Any, tokenizer: Any, rows: Any, held_back: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train, and measure on the held-back rankings.

    Returns:
        What was measured at the end, and what `train` returns.
    """
    from instructgpt_hf.trainers.reward import RewardTrainer

    measured: dict[str, Any] = {}

    def compute_metrics(found: Any) -> dict[str, float]:
        measured.update(evaluate_rankings(found.predictions, found.label_ids, found.inputs))
        return {name.removeprefix("eval_"): value for name, value in flat_metrics(measured).items()}

    trainer = RewardTrainer(
        model=model,
        args=run.training_arguments(),
        train_dataset=rows,
        eval_dataset=held_back,
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
    )
    training = train(trainer, run)
    trainer.evaluate()
    return measured, training


def _start(run: StageRun, sft_folder: Path, sft: StageArtifact) -> tuple[Path, dict[str, Any]]:
    """The model that becomes the reward model, and the pretrained model it descends from.

    The SFT model by default; with `model_name_or_path`, another one, such as the paper's 6B model for a 1.3B policy.
    """
    source = run.settings.model_args.model_name_or_path
    if source is None:
        return sft_folder, sft.base_model
    revision = run.settings.model_args.model_revision
    folder = model_folder(source, revision, "model_name_or_path")
    load_config(folder)
    vocabulary = vocabulary_fingerprint(load_tokenizer(folder))
    base = {
        "id": source,
        "revision": revision,
        "fingerprint": model_fingerprint(folder),
        "vocabulary": vocabulary,
        "license": model_license(folder),
    }
    check_vocabulary(sft.base_model, base, "the reward model")
    return folder, base


def check_vocabulary(expected: dict[str, Any], found: dict[str, Any], role: str) -> None:
    """Raise unless two models read the same token ids.

    Raises:
        InstructGPTError: naming both base models.
    """
    if expected["vocabulary"] != found["vocabulary"]:
        raise InstructGPTError(
            f"{role} comes from base model {found['id']!r}, whose tokenizer differs from that of {expected['id']!r}, "
            "the base of the SFT model: it would read the policy's token ids as other words. Choose models of one "
            "tokenizer."
        )


def recorded_format(sft: StageArtifact, name: str | None, tokenizer: Any, where: str) -> PromptFormat:
    """The SFT stage's prompt format, which a later stage may repeat but not change.

    Raises:
        InstructGPTError: if the later stage's recipe or tokenizer renders prompts differently.
    """
    recorded = PromptFormat.from_dict(sft.prompt_format)
    if name is not None:
        recorded.check_same(PromptFormat.create(name, tokenizer), where)
    return recorded


def _demonstrations(run: StageRun, sft: StageArtifact) -> list[dict[str, Any]]:
    """Demonstrations to centre the scores on: those the SFT model was trained on."""
    noted = sft.data["demonstrations"]
    source, split = noted["source"], noted["split"]
    if source.startswith(LAB_PREFIX):
        kind = source.removeprefix(LAB_PREFIX)
        source = str(lab_folder(run.run_folder, run.seed) / f"{kind}.{split}.jsonl")
    try:
        dataset = load_split(source, split, noted.get("config"), "demonstrations")
    except InstructGPTError as error:
        raise InstructGPTError(
            f"center_on_demonstrations = True: the SFT model's demonstrations cannot be read here ({error}). Put them "
            "there, or set center_on_demonstrations: false."
        ) from error
    dataset = demonstration_rows(dataset, "demonstrations")
    return list(dataset.select(range(min(CENTERING_LIMIT, len(dataset)))))


def _demonstrated_ids(
    demonstrations: list[dict[str, Any]] | None, prompt_format: PromptFormat, tokenizer: Any, max_length: int
) -> list[list[int]]:
    """Token ids of the demonstrations within the reward model's length limit; none if scores are not centred."""
    if demonstrations is None:
        return []
    ids = [
        prompt_format.prompt_ids(row["prompt"], tokenizer)
        + prompt_format.completion_ids(row["prompt"], row["completion"], tokenizer)
        for row in demonstrations
    ]
    kept = [item for item in ids if len(item) <= max_length]
    if not kept:
        raise InstructGPTError(
            f"center_on_demonstrations = True: every demonstration of the SFT model is longer than "
            f"max_length={max_length} tokens (the shortest has {min(map(len, ids))}). Raise max_length, or set "
            "center_on_demonstrations: false."
        )
    return kept
