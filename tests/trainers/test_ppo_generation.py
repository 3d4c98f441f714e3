"""How PPO's rollouts are generated: ended completions, length limits, continuous batching, what vLLM is sent."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from instructgpt_hf._compat.contracts import CONTRACTS
from instructgpt_hf.config import rules
from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.models.merging import merged_weights

PROMPTS = Dataset.from_dict({"prompt": ["a b " * (index % 4) + f"w{index}" for index in range(32)]})
ENDS = list(range(1, 64, 6))  # many, so that greedy completions end at lengths that differ
SMALL_CACHE = {"num_blocks": 32, "page_size": 16, "max_batch_tokens": 128}


@pytest.fixture
def make_trainer(make_trainer):
    def build(policy=None, **changes):
        settings = dict(
            prompts=PROMPTS,
            reward=lambda completion_ids, **_: [float(len(ids)) for ids in completion_ids],
            total_episodes=16,
            max_completion_length=12,
            learning_rate=5e-6,
            value_learning_rate=9e-6,
            bf16=False,
            seed=42,
        )
        return make_trainer(policy=policy, **{**settings, **changes})

    return build


def likely_eos(policy, factor=4.0):
    """Make a random policy end its completions at lengths that differ."""
    with torch.no_grad():
        policy.lm_head.weight[1] = policy.lm_head.weight[2:].mean(0)
        for parameter in policy.parameters():
            parameter.mul_(factor if parameter.dim() > 1 else 1.0)
    return policy


def lora(policy, **changes):
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **changes)
    model = get_peft_model(policy, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
    return model


def test_rollouts_drop_ended_completions(make_trainer, make_policy, monkeypatch):
    trainer = make_trainer(likely_eos(make_policy()))
    passes = []
    forward = trainer.actor_critic.policy.forward

    def counting(*args, **kwargs):
        passes.append(kwargs["input_ids"].shape)
        return forward(*args, **kwargs)

    monkeypatch.setattr(trainer.actor_critic.policy, "forward", counting)
    _, completions, _ = trainer.generate(PROMPTS["prompt"][:16])
    assert passes[0][0] == 16 and passes[-1][0] < 16 and passes[-1][1] == 1
    assert len({len(ids) for ids in completions}) > 3
    for ids in completions:
        assert 1 not in ids[:-1] and (ids[-1] == 1 or len(ids) == 12)


def test_completions_in_batches_are_those_of_all_at_once(make_trainer, make_policy, monkeypatch):
    """Greedy completions, in the order of the prompts; batches hold prompts of similar length."""
    results, passes = [], []
    for size in (None, 5):
        trainer = make_trainer(likely_eos(make_policy()), rollout_batch_size=size)
        trainer.generation_config.do_sample = False
        trainer.generation_config.eos_token_id = trainer.eos_token_ids = ENDS
        forward = trainer.actor_critic.policy.forward

        def counting(*args, forward=forward, **kwargs):
            passes.append(tuple(kwargs["input_ids"].shape))
            return forward(*args, **kwargs)

        monkeypatch.setattr(trainer.actor_critic.policy, "forward", counting)
        results.append(trainer.generate(PROMPTS["prompt"][:16]))
    assert results[0] == results[1]
    assert [shape for shape in passes if shape[1] > 1] == [(16, 7), (5, 7), (5, 5), (5, 3)]
    assert passes.count((1, 1)) >= 1


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_with_a_shortest_completion(make_trainer, make_policy, checkpointing, caplog):
    """No completion ends early; rollout, reference and training agree on the log-probabilities."""
    trainer = make_trainer(
        likely_eos(make_policy()),
        min_completion_length=5,
        gradient_checkpointing=checkpointing,
        per_device_train_batch_size=16,
        num_iterations=1,
    )
    trainer.train()
    record = trainer.state.log_history[0]
    assert record["completions/min_length"] >= 6 and record["completions/eos_rate"] > 0
    assert record["policy/ratio"] == pytest.approx(1.0, abs=1e-5)
    assert record["objective/kl"] == pytest.approx(0.0, abs=1e-4)
    assert "Ended completions stay" not in caplog.text  # checkpointing is off, and so the cache on, during rollouts


def test_log_probs_below_the_shortest_completion(make_trainer, make_policy):
    """Those of a softmax over all tokens but EOS, and from there on those of the whole softmax."""
    trainer = make_trainer(make_policy(), min_completion_length=2)
    model = trainer.actor_critic
    ids = torch.tensor([[3, 4, 5, 6, 7, 1], [0, 8, 9, 10, 11, 12]])
    mask = (ids != 0).long()
    output = model(ids, mask, 4, with_entropy=True)
    assert output.logps.requires_grad
    positions = torch.tensor([[0, 1, 2, 3, 4], [0, 0, 1, 2, 3]])
    logits = model.policy(ids[:, :-1], attention_mask=mask[:, :-1], position_ids=positions).logits[:, 1:]
    others = [index for index in range(logits.shape[-1]) if index != 1]
    places = torch.arange(4)
    for row in range(2):
        tokens = ids[row, 2:]
        for place in places:
            allowed = logits[row, place, others] if place < 2 else logits[row, place]
            expected = logits[row, place, tokens[place]] - allowed.logsumexp(-1)
            torch.testing.assert_close(output.logps[row, place], expected)
            probabilities = allowed.softmax(-1)
            entropy = -(probabilities * probabilities.log()).sum()
            torch.testing.assert_close(output.entropy[row, place], entropy.detach())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(min_completion_length=13), "min_completion_length = 13: must be at most max_completion_length \\(12\\)"),
        (dict(min_completion_length=-1), "min_completion_length = -1: must be 0 or greater"),
        (
            dict(min_completion_length=2, use_transformers_continuous_batching=True),
            "must be 0 with use_transformers_continuous_batching",
        ),
        (dict(use_vllm=True, use_transformers_continuous_batching=True), "cannot be combined with use_vllm"),
    ],
)
def test_settings_that_contradict_each_other(make_trainer, changes, message):
    with pytest.raises(InstructGPTError, match=message):
        make_trainer(**changes)


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("bf16", [False, True])
def test_continuous_batching(make_trainer, make_policy, kind, bf16):
    """Greedy completions are those of `generate` in the same precision, and the weights stay as they are."""
    policy = likely_eos(make_policy())
    policy = lora(policy) if kind == "lora" else policy
    trainer = make_trainer(
        policy,
        use_transformers_continuous_batching=True,
        transformers_continuous_batching_config=SMALL_CACHE,
        bf16=bf16,
        use_cpu=True,
    )
    trainer.generation_config.do_sample = False
    trainer.generation_config.eos_token_id = trainer.eos_token_ids = ENDS
    before = {name: item.clone() for name, item in policy.named_parameters()}
    training = {name: item.training for name, item in trainer.actor_critic.named_modules()}
    prompts = PROMPTS["prompt"][:16]
    prompt_ids, completions, _ = trainer.generate(prompts)
    assert all(torch.equal(item, before[name]) for name, item in policy.named_parameters())
    assert all(item.dtype == torch.float32 for item in policy.parameters())
    assert {name: item.training for name, item in trainer.actor_critic.named_modules()} == training
    if not bf16:
        trainer.use_transformers_continuous_batching = False
        assert trainer.generate(prompts)[1] == completions
    for item in policy.parameters():
        item.data = item.data.to(torch.bfloat16 if bf16 else torch.float32)
    for prompt, completion in zip(prompt_ids, completions, strict=True):
        ids = policy.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            generation_config=trainer.generation_config,
        )
        assert completion == ids[0, len(prompt) :].tolist()
    assert len({len(completion) for completion in completions}) > 2


def test_continuous_batching_draws_from_the_seed_and_the_iteration(make_trainer, make_policy):
    backend = dict(use_transformers_continuous_batching=True, transformers_continuous_batching_config=SMALL_CACHE)
    prompts, found = PROMPTS["prompt"][:16], []
    for seed, step in ((42, 0), (42, 0), (42, 1), (43, 0)):
        trainer = make_trainer(likely_eos(make_policy()), seed=seed, **backend)
        trainer.state.global_step = step * trainer.args.optimizer_steps_per_iteration
        state = torch.get_rng_state()
        found.append(trainer.generate(prompts)[1])
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(3)  # the state around it does not matter
    assert found[0] == found[1] and found[0] != found[2] and found[0] != found[3]


def test_a_run_with_continuous_batching(make_trainer, make_policy):
    trainer = make_trainer(
        likely_eos(make_policy()),
        use_transformers_continuous_batching=True,
        transformers_continuous_batching_config=SMALL_CACHE,
        per_device_train_batch_size=16,
    )
    trainer.train()
    assert trainer.state.log_history[0]["policy/ratio"] == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("continuous", [False, True], ids=["generate", "continuous batching"])
def test_tokens_come_from_the_distribution_at_the_temperature(make_trainer, make_policy, continuous, temperature):
    """Frequencies of 2,048 first tokens against the probabilities, by chi-square."""
    policy = make_policy()
    policy.lm_head.weight.data *= 6
    with torch.no_grad():
        logits = policy(torch.tensor([[3, 4, 5]])).logits[0, -1] / temperature
    backend = dict(
        use_transformers_continuous_batching=True,
        transformers_continuous_batching_config={"num_blocks": 64, "page_size": 16, "max_batch_tokens": 256},
    )
    trainer = make_trainer(policy, max_completion_length=1, temperature=temperature, **(backend if continuous else {}))
    torch.manual_seed(1)
    draws = 2048
    _, completions, _ = trainer.generate(["a b c"] * draws)
    found = torch.bincount(torch.tensor([ids[0] for ids in completions]), minlength=len(logits))
    expected = draws * logits.softmax(-1)
    common = expected > 5
    found = torch.cat([found[common], found[~common].sum()[None]]).double()
    expected = torch.cat([expected[common], expected[~common].sum()[None]]).double()
    statistic, freedom = ((found - expected) ** 2 / expected.clamp(min=1e-9)).sum().item(), len(found) - 1
    assert freedom > 5
    # Wilson and Hilferty: the cube root is close to normal; 4 standard deviations.
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 4 * (2 / (9 * freedom)) ** 0.5) ** 3


def test_continuous_batching_that_fails_says_why(make_trainer, make_policy):
    trainer = make_trainer(
        use_transformers_continuous_batching=True,
        transformers_continuous_batching_config={**SMALL_CACHE, "num_blocks": 1, "page_size": 4},
    )
    with pytest.raises(InstructGPTError, match="use_transformers_continuous_batching: "):
        trainer.generate(PROMPTS["prompt"][:16])


class Engine:
    """Stands for TRL's VLLMGeneration: takes its weights as that does, and generates EOS."""

    def __init__(self, model, **settings):
        self.model, self.settings, self.generation_kwargs = model, settings, dict(settings["generation_kwargs"] or {})
        self.sent = []

    def _iter_named_params(self):
        for name, parameter in self.model.named_parameters():
            yield name, parameter.data

    def sync_weights(self):
        self.sent.append({name: item.clone() for name, item in self._iter_named_params()})

    def generate(self, prompts, images, num_generations, profiler):
        assert num_generations == 1
        completion = [5] * max(1, self.generation_kwargs.get("min_tokens", 0)) + [1]
        return prompts, [completion for _ in prompts], None, None


@pytest.fixture
def vllm(monkeypatch):
    import trl.trainer.rloo_trainer

    monkeypatch.setattr(trl.trainer.rloo_trainer, "VLLMGeneration", Engine)
    monkeypatch.setattr(rules, "find_spec", lambda name: object())


def test_vllm_settings_that_cannot_work(make_trainer, monkeypatch):
    monkeypatch.setattr(rules, "find_spec", lambda name: None)
    with pytest.raises(InstructGPTError, match="use_vllm = True: needs the package vllm, which is not installed"):
        make_trainer(use_vllm=True)
    monkeypatch.setattr(rules, "find_spec", lambda name: object())
    values = {"use_vllm": True, "load_in_4bit": True, "load_in_8bit": False}
    assert "vLLM is sent whole weights" in rules.violations("ppo", values)[0].rule


def test_vllm_gets_the_policy_under_its_own_names(make_trainer, make_policy, vllm):
    trainer = make_trainer(use_vllm=True, min_completion_length=3, total_episodes=32, learning_rate=1e-2)
    start = {name: item.detach().clone() for name, item in make_policy().named_parameters()}
    engine = trainer.vllm_generation
    assert engine.generation_kwargs == {"stop_token_ids": [1], "ignore_eos": True, "min_tokens": 3}
    trainer.train()
    first, second = engine.sent  # once per iteration
    assert set(first) == set(start)
    assert all(torch.equal(first[name], item) for name, item in start.items())
    assert any(not torch.equal(second[name], item) for name, item in start.items())


def test_vllm_gets_lora_merged_and_the_base_stays_as_it_is(make_trainer, make_policy, vllm):
    policy = lora(make_policy(), modules_to_save=["embed_tokens"])
    trainer = make_trainer(policy, use_vllm=True)
    before = {name: item.detach().clone() for name, item in trainer.actor_critic.named_parameters()}
    engine = trainer.vllm_generation
    for _ in range(2):
        engine.sync_weights()
    assert all(torch.equal(item, before[name]) for name, item in trainer.actor_critic.named_parameters())
    assert not any(module.merged for module in policy.modules() if hasattr(module, "merged"))
    whole = make_policy()
    assert set(engine.sent[0]) == set(dict(whole.named_parameters()))
    whole.load_state_dict(engine.sent[1])
    ids = torch.randint(3, 64, (2, 7))
    torch.testing.assert_close(whole.eval()(ids).logits, policy.eval()(ids).logits)


def test_merged_weights_of_half_precision_leave_no_rounding(make_policy):
    """PEFT's merge and unmerge would change weights in bfloat16."""
    policy = lora(make_policy().to(torch.bfloat16))
    before = {name: item.detach().clone() for name, item in policy.named_parameters()}
    for name, item in merged_weights(policy):
        assert item.dtype == torch.bfloat16, name
    assert all(torch.equal(item, before[name]) for name, item in policy.named_parameters())
    policy.merge_adapter()
    policy.unmerge_adapter()
    assert any(not torch.equal(item, before[name]) for name, item in policy.named_parameters())


def test_the_contract_of_vllm_weights():
    """TRL's engine takes every synchronisation's weights from the method that is replaced."""
    import inspect

    from trl.generation.vllm_generation import VLLMGeneration

    assert "self._iter_named_params()" in inspect.getsource(VLLMGeneration.sync_weights)
    assert "VLLMGeneration._iter_named_params" in CONTRACTS


class TestRowsWithoutToken:
    """A policy with more embeddings than its tokenizer has tokens, as padded vocabularies are."""

    @pytest.fixture
    def policy(self, make_policy):
        """Of its 72 rows the tokenizer has 64; the others are by far the likeliest."""
        model = make_policy(vocab_size=72)
        with torch.no_grad():
            model.lm_head.weight[64:] = 20 * model.lm_head.weight[3:11]
        return model

    @pytest.mark.parametrize("continuous", [False, True], ids=["generate", "continuous batching"])
    @pytest.mark.parametrize("kind", ["full", "lora"])
    def test_they_are_never_sampled(self, make_trainer, make_scorer, policy, kind, continuous):
        """Rollout, update and reference leave them out alike; the reward model has no rows for them."""
        batching = {"transformers_continuous_batching_config": SMALL_CACHE} if continuous else {}
        trainer = make_trainer(
            lora(policy) if kind == "lora" else policy,
            use_transformers_continuous_batching=continuous,
            reward=make_scorer(),
            ptx_coef=0.1,
            per_device_train_batch_size=16,
            **batching,
        )
        seen = []
        rollout = trainer.rollout
        trainer.rollout = lambda inputs: seen.append(rollout(inputs)) or seen[-1]
        trainer.train()
        assert int(seen[0].tokens.completion_ids.max()) < 64 and seen[0].logps.isfinite().all()
        record = trainer.state.log_history[0]
        assert record["policy/ratio"] == pytest.approx(1.0, abs=1e-4) and 0 < record["loss/ptx"] < 10
        assert record["objective/kl"] == pytest.approx(0.0, abs=1e-4)

    def test_their_probability_is_0(self, make_trainer, policy, make_policy):
        """In log-probabilities and entropy, of a reference with other rows too."""
        other = make_policy(seed=3, vocab_size=80)
        trainer = make_trainer(policy, ref_model=other)
        ids = torch.tensor([[3, 4, 5, 6, 7, 1]])
        mask = torch.ones_like(ids)
        output = trainer.actor_critic(ids, mask, 4, with_entropy=True)
        for model, actual in ((policy, output.logps), (other, trainer.actor_critic.log_probs(other, ids, mask, 4)[0])):
            expected = model(ids).logits[:, 1:-1, :64].log_softmax(-1)
            torch.testing.assert_close(actual[0], expected[0, torch.arange(4), ids[0, 2:]])
        probabilities = policy(ids).logits[:, 1:-1, :64].softmax(-1)
        torch.testing.assert_close(output.entropy, -(probabilities * probabilities.log()).sum(-1))

    def test_vllm_is_told(self, make_trainer, policy, vllm):
        engine = make_trainer(policy, use_vllm=True).vllm_generation
        assert engine.generation_kwargs["logit_bias"] == dict.fromkeys(range(64, 72), -100.0)

    @pytest.mark.parametrize("role", ["reward model", "value model", "KL reference"])
    def test_a_model_with_fewer_rows_than_the_tokenizer(self, make_trainer, make_policy, make_scorer, role):
        """A policy gets the rows that it lacks, as when it is loaded by its name."""
        small = {"vocab_size": 60}
        models = {
            "reward model": lambda: {"reward": make_scorer(**small)},
            "value model": lambda: {"value_model": make_scorer(**small)},
            "KL reference": lambda: {"ref_model": make_policy(**small)},
        }
        with pytest.raises(InstructGPTError, match=f"{role}: has embeddings for 60 token ids, and .* reads has 64"):
            make_trainer(**models[role]())
