"""The output head of a model: what holds its weight, and the LoRA adapters that are on it.

Looked up at every call: PEFT swaps weights and adapters between policy and reference.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .errors import ModelError

WAY_OUT = "take lm_head out of the adapter's targets, or train it whole with modules_to_save"


def output_head(model: PreTrainedModel) -> Any:
    """The module that holds the head's `weight` [V, D] and `bias`; `ModelError` if that isn't all.

    LoRA on it is no error: `head_lora` has it.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise ModelError(f"{type(model).__name__} has no language-model head; load a CausalLM")
    if any(hasattr(module, "base_layer") for module in head.modules()):
        _check_adapter(head)
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        raise ModelError(
            f"the output head {type(head).__name__} has no plain [V, D] weight; leave lm_head out "
            "of quantization"
        )
    return head


def head_lora(head: Any) -> tuple[Tensor, Tensor, float] | None:
    """The active LoRA adapters on the head as `linear_logps` takes them: (A [r, D], B [V, r], s).

    None if there are none, if they are off, or if they are merged into the weight.
    """
    if not hasattr(head, "base_layer") or head.disable_adapters or head.merged:
        return None
    active = [name for name in head.active_adapters if name in head.lora_A]
    if not active:
        return None
    if len(active) == 1:
        (name,) = active
        return head.lora_A[name].weight, head.lora_B[name].weight, float(head.scaling[name])
    a = torch.cat([head.scaling[name] * head.lora_A[name].weight for name in active])
    return a, torch.cat([head.lora_B[name].weight for name in active], 1), 1.0


def _check_adapter(head: Any) -> None:
    """`ModelError` for an adapter on the head that is more than plain LoRA on a linear layer."""
    from peft.tuners.lora import Linear

    what = None
    if type(head) is not Linear or type(head.base_layer) is not nn.Linear:
        what = f"of type {type(head).__name__} "
    elif head.lora_variant:
        variants = {type(variant).__name__ for variant in head.lora_variant.values()}
        what = f"({', '.join(sorted(variants))}) "
    elif any(layer.bias is not None for layer in head.lora_B.values()):
        what = "with a bias of its own "
    if what is not None:
        raise ModelError(
            f"an adapter {what}on the output head (lm_head) isn't supported, only plain LoRA is: "
            f"log-probs come straight from its weights; {WAY_OUT}"
        )
    for name, dropout in head.lora_dropout.items():
        if getattr(dropout, "p", 0) > 0:
            raise ModelError(
                f"lora_dropout is {dropout.p} in the adapter {name!r} on the output head, whose "
                "log-probs know no dropout; set lora_dropout: 0 or disable_dropout: true, or "
                f"{WAY_OUT}"
            )
