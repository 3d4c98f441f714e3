"""Sampling, multiple choice, text loss and KL on tiny random models, against slow loops over single sequences."""

import pytest
import torch
from torch.nn import functional as F

from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.evaluation import (
    continuation_log_probs,
    likelihood,
    option_accuracy,
    sequence_kl,
    text_loss,
)
from instructgpt_hf.models.sampling import sample_completions

EOS = 1
PROMPTS = [[5, 6, 7, 8, 9], [10], [11, 12, 13], [14, 15], [5]]
TASKS = [
    {"task": "letters", "prompt": "a b", "options": [" c", " d e"], "answer": 0},
    {"task": "letters", "prompt": "f g h i j", "options": [" k l m", " n", " o p"], "answer": 2},
    {"task": "words", "prompt": "w1 w2 w3", "options": [" w4 w5", " w6", " w7 w8 w9"], "answer": 1},
    {"task": "words", "prompt": "w1", "options": [" w2", " w3"], "answer": 1},
]


def slow_log_probs(model, prompt, completion):
    """One sequence at a time, no padding, no mask."""
    model.eval()
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *completion]])).logits[0]
    logps = torch.log_softmax(logits.float(), -1)
    return torch.stack([logps[len(prompt) - 1 + place, token] for place, token in enumerate(completion)])


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_log_probs_equal_single_sequences(make_policy, architecture, batch_size):
    model = make_policy(architecture)
    completions = [[20, EOS], [21, 22, 23, 24, 25], [26], [27, 28, EOS], [30, 31]]
    actual = continuation_log_probs(model, PROMPTS, completions, batch_size)
    for row, (prompt, completion) in enumerate(zip(PROMPTS, completions, strict=True)):
        torch.testing.assert_close(actual[row], slow_log_probs(model, prompt, completion))


@pytest.mark.parametrize(("logits", "rows"), [(2**27, 5), (6 * 64 * 2, 2), (1, 1)])
def test_a_pass_has_no_more_logits_than_memory_is_meant_for(make_policy, monkeypatch, logits, rows):
    """The longest of the five sequences has 6 tokens; of a model with 64 logits for each, so many rows at a time."""
    monkeypatch.setattr(likelihood, "_LOGITS", logits)
    model, seen = make_policy(), []
    assert model.config.vocab_size == 64
    hook = model.register_forward_pre_hook(lambda *call: seen.append(len(call[2]["input_ids"])), with_kwargs=True)
    actual = continuation_log_probs(model, PROMPTS, [[20]] * 5, 16)
    hook.remove()
    assert max(seen) == rows
    for prompt, logps in zip(PROMPTS, actual, strict=True):
        torch.testing.assert_close(logps, slow_log_probs(model, prompt, [20]))


def test_empty_sequences_are_refused(make_policy):
    with pytest.raises(ValueError, match="Row 1: prompt and completion need at least one token"):
        continuation_log_probs(make_policy(), [[5], [5]], [[6], []], 2)
    with pytest.raises(ValueError, match="got 1 for 2"):
        continuation_log_probs(make_policy(), [[5], [5]], [[6]], 2)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_greedy_completions_equal_step_by_step_argmax(make_policy, tokenizer, architecture):
    model = make_policy(architecture).eval()
    # The repository's own settings must not reach the comparison of policies.
    model.generation_config.repetition_penalty = 5.0
    expected = []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(6):
            with torch.no_grad():
                ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
            if ids[-1] in (EOS, 2, 40):
                break
        expected.append(ids[len(prompt) :])
    for batch_size in (1, 2, 8):
        actual = sample_completions(model, tokenizer, PROMPTS, [EOS, 2, 40], 6, temperature=0, batch_size=batch_size)
        assert actual == expected


def test_completions_end_with_their_eos_or_at_the_limit(make_policy, tokenizer):
    eos = [EOS, *range(3, 20)]
    completions = sample_completions(make_policy(), tokenizer, PROMPTS * 10, eos, max_new_tokens=4, seed=3)
    finished = [ids for ids in completions if ids[-1] in eos]
    assert 0 < len(finished) < len(completions)
    assert all(token not in eos for ids in completions for token in ids[:-1])
    assert all(len(ids) == 4 for ids in completions if ids[-1] not in eos)


def test_sampling_follows_the_tempered_distribution(make_policy, tokenizer):
    model = make_policy().eval()
    # A generation config of the repository must not narrow the distribution.
    model.generation_config.top_k, model.generation_config.repetition_penalty = 2, 3.0
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
        expected = torch.softmax(model(torch.tensor([[5, 6]])).logits[0, -1] / 0.8, -1)
    drawn = sample_completions(model, tokenizer, [[5, 6]] * 4000, [EOS], 1, temperature=0.8, batch_size=4000)
    counts = torch.bincount(torch.tensor(drawn).flatten(), minlength=len(expected)).float()
    # Pearson's statistic over 63 degrees of freedom: 110 is beyond the 99.97 % point.
    large = expected > 1e-3
    statistic = ((counts - 4000 * expected).square() / (4000 * expected))[large].sum()
    assert large.sum() > 20
    assert statistic < 110


def test_sampling_restores_modes_and_random_state(make_policy, tokenizer):
    model = make_policy().train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first = sample_completions(model, tokenizer, PROMPTS, [EOS], 5, seed=7)
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)
    assert [module.training for module in model.modules()] == modes
    assert sample_completions(model, tokenizer, PROMPTS, [EOS], 5, seed=7) == first
    assert sample_completions(model, tokenizer, PROMPTS, [EOS], 5, seed=8) != first


def test_bad_sampling_arguments_are_refused(make_policy, tokenizer):
    with pytest.raises(ValueError, match="Prompt 1 is empty: 1 of 2"):
        sample_completions(make_policy(), tokenizer, [[5], []], [EOS], 2)
    with pytest.raises(ValueError, match="at least one EOS"):
        sample_completions(make_policy(), tokenizer, [[5]], [], 2)
    with pytest.raises(ValueError, match="temperature >= 0"):
        sample_completions(make_policy(), tokenizer, [[5]], [EOS], 2, temperature=-1)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_option_accuracy_equals_the_slow_loop(make_policy, tokenizer, side, batch_size):
    model = make_policy()
    tokenizer.padding_side = side
    expected = []
    for item in TASKS:
        prompt = tokenizer(item["prompt"])["input_ids"]
        means = [slow_log_probs(model, prompt, tokenizer(option)["input_ids"]).mean() for option in item["options"]]
        expected.append(max(range(len(means)), key=lambda place: means[place]) == item["answer"])
    result = option_accuracy(model, tokenizer, TASKS, batch_size)
    tokenizer.padding_side = "left"
    assert result["hits"] == expected
    assert (result["correct"], result["count"]) == (sum(expected), 4)
    assert result["accuracy"] == sum(expected) / 4
    assert result["chance"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 3 + 1 / 2) / 4)
    assert {name: part["correct"] for name, part in result["by_task"].items()} == {
        "letters": sum(expected[:2]),
        "words": sum(expected[2:]),
    }
    assert result["accuracy_low"] < result["accuracy"] < result["accuracy_high"] or sum(expected) in (0, 4)


def test_a_model_that_knows_the_answers_gets_them_all(tokenizer):
    right = {tuple(tokenizer(item["prompt"] + item["options"][item["answer"]])["input_ids"]) for item in TASKS}

    def model(input_ids, attention_mask):
        logits = torch.zeros(*input_ids.shape, 64)
        for row, (ids, mask) in enumerate(zip(input_ids.tolist(), attention_mask.tolist(), strict=True)):
            text = tuple(ids[: sum(mask)])
            if text in right:
                for place in range(len(text) - 1):
                    logits[row, place, text[place + 1]] = 5.0
        return type("Output", (), {"logits": logits})

    assert option_accuracy(model, tokenizer, TASKS)["accuracy"] == 1.0
    wrong = [{**item, "answer": (item["answer"] + 1) % len(item["options"])} for item in TASKS]
    assert option_accuracy(model, tokenizer, wrong)["accuracy"] == 0.0


def test_the_mean_per_token_decides_and_not_the_sum(tokenizer):
    def model(input_ids, attention_mask):
        logits = torch.zeros(*input_ids.shape, 64)
        logits[..., tokenizer.convert_tokens_to_ids("d")] = 1.0
        return type("Output", (), {"logits": logits})

    # Every d is likelier than every c, but three of them are less likely than one c.
    task = [{"task": "t", "prompt": "a", "options": [" c", " d d d"], "answer": 1}]
    assert option_accuracy(model, tokenizer, task)["hits"] == [True]


def test_malformed_tasks_are_all_named(make_policy, tokenizer):
    broken = [
        {"task": "t", "prompt": "a", "options": [" b", " c"]},
        {"task": "t", "prompt": "a", "options": [" b", " b"], "answer": 0},
        {"task": "t", "prompt": "a", "options": [" b", " c"], "answer": 2},
        {"task": "t", "prompt": "", "options": [" b", " c"], "answer": 0},
    ]
    with pytest.raises(InstructGPTError) as error:
        option_accuracy(make_policy(), tokenizer, broken)
    for part in ("question 0: missing answer", "question 1: options", "question 2: answer", "question 3: the prompt"):
        assert part in str(error.value)
    with pytest.raises(InstructGPTError, match="no questions"):
        option_accuracy(make_policy(), tokenizer, [])


@pytest.mark.parametrize("batch_size", [1, 8])
def test_text_loss_equals_cross_entropy(make_policy, tokenizer, batch_size):
    model = make_policy().eval()
    texts = ["a b c d e f g h", "w1 w2", "a", "b c d"]
    total = count = 0
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"][:5]])
        if ids.shape[1] > 1:
            with torch.no_grad():
                total += F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum").item()
            count += ids.shape[1] - 1
    assert text_loss(model, tokenizer, texts, max_length=5, batch_size=batch_size) == pytest.approx(total / count)
    with pytest.raises(InstructGPTError, match="none of 1 texts has two tokens"):
        text_loss(model, tokenizer, ["a"], 5)


def test_kl_equals_the_slow_loop_and_is_zero_to_itself(make_policy):
    policy, reference = make_policy(seed=0), make_policy(seed=1)
    completions = [[20, EOS], [21, 22, 23, 24, 25], [26], [27, 28, EOS], [30, 31]]
    sums = [
        (slow_log_probs(policy, prompt, ids) - slow_log_probs(reference, prompt, ids)).sum().item()
        for prompt, ids in zip(PROMPTS, completions, strict=True)
    ]
    estimate = sequence_kl(policy, reference, PROMPTS, completions, batch_size=2)
    assert estimate.value == pytest.approx(sum(sums) / 5, rel=1e-4, abs=1e-6)
    assert estimate.low <= estimate.value <= estimate.high
    assert sequence_kl(policy, policy, PROMPTS, completions) == (0, 0, 0)


def test_kl_of_sampled_answers_covers_the_exact_divergence(make_policy, tokenizer):
    policy, reference = make_policy(seed=0).eval(), make_policy(seed=1).eval()
    with torch.no_grad():
        for model in (policy, reference):
            model.lm_head.weight.mul_(8)
        logps, ref_logps = (
            torch.log_softmax(model(torch.tensor([[5, 6]])).logits[0, -1] / 0.7, -1) for model in (policy, reference)
        )
    exact = (logps.exp() * (logps - ref_logps)).sum().item()
    drawn = sample_completions(policy, tokenizer, [[5, 6]] * 3000, [EOS], 1, temperature=0.7, batch_size=3000)
    estimate = sequence_kl(policy, reference, [[5, 6]] * 3000, drawn, batch_size=3000, temperature=0.7)
    assert exact > 0.1
    assert estimate.low - 0.02 < exact < estimate.high + 0.02
