"""Gradient checkpointing: which activations the backward pass computes again.

`True` (full): every layer keeps its input alone. `"selective"`: attention's output is kept as
well, since recomputing it costs most where packs are long, and storing it least. Gradients are
bitwise those without checkpointing.
"""

from __future__ import annotations

import functools
from typing import Any

from peft import PeftModel
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PretrainedConfig, PreTrainedModel

from .errors import ConfigError, did_you_mean
from .model import base_model

# What torch.utils.checkpoint takes that a config file can say.
CHECKPOINT_KWARGS = ("use_reentrant", "preserve_rng_state", "determinism_check", "debug")
# The attention kernels whose outputs selective checkpointing keeps; a kernel that this PyTorch or
# this machine does not have is never called.
KEPT_OPERATIONS = (
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_attention_math",
    "torch_attn::_varlen_attn",
    "flash_attn::_flash_attn_varlen_forward",
    "flash_attn_3::_flash_attn_forward",  # its releases differ
    "flash_attn_3::fwd",
    "fastdpo::planned_attention",
)
# The backends that call one of them: FlexAttention is compiled, flash-attn 4 no torch operation.
_KEEPABLE = ("sdpa", "varlen_attn", "flash_attention_2", "flash_attention_3")


def checkpoint_kwargs(given: Any) -> dict[str, Any]:
    """`gradient_checkpointing_kwargs`, checked. Raises `ConfigError` naming an unknown one."""
    kwargs = given or {}
    assert isinstance(kwargs, dict)
    for name in kwargs:
        if name not in CHECKPOINT_KWARGS:
            raise ConfigError(
                f"gradient_checkpointing_kwargs has no {name!r}"
                f"{did_you_mean(name, CHECKPOINT_KWARGS)}; it takes {', '.join(CHECKPOINT_KWARGS)}"
            )
    return kwargs


def checkpoint_activations(
    model: PreTrainedModel | PeftModel, how: bool | str, given: Any, backend: str = "sdpa"
) -> None:
    """Switches checkpointing on: `how` is True or "selective"; backend: what runs attention.

    Raises `ConfigError`.
    """
    kwargs: dict[str, Any] = {"use_reentrant": False, **checkpoint_kwargs(given)}
    base = base_model(model)
    if how == "selective":
        if kwargs["use_reentrant"]:
            raise ConfigError(
                "gradient_checkpointing 'selective' keeps attention's outputs, which "
                "use_reentrant: true can't; leave one of them out"
            )
        reason = why_not_selective(base.config, backend)
        if reason is not None:
            raise ConfigError(
                f"gradient_checkpointing 'selective' keeps attention's outputs, and {reason}; "
                "use 'full'"
            )
        kwargs["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    if hasattr(base, "activation_checkpointing_enable"):  # its name from transformers 5.20
        base.activation_checkpointing_enable(kwargs)
    else:
        base.gradient_checkpointing_enable(kwargs)
    if kwargs["use_reentrant"]:  # which needs inputs that require grad
        base.enable_input_require_grads()


def why_not_selective(config: PretrainedConfig, backend: str) -> str | None:
    """Why attention's outputs can't be kept while the rest is computed again; None if they can."""
    if backend not in _KEEPABLE:
        return f"those of {backend} attention can't be told from the rest"
    softcap = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    if backend == "sdpa" and (softcap is not None or config.model_type == "gpt_oss"):
        own = f"caps its logits at {softcap}" if softcap is not None else "has sinks"
        return f"this model's attention {own}, which sdpa runs unfused"
    return None


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    packet = getattr(operation, "_overloadpacket", operation)
    name = getattr(packet, "_qualified_op_name", "")
    if name in KEPT_OPERATIONS:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
