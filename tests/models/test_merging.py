"""A merged model is the adapter with its base in one: scores, logits, record and files."""

import json

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig

from instructgpt_hf.artifacts import StageArtifact
from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.models import merging
from instructgpt_hf.models.loading import load_policy
from instructgpt_hf.models.merging import merge_adapter
from instructgpt_hf.models.reward_model import create_reward_model, load_reward_model, save_reward_model

IDS = torch.tensor([[5, 6, 7, 8, 1]])
ARCHITECTURES = ["llama", "gpt2", "gpt_neox"]
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def lora(task_type="CAUSAL_LM", **changes):
    return LoraConfig(**{"task_type": task_type, "r": 4, "lora_alpha": 8, "target_modules": "all-linear", **changes})


def output(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def record(**changes):
    values = {
        "stage": "sft",
        "recipe": "test",
        "config": {"use_peft": True, "seed": 3},
        "prompt_format": {"name": "raw"},
        "base_model": {"id": "base"},
        "fingerprint": "0123",
        "seed": 3,
        "model": {"kind": "adapter", "architecture": "LlamaForCausalLM", "parameters": 1, "trainable_parameters": 2},
        "metrics": {"eval_loss": 1.5},
    }
    return StageArtifact(**{**values, **changes})


@pytest.fixture
def base(tmp_path, make_policy, tokenizer):
    def build(architecture="llama", **changes):
        make_policy(architecture, **changes).save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    return build


@pytest.fixture
def adapter(tmp_path, tokenizer):
    """A policy's adapter folder with non-trivial weights; the model itself too."""

    def build(folder, config=None, **options):
        policy = load_policy(folder, tokenizer, peft_config=config or lora(), **options)
        for name, item in policy.named_parameters():
            if item.requires_grad and "lora_A" not in name:
                torch.nn.init.normal_(item, std=0.1)
        policy.save_pretrained(tmp_path / "adapter")
        tokenizer.save_pretrained(tmp_path / "adapter")
        return policy, tmp_path / "adapter"

    return build


class TestPolicy:
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_logits(self, base, adapter, tmp_path, architecture):
        policy, folder = adapter(base(architecture))
        out = merge_adapter(folder, tmp_path / "out")
        merged = AutoModelForCausalLM.from_pretrained(out)
        torch.testing.assert_close(output(merged), output(policy), atol=1e-4, rtol=1e-4)
        assert not torch.allclose(output(merged), output(AutoModelForCausalLM.from_pretrained(tmp_path / "base")))

    def test_weights_are_the_sum(self, base, adapter, tmp_path):
        """W + alpha/r B A, by hand."""
        _, folder = adapter(base())
        out = merge_adapter(folder, tmp_path / "out")
        parts, before, after = (
            load_file(path)
            for path in (
                folder / "adapter_model.safetensors",
                tmp_path / "base/model.safetensors",
                out / "model.safetensors",
            )
        )
        name = "model.layers.1.mlp.up_proj"
        a, b = (parts[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "AB")
        torch.testing.assert_close(after[f"{name}.weight"], before[f"{name}.weight"] + 2 * b @ a)
        assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])

    def test_tokens_and_tokenizer(self, base, adapter, tokenizer, tmp_path):
        """The base pads with EOS and stops at other tokens; the policy does neither."""
        policy, folder = adapter(base(pad_token_id=1))
        merged = AutoModelForCausalLM.from_pretrained(merge_adapter(folder, tmp_path / "out"))
        assert merged.config.pad_token_id == merged.generation_config.pad_token_id == 0
        assert merged.generation_config.eos_token_id == 1 == policy.generation_config.eos_token_id
        assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == tokenizer.get_vocab()

    def test_base_with_sampling_settings_and_without_sampling(self, base, adapter, tmp_path):
        """transformers would refuse to save the merged model."""
        folder = base()
        path = folder / "generation_config.json"
        # transformers saves a config whose ids are unchanged, whatever it holds.
        given = {"do_sample": False, "temperature": 0.9, "pad_token_id": 1}
        path.write_text(json.dumps(json.loads(path.read_text()) | given))
        policy, folder = adapter(folder)
        merged = AutoModelForCausalLM.from_pretrained(merge_adapter(folder, tmp_path / "out"))
        torch.testing.assert_close(output(merged), output(policy), atol=1e-4, rtol=1e-4)
        assert merged.generation_config.temperature is None and merged.generation_config.do_sample is False

    @pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
    def test_trained_half_of_tied_matrices(self, base, adapter, tmp_path, module):
        policy, folder = adapter(base(tie_word_embeddings=True), lora(modules_to_save=[module]))
        merged = AutoModelForCausalLM.from_pretrained(merge_adapter(folder, tmp_path / "out"))
        assert not merged.config.tie_word_embeddings
        torch.testing.assert_close(output(merged), output(policy), atol=1e-4, rtol=1e-4)

    def test_tied_matrices_stay_tied(self, base, adapter, tmp_path):
        policy, folder = adapter(base(tie_word_embeddings=True))
        merged = AutoModelForCausalLM.from_pretrained(merge_adapter(folder, tmp_path / "out"))
        assert merged.config.tie_word_embeddings
        torch.testing.assert_close(output(merged), output(policy), atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("nested", [True, False])
    def test_quantisation_is_read_from_the_record(self, base, adapter, tmp_path, nested):
        quantization = BitsAndBytesConfig(**NF4 | {"bnb_4bit_use_double_quant": nested})
        folder = base(hidden_size=64, intermediate_size=128)
        policy, folder = adapter(folder, dtype=torch.float32, quantization_config=quantization)
        plain = merge_adapter(folder, tmp_path / "unrecorded")
        config = {"use_peft": True, "load_in_4bit": True} | ({} if nested else {"use_bnb_nested_quant": False})
        record(config=config).save(folder)
        merged = AutoModelForCausalLM.from_pretrained(merge_adapter(folder, tmp_path / "out"))
        torch.testing.assert_close(output(merged), output(policy), atol=1e-4, rtol=1e-4)
        assert not hasattr(merged.config, "quantization_config")
        unrecorded = AutoModelForCausalLM.from_pretrained(plain)
        assert not torch.allclose(output(unrecorded), output(policy), atol=1e-3)


class TestFolder:
    def test_record(self, base, adapter, tmp_path):
        _, folder = adapter(base())
        record().save(folder)
        before, after = StageArtifact.load(folder), StageArtifact.load(merge_adapter(folder, tmp_path / "out"))
        parameters = sum(item.numel() for item in AutoModelForCausalLM.from_pretrained(tmp_path / "out").parameters())
        assert after.model == before.model | {"kind": "full", "parameters": parameters, "merged": "float32"}
        assert after.fingerprint != before.fingerprint
        same = ("stage", "recipe", "config", "prompt_format", "base_model", "seed", "metrics", "previous")
        assert all(getattr(after, name) == getattr(before, name) for name in same)

    def test_subfolders(self, base, adapter, tokenizer, tmp_path):
        """As the PPO stage writes it: averaged policy and value model beside the policy, each with its own weights."""
        policy, folder = adapter(base())
        value_model = create_reward_model(folder, tokenizer, seed=0)
        value_model.get_base_model().config.reward_shift = 0.5
        save_reward_model(value_model, folder / "value_model")
        tokenizer.save_pretrained(folder / "value_model")
        ema = load_policy(folder, tokenizer)
        with torch.no_grad():
            for item in ema.parameters():
                if item.requires_grad:
                    item.mul_(0.9)
        ema.save_pretrained(folder / "ema")
        (folder / "rollouts.jsonl").write_text("{}\n")
        record().save(folder)
        with pytest.raises(InstructGPTError, match=f"`instructgpt-hf merge {folder} out` merges both, .* out/ema"):
            merge_adapter(folder / "ema", "out")
        assert load_reward_model(merge_adapter(folder / "value_model", tmp_path / "value")).config.reward_shift == 0.5
        out = merge_adapter(folder, tmp_path / "out")
        for name, expected in (("", policy), ("ema", ema)):
            found = AutoModelForCausalLM.from_pretrained(out / name)
            torch.testing.assert_close(output(found), output(expected), atol=1e-4, rtol=1e-4)
        scorer = load_reward_model(out / "value_model")
        torch.testing.assert_close(output(scorer), output(value_model), atol=1e-4, rtol=1e-4)
        assert scorer.config.reward_shift == 0.5 and (out / "rollouts.jsonl").read_text() == "{}\n"
        assert not [path for path in out.rglob("*") if "adapter" in path.name or path.name == "classifier"]

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_dtype(self, base, adapter, tmp_path, dtype):
        policy, folder = adapter(base())
        out = merge_adapter(folder, tmp_path / "out", dtype=dtype)
        assert {str(item.dtype) for item in load_file(out / "model.safetensors").values()} == {f"torch.{dtype}"}
        merged = AutoModelForCausalLM.from_pretrained(out)
        assert merged.dtype == getattr(torch, dtype)
        torch.testing.assert_close(output(merged.float()), output(policy), atol=0.05, rtol=0.05)

    def test_shards(self, base, adapter, tmp_path, monkeypatch):
        policy, folder = adapter(base())
        monkeypatch.setattr(merging, "SHARD_SIZE", "20KB")
        out = merge_adapter(folder, tmp_path / "out")
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert len(set(index["weight_map"].values())) > 1
        merged = AutoModelForCausalLM.from_pretrained(out)
        torch.testing.assert_close(output(merged), output(policy), atol=1e-4, rtol=1e-4)

    def test_source_is_untouched(self, base, adapter, tmp_path):
        _, folder = adapter(base())
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        merge_adapter(folder, tmp_path / "out")
        assert all(path.read_bytes() == content for path, content in before.items())


class TestRefusals:
    def test_no_adapter(self, base, tmp_path):
        with pytest.raises(InstructGPTError, match=r"base: has no adapter_config\.json"):
            merge_adapter(base(), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_missing(self, tmp_path):
        with pytest.raises(InstructGPTError, match=r"adapter: .*no such folder"):
            merge_adapter(tmp_path / "nothing", tmp_path / "out")

    @pytest.mark.parametrize("name", ["adapter", "base/config.json"])
    def test_target_in_use(self, base, adapter, tmp_path, name):
        _, folder = adapter(base())
        with pytest.raises(InstructGPTError, match="exists already; name a folder that does not"):
            merge_adapter(folder, tmp_path / name)

    def test_dtype(self, base, adapter, tmp_path):
        _, folder = adapter(base())
        with pytest.raises(InstructGPTError, match=r"dtype = 'bf16': is not one that .* 'bfloat16'"):
            merge_adapter(folder, tmp_path / "out", dtype="bf16")

    def test_base_that_is_gone(self, base, adapter, tmp_path):
        _, folder = adapter(base())
        (tmp_path / "base").rename(tmp_path / "moved")
        with pytest.raises(InstructGPTError, match=r"base model of the adapter: .*base: no such folder"):
            merge_adapter(folder, tmp_path / "out")
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))

    def test_weights_that_are_not_numbers(self, base, adapter, tmp_path):
        policy, folder = adapter(base())
        with torch.no_grad():
            next(item for name, item in policy.named_parameters() if "lora_B" in name).fill_(float("nan"))
        policy.save_pretrained(folder)
        with pytest.raises(InstructGPTError, match="adapter: cannot be merged: NaNs detected"):
            merge_adapter(folder, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_interrupted_writing_leaves_nothing(self, base, adapter, tmp_path, monkeypatch):
        _, folder = adapter(base())
        record().save(folder)

        def fail(*_, **__):
            raise OSError("disk full")

        monkeypatch.setattr(merging, "_merged_record", fail)
        with pytest.raises(OSError, match="disk full"):
            merge_adapter(folder, tmp_path / "out")
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_reward_model_is_plain(base, tokenizer, tmp_path):
    """Head and shift are in the merged classifier; an unquantised half-precision base is summed in float32."""
    model = create_reward_model(
        base(), tokenizer, seed=0, peft_config=lora("SEQ_CLS", init_lora_weights=False), dtype=torch.bfloat16
    )
    model.get_base_model().config.reward_shift = -0.25
    save_reward_model(model, tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    merged = AutoModelForSequenceClassification.from_pretrained(merge_adapter(tmp_path / "reward", tmp_path / "out"))
    # The same weights without rounding in between: the unmerged adapter on a float32 copy of the bfloat16 base.
    expected = load_reward_model(tmp_path / "reward").float()
    torch.testing.assert_close(output(merged), output(expected), atol=1e-4, rtol=1e-4)
    assert merged.config.reward_shift == -0.25
    assert torch.equal(merged.score.weight, model.get_base_model().score.modules_to_save["default"].weight)
