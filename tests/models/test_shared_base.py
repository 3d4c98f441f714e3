"""Four roles as adapters on one base against four separate models."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

from instructgpt_hf._compat.quirks import disable_dropout
from instructgpt_hf.models.actor_critic import ActorCritic
from instructgpt_hf.models.adapters import REWARD_ADAPTER, VALUE_ADAPTER, using_adapter
from instructgpt_hf.models.loading import count_parameters, keep_half, load_policy
from instructgpt_hf.models.reward_model import AdapterScorer, create_reward_model, load_reward_model, save_reward_model
from instructgpt_hf.models.scoring import sequence_scores, token_scores
from instructgpt_hf.models.shared_base import (
    base_of,
    load_another_reward_model,
    load_scorers,
    sharing_refusal,
)

IDS = torch.tensor([[0, 5, 6, 7, 8, 1], [9, 10, 11, 12, 1, 0]])
MASK = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
LENGTH = 3
NF4 = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def quantized(on):
    return {"quantization_config": BitsAndBytesConfig(**NF4), "device_map": {"": "cpu"}} if on else {}


def randomise(model, seed):
    """Adapters start without effect; give every one of their weights a value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, item in model.named_parameters():
            if "lora_" in name:
                item.copy_(0.3 * torch.randn(item.shape, generator=generator))


@pytest.fixture
def folders(make_policy, tokenizer, tmp_path):
    """A base, an SFT adapter and a reward adapter on it; `build(four_bit)` makes them."""

    def build(four_bit=False, architecture="llama"):
        base = tmp_path / "base"
        sizes = {"hidden_size": 64} if four_bit else {}
        make_policy(architecture, **sizes).save_pretrained(base)
        tokenizer.save_pretrained(base)
        options = quantized(four_bit)
        adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        policy = load_policy(base, tokenizer, peft_config=adapter, **options)
        randomise(policy, 1)
        policy.save_pretrained(tmp_path / "sft")
        tokenizer.save_pretrained(tmp_path / "sft")
        reward = create_reward_model(tmp_path / "sft", tokenizer, seed=0, **options)
        randomise(reward, 2)
        reward.base_model.model.config.reward_shift = 0.75
        save_reward_model(reward, tmp_path / "reward")
        return tmp_path / "sft", tmp_path / "reward"

    return build


def shared_roles(sft, reward_folder, tokenizer, **options):
    policy = load_policy(sft, tokenizer, **options)
    return policy, *load_scorers(policy, reward_folder, **options)


def log_probs(model):
    positions = (MASK.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=IDS, attention_mask=MASK, position_ids=positions).logits
    return logits[:, -LENGTH - 1 : -1].log_softmax(-1).gather(2, IDS[:, -LENGTH:, None]).squeeze(2)


@pytest.mark.parametrize("four_bit", [False, True], ids=["float32", "nf4"])
def test_roles_on_one_base_compute_what_separate_models_compute(folders, tokenizer, four_bit):
    sft, reward_folder = folders(four_bit)
    policy, reward, value = shared_roles(sft, reward_folder, tokenizer, **quantized(four_bit))
    assert reward.host is policy and value.host is policy
    separate = load_reward_model(reward_folder, **quantized(four_bit))
    with torch.no_grad():
        expected = token_scores(separate, IDS, MASK)
        for scorer in (reward, value):
            torch.testing.assert_close(token_scores(scorer, IDS, MASK), expected)
        torch.testing.assert_close(sequence_scores(reward, IDS, MASK), sequence_scores(separate, IDS, MASK))
        alone = load_policy(sft, tokenizer, **quantized(four_bit))
        torch.testing.assert_close(log_probs(policy), log_probs(alone))
    # The reward adapter differs from the policy's, or equality would show nothing.
    with torch.no_grad(), using_adapter(policy, REWARD_ADAPTER):
        assert (log_probs(policy) - log_probs(alone)).abs().max() > 0.1


@pytest.mark.parametrize(
    ("architecture", "four_bit"),
    [(name, False) for name in ("llama", "qwen3", "gemma3_text", "gpt2", "gpt_neox", "opt")] + [("llama", True)],
)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_gradients_are_those_of_separate_models(folders, tokenizer, checkpointing, architecture, four_bit):
    """Also when the backward pass recomputes activations, and when it runs under another adapter than the forward."""
    sft, reward_folder = folders(four_bit, architecture)
    options = quantized(four_bit)
    policy, reward, value = shared_roles(sft, reward_folder, tokenizer, **options)
    model = ActorCritic(policy, value).train()
    disable_dropout(policy)
    if checkpointing:
        model.activation_checkpointing_enable()
        assert policy.is_gradient_checkpointing
    output = model(IDS, MASK, LENGTH)
    loss = (output.logps * MASK[:, -LENGTH:]).sum() + (output.values**2 * MASK[:, -LENGTH:]).sum()
    with using_adapter(policy, REWARD_ADAPTER):
        loss.backward()

    alone = load_policy(sft, tokenizer, **options).train()
    critic = load_reward_model(reward_folder, trainable=True, **options).train()
    for separate in (alone, critic):
        disable_dropout(separate)
    other = ActorCritic(alone, critic)
    expected = other(IDS, MASK, LENGTH)
    ((expected.logps * MASK[:, -LENGTH:]).sum() + (expected.values**2 * MASK[:, -LENGTH:]).sum()).backward()
    gradients = {name: item.grad for name, item in alone.named_parameters() if item.requires_grad}
    values = {name: item.grad for name, item in critic.named_parameters() if item.requires_grad}
    assert len(model.role_parameters("policy")) == len(gradients)
    assert len(model.role_parameters("value_model")) == len(values)
    for name, item in policy.named_parameters():
        if ".default." in name:
            torch.testing.assert_close(item.grad, gradients[name], rtol=1e-4, atol=1e-5)
        elif f".{VALUE_ADAPTER}." in name:
            twin = values[name.replace(VALUE_ADAPTER, "default")]
            torch.testing.assert_close(item.grad, twin, rtol=1e-4, atol=1e-5)
        else:
            assert item.grad is None, name
    head = next(item for name, item in values.items() if "score" in name)
    torch.testing.assert_close(value.score.weight.grad, head, rtol=1e-4, atol=1e-5)
    assert reward.score.weight.grad is None


def test_reentrant_checkpointing_of_a_shared_base_is_refused(folders, tokenizer):
    policy, _, value = shared_roles(*folders(), tokenizer)
    with pytest.raises(ValueError, match="use_reentrant=True gives wrong gradients"):
        ActorCritic(policy, value).gradient_checkpointing_enable({"use_reentrant": True})


def test_switching_adapters_changes_nothing_that_is_trained(folders, tokenizer):
    policy, _, _ = shared_roles(*folders(), tokenizer)
    before = {name: item.requires_grad for name, item in policy.named_parameters()}
    with using_adapter(policy, VALUE_ADAPTER), using_adapter(policy, None):
        assert {name: item.requires_grad for name, item in policy.named_parameters()} == before
        with torch.no_grad(), policy.disable_adapter():
            base = log_probs(policy)
    with torch.no_grad(), using_adapter(policy, None):
        torch.testing.assert_close(log_probs(policy), base)
    with (
        pytest.raises(ValueError, match="No adapter 'critic'; the model has 'default'"),
        using_adapter(policy, "critic"),
    ):
        pass


def test_a_value_model_of_a_shared_base_is_saved_as_one_of_its_own(folders, tokenizer, tmp_path):
    sft, reward_folder = folders()
    policy, reward, value = shared_roles(sft, reward_folder, tokenizer)
    assert count_parameters(policy) == count_parameters(load_policy(sft, tokenizer))
    with torch.no_grad():
        value.score.weight.add_(0.5)
        for name, item in value.named_parameters():
            if "lora_B" in name:
                item.add_(0.1)
        expected = sequence_scores(value, IDS, MASK)
        assert (sequence_scores(reward, IDS, MASK) - expected).abs().min() > 1e-3, "the reward model must not move"
    save_reward_model(value, tmp_path / "value")
    with torch.no_grad():
        torch.testing.assert_close(sequence_scores(load_reward_model(tmp_path / "value"), IDS, MASK), expected)
        base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1, pad_token_id=0)
        plain = PeftModel.from_pretrained(base, tmp_path / "value")
        row = IDS[:1, 1:]
        torch.testing.assert_close(plain(input_ids=row).logits[:, 0] - 0.75, expected[:1])


def test_another_base_is_shared_by_reward_and_value_model(folders, tokenizer, make_policy, tmp_path):
    _, reward_folder = folders()
    make_policy(seed=5).save_pretrained(tmp_path / "other")
    policy = load_policy(tmp_path / "other", tokenizer, peft_config=LoraConfig(r=4, task_type="CAUSAL_LM"))
    assert sharing_refusal(*base_of(policy), reward_folder) == "the adapters have different base models"
    reward, value = load_scorers(policy, reward_folder)
    assert reward.host is value.host and reward.host is not policy
    expected = token_scores(load_reward_model(reward_folder), IDS, MASK).detach()
    for scorer in (reward, value):
        torch.testing.assert_close(token_scores(scorer, IDS, MASK).detach(), expected)
    model = ActorCritic(policy, value)
    names = model.role_parameters("value_model")
    assert names and all(VALUE_ADAPTER in name or "score" in name for name in names)
    assert not any(REWARD_ADAPTER in name for name in names)


@pytest.mark.parametrize("four_bit", [False, True], ids=["float32", "nf4"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_gradients_on_a_second_base_of_another_size(
    folders, tokenizer, make_policy, tmp_path, checkpointing, four_bit
):
    """Also after the reward model has scored: on some CPUs an evaluation repacks 4-bit weights for good."""
    sft, _ = folders(four_bit)
    options = quantized(four_bit)
    larger = make_policy(hidden_size=128, intermediate_size=128, num_hidden_layers=3, seed=7)
    larger.save_pretrained(tmp_path / "larger")
    tokenizer.save_pretrained(tmp_path / "larger")
    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    start = load_policy(tmp_path / "larger", tokenizer, peft_config=adapter, **options)
    randomise(start, 3)
    start.save_pretrained(tmp_path / "larger-sft")
    scorer = create_reward_model(tmp_path / "larger-sft", tokenizer, seed=0, **options)
    randomise(scorer, 4)
    save_reward_model(scorer, tmp_path / "larger-reward")

    policy, reward, value = shared_roles(sft, tmp_path / "larger-reward", tokenizer, **options)
    assert value.host is reward.host and value.host is not policy
    model = ActorCritic(policy, value).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    with torch.no_grad():
        sequence_scores(reward, IDS, MASK)
    (model(IDS, MASK, LENGTH, role="value_model").values ** 2 * MASK[:, -LENGTH:]).sum().backward()

    critic = load_reward_model(tmp_path / "larger-reward", trainable=True, **options).train()
    other = ActorCritic(load_policy(sft, tokenizer, **options), critic)
    (other(IDS, MASK, LENGTH, role="value_model").values ** 2 * MASK[:, -LENGTH:]).sum().backward()
    expected = {name: item.grad for name, item in critic.named_parameters() if item.requires_grad}
    found = dict(value.host.named_parameters())
    compared = [name for name in expected if "lora_" in name]
    assert len(compared) == 2 * 3 * 7
    for name in compared:
        twin = found[name.replace(".default.", f".{VALUE_ADAPTER}.")]
        torch.testing.assert_close(twin.grad, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("four_bit", [False, True], ids=["float32", "nf4"])
def test_further_reward_models_use_the_same_base(folders, tokenizer, tmp_path, four_bit):
    sft, first = folders(four_bit)
    options = quantized(four_bit)
    others = [tmp_path / "harmless", tmp_path / "honest"]
    for seed, folder in enumerate(others, start=3):
        model = create_reward_model(sft, tokenizer, seed=seed, **options)
        randomise(model, seed)
        model.base_model.model.config.reward_shift = float(seed)
        save_reward_model(model, folder)
    policy, reward, value = shared_roles(sft, first, tokenizer, **options)
    trained = {name for name, item in policy.named_parameters() if item.requires_grad}
    further = [load_another_reward_model(policy, value, folder, **options) for folder in others]
    assert all(item.host is policy and not item.training for item in further)
    assert {name for name, item in policy.named_parameters() if item.requires_grad} == trained
    with torch.no_grad():
        for model, folder in zip([reward, value, *further], [first, first, *others], strict=True):
            separate = load_reward_model(folder, **options)
            torch.testing.assert_close(token_scores(model, IDS, MASK), token_scores(separate, IDS, MASK))
            torch.testing.assert_close(sequence_scores(model, IDS, MASK), sequence_scores(separate, IDS, MASK))
        torch.testing.assert_close(log_probs(policy), log_probs(load_policy(sft, tokenizer, **options)))
    model = ActorCritic(policy, value)
    own = {name for role in ("policy", "value_model") for name in model.role_parameters(role)}
    assert not any("reward_model" in name for name in own)
    assert count_parameters(policy) == count_parameters(load_policy(sft, tokenizer, **options))


def test_a_further_reward_model_uses_the_base_of_the_first_one(folders, tokenizer, make_policy, tmp_path):
    _, reward_folder = folders()
    make_policy(seed=5).save_pretrained(tmp_path / "other_base")
    tokenizer.save_pretrained(tmp_path / "other_base")
    policy = load_policy(tmp_path / "other_base", tokenizer, peft_config=LoraConfig(r=4, target_modules="all-linear"))
    reward, value = load_scorers(policy, reward_folder)
    further = load_another_reward_model(policy, value, reward_folder)
    assert further.host is value.host is reward.host is not policy
    with torch.no_grad():
        torch.testing.assert_close(token_scores(further, IDS, MASK), token_scores(reward, IDS, MASK))


def test_tokens_of_its_own_keep_a_further_reward_model_apart(folders, tokenizer, tmp_path):
    sft, reward_folder = folders()
    policy, _, value = shared_roles(sft, reward_folder, tokenizer)
    wider = type(tokenizer)(
        tokenizer_object=type(tokenizer._tokenizer).from_str(tokenizer._tokenizer.to_str()),
        pad_token="<pad>",
        eos_token="<eos>",
    )
    wider.add_tokens(["<one>", "<two>"])
    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS")
    own = create_reward_model(tmp_path / "base", wider, seed=3, peft_config=adapter)
    save_reward_model(own, tmp_path / "wider")
    further = load_another_reward_model(policy, value, tmp_path / "wider")
    assert not isinstance(further, AdapterScorer)
    ids = torch.tensor([[5, len(tokenizer), len(tokenizer) + 1, 1]])
    assert sequence_scores(further, ids, torch.ones_like(ids)).isfinite().all()
    assert "more tokens than the base has embeddings" in sharing_refusal(*base_of(policy), tmp_path / "wider")


def test_a_frozen_role_has_no_dropout_while_its_base_trains(folders, tokenizer, tmp_path):
    sft, _ = folders()
    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS", lora_dropout=0.5)
    model = create_reward_model(tmp_path / "base", tokenizer, seed=0, peft_config=adapter)
    randomise(model, 2)
    save_reward_model(model, tmp_path / "dropped")
    policy, reward, value = shared_roles(sft, tmp_path / "dropped", tokenizer)
    further = load_another_reward_model(policy, value, tmp_path / "dropped")
    policy.train()
    value.train()
    with torch.no_grad():
        for model in (reward, further):
            assert torch.equal(token_scores(model, IDS, MASK), token_scores(model, IDS, MASK))
            assert policy.training
        assert not torch.equal(token_scores(value, IDS, MASK), token_scores(value, IDS, MASK))


def test_a_further_whole_reward_model_is_one_of_its_own(folders, tokenizer, make_scorer, tmp_path):
    sft, reward_folder = folders()
    save_reward_model(make_scorer(), tmp_path / "whole")
    policy, _, value = shared_roles(sft, reward_folder, tokenizer)
    further = load_another_reward_model(policy, value, tmp_path / "whole")
    assert not isinstance(further, AdapterScorer)
    assert not any(item.requires_grad for item in further.parameters())


def test_another_precision_is_not_shared(folders, tokenizer):
    sft, reward_folder = folders(four_bit=True)
    full = load_policy(sft, tokenizer)
    assert (
        sharing_refusal(*base_of(full), reward_folder) == "the reward model was trained on a base of another precision"
    )


def test_a_whole_reward_model_and_a_value_adapter_share_its_weights(make_scorer, tokenizer, make_policy, tmp_path):
    model = make_scorer()
    model.config.reward_shift = 0.25
    save_reward_model(model, tmp_path / "reward")
    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS")
    reward, value = load_scorers(make_policy(), tmp_path / "reward", peft_config=adapter)
    assert isinstance(reward, AdapterScorer) and reward.host is value.host
    expected = token_scores(load_reward_model(tmp_path / "reward"), IDS, MASK).detach()
    randomise(value.host, 3)
    torch.testing.assert_close(token_scores(reward, IDS, MASK).detach(), expected)
    own = token_scores(value, IDS, MASK).detach()
    assert (own - expected).abs().max() > 0.01
    save_reward_model(value, tmp_path / "value")
    torch.testing.assert_close(token_scores(load_reward_model(tmp_path / "value"), IDS, MASK).detach(), own)


def test_whole_models_stay_apart(make_scorer, make_policy, tmp_path):
    save_reward_model(make_scorer(), tmp_path / "reward")
    reward, value = load_scorers(make_policy(), tmp_path / "reward")
    assert not any(item.requires_grad for item in reward.parameters())
    assert all(item.requires_grad for item in value.parameters())


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_change_nothing_under_autocast(make_policy, make_scorer, architecture, dtype):
    for model in (make_policy(architecture), make_scorer(architecture)):
        model.eval()
        half = copy.deepcopy(model)
        loaded = [item.data for item in half.parameters()]
        keep_half(half, dtype)
        assert any(item.dtype == dtype for item in half.parameters())
        kept = {item.data_ptr() for item in loaded} & {item.data_ptr() for item in half.parameters()}
        assert not kept, "one weight as it was loaded would keep the whole file mapped"
        with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
            expected, found = (item(IDS, attention_mask=MASK).logits for item in (model, half))
        assert torch.equal(expected, found)
