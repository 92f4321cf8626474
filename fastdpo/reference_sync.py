"""TR-DPO (arXiv 2404.09656): a reference that follows the policy, ref <- a policy + (1 - a) ref.

With weights this is their average (its soft update, and for a = 1 its hard one). With LoRA the
average is of the products B A, not of the factors: a hard update copies the adapter, bit for bit; a
soft one stacks the factors and recompresses them. Called between steps, on every rank alike.
"""

import re
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from .adapters import REFERENCE_ADAPTER, adapter_parameters, overwrite_adapter
from .errors import CheckpointError, ConfigError, ModelError
from .model import is_quantized
from .reference_logps import AdapterReference, LiveReference, ModelReference

RECOMPRESSION_TOLERANCE = 1e-4
"""A soft update of a LoRA reference may change each s B A by this share of its Frobenius norm; its
rank grows to what that takes. Errors shrink by 1 - a per update, so they add up to at most
this over a."""


def check_can_follow(
    reference: LiveReference, policy: PreTrainedModel | PeftModel, alpha: float
) -> None:
    """Raises `ConfigError` or `ModelError` where `reference` can't be moved towards `policy`."""
    if isinstance(reference, ModelReference):
        if isinstance(policy, PeftModel):
            raise ConfigError(
                "sync_ref_model moves the adapter's own reference, and a ref_model has none of its "
                "weights; leave ref_model out, or merge the adapter and train in full"
            )
        own, other = (
            {name: tuple(p.shape) for name, p in m.named_parameters()}
            for m in (reference.model, policy)
        )
        if is_quantized(reference.model) or own != other:
            differing = sorted(own.items() ^ other.items())
            what = f"{differing[0][0]!r} differs" if differing else "it is quantized"
            raise ModelError(
                f"sync_ref_model averages weights, and ref_model's are not the policy's: {what}; "
                "leave ref_model out"
            )
        return
    assert isinstance(policy, PeftModel)
    if alpha == 1:
        return
    for name, module in policy.named_modules():
        if isinstance(module, BaseTunerLayer) and REFERENCE_ADAPTER in _adapters_of(module):
            reason = _not_averaged(module)
            if reason is not None:
                raise ConfigError(
                    f"sync_ref_model can't average {reason} ({name}); set ref_model_mixup_alpha: 1 "
                    "to replace the reference instead"
                )


def _adapters_of(module: BaseTunerLayer) -> set[str]:
    return {key for name in module.adapter_layer_names for key in getattr(module, name, {})}


def _not_averaged(module: BaseTunerLayer) -> str | None:
    """Why a layer's adapter is no s B A of two plain matrices, or None."""
    if not isinstance(module, LoraLayer):
        return f"adapters of {type(module).__name__}"
    if REFERENCE_ADAPTER not in module.lora_A:
        return "LoRA on embeddings"
    if module.use_dora.get(REFERENCE_ADAPTER, False):
        return "DoRA's magnitudes"
    factors = module.lora_A[REFERENCE_ADAPTER], module.lora_B[REFERENCE_ADAPTER]
    if not all(type(factor) is nn.Linear and factor.bias is None for factor in factors):
        return f"LoRA on {type(module.get_base_layer()).__name__} layers or with biases"
    return None


@torch.no_grad()
def follow(reference: LiveReference, policy: PreTrainedModel | PeftModel, alpha: float) -> None:
    """One update of `reference` towards `policy`; `alpha` in (0, 1] is the policy's share."""
    if isinstance(reference, ModelReference):
        # Tied parameters appear once.
        for own, new in zip(reference.model.parameters(), policy.parameters(), strict=True):
            _average(own, new, alpha)
        return
    assert isinstance(reference, AdapterReference) and isinstance(policy, PeftModel)
    (active,) = policy.active_adapters
    if alpha == 1:
        overwrite_adapter(policy, active)
        return
    for module in policy.modules():
        if isinstance(module, LoraLayer) and REFERENCE_ADAPTER in module.lora_A:
            _average_products(module, active, alpha)
    for name, own in adapter_parameters(policy, REFERENCE_ADAPTER):
        if ".lora_" not in name:  # modules_to_save: whole modules, averaged as such
            source = re.sub(rf"\.{REFERENCE_ADAPTER}(\.|$)", rf".{active}\1", name)
            _average(own, policy.get_parameter(source), alpha)


def _average(own: torch.Tensor, new: torch.Tensor, alpha: float) -> None:
    if alpha == 1:
        own.copy_(new)
    else:
        own.mul_(1 - alpha).add_(new.to(own.device), alpha=alpha)


def _average_products(module: LoraLayer, active: str, alpha: float) -> None:
    """[out, R] [R, in] <- the average of both products, of the smallest rank R in tolerance."""
    a, b = _factors(module, REFERENCE_ADAPTER)
    dtype = torch.promote_types(a.dtype, torch.float32)
    shares = {REFERENCE_ADAPTER: 1 - alpha, active: alpha}
    lefts, rights = [], []
    for name, share in shares.items():
        right, left = _factors(module, name)
        lefts.append((share * module.scaling[name]) * left.to(dtype))
        rights.append(right.to(dtype))
    left, right = torch.cat(lefts, dim=1), torch.cat(rights)
    left, right = recompress(left, right, RECOMPRESSION_TOLERANCE)
    _set_product(module, right.to(a.dtype), left.to(b.dtype), scaling=1.0)


def recompress(
    left: torch.Tensor, right: torch.Tensor, tolerance: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of `left [m, k] @ right [k, n]` of the smallest rank (at least 1) whose product errs
    by at most `tolerance` of the Frobenius norm: QR of both, then the SVD of a k x k core."""
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, s, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    tail = s.flip(0).square().cumsum(0).flip(0).sqrt()  # tail[r]: the error of rank r
    rank = max(1, int((tail > tolerance * tail[0]).sum()))
    root = s[:rank].sqrt()
    return (q_left @ u[:, :rank]) * root, root[:, None] * (vh[:rank] @ q_right.T)


def _factors(module: LoraLayer, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A [R, in] and B [out, R] of an adapter."""
    a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
    assert isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
    return a, b


def _set_product(module: LoraLayer, a: torch.Tensor, b: torch.Tensor, scaling: float) -> None:
    """Puts factors of any rank into the reference adapter of a layer."""
    rank = a.shape[0]
    for factors, weight in ((module.lora_A, a), (module.lora_B, b)):
        linear = factors[REFERENCE_ADAPTER]
        assert isinstance(linear, nn.Linear)
        linear.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        linear.out_features, linear.in_features = weight.shape
    module.r[REFERENCE_ADAPTER] = rank
    module.scaling[REFERENCE_ADAPTER] = scaling


# ---- checkpoints -----------------------------------------------------------------------------


def reference_state(reference: LiveReference) -> dict[str, Any]:
    """What a checkpoint must hold of a reference that moves: its tensors, and LoRA's scales."""
    if isinstance(reference, ModelReference):
        return {"weights": {n: p.detach() for n, p in reference.model.named_parameters()}}
    assert isinstance(reference, AdapterReference)
    scales = {
        name: module.scaling[REFERENCE_ADAPTER]
        for name, module in reference.model.named_modules()
        if isinstance(module, LoraLayer) and REFERENCE_ADAPTER in module.scaling
    }
    own = adapter_parameters(reference.model, REFERENCE_ADAPTER)
    return {"weights": {name: p.detach() for name, p in own}, "scales": scales}


@torch.no_grad()
def load_reference_state(reference: LiveReference, state: dict[str, Any]) -> None:
    """Puts back what `reference_state` gave; raises `CheckpointError` if it is another model's."""
    model = reference.model
    own = dict(model.named_parameters())
    missing = sorted(state["weights"].keys() - own.keys())
    if missing:
        raise CheckpointError(f"the checkpoint's reference has {missing[0]!r}, the model has not")
    for name, tensor in state["weights"].items():
        parameter = own[name]
        parameter.data = tensor.to(parameter.device)
    for name, scale in state.get("scales", {}).items():
        module = model.get_submodule(name)
        assert isinstance(module, LoraLayer)
        if REFERENCE_ADAPTER in module.lora_A:  # not on embeddings, whose rank never changes
            a, b = _factors(module, REFERENCE_ADAPTER)
            _set_product(module, a.detach(), b.detach(), scale)
