"""Merging of LoRA adapters into whole models, for PPO, serving and plain transformers."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import PreTrainedModel

from instructgpt_hf._compat.peft import AdapterLayer, unwrap_peft
from instructgpt_hf._compat.quirks import is_quantized
from instructgpt_hf.artifacts import STAGE_FILE, StageArtifact, atomic_folder, fingerprint
from instructgpt_hf.config.model import ModelConfig, quantization_config
from instructgpt_hf.errors import InstructGPTError, loading_errors, nearest
from instructgpt_hf.models.adapters import POLICY_ADAPTER, adapter_of
from instructgpt_hf.models.loading import count_parameters, load_policy, load_tokenizer
from instructgpt_hf.models.origins import ADAPTER_FILE, adapter_base, is_adapter, resolve_source
from instructgpt_hf.models.reward_model import CLASSIFIER_FOLDER, load_adapter_classifier

DTYPES = ("float32", "bfloat16", "float16")
SHARD_SIZE = "5GB"
_ADAPTER_FILES = (ADAPTER_FILE, "adapter_model.safetensors", "README.md")


def merge_adapter(source: str | Path, target: str | Path, dtype: str = "float32") -> Path:
    """Write a whole model from an adapter of this package: a policy, reward or value model.

    The adapter is added in float32 to the weights it was trained on; a quantised base is dequantised first. The merged
    model computes what the adapter did, apart from the rounding of activations in 8-bit layers and to `dtype`.
    Adapters in subfolders (`value_model/`, `ema/`) are merged too. Head, shift, padding and EOS ids, tokenizer and
    `stage.json` are kept. The base's quantisation is read from `classifier/config.json` of a reward or value model and
    from `stage.json` of a policy; without either, the base is taken as stored.

    Args:
        source: folder or Hub id.
        target: folder to write and return; must be absent or empty.
        dtype: dtype of the written weights, one of `DTYPES`.

    Raises:
        InstructGPTError: if `source` holds no adapter, its base cannot be loaded, or `target` is in use.
    """
    if dtype not in DTYPES:
        raise InstructGPTError(f"dtype = {dtype!r}: is not one that a merged model can have; {nearest(dtype, DTYPES)}")
    folder, final = resolve_source(str(source), role="adapter"), Path(target).expanduser()
    if not is_adapter(folder):
        raise InstructGPTError(f"{source}: has no {ADAPTER_FILE}, so there is no adapter to merge.")
    stage = folder.parent
    if not (folder / STAGE_FILE).is_file() and (stage / STAGE_FILE).is_file() and not _has_own_head(folder):
        raise InstructGPTError(
            f"{source}: belongs to the stage in {stage}, which has its tokenizer and record. "
            f"`instructgpt-hf merge {stage} {target}` merges both, this one into {final / folder.name}."
        )
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise InstructGPTError(f"{final}: exists already; name a folder that does not.")
    record = StageArtifact.load(folder) if (folder / STAGE_FILE).is_file() else None
    ignored = shutil.ignore_patterns(*_ADAPTER_FILES, CLASSIFIER_FOLDER, ".*")
    with atomic_folder(final) as temporary:
        shutil.copytree(folder, temporary, ignore=ignored, dirs_exist_ok=True)
        for adapter in [folder, *sorted(item.parent for item in folder.glob(f"*/{ADAPTER_FILE}"))]:
            model = _merge(adapter, folder, record).to(getattr(torch, dtype))
            model.save_pretrained(temporary / adapter.relative_to(folder), max_shard_size=SHARD_SIZE)
            if adapter == folder and record is not None:
                _merged_record(record, model, dtype).save(temporary)
    return final


@torch.no_grad()
def merged_weights(policy: PeftModel) -> Iterator[tuple[str, Tensor]]:
    """Iterate over the merged weights of a LoRA policy, under the names of the whole model.

    Merging and unmerging the whole policy would round the base's weights, and the reference on the same base, a little
    more each time. Here one layer is merged at a time, and its own weights are restored exactly.

    The policy is not quantised; adapters of other roles are left out. A weight is valid until the next one.
    """
    base = unwrap_peft(policy)
    for name, parameter in base.named_parameters():
        if ".base_layer." in name:
            owner, _, rest = name.rpartition(".base_layer.")
            with _merged(base.get_submodule(owner)):
                yield f"{owner}.{rest}", parameter.data
        elif ".original_module." not in name and "lora_" not in name and adapter_of(name) == POLICY_ADAPTER:
            yield name.replace(f".modules_to_save.{POLICY_ADAPTER}.", "."), parameter.data


@contextlib.contextmanager
def _merged(layer: AdapterLayer) -> Iterator[None]:
    """Merge the policy's adapter into one layer inside the block, and put the very same tensors back."""
    kept = {item: item.data for item in layer.get_base_layer().parameters()}
    for item, data in kept.items():
        item.data = data.clone()
    try:
        if isinstance(layer, LoraLayer):
            layer.merge(adapter_names=[POLICY_ADAPTER])
        yield
    finally:
        if layer.merged:
            layer.unmerge()
        for item, data in kept.items():
            item.data = data


def _has_own_head(adapter: Path) -> bool:
    """Whether it is a reward or value model, whose base needs no tokenizer."""
    return (adapter / CLASSIFIER_FOLDER).is_dir()


def _merge(adapter: Path, folder: Path, record: StageArtifact | None) -> PreTrainedModel:
    """The whole model of one adapter of a stage's folder, in float32."""
    if _has_own_head(adapter):
        base = load_adapter_classifier(adapter)
    else:
        base = load_policy(adapter_base(adapter), load_tokenizer(folder), **_precision(record))
    if is_quantized(base):
        base = base.dequantize()
    base = base.cpu().float()
    with loading_errors(f"{adapter}: cannot be merged", ValueError):
        model = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload(safe_merge=True)
    outputs = model.get_output_embeddings()
    if outputs is not None and outputs.weight is not model.get_input_embeddings().weight:
        # An adapter that trained one of two tied matrices has untied them.
        model.config.get_text_config().tie_word_embeddings = False
    return model


def _precision(record: StageArtifact | None) -> dict[str, Any]:
    """The dtype and quantisation that a stage loaded its model in, for `from_pretrained`."""
    if record is None:
        return {}
    names = {item.name for item in dataclasses.fields(ModelConfig)} & set(record.config)
    settings = ModelConfig(**{name: record.config[name] for name in names})
    return {"dtype": settings.dtype, "quantization_config": quantization_config(settings)}


def _merged_record(record: StageArtifact, model: PreTrainedModel, dtype: str) -> StageArtifact:
    """The stage's record with a fingerprint of its own, because no recipe leads to the merged model."""
    changed = {"kind": "full", "parameters": count_parameters(model)["parameters"], "merged": dtype}
    own = fingerprint({"merged": record.fingerprint, "dtype": dtype})
    kept = {key: value for key, value in record.model.items() if key != "bases"}
    return dataclasses.replace(record, model={**kept, **changed}, fingerprint=own)
