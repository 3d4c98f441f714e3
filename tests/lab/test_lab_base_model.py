"""The packaged base model and the script that makes it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from instructgpt_hf import lab
from instructgpt_hf.lab import corpus, make_base_model
from instructgpt_hf.lab.files import rows


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(lab.base_model_path())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(lab.base_model_path())


def test_the_packaged_model_is_a_small_float32_llama(model) -> None:
    files = [path for path in lab.base_model_path().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 5 * 1024**2
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in files}
    assert model.config.model_type == "llama" and model.config.tie_word_embeddings
    assert model.config.bos_token_id is None
    assert all(weights.dtype == torch.float32 for weights in model.parameters())
    assert all(size % 32 == 0 for weights in model.parameters() for size in weights.shape)
    assert "apache-2.0" in (lab.base_model_path() / "README.md").read_text(encoding="utf-8")


def test_tokenizer_round_trips_with_distinct_pad_and_eos(tokenizer, model) -> None:
    assert tokenizer.pad_token == "<pad>" and tokenizer.eos_token == "<eos>"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert (model.config.pad_token_id, model.config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert tokenizer.bos_token is None and len(tokenizer) == model.config.vocab_size
    texts = [*corpus.documents(9, 50), "User: What is the fox?\nAssistant: The fox is red.", "  é ü 漢 \t!"]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert not {tokenizer.pad_token_id, tokenizer.eos_token_id} & set(ids)


def test_prompts_and_completions_are_short(tokenizer) -> None:
    demonstrations = rows("demonstrations.train", 0, 500)
    prompts = [tokenizer(f"User: {row['prompt']}\nAssistant:")["input_ids"] for row in demonstrations]
    completions = [tokenizer(f" {row['completion']}")["input_ids"] for row in demonstrations]
    assert max(map(len, prompts)) <= 30
    assert max(map(len, completions)) + 1 <= 32
    texts = [row["text"] for row in rows("pretraining.train", 0, 1000)]
    assert max(map(len, tokenizer(texts)["input_ids"])) + 1 <= make_base_model.POSITIONS


def test_an_option_continues_the_tokens_of_its_prompt(tokenizer) -> None:
    for item in lab.tasks(0, 45):
        prompt = tokenizer(item["prompt"])["input_ids"]
        for option in item["options"]:
            assert prompt + tokenizer(option)["input_ids"] == tokenizer(item["prompt"] + option)["input_ids"]


def test_the_packaged_model_knows_the_tasks_but_does_not_follow_instructions(tokenizer, model) -> None:
    accuracy, _ = make_base_model.task_accuracy(model, tokenizer, lab.tasks(11, 90))
    assert accuracy > 0.7
    prompts = [row["prompt"] for row in rows("prompts.test", 0, 40)]
    texts = [f"User: {prompt}\nAssistant:" for prompt in prompts]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False)
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    demonstrations = rows("demonstrations.test", 0, 40)
    by_labelers = lab.gold_scores(*([row[key] for row in demonstrations] for key in ("prompt", "completion")))
    assert sum(lab.gold_scores(prompts, answers)) / 40 < sum(by_labelers) / 40 - 2


def test_the_same_seed_makes_the_same_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    # The accuracy that is printed at the end is not what is tested here.
    monkeypatch.setattr(make_base_model, "tasks", lambda seed, n: lab.tasks(seed, 9))
    for name in ("first", "second"):
        make_base_model.main(["--seed", "1", "--steps", "2", "--output_dir", str(tmp_path / name)])
    assert "984,192 parameters" in capsys.readouterr().out
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    for file in ("tokenizer.json", "config.json", "README.md"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
