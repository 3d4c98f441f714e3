"""Completions that share a row score, and send gradients back, as each would alone: on every architecture."""

from __future__ import annotations

import copy
import shutil
from types import SimpleNamespace

import pytest
import torch
from helpers.tiny_models import LLAMA, NEOX, SIZES, tiny_config
from peft import LoraConfig, get_peft_model
from torch.nn.attention.flex_attention import BlockMask, create_mask
from transformers import AutoModelForSequenceClassification

from instructgpt_hf.data.rankings.batches import RankingCollator
from instructgpt_hf.models.prefix_sharing import CompletionScorer, attention_masks, shared_prefix_refusal

PAD, EOS = 0, 1
# Prompts and completions longer and shorter than the window of 4 below; four to two completions each.
RANKINGS = [
    {"prompt_ids": [5, 6, 7, 8, 9, 10], "completion_ids": [[11, 12, 13, 1], [14, 1], [15, 16, 17, 18, 19, 1]]},
    {"prompt_ids": [20, 21], "completion_ids": [[22, 1], [1], [23, 24, 25, 1], [26, 27, 1]]},
    {"prompt_ids": [30, 31, 32], "completion_ids": [[33, 34, 35, 36, 37, 38, 39, 1], [40, 1]]},
]
for ranking in RANKINGS:
    ranking["ranks"] = list(range(1, len(ranking["completion_ids"]) + 1))

# Their classifiers have no SDPA; softcapping needs eager attention anyway.
EAGER_ONLY = {"gemma2", "gptj"}
CASES = [(name, "eager") for name in SIZES] + [(name, "sdpa") for name in SIZES if name not in EAGER_ONLY]


def scorer(architecture, attention="sdpa", sizes=None):
    torch.manual_seed(0)
    config = tiny_config(architecture, sizes, num_labels=1)
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():  # the initialisation is too small for attention to matter
        for name, item in model.named_parameters():
            if item.dim() > 1 and "score" not in name:
                item.mul_(4)
    return model


def alone(model):
    """Raw scores by plain forward passes of one sequence."""
    rows = [ranking["prompt_ids"] + ids for ranking in RANKINGS for ids in ranking["completion_ids"]]
    return torch.stack([model(torch.tensor([ids])).logits[0, 0] for ids in rows])


def together(model, hidden_size=10_000, side="right", read=None):
    """The same scores from rows that hold several completions of several prompts."""
    ((batch,),) = RankingCollator(PAD, 10_000, hidden_size, side)(RANKINGS)["forwards"]
    read = read or CompletionScorer(model)
    return read(model, batch)


class TestScores:
    @pytest.mark.parametrize(("architecture", "attention"), CASES)
    def test_equal_to_one_forward_per_completion(self, architecture, attention):
        model = scorer(architecture, attention)
        read = CompletionScorer(model)
        assert shared_prefix_refusal(read, PAD) is None
        with torch.no_grad():
            expected = alone(model)
            for side in ("right", "left"):
                torch.testing.assert_close(together(model, side=side, read=read), expected, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(together(model, None, side, read), expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(("architecture", "attention"), CASES)
    def test_gradients_are_equal(self, architecture, attention):
        model = scorer(architecture, attention)
        other = copy.deepcopy(model)
        weights = torch.linspace(-1, 1, 9)
        (alone(other) * weights).sum().backward()
        (together(model) * weights).sum().backward()
        expected = {name: item.grad for name, item in other.named_parameters()}
        scale = max(item.abs().max() for item in expected.values())
        for name, item in model.named_parameters():
            torch.testing.assert_close(item.grad / scale, expected[name] / scale, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("architecture", ["llama", "gpt2"])
    def test_adapter_and_gradient_checkpointing(self, architecture):
        model = scorer(architecture)
        config = LoraConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear", modules_to_save=["score"])
        model = get_peft_model(model, config)
        with torch.no_grad():
            for name, item in model.named_parameters():
                if "lora_B" in name:
                    item.normal_()
        other = copy.deepcopy(model)
        alone(other).square().sum().backward()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        together(model).square().sum().backward()
        trained = [(name, item) for name, item in model.named_parameters() if item.requires_grad]
        assert any("score" in name for name, _ in trained)
        expected = dict(other.named_parameters())
        for name, item in trained:
            torch.testing.assert_close(item.grad, expected[name].grad, rtol=1e-3, atol=1e-4)

    def test_other_calls_are_left_alone(self):
        model = scorer("llama")
        ids = torch.tensor([[5, 6, 1], [7, 8, 1]])
        before = model(ids).logits
        read = CompletionScorer(model)
        together(model, read=read)
        torch.testing.assert_close(model(ids).logits, before)

    def test_head_stays_in_float32_under_autocast(self):
        """Scores near 100 are half a unit apart in bfloat16."""
        model = scorer("llama")
        with torch.no_grad():
            model.score.weight.mul_(1000)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            ((batch,),) = RankingCollator(PAD, 10_000, 10_000)(RANKINGS)["forwards"]
            found = CompletionScorer(model)(model, batch, torch.bfloat16)
        assert found.dtype == torch.float32
        assert not torch.equal(found, found.bfloat16().float())


@pytest.mark.slow  # compiles its kernel
@pytest.mark.skipif(shutil.which("g++") is None, reason="flex attention on a CPU needs a C++ compiler")
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2", "gemma3_text"])
def test_flex_attention_gives_the_same_scores(architecture):
    with torch.no_grad():
        expected = together(scorer(architecture, "eager"))
        found = together(scorer(architecture, "flex_attention"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def seen(mask):
    """Who sees whom, as numbers [B, L, L], of either form of a mask."""
    if isinstance(mask, BlockMask):
        return create_mask(mask.mask_mod, mask.shape[0], None, *mask.shape[2:], device="cpu")[:, 0].int()
    assert set(mask.unique().tolist()) == {0.0, torch.finfo(torch.float32).min}
    return (mask[:, 0] == 0).int()


@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
class TestMask:
    def test_drawn_by_hand(self, attention):
        """[p p a b b] with one pad, then a row of two blocks: who sees whom."""
        batch = SimpleNamespace(
            position_ids=torch.tensor([[0, 1, 2, 2, 3, 0], [0, 1, 0, 1, 1, 1]]),
            blocks=torch.tensor([[0, 0, 0, 0, 0, -1], [0, 0, 1, 1, 1, 1]]),
            segments=torch.tensor([[0, 0, 1, 2, 2, 0], [0, 1, 0, 1, 2, 3]]),
        )
        mask = attention_masks(scorer("llama", attention=attention), batch, torch.float32)
        assert tuple(mask.shape) == (2, 1, 6, 6)
        assert seen(mask)[0].tolist() == [
            [1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0],
            [1, 1, 0, 1, 0, 0],
            [1, 1, 0, 1, 1, 0],
            [0, 0, 0, 0, 0, 1],
        ]
        assert seen(mask)[1].tolist() == [
            [1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [0, 0, 1, 0, 0, 0],
            [0, 0, 1, 1, 0, 0],
            [0, 0, 1, 0, 1, 0],
            [0, 0, 1, 0, 0, 1],
        ]

    def test_window_counts_positions_not_places(self, attention):
        """[p p p p a b] with a window of 2: b follows the prompt's end as closely as a does."""
        batch = SimpleNamespace(
            position_ids=torch.tensor([[0, 1, 2, 3, 4, 4]]),
            blocks=torch.zeros(1, 6, dtype=torch.long),
            segments=torch.tensor([[0, 0, 0, 0, 1, 2]]),
        )
        sizes = {**SIZES["gemma3_text"], "sliding_window": 2}
        masks = attention_masks(scorer("gemma3_text", sizes=sizes, attention=attention), batch, torch.float32)
        assert seen(masks["sliding_attention"])[0, 4:].tolist() == [[0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 0, 1]]
        assert seen(masks["full_attention"])[0, 4:].tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 1]]


class TestRefusal:
    @pytest.mark.parametrize("architecture", ["bloom", "falcon"])
    def test_architectures_without_positions(self, architecture):
        model = scorer(
            architecture, "eager", NEOX if architecture == "falcon" else dict(hidden_size=32, n_layer=2, n_head=4)
        )
        reason = shared_prefix_refusal(CompletionScorer(model), PAD)
        assert reason == f"{type(model).__name__} cannot be told the positions of its tokens"

    def test_a_model_that_refuses_the_mask(self, monkeypatch):
        model = scorer("llama")

        def forward(*args, attention_mask=None, **kwargs):
            raise ValueError("expected a mask of 2 dimensions")

        monkeypatch.setattr(model.model, "forward", forward)
        assert "refuses a mask with a row for every token (expected a mask" in shared_prefix_refusal(
            CompletionScorer(model), PAD
        )

    def test_layers_that_are_not_attention(self):
        sizes = {**LLAMA, "layer_types": ["linear_attention", "full_attention"], "num_experts": 2}
        model = scorer("qwen3_next", sizes=sizes)
        assert "linear_attention" in shared_prefix_refusal(CompletionScorer(model), PAD)

    def test_attention_without_masks(self):
        model = scorer("llama")
        model.config._attn_implementation = "flash_attention_2"
        reason = shared_prefix_refusal(CompletionScorer(model), PAD)
        assert "'flash_attention_2' is not sdpa or eager or flex_attention" in reason

    def test_flex_attention_cannot_train_on_a_cpu(self):
        reason = shared_prefix_refusal(CompletionScorer(scorer("llama", "flex_attention")), PAD)
        assert reason == "flex_attention has no backward pass on a CPU"

    def test_a_model_that_ignores_the_mask(self, monkeypatch):
        model = scorer("llama")
        plain = model.model.forward
        monkeypatch.setattr(
            model.model,
            "forward",
            lambda *args, attention_mask=None, **kwargs: plain(*args, attention_mask=None, **kwargs),
        )
        assert "scores completions differently" in shared_prefix_refusal(CompletionScorer(model), PAD)

    def test_a_model_that_ignores_positions(self, monkeypatch):
        model = scorer("gpt2")
        plain = model.transformer.forward
        monkeypatch.setattr(
            model.transformer, "forward", lambda *args, position_ids=None, **kwargs: plain(*args, **kwargs)
        )
        assert "scores completions differently" in shared_prefix_refusal(CompletionScorer(model), PAD)

    def test_mode_is_left_as_it_was(self):
        model = scorer("llama")
        for training in (True, False):
            model.train(training)
            shared_prefix_refusal(CompletionScorer(model), PAD)
            assert model.training is training

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_rounding_not_refusal(self, dtype):
        model = scorer("llama").to(dtype)
        assert shared_prefix_refusal(CompletionScorer(model), PAD) is None
