"""The reward model: its head, its scores by every way of reading them, and its saved form, whole and as an adapter."""

import copy
import math
import re
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, LoraConfig
from transformers import AutoModelForSequenceClassification

from instructgpt_hf._compat.peft import unwrap_peft
from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.models.inputs import last_token_index, position_ids
from instructgpt_hf.models.loading import load_policy, load_tokenizer
from instructgpt_hf.models.reward_model import create_reward_model, load_reward_model, save_reward_model
from instructgpt_hf.models.scoring import reward_shift, score_token_lists, sequence_scores, token_scores

ARCHITECTURES = ["llama", "gpt2", "gpt_neox"]
REWARD_PAGE = Path(__file__).parents[2] / "docs" / "reward.md"
SEQUENCES = [[5, 6, 7, 1], [8, 9, 10, 11, 12, 13, 1], [14, 1], [5, 6, 20, 21, 1]]


def padded(sequences, side="right", pad=0):
    width = max(map(len, sequences))
    fill = [[pad] * (width - len(ids)) for ids in sequences]
    rows = [ids + more if side == "right" else more + ids for ids, more in zip(sequences, fill, strict=True)]
    ones = [
        [1] * len(ids) + [0] * len(more) if side == "right" else [0] * len(more) + [1] * len(ids)
        for ids, more in zip(sequences, fill, strict=True)
    ]
    return torch.tensor(rows), torch.tensor(ones)


def alone(model, ids):
    """Score of one sequence without padding, by transformers' own forward pass."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, 0].item()


@pytest.fixture
def sft(tmp_path, make_policy, tokenizer):
    """A saved SFT model of an architecture, whole or as an adapter with non-trivial weights."""

    def build(architecture="llama", adapter=False, **changes):
        folder = tmp_path / "sft"
        policy = make_policy(architecture, **changes)
        if adapter:
            policy.save_pretrained(tmp_path / "base")
            tokenizer.save_pretrained(tmp_path / "base")
            policy = load_policy(tmp_path / "base", tokenizer, peft_config=lora())
            _randomize(policy)
        policy.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return build


def lora(task_type="CAUSAL_LM"):
    return LoraConfig(task_type=task_type, r=4, lora_alpha=8, target_modules="all-linear")


def _randomize(model):
    for name, item in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(item, std=0.1)


def hidden_states(model, ids):
    inner = unwrap_peft(model).eval()
    with torch.no_grad():
        return getattr(inner, inner.base_model_prefix)(torch.tensor([ids])).last_hidden_state


class TestHead:
    def test_variance_is_one_over_d_plus_one(self, sft, tokenizer):
        """Over many seeds the weights pass for draws of N(0, 1/(d+1)): mean, variance and share within one sigma.

        1/(d+1) and 1/d differ by 3 % here and the standard error of the variance is 0.4 %, so they are told apart.
        """
        folder, weights = sft(num_hidden_layers=1), []
        model = create_reward_model(folder, tokenizer, seed=0)
        width = model.config.hidden_size
        from instructgpt_hf.models import reward_model

        for seed in range(4000):
            reward_model.init_head(model, seed)
            weights.append(model.score.weight.detach().clone())
        drawn = torch.cat(weights).flatten() * math.sqrt(width + 1)
        count = drawn.numel()
        assert abs(drawn.mean()) < 5 / math.sqrt(count)
        assert abs(drawn.var() - 1) < 4 * math.sqrt(2 / count)
        assert abs((drawn.abs() < 1).float().mean() - 0.6827) < 5 * math.sqrt(0.6827 * 0.3173 / count)
        assert len({tuple(weight.flatten().tolist()) for weight in weights}) == 4000

    def test_scale_is_exact(self, sft, tokenizer):
        """The weight times sqrt(d+1) is what the seed's generator draws from N(0, 1)."""
        model = create_reward_model(sft(), tokenizer, seed=7)
        expected = torch.randn(1, 32, generator=torch.Generator().manual_seed(7))
        torch.testing.assert_close(model.score.weight.detach() * 33**0.5, expected)

    def test_seed_decides_not_the_global_state(self, sft, tokenizer):
        folder = sft()
        first = create_reward_model(folder, tokenizer, seed=3).score.weight
        torch.randn(5)
        assert torch.equal(first, create_reward_model(folder, tokenizer, seed=3).score.weight)
        assert not torch.equal(first, create_reward_model(folder, tokenizer, seed=4).score.weight)

    def test_no_bias_and_no_dropout(self, sft, tokenizer):
        model = create_reward_model(sft(), tokenizer, seed=0)
        assert model.score.bias is None and model.score.weight.shape == (1, 32)
        assert not any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules())

    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_body_is_the_sft_model(self, sft, tokenizer, architecture):
        folder = sft(architecture)
        policy = load_policy(folder, tokenizer)
        model = create_reward_model(folder, tokenizer, seed=0)
        assert torch.equal(hidden_states(model, SEQUENCES[1]), hidden_states(policy, SEQUENCES[1]))
        assert all(item.requires_grad for item in model.parameters())
        assert reward_shift(model) == 0.0

    def test_padding_id_is_the_tokenizers(self, sft, tokenizer):
        model = create_reward_model(sft(pad_token_id=1), tokenizer, seed=0)
        assert model.config.pad_token_id == 0 and model.config.eos_token_id == 1

    def test_architecture_without_a_classifier(self, tmp_path, tokenizer):
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(
            "codegen", vocab_size=64, n_embd=32, n_layer=1, n_head=4, rotary_dim=4, n_positions=32, n_ctx=32
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
        with pytest.raises(InstructGPTError, match="transformers has no sequence classifier for this architecture"):
            create_reward_model(tmp_path, tokenizer, seed=0)

    def test_architecture_with_another_head(self, tmp_path, tokenizer):
        from transformers import BertConfig

        sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
        AutoModelForSequenceClassification.from_config(BertConfig(num_labels=1, **sizes)).save_pretrained(tmp_path)
        with pytest.raises(InstructGPTError, match="BertForSequenceClassification has no plain scalar `score` head"):
            create_reward_model(tmp_path, tokenizer, seed=0)


class TestScores:
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    @pytest.mark.parametrize("side", ["right", "left"])
    def test_padding_does_not_matter(self, make_scorer, architecture, side):
        model = make_scorer(architecture).eval()
        ids, mask = padded(SEQUENCES, side)
        with torch.no_grad():
            found = sequence_scores(model, ids, mask)
        expected = torch.tensor([alone(model, item) for item in SEQUENCES])
        torch.testing.assert_close(found, expected)
        with torch.no_grad():
            wider = sequence_scores(model, *padded([*SEQUENCES, list(range(30, 60))], side))
        torch.testing.assert_close(wider[:-1], expected)

    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_equal_to_transformers_on_the_same_batch(self, make_scorer, architecture):
        model = make_scorer(architecture).eval()
        ids, mask = padded(SEQUENCES)
        with torch.no_grad():
            plain = model(input_ids=ids, attention_mask=mask).logits.squeeze(-1)
            torch.testing.assert_close(sequence_scores(model, ids, mask), plain)

    def test_equal_to_transformers_with_left_padding(self, make_scorer):
        model = make_scorer().eval()
        ids, mask = padded(SEQUENCES, "left")
        with torch.no_grad():
            plain = model(input_ids=ids, attention_mask=mask).logits.squeeze(-1)
            torch.testing.assert_close(sequence_scores(model, ids, mask), plain)

    def test_score_is_read_at_eos(self, make_scorer):
        """With padding equal to EOS transformers reads one token early; the mask finds EOS all the same."""
        model = make_scorer().eval()
        ids, mask = padded(SEQUENCES, pad=1)
        with torch.no_grad():
            found = sequence_scores(model, ids, mask)
        torch.testing.assert_close(found, torch.tensor([alone(model, item) for item in SEQUENCES]))
        model.config.pad_token_id = 1
        with torch.no_grad():
            early = model(input_ids=ids, attention_mask=mask).logits.squeeze(-1)
        torch.testing.assert_close(early, torch.tensor([alone(model, item[:-1]) for item in SEQUENCES]))

    def test_shift_is_subtracted_everywhere(self, make_scorer):
        model = make_scorer().eval()
        ids, mask = padded(SEQUENCES)
        with torch.no_grad():
            raw, tokens = sequence_scores(model, ids, mask), token_scores(model, ids, mask)
            model.config.reward_shift = 1.25
            torch.testing.assert_close(sequence_scores(model, ids, mask), raw - 1.25)
            torch.testing.assert_close(token_scores(model, ids, mask), tokens - 1.25)
        torch.testing.assert_close(torch.tensor(score_token_lists(model, SEQUENCES, 0, 2)), raw - 1.25)

    def test_token_scores_are_the_scores_of_prefixes(self, make_scorer):
        model = make_scorer().eval()
        ids = SEQUENCES[1]
        with torch.no_grad():
            found = token_scores(model, *padded([ids]))[0]
        expected = torch.tensor([alone(model, ids[: end + 1]) for end in range(len(ids))])
        torch.testing.assert_close(found, expected)

    @pytest.mark.parametrize("batch_size", [1, 3, 10])
    def test_lists_come_back_in_order(self, make_scorer, batch_size):
        model = make_scorer().train()
        found = score_token_lists(model, SEQUENCES, 0, batch_size)
        assert model.training
        assert found == pytest.approx([alone(model.eval(), item) for item in SEQUENCES], abs=1e-5)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_half_precision_does_not_round_scores(self, sft, tokenizer, dtype):
        """Scores around 8 stay apart by less than a step of the model's dtype there, as in double precision."""
        model = create_reward_model(sft(), tokenizer, seed=0, dtype=dtype).eval()
        with torch.no_grad():
            model.score.weight.mul_(20)
        states = [hidden_states(model, ids)[0, -1] for ids in SEQUENCES]
        exact = [(model.score.weight.double() @ state.double()).item() for state in states]
        assert [alone(model, ids) for ids in SEQUENCES] == pytest.approx(exact, rel=1e-6)
        ids, mask = padded(SEQUENCES[:1])
        for autocast in (False, True):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast and dtype == torch.bfloat16):
                assert sequence_scores(model, ids, mask).item() == pytest.approx(exact[0], rel=1e-6)
                assert model(input_ids=ids).logits.item() == pytest.approx(exact[0], rel=1e-6)
        rounded = torch.tensor(exact).to(dtype).double()
        assert (rounded - torch.tensor(exact).double()).abs().max() > 1e-4

    def test_positions_and_last_tokens(self):
        mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]])
        assert position_ids(mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 2], [0, 1, 2, 3]]
        assert last_token_index(mask).tolist() == [3, 2, 3]


class TestSaved:
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_plain_transformers_gives_the_same_scores(self, sft, tokenizer, tmp_path, architecture):
        model = create_reward_model(sft(architecture), tokenizer, seed=0).eval()
        model.config.reward_shift = 0.75
        model.save_pretrained(tmp_path / "reward")
        ids, mask = padded(SEQUENCES)
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").eval()
        ours = load_reward_model(tmp_path / "reward")
        with torch.no_grad():
            raw = plain(input_ids=ids, attention_mask=mask).logits.squeeze(-1)
            torch.testing.assert_close(raw - plain.config.reward_shift, sequence_scores(ours, ids, mask))
            torch.testing.assert_close(raw - 0.75, sequence_scores(model, ids, mask))
        assert plain.config.num_labels == 1 and reward_shift(ours) == 0.75

    @pytest.mark.parametrize("trainable", [True, False])
    def test_frozen_unless_trainable(self, make_scorer, tmp_path, trainable):
        make_scorer().save_pretrained(tmp_path)
        model = load_reward_model(tmp_path, trainable=trainable)
        assert not model.training
        assert all(item.requires_grad == trainable for item in model.parameters())

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda folder: (folder / "model.safetensors").unlink(), "cannot be loaded with one score"),
            (lambda folder: (folder / "config.json").unlink(), "transformers has no sequence classifier"),
        ],
        ids=["no weights", "no config"],
    )
    def test_incomplete(self, make_scorer, tmp_path, damage, message):
        make_scorer().save_pretrained(tmp_path)
        damage(tmp_path)
        with pytest.raises(InstructGPTError, match=message):
            load_reward_model(tmp_path)

    def test_classifier_of_several_labels(self, make_scorer, tmp_path):
        config = copy.deepcopy(make_scorer().config)
        config.num_labels = 3
        AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
        with pytest.raises(InstructGPTError, match="cannot be loaded with one score"):
            load_reward_model(tmp_path)

    def test_missing(self, tmp_path):
        with pytest.raises(InstructGPTError, match=r"reward model: .*no such folder"):
            load_reward_model(tmp_path / "missing")


class TestAdapter:
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_starts_with_the_sft_adapter(self, sft, tokenizer, architecture):
        """The reward adapter is a copy of the SFT adapter, so hidden states agree; the base alone gives others."""
        folder = sft(architecture, adapter=True)
        policy = load_policy(folder, tokenizer)
        model = create_reward_model(folder, tokenizer, seed=7)
        expected = hidden_states(policy, SEQUENCES[1])
        assert torch.equal(hidden_states(model, SEQUENCES[1]), expected)
        with policy.disable_adapter():
            assert not torch.allclose(hidden_states(policy, SEQUENCES[1]), expected, atol=1e-3)
        head = torch.randn(1, 32, generator=torch.Generator().manual_seed(7)) / 33**0.5
        torch.testing.assert_close(_head(model).weight.detach(), head)
        trainable = {name for name, item in model.named_parameters() if item.requires_grad}
        assert all("lora_" in name or "modules_to_save" in name for name in trainable)
        assert sum("modules_to_save" in name for name in trainable) == 1

    @pytest.mark.parametrize("fresh", [False, True], ids=["from an SFT adapter", "on a whole SFT model"])
    def test_trained_head_and_adapter_survive_saving(self, sft, tokenizer, tmp_path, fresh):
        folder = sft(adapter=not fresh)
        model = create_reward_model(folder, tokenizer, seed=0, peft_config=lora("SEQ_CLS") if fresh else None)
        started = torch.tensor(score_token_lists(model, SEQUENCES, 0, 4))
        _train(model)
        trained = torch.tensor(score_token_lists(model, SEQUENCES, 0, 4))
        assert (trained - started).abs().min() > 1e-3
        _write(model, tokenizer, tmp_path / "reward", shift=0.5)
        again = load_reward_model(tmp_path / "reward")
        assert reward_shift(again) == 0.5
        torch.testing.assert_close(torch.tensor(score_token_lists(again, SEQUENCES, 0, 4)), trained - 0.5)
        assert not any(item.requires_grad for item in again.parameters())
        value_model = load_reward_model(tmp_path / "reward", trainable=True)
        trainable = {name for name, item in value_model.named_parameters() if item.requires_grad}
        assert {name for name, item in model.named_parameters() if item.requires_grad} == trainable

    def test_peft_gives_the_same_raw_scores(self, sft, tokenizer, tmp_path):
        model = create_reward_model(sft(adapter=True), tokenizer, seed=0)
        _train(model)
        _write(model, tokenizer, tmp_path / "reward", shift=0.5)
        plain = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "reward", num_labels=1).eval()
        ours = score_token_lists(model, SEQUENCES, 0, 4)
        assert [alone(plain, ids) - 0.5 for ids in SEQUENCES] == pytest.approx(ours, abs=1e-5)

    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_plain_transformers_loads_the_adapter_folder(self, sft, tokenizer, tmp_path, architecture):
        """Head, adapter and padding token survive, in a batch too; the shift stands in `classifier/config.json`."""
        from transformers import AutoConfig

        model = create_reward_model(sft(architecture, adapter=True), tokenizer, seed=0)
        _train(model)
        _write(model, tokenizer, tmp_path / "reward", shift=0.5)
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward", num_labels=1).eval()
        shift = AutoConfig.from_pretrained(tmp_path / "reward", subfolder="classifier").reward_shift
        ids, mask = padded(SEQUENCES)
        with torch.no_grad():
            raw = plain(input_ids=ids, attention_mask=mask).logits.squeeze(-1)
        torch.testing.assert_close(raw - shift, torch.tensor(score_token_lists(model, SEQUENCES, 0, 4)))

    def test_plain_transformers_reads_the_padding_token_of_the_adapter(self, sft, tokenizer, tmp_path):
        """The base pads with EOS, so its own config would read one token early."""
        from transformers import AutoConfig

        model = create_reward_model(sft(adapter=True, pad_token_id=1), tokenizer, seed=0)
        _write(model, tokenizer, tmp_path / "reward", shift=0.5)
        config = AutoConfig.from_pretrained(tmp_path / "reward", subfolder="classifier")
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward", config=config).eval()
        ids, mask = padded(SEQUENCES)
        with torch.no_grad():
            found = plain(input_ids=ids, attention_mask=mask).logits.squeeze(-1)
        torch.testing.assert_close(found, torch.tensor([alone(model.eval(), item) for item in SEQUENCES]))
        assert config.architectures == ["LlamaForSequenceClassification"]

    def test_base_whose_padding_is_eos(self, sft, tokenizer, tmp_path):
        """The base's config says padding = EOS; the adapter's says what the reward model was trained with."""
        model = create_reward_model(sft(adapter=True, pad_token_id=1), tokenizer, seed=0)
        _write(model, tokenizer, tmp_path / "reward", shift=0.0)
        ids, mask = padded(SEQUENCES)
        again = load_reward_model(tmp_path / "reward")
        with torch.no_grad():
            found = again(input_ids=ids, attention_mask=mask).logits.squeeze(-1)
        torch.testing.assert_close(found, torch.tensor([alone(model.eval(), item) for item in SEQUENCES]))

    def test_other_saved_modules_stay(self, make_policy, tokenizer, tmp_path):
        """An SFT adapter that trained the embeddings hands them on with its adapter."""
        make_policy().save_pretrained(tmp_path / "base")
        config = lora()
        config.modules_to_save = ["embed_tokens"]
        policy = load_policy(tmp_path / "base", tokenizer, peft_config=config)
        _randomize(policy)
        with torch.no_grad():
            policy.get_input_embeddings().weight.normal_()
        policy.save_pretrained(tmp_path / "sft")
        tokenizer.save_pretrained(tmp_path / "sft")
        model = create_reward_model(tmp_path / "sft", tokenizer, seed=0)
        assert torch.equal(hidden_states(model, SEQUENCES[1]), hidden_states(policy, SEQUENCES[1]))
        _train(model)
        _write(model, tokenizer, tmp_path / "reward", shift=0.0)
        again = score_token_lists(load_reward_model(tmp_path / "reward"), SEQUENCES, 0, 4)
        assert again == pytest.approx(score_token_lists(model, SEQUENCES, 0, 4), abs=1e-5)

    @pytest.mark.parametrize("architecture", ["llama", "gpt2"])
    def test_base_without_a_padding_token(self, make_policy, tokenizer, tmp_path, architecture):
        """A new padding token has an embedding of its own, which the base lacks; the adapter's scores survive."""
        changed = copy.deepcopy(tokenizer)
        changed.pad_token = None
        vocabulary = changed.get_vocab()
        assert max(vocabulary.values()) == 63
        make_policy(architecture, pad_token_id=None).save_pretrained(tmp_path / "base")
        changed.save_pretrained(tmp_path / "base")
        grown = load_tokenizer(tmp_path / "base")
        grown.add_special_tokens({"pad_token": "<|pad|>"})
        assert grown.pad_token_id == 64
        policy = load_policy(tmp_path / "base", grown, peft_config=lora())
        _randomize(policy)
        policy.save_pretrained(tmp_path / "sft")
        grown.save_pretrained(tmp_path / "sft")
        model = create_reward_model(tmp_path / "sft", load_tokenizer(tmp_path / "sft"), seed=0)
        _train(model)
        _write(model, grown, tmp_path / "reward", shift=0.25)
        again = load_reward_model(tmp_path / "reward")
        expected = pytest.approx(score_token_lists(model, SEQUENCES, 64, 4), abs=1e-5)
        assert score_token_lists(again, SEQUENCES, 64, 4) == expected
        documented = re.search(r"```python\n(from peft import AutoPeftModelForS.*?)```", REWARD_PAGE.read_text(), re.S)
        names = {}
        exec(documented[1].replace("runs/tiny-cpu/reward", str(tmp_path / "reward")), names)
        ids, mask = padded(SEQUENCES, pad=64)
        with torch.no_grad():
            raw = names["reward_model"](input_ids=ids, attention_mask=mask).logits.squeeze(-1)
        assert (raw - names["shift"]).tolist() == expected


def _head(model):
    return next(item for name, item in model.named_modules() if name.endswith("score.modules_to_save.default"))


def _train(model):
    optimizer = torch.optim.Adam([item for item in model.parameters() if item.requires_grad], lr=1e-2)
    for _ in range(3):
        loss = -sequence_scores(model.train(), *padded(SEQUENCES)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _write(model, tokenizer, folder, shift):
    """As the reward stage writes its model."""
    unwrap_peft(model).config.reward_shift = shift
    save_reward_model(model, folder)
    tokenizer.save_pretrained(folder)
