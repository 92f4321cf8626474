"""The decoder's layers, made faster: liger-kernel's, or torch.compile layer by layer.

Attention stays outside the compiled graphs: its segments differ from pack to pack, and it is one
kernel already. What remains depends on a pack's length alone, and packs are padded at their tail to
few lengths, so that few graphs serve a run. The head is never touched: see logps.py. On a GPU what
was compiled may be recorded as CUDA graphs, whose launches cost the host nothing.
"""

from __future__ import annotations

import functools
import logging
import types
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .config import DPOConfig
from .errors import ConfigError, MissingPackageError, ModelError
from .logps import PackedForwardInfo, decoder_of
from .model import is_quantized

logger = logging.getLogger(__name__)

N_LENGTHS = 8
LENGTH_STEP = 64  # tokens; what tiles of matrix products divide by
_MOST_GRAPHS = 64  # lengths, times policy and reference, times training and evaluation
_BACKEND = "inductor"


# ---- liger-kernel ------------------------------------------------------------------------------


def apply_liger(model: PreTrainedModel) -> None:
    """liger-kernel's norms, rotary embedding and gated MLP in place of the model's own.

    Not its fused loss: log-probs are ours. Raises `MissingPackageError` without the package,
    `ModelError` for a model that it doesn't have, `ConfigError` where its kernels can't run.
    """
    try:
        from liger_kernel.transformers import (  # pyright: ignore[reportMissingImports]
            _apply_liger_kernel_to_instance,
        )
        from liger_kernel.transformers.monkey_patch import (  # pyright: ignore[reportMissingImports]
            MODEL_TYPE_TO_APPLY_LIGER_FN,
        )
    except ImportError as error:
        raise MissingPackageError(
            "use_liger_kernel needs liger-kernel: pip install liger-kernel"
        ) from error
    if model.device.type != "cuda":
        raise ConfigError(
            f"use_liger_kernel: its kernels need a GPU, this model is on {model.device.type}; "
            "leave it out"
        )
    kind = model.config.model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ModelError(
            f"use_liger_kernel: liger-kernel has no layers for {kind!r}; use compile: layers"
        )
    _apply_liger_kernel_to_instance(
        model=model, cross_entropy=False, fused_linear_cross_entropy=False
    )
    logger.info("layers: liger-kernel's for %s", kind)


def wants_liger(model: PreTrainedModel, args: DPOConfig) -> bool:
    """Whether liger-kernel's layers are to be taken: where asked for, and under `compile: auto`
    on a GPU where the package is there and has the model. Its layers are not recorded as graphs.
    """
    if args.use_liger_kernel:
        return True
    if args.compile != "auto" or args.cuda_graphs or model.device.type != "cuda":
        return False
    try:
        from liger_kernel.transformers.monkey_patch import (  # pyright: ignore[reportMissingImports]
            MODEL_TYPE_TO_APPLY_LIGER_FN,
        )
    except ImportError:
        return False
    return model.config.model_type in MODEL_TYPE_TO_APPLY_LIGER_FN


# ---- torch.compile -----------------------------------------------------------------------------


def wants_compile(
    model: PreTrainedModel, packed: PackedForwardInfo, args: DPOConfig, liger: bool
) -> bool:
    """Whether the layers are to be compiled; `ConfigError` where that is asked for and can't be.

    `auto` compiles where it can and says why it doesn't elsewhere. liger: they are its own.
    """
    if args.compile == "off":
        return False
    reason = None
    if packed.mode == "padded":
        reason = "padded batches have a shape each"
    elif is_quantized(model):
        reason = "quantized layers break its graphs"
    elif layers_of(model) is None:
        reason = f"{type(model).__name__} has no list of layers"
    elif args.compile == "auto" and args.device.type != "cuda":
        reason = "it pays on a GPU"
    elif args.compile == "auto" and liger:
        reason = "liger-kernel's layers are fused already"
    if reason is None:
        return True
    if args.compile == "layers":
        raise ConfigError(f"'compile' is 'layers', but {reason}; use 'auto' or 'off'")
    logger.info("layers: not compiled, %s", reason)
    return False


def layers_of(model: PreTrainedModel) -> nn.ModuleList | None:
    """The decoder's layers, where they stand in a list named so."""
    layers = getattr(decoder_of(model), "layers", None)
    return layers if isinstance(layers, nn.ModuleList) else None


def pack_lengths(max_tokens: int) -> tuple[int, ...]:
    """The lengths that packs of at most `max_tokens` are padded to, ascending."""
    step = -(-max_tokens // (N_LENGTHS * LENGTH_STEP)) * LENGTH_STEP
    return tuple(sorted({min(step * i, max_tokens) for i in range(1, N_LENGTHS + 1)}))


def check_cuda_graphs(args: DPOConfig, compiled: bool) -> None:
    """`ConfigError` where `cuda_graphs` is asked for and there is nothing to record, or memory of a
    graph's would be read after its next run."""
    if not args.cuda_graphs:
        return
    reason = None
    if args.device.type != "cuda":
        reason = f"they need a GPU, and this is {args.device.type}"
    elif not compiled:
        reason = "they record compiled layers, and these are not compiled; set compile: layers"
    elif args.gradient_checkpointing in (True, "selective"):  # auto: until there is a plan
        reason = "gradient checkpointing runs layers twice a pass; set gradient_checkpointing: none"
    elif args.activation_offloading is True:
        reason = "activation_offloading copies activations while graphs go on; switch it off"
    if reason is not None:
        raise ConfigError(f"'cuda_graphs' can't be had: {reason}, or leave cuda_graphs out")


def compile_layers(model: PreTrainedModel, cuda_graphs: bool = False) -> None:
    """Compiles each layer of the decoder for static shapes; layers of one class share graphs.

    Gradient checkpointing stays around the compiled function: what it recomputes is compiled too.
    Calls without a pack, such as generation's, run as they were. cuda_graphs: every part of a layer
    is recorded, for every layer and length; whoever calls the model says where a pass begins
    (`torch.compiler.cudagraph_mark_step_begin`). Attention's arguments are copied in and out.
    """
    layers = layers_of(model)
    if layers is None:
        raise ModelError(f"{type(model).__name__} has no list of layers to compile; compile: off")
    limit = torch._dynamo.config
    limit.recompile_limit = max(limit.recompile_limit, _MOST_GRAPHS)
    for layer in layers:
        function = getattr(layer.forward, "__func__", type(layer).forward)
        # transformers may checkpoint inside forward, around this one.
        plain = getattr(function, "__wrapped__", function)
        forward = _compiled_forward(plain, plain is not function, cuda_graphs)
        layer.forward = types.MethodType(forward, layer)
    for parameter in layers.parameters() if cuda_graphs else ():
        if parameter.requires_grad:  # else .grad is the graph's own memory, until its next run
            parameter.register_hook(torch.clone)
    how = ", recorded as CUDA graphs" if cuda_graphs else ""
    logger.info("layers: %d compiled by %s%s", len(layers), _BACKEND, how)


@functools.cache
def _compiled_forward(plain: Any, checkpoints: bool, cuda_graphs: bool = False) -> Any:
    options: Any = {"triton.cudagraphs": True} if cuda_graphs else None
    compiled = torch.compile(plain, backend=_BACKEND, dynamic=False, options=options)

    @functools.wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        function = plain if kwargs.get("pack_layout") is None else compiled
        if checkpoints and self.gradient_checkpointing and self.training:
            function = functools.partial(function, self, **kwargs)
            return self._gradient_checkpointing_func(function, *args)
        return function(self, *args, **kwargs)

    return forward


def compiled_graphs() -> int:
    """How many graphs this process has compiled; no device work."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
