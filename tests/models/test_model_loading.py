"""Tokenizers with a distinct padding token, policies whole and as adapters."""

import copy
import json

import pytest
import torch
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma3Config,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
)

from instructgpt_hf import lab
from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.models.loading import (
    NEW_PAD_TOKEN,
    check_adapter_settings,
    count_parameters,
    load_config,
    load_policy,
    load_tokenizer,
    positions,
)
from instructgpt_hf.models.origins import adapter_base, base_model_folder, is_adapter, resolve_source


@pytest.fixture
def save(tmp_path):
    """Write a model and a tokenizer into a folder."""

    def build(name, model, tokenizer):
        folder = tmp_path / name
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return build


def lora():
    return LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear")


class TestTokenizer:
    def test_distinct_padding_is_kept(self, tokenizer, tmp_path):
        tokenizer.save_pretrained(tmp_path)
        found = load_tokenizer(tmp_path)
        assert (found.pad_token, found.eos_token, len(found)) == ("<pad>", "<eos>", len(tokenizer))
        assert found.padding_side == "left"

    @pytest.mark.parametrize("given", ["<eos>", None])
    def test_a_reserved_token_becomes_the_padding(self, tokenizer, tmp_path, given):
        changed = copy.deepcopy(tokenizer)
        changed.pad_token = given
        changed.save_pretrained(tmp_path)
        found = load_tokenizer(tmp_path)
        assert found.pad_token == "<pad>" and found.pad_token_id == 0 and len(found) == len(tokenizer)

    def test_a_new_token_where_none_is_reserved(self, tmp_path):
        found = load_tokenizer(_without_padding(tmp_path))
        assert found.pad_token == NEW_PAD_TOKEN and found.pad_token_id == 2 and found.eos_token_id == 0

    def test_no_eos(self, tokenizer, tmp_path):
        changed = copy.deepcopy(tokenizer)
        changed.eos_token = None
        changed.save_pretrained(tmp_path)
        with pytest.raises(InstructGPTError, match="no EOS token"):
            load_tokenizer(tmp_path)

    def test_no_tokenizer(self, tmp_path):
        with pytest.raises(InstructGPTError, match="no tokenizer could be loaded"):
            load_tokenizer(tmp_path)


def _without_padding(folder):
    """A tokenizer of two words whose padding is its EOS token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>").save_pretrained(folder)
    return folder


class TestSource:
    def test_folder(self, tmp_path):
        assert resolve_source(str(tmp_path)) == tmp_path

    def test_the_labs_base_model(self):
        folder = base_model_folder(lab.LAB_MODEL, None, "base model")
        assert folder == lab.base_model_path() and (folder / "config.json").is_file()

    def test_a_stage_in_a_folder_named_like_the_labs_base_model(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / lab.LAB_MODEL).mkdir()
        assert resolve_source(lab.LAB_MODEL, role="sft stage").resolve() == tmp_path / lab.LAB_MODEL

    @pytest.mark.parametrize("name", ["./missing", "/nowhere/missing", "~/nowhere"])
    def test_missing_folder(self, name):
        with pytest.raises(InstructGPTError, match=f"model: {name}: no such folder"):
            resolve_source(name)

    @pytest.mark.parametrize("name", ["nobody-here/no-such-model", "no such name!", "a/b/c"])
    def test_neither_folder_nor_hub(self, name):
        with pytest.raises(InstructGPTError, match=f"reward model: '{name}' is neither a local folder nor a model"):
            resolve_source(name, role="reward model")

    def test_folder_without_a_config(self, tmp_path):
        with pytest.raises(InstructGPTError, match="no model config could be loaded"):
            load_config(tmp_path)


def _with_generation_config(folder, given):
    """The folder, with more settings in its `generation_config.json`, and padding that the tokenizer's replaces."""
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token_id": 1, **given}))
    return folder


class TestPolicy:
    def test_whole(self, make_policy, tokenizer, save):
        made = make_policy()
        policy = load_policy(save("base", made, tokenizer), tokenizer)
        assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), made.parameters(), strict=True))
        counts = count_parameters(policy)
        assert counts["parameters"] == counts["trainable_parameters"] == sum(p.numel() for p in made.parameters())

    def test_padding_id_is_the_tokenizers(self, make_policy, tokenizer, save):
        made = make_policy(pad_token_id=1)
        policy = load_policy(save("base", made, tokenizer), tokenizer)
        assert policy.config.pad_token_id == policy.generation_config.pad_token_id == 0

    @pytest.mark.parametrize(
        ("given", "dropped"),
        [
            ({"do_sample": False, "temperature": 0.9, "top_p": 0.6}, {"temperature", "top_p"}),
            ({"temperature": 0.7, "top_k": 5, "min_p": 0.1}, {"temperature", "top_k", "min_p"}),
            (
                {"length_penalty": 2.0, "early_stopping": True, "max_new_tokens": 7},
                {"length_penalty", "early_stopping"},
            ),
            ({"do_sample": True, "temperature": 0.7, "top_p": 0.6, "output_scores": True}, {"output_scores"}),
        ],
    )
    def test_settings_that_transformers_would_not_save(
        self, make_policy, tokenizer, save, given, dropped, tmp_path, caplog
    ):
        """They go when the model is loaded, not when it is saved after training; greedy tokens stay the same."""
        folder = _with_generation_config(save("base", make_policy(), tokenizer), given)
        prompt = {"input_ids": torch.tensor([[5, 6, 7]]), "max_new_tokens": 4}
        before = AutoModelForCausalLM.from_pretrained(folder)
        for peft_config in (None, lora()):
            caplog.clear()
            policy = load_policy(folder, tokenizer, peft_config=peft_config)
            assert len([record for record in caplog.records if "generation_config: dropped" in record.message]) == 1
            unwrapped = policy if peft_config is None else policy.merge_and_unload()
            unwrapped.save_pretrained(tmp_path / "saved")
            saved = json.loads((tmp_path / "saved/generation_config.json").read_text())
            kept = {name: value for name, value in given.items() if name not in dropped}
            assert saved.items() >= kept.items() and not dropped & {name for name in saved if saved[name] is not None}
            if not given.get("do_sample"):
                assert torch.equal(policy.generate(**prompt), before.generate(**prompt))

    @pytest.mark.parametrize("given", [{"do_sample": True, "temperature": 0.7, "top_p": 0.6}, {}])
    def test_settings_that_fit_together_stay(self, make_policy, tokenizer, save, given, caplog):
        folder = _with_generation_config(save("base", make_policy(), tokenizer), given)
        found = load_policy(folder, tokenizer).generation_config.to_dict()
        expected = GenerationConfig.from_pretrained(folder, pad_token_id=0, eos_token_id=1).to_dict()
        assert found == expected and not caplog.records

    def test_embeddings_grow_for_a_new_padding_token(self, make_policy, tmp_path):
        make_policy(vocab_size=2, eos_token_id=0, bos_token_id=0).save_pretrained(tmp_path)
        tokenizer = load_tokenizer(_without_padding(tmp_path))
        policy = load_policy(tmp_path, tokenizer)
        assert policy.get_input_embeddings().num_embeddings == 3 == policy.config.vocab_size
        assert torch.isfinite(policy(torch.tensor([[1, 2]])).logits).all()

    def test_embeddings_that_are_larger_stay(self, make_policy, tokenizer, save):
        made = make_policy(vocab_size=96)
        assert load_policy(save("base", made, tokenizer), tokenizer).config.vocab_size == 96

    def test_fresh_adapter(self, make_policy, tokenizer, save):
        policy = load_policy(save("base", make_policy(), tokenizer), tokenizer, peft_config=lora())
        trainable = {name for name, item in policy.named_parameters() if item.requires_grad}
        assert trainable and all("lora_" in name for name in trainable)
        ids = torch.tensor([[5, 6, 7]])
        with torch.no_grad(), policy.disable_adapter():
            base = policy(ids).logits
        assert torch.equal(policy(ids).logits, base)

    @pytest.mark.parametrize("trainable", [True, False])
    def test_adapter_folder_continues(self, make_policy, tokenizer, save, trainable):
        base = save("base", make_policy(), tokenizer)
        policy = load_policy(base, tokenizer, peft_config=lora())
        for name, item in policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(item, std=0.1)
        folder = save("adapter", policy, tokenizer)
        assert is_adapter(folder) and not is_adapter(base) and adapter_base(folder) == base
        again = load_policy(folder, tokenizer, trainable=trainable)
        ids = torch.tensor([[5, 6, 7]])
        torch.testing.assert_close(again(ids).logits, policy(ids).logits)
        assert any(item.requires_grad for item in again.parameters()) == trainable
        assert load_config(folder).model_type == "llama"


class TestAdapterSettings:
    """Settings of an adapter in a recipe whose stage continues one that exists."""

    @pytest.fixture
    def folders(self, make_policy, tokenizer, save):
        base = save("base", make_policy(), tokenizer)
        made = {"base": base}
        for name, rank, modules in (("first", 4, "all-linear"), ("second", 8, ["q_proj", "v_proj"])):
            config = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=8, target_modules=modules)
            made[name] = save(name, load_policy(base, tokenizer, peft_config=config), tokenizer)
        return made

    @pytest.mark.parametrize(
        ("names", "given"),
        [
            (["first"], {}),
            (["first"], {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_target_modules": "all-linear"}),
            (["first"], {"lora_dropout": 0.0, "use_dora": False, "use_rslora": False, "learning_rate": 1.0}),
            (["second"], {"lora_r": 8, "lora_target_modules": ["v_proj", "q_proj"]}),
            (["first", "second"], {"lora_r": 8}),
            (["base"], {"use_peft": False, "lora_r": 2}),
            (["first", "base"], {"use_peft": False, "lora_r": 2}),
        ],
    )
    def test_what_has_an_effect_or_agrees(self, folders, names, given):
        check_adapter_settings([folders[name] for name in names], given, "reward.yaml")

    @pytest.mark.parametrize(
        ("names", "given", "message"),
        [
            (["first"], {"use_peft": False}, "use_peft = False: only the adapter"),
            (["first"], {"lora_r": 16}, "lora_r = 16: the adapter has 4"),
            (["first"], {"lora_alpha": 32}, "lora_alpha = 32: the adapter has 8"),
            (["first"], {"lora_dropout": 0.1}, "lora_dropout = 0.1: the adapter has 0.0"),
            (["first"], {"use_dora": True}, "use_dora = True: the adapter has False"),
            (
                ["second"],
                {"lora_target_modules": ["q_proj"]},
                r"the adapter has \['q_proj', 'v_proj'\]",
            ),
            (["first", "second"], {"lora_r": 16}, "lora_r = 16: the adapter has 4 or 8"),
        ],
    )
    def test_what_would_be_ignored(self, folders, names, given, message):
        with pytest.raises(InstructGPTError, match=rf"ppo.yaml: this stage continues(.|\n)*{message}"):
            check_adapter_settings([folders[name] for name in names], given, "ppo.yaml")

    def test_everything_is_listed_at_once(self, folders):
        with pytest.raises(InstructGPTError) as caught:
            check_adapter_settings(
                [folders["first"]], {"lora_r": 1, "lora_alpha": 2, "use_peft": False}, "reward.yaml"
            )
        assert str(caught.value).count("\n  - ") == 3


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (GPT2Config(n_positions=77), 77),
        (OPTConfig(max_position_embeddings=78), 78),
        (LlamaConfig(max_position_embeddings=79), 79),
        (LlamaConfig(rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}), None),
        (BloomConfig(), None),
    ],
    ids=["gpt2", "opt", "llama", "scaled", "bloom"],
)
def test_positions(config, expected):
    assert positions(config) == expected


def test_positions_of_a_multimodal_model_are_its_texts():
    config = Gemma3Config(text_config={"max_position_embeddings": 80})
    assert positions(config) == 80
