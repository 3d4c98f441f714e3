"""Stage 1: from a pretrained model and demonstrations to the SFT model (InstructGPT §3.5, C.1, C.3)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from instructgpt_hf.artifacts import StageArtifact, model_fingerprint
from instructgpt_hf.config.model import peft_config
from instructgpt_hf.data.demonstrations import demonstration_rows, mix_pretraining, tokenize_demonstrations
from instructgpt_hf.data.pretraining import PretrainingStream
from instructgpt_hf.data.prompts import PromptFormat
from instructgpt_hf.models.loading import count_parameters, load_config, load_policy, load_tokenizer
from instructgpt_hf.stages.fit import train
from instructgpt_hf.stages.lengths import usable_length
from instructgpt_hf.stages.processes import whole_weights
from instructgpt_hf.stages.resuming import check_resume
from instructgpt_hf.stages.run import (
    StageRun,
    model_folder,
    model_license,
    model_options,
    show_loading_progress,
    vocabulary_fingerprint,
)


def run_sft(run: StageRun) -> StageArtifact:
    """Train the SFT model, or find it finished.

    Raises:
        InstructGPTError: if data, model or settings are unusable; nothing is written then.
    """
    arguments, args, settings = run.settings.data_args, run.training_arguments(), run.settings
    source = settings.model_args.model_name_or_path
    base = model_folder(source, settings.model_args.model_revision, "model_name_or_path")
    config, tokenizer = load_config(base), load_tokenizer(base)
    prompt_format = PromptFormat.create(arguments.prompt_template, tokenizer)
    demonstrations, test = run.train_and_test("demonstrations")
    demonstrations = demonstration_rows(demonstrations, f"demonstrations: {arguments.dataset_name}")
    test = demonstration_rows(test, f"demonstrations: {arguments.dataset_name} (held back)")
    text = run.pretraining_text("pretraining_mix", args.pretraining_mix)
    base_print = model_fingerprint(base)
    mark = run.fingerprint({"base": base_print})
    if (done := run.finished(mark)) is not None:
        return done

    max_length: Any = usable_length(run, config, args.max_length)
    limits = {"max_length": max_length, "max_prompt_length": arguments.max_prompt_length}
    rows, dropped = tokenize_demonstrations(demonstrations, prompt_format, tokenizer, where="demonstrations", **limits)
    test_rows, _ = tokenize_demonstrations(test, prompt_format, tokenizer, where="held-back demonstrations", **limits)
    run.data["demonstrations"].update(dropped)
    if text is not None:
        blocks, demonstrated = PretrainingStream(text[0], tokenizer, max_length, run.seed), len(rows)
        rows = mix_pretraining(rows, blocks, args.pretraining_mix, run.seed)
        run.data["pretraining"]["examples"] = len(rows) - demonstrated

    run.check_folder()
    check_resume(run, mark)
    show_loading_progress(base)
    model, before = _build(run, base, config, tokenizer)
    run.prepare_work(mark)
    from instructgpt_hf.trainers.sft import SFTTrainer, restore_config

    trainer = SFTTrainer(
        model=model, args=args, train_dataset=rows, eval_dataset=test_rows, processing_class=tokenizer
    )
    training = train(trainer, run)
    metrics = {
        key: value for key, value in trainer.evaluate().items() if key in ("eval_loss", "eval_mean_token_accuracy")
    }
    artifact = run.artifact(
        mark,
        prompt_format=prompt_format.to_dict(),
        base_model={
            "id": source,
            "revision": settings.model_args.model_revision,
            "fingerprint": base_print,
            "vocabulary": vocabulary_fingerprint(tokenizer),
            "license": model_license(base),
        },
        model={
            "kind": "adapter" if settings.model_args.use_peft else "full",
            "architecture": config.architectures[0] if config.architectures else config.model_type,
            "residual_dropout_applied": before is not None,
            "license": model_license(base),
            **count_parameters(model),
        },
        metrics=metrics,
        training=training,
    )
    if before is not None:
        restore_config(model.config, before)

    weights = whole_weights(trainer)

    def save(folder: Path) -> None:
        model.save_pretrained(folder, **({} if weights is None else {"state_dict": weights}))
        tokenizer.save_pretrained(folder)

    run.log(f"held-back demonstrations: loss {metrics['eval_loss']:.3f} nats per token")
    return run.finish(artifact, save)


def _build(run: StageRun, base: Path, config: Any, tokenizer: Any) -> tuple[Any, dict[str, Any] | None]:
    """The model to train, and the config settings that the residual dropout replaced."""
    from instructgpt_hf.trainers.sft import set_residual_dropout

    dropout = run.settings.training_args.residual_dropout
    before = set_residual_dropout(config, dropout) if dropout is not None else None
    if dropout is not None and before is None:
        run.log(f"residual_dropout = {dropout} has no effect: {config.model_type} has no residual dropout")
    model = load_policy(
        base,
        tokenizer,
        peft_config=peft_config(run.settings.model_args, "CAUSAL_LM"),
        config=config if before is not None else None,
        **model_options(run.settings),
    )
    return model, before
