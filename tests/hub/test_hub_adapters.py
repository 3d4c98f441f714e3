"""A reward adapter of a 4-bit base, by its Hub id: this package and plain transformers load it, and it merges."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hub_client import Client
from local_hub import LocalHub
from peft import LoraConfig
from tiny_run import WORDS, record, tiny_tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from instructgpt_hf.models.reward_model import create_reward_model, save_reward_model, score_token_lists

SEQUENCES = [[3, 5, 6, 4, 10, 1], [3, 8, 9, 7, 4, 11, 11, 1]]
SHIFT = 0.25
PUSH = """
    import json, sys
    from instructgpt_hf.hub.publish import push_run
    print(json.dumps(push_run(sys.argv[1], None)))
"""
LOAD = """
    import json, sys
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, pipeline
    import instructgpt_hf
    from instructgpt_hf.models.loading import restore_cpu_gradients
    from instructgpt_hf.models.merging import merge_adapter

    repo_id, sequences = sys.argv[1], json.loads(sys.argv[2])
    tokenizer = AutoTokenizer.from_pretrained(repo_id)

    def raw(model):
        with torch.no_grad():
            return [model.eval()(input_ids=torch.tensor([ids])).logits.item() for ids in sequences]

    def piped(model):
        texts = [" ".join(tokenizer.convert_ids_to_tokens(ids)) for ids in sequences]
        score = pipeline("text-classification", model=model, tokenizer=repo_id, function_to_apply="none")
        return [found["score"] for found in score(texts)]

    ours = instructgpt_hf.load_reward_model(repo_id)
    config = AutoConfig.from_pretrained(repo_id, subfolder="classifier")
    quantization = ours.get_base_model().config.quantization_config
    plain = AutoModelForSequenceClassification.from_pretrained(
        repo_id, config=config, quantization_config=quantization
    )
    restore_cpu_gradients(plain)
    merged = merge_adapter(repo_id, "merged")
    found = {
        "ours": raw(ours),
        "plain": raw(plain),
        "pipeline": piped(ours),
        "merged": raw(AutoModelForSequenceClassification.from_pretrained(merged)),
        "merged pipeline": piped(str(merged)),
    }
    shifts = [model.config.reward_shift for model in (ours.get_base_model(), plain)]
    shifts.append(instructgpt_hf.load_reward_model(merged).config.reward_shift)
    kind = instructgpt_hf.StageArtifact.load(merged).model["kind"]
    print(json.dumps({"scores": found, "shifts": shifts, "kind": kind, "four_bits": quantization.load_in_4bit}))
"""


def write_run(run: Path) -> list[float]:
    """A whole SFT model and a reward adapter on it; returns the adapter's scores without the shift."""
    tokenizer, sizes = tiny_tokenizer(), dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=len(WORDS), num_attention_heads=2, pad_token_id=0, eos_token_id=1, **sizes)
    )
    policy.save_pretrained(run / "sft")
    tokenizer.save_pretrained(run / "sft")
    record("sft", run).save(run / "sft")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = create_reward_model(
        run / "sft",
        tokenizer,
        seed=0,
        peft_config=LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
        dtype=torch.float32,
        quantization_config=nf4,
    )
    scores = score_token_lists(model, SEQUENCES, 0, 2)
    model.get_base_model().config.reward_shift = SHIFT
    save_reward_model(model, run / "reward")
    tokenizer.save_pretrained(run / "reward")
    record("reward", run, model={"kind": "adapter", "reward_shift": SHIFT}).save(run / "reward")
    return scores


def test_adapter_by_its_id(hub: LocalHub, client: Client, tmp_path: Path) -> None:
    expected = write_run(tmp_path / "run")
    repo_id = client.value(PUSH, tmp_path / "run")["reward"]
    assert str(tmp_path) not in hub.text(repo_id, "classifier/config.json")
    found = client.value(LOAD, repo_id, json.dumps(SEQUENCES))
    for way, scores in found["scores"].items():
        assert scores == pytest.approx(expected, abs=1e-4), way
    assert found["shifts"] == [SHIFT] * 3
    assert found["four_bits"] and found["kind"] == "full"
