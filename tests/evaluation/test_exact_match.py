"""Greedy exact match against generating each answer alone, token by token."""

from __future__ import annotations

import pytest
import torch

from instructgpt_hf.evaluation.tasks import exact_match


def greedy(model, tokenizer, prompt, count):
    """The likeliest continuation, one forward pass per token, up to EOS."""
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(count):
        with torch.no_grad():
            token = model(input_ids=ids).logits[0, -1].argmax()
        ids = torch.cat([ids, token.reshape(1, 1)], dim=1)
        if token == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def test_hits_are_the_answers_the_model_gives(make_policy, tokenizer):
    model = make_policy().eval()
    prompts = ["a b c", "w1", "d e f g h", "w7 w8"]
    texts = [greedy(model, tokenizer, prompt, 3) for prompt in prompts]
    tasks = [
        {"task": "own", "prompt": prompts[0], "options": [" nothing", f" {texts[0]}"], "answer": 1},
        {"task": "own", "prompt": prompts[1], "options": [f" {texts[1]}", " nothing"], "answer": 0},
        {"task": "other", "prompt": prompts[2], "options": [f" {texts[2]}", " nothing"], "answer": 1},
        {"task": "other", "prompt": prompts[3], "options": [" nothing", f" {texts[3]}"], "answer": 1},
    ]
    overall, by_task, hits = exact_match(model, tokenizer, tasks, max_new_tokens=3, batch_size=3)
    assert hits == [True, True, False, True]
    assert overall.value == pytest.approx(0.75)
    assert {name: item.value for name, item in by_task.items()} == {"other": 0.5, "own": 1.0}


def test_an_answer_ends_at_the_first_newline(make_policy, tokenizer, monkeypatch):
    monkeypatch.setattr("instructgpt_hf.evaluation.tasks.sample_completions", lambda *_, **__: [[5]])
    monkeypatch.setattr(type(tokenizer), "decode", lambda *_, **__: " red\nleaf: green")
    tasks = [{"task": "colour", "prompt": "a", "options": [" red", " green"], "answer": 0}]
    assert exact_match(None, tokenizer, tasks)[2] == [True]
