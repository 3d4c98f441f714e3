"""Decoding without ended rows gives what transformers' own loop gives, for less."""

from __future__ import annotations

import logging

import pytest
import torch
from helpers.tiny_models import LLAMA, VOCABULARY, tiny_config
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, LogitsProcessor, LogitsProcessorList

from instructgpt_hf.models import decoding
from instructgpt_hf.models.actor_critic import ActorCritic
from instructgpt_hf.models.decoding import generate

ARCHITECTURES = ["llama", "gpt2", "gpt_neox", "qwen3", "gemma3_text", "opt"]
LENGTHS = (3, 7, 1, 5, 9, 2, 4, 6, 8, 5, 3, 1)
WIDTH, PAD = max(LENGTHS), 0


def make_model(architecture):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(architecture)).eval()
    for parameter in model.parameters():
        # Larger weights than an initialisation's: answers that differ, and clear maxima.
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.3)
    return model


@pytest.fixture
def prompts():
    """12 prompts of different lengths, padded on the left."""
    torch.manual_seed(1)
    ids = torch.randint(3, len(VOCABULARY), (len(LENGTHS), WIDTH))
    mask = (torch.arange(WIDTH) >= WIDTH - torch.tensor(LENGTHS)[:, None]).long()
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


class Ends(LogitsProcessor):
    """Allows EOS ids only where an answer has its length, which follows from the prompt's last token."""

    def __init__(self, prompts, lengths, eos=(1, 2)):
        self.lengths, self.eos = torch.zeros(len(VOCABULARY), dtype=torch.long), torch.tensor(eos)
        self.lengths[prompts["input_ids"][:, -1]] = torch.tensor(lengths)

    def __call__(self, ids, scores):
        due = self.lengths[ids[:, WIDTH - 1]] == ids.shape[1] - WIDTH + 1
        scores[:, self.eos] = scores[:, self.eos].where(due[:, None], -torch.inf)
        scores[:, PAD] = -torch.inf  # the tests tell answers from padding by it
        others = torch.ones(scores.shape[1], dtype=torch.bool).index_fill(0, self.eos, False)
        scores[due[:, None] & others] = -torch.inf
        return scores


ANSWERS = (4, 1, 9, 2, 15, 1, 30, 3, 12, 5, 2, 40)  # the last one is cut


def settings(**changes):
    values = dict(max_new_tokens=24, do_sample=False, pad_token_id=PAD, eos_token_id=[1, 2], top_k=0, top_p=1.0)
    return GenerationConfig(**{**values, **changes})


@pytest.fixture
def ends(prompts):
    prompts["input_ids"][:, -1] = torch.arange(3, 3 + len(LENGTHS))
    return {**prompts, "logits_processor": LogitsProcessorList([Ends(prompts, ANSWERS)])}


def count_rows(model, monkeypatch):
    """Rows of every forward pass from now on."""
    seen = []
    forward = model.forward

    def counting(*args, **kwargs):
        seen.append(len(kwargs["input_ids"]))
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", counting)
    return seen


@pytest.mark.parametrize("share", [0.0, 0.125, 0.5])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_tokens_are_those_of_transformers(ends, architecture, share, monkeypatch):
    monkeypatch.setattr(decoding, "DROPPED_SHARE", share)
    model = make_model(architecture)
    expected = model.generate(**ends, generation_config=settings())
    assert torch.equal(generate(model, **ends, generation_config=settings()), expected)
    answers = expected[:, WIDTH:]
    assert [int((row != PAD).sum()) for row in answers] == [min(length, 24) for length in ANSWERS]
    assert len({tuple(row.tolist()) for row in answers[:, :3]}) > 6, "the answers are too alike to test anything"


def test_ended_rows_cost_no_forward_pass(ends, monkeypatch):
    """After every step, the rows that go on are the rows of the next pass."""
    monkeypatch.setattr(decoding, "DROPPED_SHARE", 0.0)
    model = make_model("llama")
    seen = count_rows(model, monkeypatch)
    generate(model, **ends, generation_config=settings())
    assert seen == [sum(length > step for length in ANSWERS) for step in range(24)]


def test_rows_are_taken_out_by_shares(ends, monkeypatch):
    monkeypatch.setattr(decoding, "DROPPED_SHARE", 0.25)
    model = make_model("llama")
    seen = count_rows(model, monkeypatch)
    generate(model, **ends, generation_config=settings())
    going = [sum(length > step for length in ANSWERS) for step in range(24)]
    expected = [12]
    for now in going[1:]:
        expected.append(now if expected[-1] - now >= max(1, 0.25 * expected[-1]) else expected[-1])
    assert seen == expected and len(set(seen)) > 3


@pytest.mark.parametrize("limits", [dict(max_new_tokens=1), dict(min_new_tokens=6), dict(min_new_tokens=9)])
def test_length_limits(prompts, limits):
    """No EOS before the shortest length; the longest one cuts."""
    model = make_model("llama")
    model.lm_head.weight.data[1] = model.lm_head.weight.data[3:].mean(0) * 8  # a frequent EOS
    config = settings(**{"max_new_tokens": 12, "eos_token_id": [1], **limits})
    expected = model.generate(**prompts, generation_config=config)
    actual = generate(model, **prompts, generation_config=config)
    assert torch.equal(actual, expected)
    shortest = limits.get("min_new_tokens", 0)
    assert not (actual[:, WIDTH : WIDTH + shortest] == 1).any()
    assert actual.shape[1] - WIDTH <= config.max_new_tokens


def test_sampled_tokens_do_not_depend_on_what_is_taken_out(ends, monkeypatch):
    model, config = make_model("llama"), settings(do_sample=True, temperature=1.3)
    results, after = [], []
    for share in (0.0, 0.3, 2.0):
        monkeypatch.setattr(decoding, "DROPPED_SHARE", share)
        torch.manual_seed(5)
        results.append(generate(model, **ends, generation_config=config))
        after.append(torch.rand(1))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert after[0] == after[1] == after[2]
    torch.manual_seed(6)
    assert not torch.equal(generate(model, **ends, generation_config=config), results[0])


def test_draws_follow_the_distribution():
    """Frequencies of 200,000 draws against the probabilities, by chi-square; tokens of probability 0 never come."""
    torch.manual_seed(0)
    scores = torch.tensor([[0.0, 1.0, -torch.inf, 2.0, -1.0, -torch.inf]])
    probabilities = scores.softmax(-1)[0]
    draws = decoding._draw(scores.expand(200_000, -1), torch.arange(200_000), 200_000)
    counts = torch.bincount(draws, minlength=6)
    assert counts[2] == counts[5] == 0
    possible = probabilities > 0
    expected = probabilities[possible] * 200_000
    statistic = ((counts[possible] - expected) ** 2 / expected).sum()
    assert statistic < 16.3  # the 0.1 % quantile with 3 degrees of freedom


def test_sampling_has_the_distribution_of_transformers(prompts):
    """The first two tokens of 4,000 answers, with top-k and temperature, as frequent as in `model.generate`."""
    model = make_model("llama")
    config = settings(do_sample=True, temperature=0.8, top_k=3, max_new_tokens=2, eos_token_id=[2])
    rows = {name: item[:1].expand(4_000, -1) for name, item in prompts.items()}
    torch.manual_seed(0)
    pairs = []
    for run in (generate, lambda model, **inputs: model.generate(**inputs)):
        tokens = run(model, **rows, generation_config=config)[:, WIDTH:]
        pairs.append(torch.bincount(tokens[:, 0] * len(VOCABULARY) + tokens[:, 1], minlength=len(VOCABULARY) ** 2))
    ours, theirs = (item.float() for item in pairs)
    seen = (ours + theirs) > 20
    statistic = ((ours - theirs) ** 2 / (ours + theirs))[seen].sum()
    degrees = int(seen.sum())
    assert 3 <= degrees <= 9 and statistic < degrees + 4 * (2 * degrees) ** 0.5


def test_peft_policies_and_the_actor_critic(ends, make_scorer, monkeypatch):
    monkeypatch.setattr(decoding, "DROPPED_SHARE", 0.0)
    model = make_model("llama")
    plain = model.generate(**ends, generation_config=settings())
    policy = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    expected = policy.generate(**ends, generation_config=settings())
    assert not torch.equal(plain, expected)
    seen = count_rows(policy.get_base_model(), monkeypatch)
    actor_critic = ActorCritic(policy, make_scorer())
    assert torch.equal(actor_critic.generate(**ends, generation_config=settings()), expected)
    assert seen[0] == len(LENGTHS) and seen[-1] == 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(num_beams=2), "generation mode is beam_search"),
        (dict(cache_implementation="static"), "a StaticCache"),
        (dict(use_cache=False), "the cache is off"),
    ],
)
def test_what_the_loop_cannot_do_runs_in_transformers_own(ends, caplog, changes, reason):
    decoding._log_once.cache_clear()
    model = make_model("llama")
    config = settings(**changes, disable_compile=True)
    expected = model.generate(**ends, generation_config=config)
    with caplog.at_level(logging.WARNING, logger=decoding.__name__):
        for _ in range(2):
            assert torch.equal(generate(model, **ends, generation_config=config), expected)
    said = [record.getMessage() for record in caplog.records if record.name == decoding.__name__]
    assert len(said) == 1 and reason in said[0]


def test_recurrent_states_and_processors_that_count_rows(prompts, caplog):
    """A model with a recurrent state beside its keys, and a function that is given row numbers."""
    decoding._log_once.cache_clear()
    config = AutoConfig.for_model(
        "falcon_h1", vocab_size=64, pad_token_id=0, eos_token_id=1, **LLAMA, mamba_d_ssm=32, mamba_n_heads=4,
        mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=8,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    with caplog.at_level(logging.WARNING, logger=decoding.__name__):
        inputs = dict(**prompts, generation_config=settings(max_new_tokens=3))
        assert torch.equal(generate(model, **inputs), model.generate(**inputs))
        inputs["prefix_allowed_tokens_fn"] = lambda row, ids: [3 + row]
        model = make_model("llama")
        assert torch.equal(generate(model, **inputs), model.generate(**inputs))
    assert "LinearAttention" in caplog.text and "PrefixConstrainedLogitsProcessor" in caplog.text


def test_logits_that_are_not_finite_are_refused(prompts):
    model = make_model("llama")
    model.lm_head.weight.data[5] = torch.nan
    with pytest.raises(Exception, match="logits are not finite"):
        generate(model, **prompts, generation_config=settings(do_sample=True))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    "own",
    [
        dict(no_repeat_ngram_size=1),
        dict(suppress_tokens=list(range(5, 30))),
        dict(typical_p=0.05),
        dict(min_length=WIDTH + 20),
        dict(num_beams=2),
    ],
    ids=lambda own: next(iter(own)),
)
def test_settings_of_the_models_files_change_no_token(prompts, own, lora):
    plain, with_own = make_model("llama"), make_model("llama")
    for name, value in own.items():
        setattr(with_own.generation_config, name, value)
    if lora:
        plain, with_own = (get_peft_model(model, LoraConfig(r=2)) for model in (plain, with_own))
    answers = []
    for model in (plain, with_own):
        torch.manual_seed(3)
        answers.append(generate(model, **prompts, generation_config=settings(do_sample=True)))
    torch.testing.assert_close(*answers)
    for name, value in own.items():
        assert getattr(with_own.generation_config, name) == value, "a policy is saved with its own config"
