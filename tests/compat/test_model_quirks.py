"""Behaviour of models, generation and adapters that `instructgpt_hf._compat` works around."""

from __future__ import annotations

import contextlib
import copy
import inspect
import threading
from importlib.metadata import version

import pytest
import torch
import transformers
from bitsandbytes.functional import has_avx512bf16
from bitsandbytes.nn import Linear4bit
from helpers.upstream import quantised, tiny
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, GenerationMixin
from trl.trainer.utils import disable_dropout_in_model

from instructgpt_hf._compat import peft, quirks

IDS = torch.tensor([[3, 4, 5, 6]])


class TestModels:
    def test_trls_disable_dropout_leaves_functional_dropout(self, make_policy):
        """`disable_dropout`."""
        model = make_policy("opt", dropout=0.5).train()
        disable_dropout_in_model(model)
        assert not torch.equal(model(IDS).logits, model(IDS).logits)
        quirks.disable_dropout(model)
        assert torch.equal(model(IDS).logits, model(IDS).logits)

    @pytest.mark.skipif(not has_avx512bf16(), reason="bitsandbytes repacks 4-bit weights on AVX512-bf16 only")
    @pytest.mark.parametrize("restored", [False, True])
    def test_a_4_bit_layer_loses_its_gradient_after_an_evaluation(self, restored):
        """`restore_cpu_gradients`."""
        torch.manual_seed(0)
        layer = Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
        if restored:
            quirks.restore_cpu_gradients(layer)

        def gradient():
            inputs = torch.ones(1, 64, requires_grad=True)
            layer.train()(inputs).square().sum().backward()
            return inputs.grad

        before = gradient()
        with torch.no_grad():
            layer.eval()(torch.ones(1, 64))
        after = gradient()
        assert (after is not None and torch.allclose(after, before)) is restored

    def test_a_config_does_not_tell_when_weights_were_quantised(self, tmp_path):
        """`is_quantized` and `take_quantization`."""
        model = quantised(tmp_path / "base")
        assert quirks.is_quantized(model) and not quirks.is_quantized(tiny())
        config = copy.deepcopy(model.config)
        assert config.quantization_config is not None, "the file's weights are not quantised"
        assert quirks.take_quantization(config, model)["load_in_4bit"]
        assert not hasattr(config, "quantization_config") and model.config.quantization_config is not None
        assert quirks.take_quantization(config, tiny()) is None

    @pytest.mark.parametrize("name", ["sdpa", "eager"])
    def test_the_config_names_the_attention_in_use(self, name):
        """`attention_implementation`."""
        model = AutoModelForCausalLM.from_config(tiny().config, attn_implementation=name)
        assert quirks.attention_implementation(model.config) == name

    def test_sharded_weights_are_recognised(self):
        """`has_sharded_weights`, on a group of one process."""
        from torch.distributed import HashStore, destroy_process_group, init_device_mesh, init_process_group
        from torch.distributed.fsdp import fully_shard

        layer = torch.nn.Linear(2, 2)
        assert not quirks.has_sharded_weights(layer)
        init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
        try:
            assert quirks.has_sharded_weights(fully_shard(layer, mesh=init_device_mesh("cpu", (1,))))
        finally:
            destroy_process_group()

    def test_padding_with_eos_moves_the_score(self, make_scorer):
        """Why `load_tokenizer` sets another padding token: a classifier then reads the token before EOS."""
        model = make_scorer().eval()
        with torch.no_grad():
            last, before = model(torch.tensor([[5, 6, 1]])).logits, model(torch.tensor([[5, 6]])).logits
            model.config.pad_token_id = 1
            assert not torch.equal(last, before)
            torch.testing.assert_close(model(torch.tensor([[5, 6, 1]])).logits, before)


class TestGeneration:
    def test_the_next_step_gets_the_cache_and_a_wider_mask(self, make_policy):
        """`next_inputs`, `cache_name`."""
        model, inputs = make_policy(), {"attention_mask": torch.ones_like(IDS), "use_cache": True}
        assert quirks.cache_name(inputs) is None
        outputs = model(IDS, **inputs)
        updated = quirks.next_inputs(model, outputs, inputs)
        name = quirks.cache_name(updated)
        assert name in inspect.signature(model.forward).parameters
        assert name == quirks.cache_name(outputs) and updated[name] is outputs[name]
        assert updated["attention_mask"].shape == (1, IDS.shape[1] + 1)

    def test_the_cache_is_renamed(self):
        """`cache_name` need not know the spelling of the installed version; the quirk can go when only one is left."""
        for name in ("past_key_values", "cache"):
            inputs = {"use_cache": True, "position_ids": None, name: DynamicCache()}
            assert quirks.cache_name(inputs) == name
        name = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"
        assert name in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters

    def test_generate_fills_in_settings_of_the_models_files(self, make_policy):
        """`call_settings_only`."""
        model = make_policy()
        model.generation_config.suppress_tokens = list(range(2, model.config.vocab_size))
        call = {"generation_config": GenerationConfig(max_new_tokens=2, min_new_tokens=2, do_sample=True)}
        assert model.generate(IDS, **call)[0, IDS.shape[1] :].max() < 2
        with quirks.call_settings_only(model):
            assert model.generate(IDS, **call)[0, IDS.shape[1] :].max() >= 2
        assert model.generation_config.suppress_tokens

    def test_autocast_does_not_reach_continuous_batching(self, make_policy):
        """`rounded_weights`."""
        model, seen = make_policy(), []

        def see(*_):
            kinds = torch.is_autocast_enabled("cpu"), model.lm_head.weight.dtype
            seen.append((threading.current_thread() is threading.main_thread(), *kinds))

        model.model.embed_tokens.register_forward_hook(see)
        weight = model.lm_head.weight.data
        with torch.autocast("cpu", dtype=torch.bfloat16), quirks.rounded_weights(model, torch.bfloat16):
            model.generate_batch(
                IDS.tolist(),
                generation_config=GenerationConfig(max_new_tokens=1, pad_token_id=0, eos_token_id=1),
                continuous_batching_config=transformers.ContinuousBatchingConfig(
                    num_blocks=32, page_size=16, max_batch_tokens=128
                ),
                progress_bar=False,
            )
        assert set(seen) == {(False, False, torch.bfloat16)}
        assert model.lm_head.weight.data is weight or model.lm_head.weight.data_ptr() == weight.data_ptr()


class TestPeft:
    @pytest.fixture
    def model(self):
        model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))
        model.add_adapter("other", LoraConfig(target_modules=["0"]))
        for name, item in model.named_parameters():
            if "lora_B.other" in name:
                torch.nn.init.ones_(item)
        return model

    def test_layers_apply_the_adapters_that_are_chosen(self, model):
        """`apply_adapters` writes what the layers read, also an empty list, and freezes nothing."""
        layers = peft.adapter_layers(model)
        assert len(layers) == 1 and peft.applied_adapters(layers) == ["default"]
        base, trained = model(torch.ones(1, 2)), [item.requires_grad for item in model.parameters()]
        peft.apply_adapters(layers, ["other"])
        assert not torch.equal(model(torch.ones(1, 2)), base)
        peft.apply_adapters(layers, [])
        assert torch.equal(model(torch.ones(1, 2)), layers[0].base_layer(torch.ones(1, 2)))
        assert [item.requires_grad for item in model.parameters()] == trained

    def test_set_adapter_changes_what_is_trained(self, model):
        """Why `apply_adapters` is needed."""
        model.set_adapter("other")
        assert {name.split(".")[-2] for name, item in model.named_parameters() if item.requires_grad} == {"other"}

    def test_adding_an_adapter_freezes_no_other(self, model):
        """What `models.shared_base` and `models.value_model` rely on."""
        model.set_adapter("other")
        model.set_requires_grad("default")
        model.add_adapter("third", LoraConfig(target_modules=["0"]))
        trained = {name.split(".")[-2] for name, item in model.named_parameters() if item.requires_grad}
        assert trained == {"default", "other"}

    def test_plain_transformers_loads_an_adapter_although_it_asks_for_a_newer_peft(self, make_policy, tmp_path):
        """From 5.24 on, transformers' own methods refuse PEFT before 0.22; PEFT's classes do not go through them."""
        base = make_policy()
        base.save_pretrained(tmp_path / "base")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        policy = get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
        policy.save_pretrained(tmp_path / "adapter")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
        torch.testing.assert_close(loaded(IDS).logits, policy(IDS).logits)
        newer = Version(transformers.__version__) >= Version("5.24") and Version(version("peft")) < Version("0.22")
        with pytest.raises(ValueError, match="PEFT") if newer else contextlib.nullcontext():
            loaded.set_adapter("default")

    def test_a_saved_module_shows_the_weight_of_its_active_copy(self):
        """`instructgpt_hf.models.scoring` reads the dtype of a head so."""
        layers = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1).bfloat16())
        model = get_peft_model(layers, LoraConfig(target_modules=["0"], modules_to_save=["1"]))
        wrapper = model.base_model.model[1]
        wrapper.modules_to_save["default"].float()
        assert wrapper.weight is wrapper.modules_to_save["default"].weight
        assert wrapper.original_module.weight.dtype == torch.bfloat16
