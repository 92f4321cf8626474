"""What a cached reference log-prob depends on besides its tokens, as a description to hash.

Two references with one description give the same log-probs, up to how packs round. Weights are
read by content, wherever they stand: the base under an adapter is the base itself. Options that
shape training alone (losses, beta, rates, an adapter that is off) are not in it.
"""

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .logps import PackedForwardInfo
from .model import base_model, is_quantized
from .reference_cache import FORMAT, content_hash

# Of a model's config: names, types of weights (their content says it) and what no forward reads.
NOT_COMPUTED = (
    *("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype"),
    *("use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "output_attentions"),
    *("output_hidden_states", "return_dict", "id2label", "label2id", "problem_type"),
)
# Of an adapter's: likewise.
NOT_COMPUTED_BY_ADAPTER = (
    *("base_model_name_or_path", "revision", "inference_mode", "lora_dropout", "peft_version"),
    *("task_type", "init_lora_weights", "target_modules", "auto_mapping", "runtime_config"),
)


def describe_reference(
    model: nn.Module, adapters: Sequence[str], packed: PackedForwardInfo, *, bf16: bool, tf32: bool
) -> dict[str, Any]:
    """All that decides the log-probs of `model` under `adapters` (none: adapters off).

    bf16: computed under bf16 autocast; tf32: fp32 products in TF32.
    """
    base = base_model(model)
    config = {k: v for k, v in base.config.to_dict().items() if k not in NOT_COMPUTED}
    return {
        "format": FORMAT,
        "class": type(base).__name__,
        "config": content_hash(config),
        "weights": _hash_tensors(_base_tensors(base)),
        "adapters": [_describe_adapter(model, name) for name in adapters],
        "quantized": is_quantized(base),
        "dtype": str(base.dtype).removeprefix("torch."),
        "compute": "bfloat16" if bf16 else "tf32" if tf32 else "as weights",
        "packs": packed.mode,
        "attention": packed.backend,
    }


def about_reference(model: nn.Module, kind: str) -> dict[str, Any]:
    """What a person wants to read about the reference; no part of its hash."""
    base = base_model(model)
    return {
        "model": base.config._name_or_path or type(base).__name__,
        "kind": kind,
        "parameters": sum(tensor.numel() for _, tensor in _base_tensors(base)),
    }


def _describe_adapter(model: nn.Module, name: str) -> dict[str, Any]:
    assert isinstance(model, PeftModel)
    config = model.peft_config[name].to_dict()
    kept = {k: v for k, v in config.items() if k not in NOT_COMPUTED_BY_ADAPTER}
    tensors = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return {"config": content_hash(kept), "weights": _hash_tensors(sorted(tensors.items()))}


def _base_tensors(base: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The model's own tensors, sorted by the names that they have without adapters."""
    adapters: list[str] = []  # prefixes
    for prefix, module in base.named_modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            names = (*module.adapter_layer_names, "modules_to_save")
            adapters += [f"{prefix}.{name}." for name in names]
    skip = tuple(adapters)
    tensors = []
    for name, tensor in base.state_dict().items():
        if isinstance(tensor, torch.Tensor) and not (skip and name.startswith(skip)):
            plain = name.replace(".base_layer.", ".").replace(".original_module.", ".")
            tensors.append((plain, tensor))
    return sorted(tensors, key=lambda item: item[0])


def _hash_tensors(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """One hash of names, types, shapes and bytes; several tensors at a time (hashing and copying
    leave Python's lock). A head tied to the embedding is hashed once."""
    tensors = list(tensors)
    unique = {_place(tensor): tensor for _, tensor in tensors}
    workers = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:  # host memory: one tensor a worker
        digests = dict(zip(unique, pool.map(_digest, unique.values()), strict=True))
    total = hashlib.sha256()
    for name, tensor in tensors:
        head = f"{name} {tensor.dtype} {tuple(tensor.shape)} "
        total.update(head.encode() + digests[_place(tensor)])
    return total.hexdigest()


def _place(tensor: torch.Tensor) -> tuple:
    if tensor.numel() == 0:
        return ()
    return tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _digest(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().contiguous().cpu().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).digest() if len(flat) else b""
