"""Stage 3: from the SFT and reward models and prompts to the PPO or PPO-ptx policy (InstructGPT §3.5, C.4)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from instructgpt_hf._compat.peft import unwrap_peft
from instructgpt_hf.artifacts import StageArtifact
from instructgpt_hf.config.model import peft_config
from instructgpt_hf.data.prompts import PromptFormat, prompt_rows
from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.models.loading import check_adapter_settings, count_parameters, load_policy, load_tokenizer
from instructgpt_hf.models.scoring import reward_shift
from instructgpt_hf.models.shared_base import load_another_reward_model, load_scorers
from instructgpt_hf.stages.continuing import ADJUSTABLE, changes, goes_on, note_changes, note_stop
from instructgpt_hf.stages.fit import train
from instructgpt_hf.stages.lengths import check_rollout_lengths
from instructgpt_hf.stages.resuming import check_resume, resume_step
from instructgpt_hf.stages.reward import recorded_format
from instructgpt_hf.stages.reward_sources import check_columns, find_rewards
from instructgpt_hf.stages.run import StageRun, model_options, previous_stage, show_loading_progress
from instructgpt_hf.trainers.ppo.watchdog import TrainingStopped


def run_ppo(run: StageRun) -> StageArtifact:
    """Train the policy, or find it finished.

    Raises:
        InstructGPTError: if data, earlier stages or settings are unusable; nothing is written then.
    """
    arguments, args = run.settings.data_args, run.training_arguments()
    sft_folder, sft = previous_stage(arguments.sft_model_path, run.run_folder / "sft", "sft")
    tokenizer = load_tokenizer(sft_folder)
    prompt_format = recorded_format(sft, arguments.prompt_template, tokenizer, "ppo.yaml: prompt_template")
    rewards = find_rewards(run, sft, prompt_format, tokenizer)
    reward_folder, reward = rewards.models[0].folder, rewards.models[0].record
    check_adapter_settings([sft_folder, rewards.value], run.settings.values, "ppo.yaml")
    if arguments.reward_model_path is None and reward.previous["sft"]["fingerprint"] != sft.fingerprint:
        raise InstructGPTError(
            f"{reward_folder}: this reward model was trained from an earlier SFT model than the one in {sft_folder}. "
            "Run the reward stage again, or name the reward model to use with reward_model_path."
        )
    prompts, counted = _prompts(run, prompt_format, tokenizer, with_columns=bool(rewards.functions))
    text = run.pretraining_text("ptx_coef", args.ptx_coef)
    inputs = {"sft": sft.fingerprint, **rewards.determining()}
    mark, fixed = run.fingerprint(inputs), run.fingerprint(inputs, without=ADJUSTABLE)
    if (done := run.finished(mark)) is not None:
        return done

    check_rollout_lengths(
        [("policy", sft_folder), *rewards.readers()],
        counted["longest_tokens"],
        args.max_completion_length,
        args.ptx_max_length if text is not None else None,
    )
    run.data["prompts"].update(counted)
    run.check_folder()
    keep = goes_on(run, fixed)
    check_resume(run, mark, keep)
    show_loading_progress(reward_folder)
    options = model_options(run.settings)
    policy = load_policy(
        sft_folder, tokenizer, peft_config=peft_config(run.settings.model_args, "CAUSAL_LM"), **options
    )
    adapter = peft_config(run.settings.model_args, "SEQ_CLS")
    reward_model, value_model = load_scorers(policy, rewards.value, peft_config=adapter, **options)

    def load_another(folder: Path) -> Any:
        return load_another_reward_model(policy, value_model, folder, **options)

    if rewards.value != reward_folder:
        reward_model = load_another(reward_folder)
    if keep:
        note_changes(run, resume_step(run))
    run.prepare_work(mark, keep)
    from instructgpt_hf.trainers.ppo.trainer import PPOTrainer

    trainer = PPOTrainer(
        policy,
        rewards.in_order(reward_model, load_another),
        value_model,
        args,
        train_dataset=prompts,
        processing_class=tokenizer,
        prompt_format=prompt_format,
        pretraining_dataset=text[0] if text is not None else None,
    )
    trainer.guard.warn = run.log
    try:
        training = train(trainer, run, boundary=args.optimizer_steps_per_iteration)
    except TrainingStopped as stop:
        raise note_stop(run, fixed, stop) from None
    if changed := changes(run):
        training["changed_settings"] = changed
    artifact = run.artifact(
        mark,
        prompt_format=prompt_format.to_dict(),
        base_model=sft.base_model,
        previous={
            "sft": {"source": arguments.sft_model_path or "sft", "fingerprint": sft.fingerprint},
            **rewards.lineage(),
        },
        model={
            "kind": "adapter" if hasattr(policy, "peft_config") else "full",
            "architecture": type(unwrap_peft(policy)).__name__,
            "value_model": "value_model",
            "value_model_architecture": value_model.config.architectures[0],
            "license": sft.base_model.get("license"),
            "published_weights": args.publish_weights if args.ema_decay else "raw",
            "reward_shift": reward_shift(reward_model),
            "rewards": rewards.described(args.reward_weights),
            **count_parameters(policy),
        },
        metrics=_last_metrics(training["log"]),
        training=training,
    )
    last = artifact.metrics
    run.log(f"last iteration: score {last['objective/scores']:.3f}, KL to SFT {last['objective/kl']:.3f} nats")
    return run.finish(artifact, trainer.save_pretrained)


def _prompts(
    run: StageRun, prompt_format: PromptFormat, tokenizer: Any, with_columns: bool
) -> tuple[Any, dict[str, int]]:
    """The prompts, with the dataset's other columns if reward functions read them."""
    arguments, args = run.settings.data_args, run.training_arguments()
    dataset, _ = run.train_and_test("prompts")
    where = f"prompts: {arguments.dataset_name}"
    prompts, counted = prompt_rows(dataset, prompt_format, tokenizer, args.max_prompt_length, where)
    if with_columns:
        check_columns(prompts.column_names, where)
    else:
        prompts = prompts.select_columns(["prompt"])
    if len(prompts) < args.generation_batch_size:
        raise InstructGPTError(
            f"{where}: {len(prompts)} prompts, fewer than generation_batch_size = {args.generation_batch_size} "
            "episodes of one iteration; add prompts or lower generation_batch_size."
        )
    return prompts, counted


def _last_metrics(log: list[dict[str, Any]]) -> dict[str, Any]:
    records = [record for record in log if "objective/scores" in record]
    wanted = ("objective/", "rewards/", "completions/", "val/", "loss/", "policy/")
    return {key: value for key, value in records[-1].items() if key.startswith(wanted)}
