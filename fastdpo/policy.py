"""The models of a run, made ready: the policy with its adapter, and the reference beside it.

`prepare_models` adds the adapter, places the weights, switches dropout off, takes the reference's
copy and binds the packed forward (logps.py), in that order. `save_memory` then switches gradient
checkpointing and offloading on, as options or plan say.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel

from fastdpo_kernels.impls import why_not_triton

from .adapters import add_adapter, refuse_prompt_learning, refuse_routers
from .batch import Pack
from .body import apply_liger, check_cuda_graphs, compile_layers, wants_compile, wants_liger
from .checkpointing import checkpoint_activations, checkpoint_kwargs
from .config import DPOConfig
from .errors import ConfigError, ModelError
from .fp8 import check_base_precision
from .logps import PackedForwardInfo, PackedOutput, prepare_packed_forward
from .lora import use_lean_lora
from .model import base_model, disable_dropout, is_quantized, keep_activations, keep_unpacked
from .offload import OffloadActivations
from .reference_cache import ReferenceCache
from .reference_key import about_reference, describe_reference
from .reference_logps import (
    LiveReference,
    NoReference,
    make_reference,
    reference_kind,
    refuse_reference_options,
)
from .reference_sync import check_can_follow
from .router_loss import RouterLoss, make_router_loss
from .runtime import broadcast_from_rank_0
from .training_options import PLANNED

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackForward:
    """Calls a model on a pack, under bf16 autocast if asked: (model, pack) -> token_logps [N]."""

    device_type: str
    bf16: bool
    saving: Callable[[], AbstractContextManager] = nullcontext  # where autograd saves what it needs
    cuda_graphs: bool = False

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device_type, torch.bfloat16, enabled=self.bf16)

    def __call__(self, model: nn.Module, pack: Pack) -> torch.Tensor:
        return self.with_stats(model, pack, ()).token_logps

    def with_stats(
        self, model: nn.Module, pack: Pack, stats: Sequence[str], router: bool = False
    ) -> PackedOutput:
        """token_logps [N], those `stats` of `linear_logps`, and the router's sums if asked for."""
        if self.cuda_graphs:  # what the last pass left in graphs' memory has been used
            torch.compiler.cudagraph_mark_step_begin()
        with self.autocast(), self.saving():
            return model(pack=pack, token_stats=stats, router_sums=router)


@dataclass(frozen=True)
class Models:
    """What a run trains and compares with."""

    policy: PreTrainedModel | PeftModel
    reference: LiveReference
    forward: PackForward
    packed: PackedForwardInfo
    packed_reference: PackedForwardInfo
    router: RouterLoss | None
    compiled: bool


def prepare_models(
    policy: PreTrainedModel | PeftModel,
    ref_model: PreTrainedModel | PeftModel | None,
    peft_config: PeftConfig | None,
    args: DPOConfig,
    *,
    needs_reference: bool = True,
) -> Models:
    """Raises `ConfigError` for options that contradict, `ModelError` for what a model can't do."""
    if peft_config is not None:
        if isinstance(policy, PeftModel):
            raise ConfigError(
                "model already carries an adapter, and peft_config asks for another; leave "
                "peft_config out to train the one it has, or merge it first (merge_and_unload)"
            )
        policy = add_adapter(policy, peft_config)
    elif isinstance(policy, PeftModel):
        for config in policy.peft_config.values():
            refuse_prompt_learning(config)
        refuse_routers(policy)
    if is_quantized(base_model(policy)) and not isinstance(policy, PeftModel):
        raise ModelError("quantized weights can't be trained; pass peft_config (--use_peft)")
    _place(policy, args.device)
    if args.disable_dropout:
        disable_dropout(policy)
    broadcast_from_rank_0(p for p in policy.parameters() if p.requires_grad)

    forward = PackForward(args.device.type, bool(args.bf16), cuda_graphs=args.cuda_graphs)
    if needs_reference:
        reference = make_reference(
            reference_kind(args, policy, ref_model),
            forward=forward,
            model=policy,
            ref_model=ref_model,
            for_precompute=args.computes_reference_first,
        )
    else:
        refuse_reference_options(args, ref_model)
        reference = NoReference(policy)
    if args.sync_ref_model:
        check_can_follow(reference, policy, args.ref_model_mixup_alpha)
    liger = wants_liger(base_model(policy), args)
    if liger:
        apply_liger(base_model(policy))
    check_base_precision(policy, args.base_precision, args.device)
    if args.lean_lora:
        for model in {id(m): m for m in (policy, reference.model)}.values():
            use_lean_lora(model)
    attention = args.attn_implementation
    packed = packed_reference = _bind(policy, args, forward, args.packing_mode, attention)
    if reference.model is not policy:
        _place(reference.model, args.device)
        if wants_liger(base_model(reference.model), args):
            apply_liger(base_model(reference.model))
        if packed.mode == "padded" != args.packing_mode:  # fallen back, to each model's own
            attention = None
        packed_reference = _bind(
            reference.model, args, forward, packed.mode, attention, is_reference=True
        )
    with forward.autocast():
        router = make_router_loss(base_model(policy), args.router_aux_loss_coef)
    if router is not None:
        logger.info("router loss: %g times load balancing", router.coefficient)
    compiled = wants_compile(base_model(policy), packed, args, liger)
    check_cuda_graphs(args, compiled)
    for model in {id(m): m for m in (policy, reference.model)}.values() if compiled else ():
        compile_layers(base_model(model), args.cuda_graphs)
    logger.info(
        "packs: %s; attention: %s; reference: %s", packed.mode, packed.backend, reference.name
    )
    return Models(policy, reference, forward, packed, packed_reference, router, compiled)


def save_memory(models: Models, args: DPOConfig, rebind: bool = False) -> PackForward:
    """Switches gradient checkpointing on, and returns the policy's forward with offloading, both
    as `args` say. Raises `ConfigError`.

    rebind: logps_workspace_bytes is not what the models were prepared with.
    """
    if rebind:
        packed = models.packed
        _bind(models.policy, args, models.forward, packed.mode, packed.backend)
    check_cuda_graphs(args, models.compiled)
    if args.gradient_checkpointing:
        kwargs = args.gradient_checkpointing_kwargs
        if models.router is not None and checkpoint_kwargs(kwargs).get("use_reentrant"):
            raise ConfigError(
                "gradient_checkpointing_kwargs use_reentrant: true loses the gradient of the "
                "router's loss; leave it out, or set router_aux_loss_coef: 0"
            )
        if models.compiled and args.gradient_checkpointing == "selective":
            raise ConfigError(
                "gradient_checkpointing 'selective' keeps attention's output, which compiled "
                "layers hide; use 'full', or compile: off"
            )
        backend = models.packed.backend
        checkpoint_activations(models.policy, args.gradient_checkpointing, kwargs, backend)
    if not args.activation_offloading:
        return models.forward
    offload = OffloadActivations(models.policy)
    return replace(models.forward, saving=lambda: offload)


def open_reference_cache(
    reference: LiveReference, packed: PackedForwardInfo, args: DPOConfig
) -> ReferenceCache:
    """The part of `args.ref_cache_dir` that belongs to this very reference, hashed here."""
    assert args.ref_cache_dir is not None
    description = describe_reference(
        reference.model,
        reference.adapters,
        packed,
        bf16=bool(args.bf16),
        tf32=bool(args.tf32) and args.device.type == "cuda",
    )
    about = about_reference(reference.model, reference.name)
    cache = ReferenceCache(args.ref_cache_dir, description, about)
    logger.info("reference cache: %s of %s", cache.name, args.ref_cache_dir)
    return cache


def _place(model: nn.Module, device: torch.device) -> None:
    base = base_model(model)
    if not hasattr(base, "hf_device_map"):  # else accelerate has placed it
        model.to(device)
    if is_quantized(base):
        keep_unpacked(base)
        keep_activations(base)


def _bind(
    model: nn.Module,
    args: DPOConfig,
    forward: PackForward,
    mode: str,
    attention: str | None,
    is_reference: bool = False,
) -> PackedForwardInfo:
    workspace = args.logps_workspace_bytes
    if isinstance(workspace, str):  # auto: until there is a plan
        workspace = PLANNED["logps_workspace_bytes"]
    if args.logps_impl == "triton":
        reason = why_not_triton(args.device)
        if reason is not None:
            raise ConfigError(f"logps_impl='triton' can't run here: {reason}; use 'auto'")
    with forward.autocast():
        return prepare_packed_forward(
            base_model(model),
            attn_implementation=attention,
            logps_impl=args.logps_impl,
            workspace_bytes=workspace,
            mode=mode,
            is_reference=is_reference,
        )
