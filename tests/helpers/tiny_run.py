"""A finished run as the pipeline leaves it: random models of a few thousand parameters and complete records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from instructgpt_hf.artifacts import StageArtifact

WORDS = ["<pad>", "<eos>", "<unk>", "User:", "Assistant:", "sort", "the", "words", "b", "a", "yes", "no"]
SHIFT = 0.375
FORMAT = {
    "name": "user-assistant",
    "template": "User: {prompt}\nAssistant:",
    "completion_prefix": " ",
    "eos_token": "<eos>",
    "pad_token": "<pad>",
    "sha256": "0123456789abcdef",
}
PICTURE = b"\x89PNG\r\n\x1a\n stands for a picture"
METRICS: dict[str, dict[str, Any]] = {
    "sft": {"eval_loss": 1.25},
    "reward": {
        "eval_accuracy": 0.71,
        "eval_accuracy_low": 0.66,
        "eval_accuracy_high": 0.76,
        "length_baseline_accuracy": 0.52,
        "eval_accuracy_k4": 0.7,
        "eval_accuracy_k10": 0.75,
        "eval_accuracy_gap1": 0.62,
        "eval_ece": 0.045,
        "eval_ece_low": 0.02,
        "eval_ece_high": 0.07,
        "eval_kendall_tau": 0.41,
        "labeler_agreement": 0.73,
        "eval_pairs": 1200,
        "eval_prompts": 200,
        "reward_mean_on_demonstrations": 0.0,
    },
    "ppo": {"mean_reward": 1.5, "kl_to_sft": 4.0, "task_accuracy": 0.4},
    "ppo-ptx": {
        "win_rate_vs_sft": 0.61,
        "win_rate_vs_sft_low": 0.54,
        "win_rate_vs_sft_high": 0.68,
        "judge": "gold labeler",
        "task_accuracy": 0.55,
        "kl_to_sft": 3.0,
        "mean_reward": 1.25,
        "objective/entropy": 2.5,
    },
}
ROLES = {
    "sft": ["demonstrations", "pretraining"],
    "reward": ["rankings"],
    "ppo": ["prompts"],
    "ppo-ptx": ["prompts", "pretraining"],
}


def record(stage: str, run: Path | str = "/home/bob/runs/tiny", **changes: Any) -> StageArtifact:
    """The record of one stage, with the local paths that a real one holds."""
    # As recorded: an earlier stage of the same run by its name, one from elsewhere by its path or Hub id.
    earlier = {"sft": [], "reward": ["sft"]}.get(stage, ["sft", "reward"])
    data = {
        role: {"source": f"lab:{role}", "split": "train", "rows": 2000, "fingerprint": f"{role[:4]}0123"}
        for role in ROLES[stage]
    }
    if stage == "reward":
        data["rankings"]["dropped_ties"] = 17
    model: dict[str, Any] = {"kind": "full", "parameters": 12345, "trainable_parameters": 12345}
    model["architecture"] = "LlamaForSequenceClassification" if stage == "reward" else "LlamaForCausalLM"
    model["license"] = "apache-2.0"
    if stage == "reward":
        model["reward_shift"] = SHIFT
    if stage.startswith("ppo"):
        model |= {"value_model": "value_model", "published_weights": "raw"}
    values: dict[str, Any] = {
        "stage": stage,
        "recipe": "tiny-cpu",
        "config": {"output_dir": f"{run}/{stage}", "seed": 7, "learning_rate": 0.001},
        "prompt_format": FORMAT,
        "base_model": {"id": "lab", "revision": None, "fingerprint": "base0123"},
        "fingerprint": f"{stage}0123",
        "seed": 7,
        "paper_defaults": {"adam_beta2": [0.95, "App. C"]},
        "previous": {name: {"source": name, "fingerprint": f"{name}0123"} for name in earlier},
        "data": data,
        "model": model,
        "metrics": dict(METRICS[stage]),
        "training": {"steps": 40, "epochs": 1.0, "seconds": 12.0, "log": [{"step": 1, "loss": 2.0}]},
        "versions": {"torch": "2.13.0", "transformers": "5.23.0", "trl": "1.16.0"},
        "hardware": {"device": "cpu", "processes": 1, "platform": "Linux"},
        "finished_at": "2026-01-02T03:04:05+00:00",
    }
    if stage == "ppo-ptx":
        values["paper_defaults"]["ema_decay"] = [0.992, "C.4"]
    return StageArtifact(**{**values, **changes})


def tiny_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def tiny_config(**changes: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        **changes,
    )


def write_run(run: Path) -> Path:
    """Write the folders of all four stages below `run`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    tokenizer = tiny_tokenizer()
    for seed, stage in enumerate(METRICS):
        folder = run / stage
        torch.manual_seed(seed)
        scorer = AutoModelForSequenceClassification.from_config(tiny_config(num_labels=1, reward_shift=SHIFT))
        policy = AutoModelForCausalLM.from_config(tiny_config())
        model = scorer if stage == "reward" else policy
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if stage.startswith("ppo"):
            scorer.save_pretrained(folder / "value_model")
            tokenizer.save_pretrained(folder / "value_model")
            policy.save_pretrained(folder / "ema")
        if stage == "reward":
            (folder / "evaluation.png").write_bytes(PICTURE)
            (folder / "evaluation.json").write_text('{"accuracy": {"accuracy": 0.71}}\n')
        record(stage, run).save(folder)
    return run
