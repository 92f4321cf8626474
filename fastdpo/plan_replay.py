"""Predicts a step's memory by running it without memory: the model's own code on fake tensors.

The twin of a model is built from its config on the `meta` device and then given fake tensors,
which have shapes, dtypes and lifetimes but no storage. Its packed forward and its backward are run
for one pack, and what they allocate and free is counted (plan_tracker.py). Kernels that need real
tensors have stand-ins (plan_standins.py). Layers repeat, so deep models are run at two smaller
depths and extrapolated: at each of three moments of a step memory is linear in the depth.
"""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from fastdpo_kernels.linear_logps_lora import beside_adapter

from .accumulate import Fp32Accumulation
from .adapters import name_all_linear
from .attention import register_backend, registered_name
from .batch import Pack
from .checkpointing import checkpoint_activations
from .errors import FastDPOError, ModelError
from .fp8 import Fp8Linear, convert_layers
from .head import head_lora, output_head
from .logps import decoder_output
from .lora import use_lean_lora
from .model import base_model, disable_dropout
from .offload import IN_FLIGHT, LEAST_BYTES, storages_of, takes
from .plan_standins import (
    STANDINS,
    PlannedFp8Linear,
    PlannedHead,
    PlannedOffload,
    PlannedQuantizedLinear,
    quantized_bytes,
    run_planned_attention,
)
from .plan_tracker import GRADIENTS, MemoryTracker, label_modules
from .rows import gather_rows

_FLASH = register_backend("planned", run_planned_attention)
_SDPA = registered_name("sdpa", plain="sdpa")


@dataclass(frozen=True)
class TwinSpec:
    """A model that is to be trained, as far as memory goes.

    dtype: of the weights. bits: 4 or 8 where bitsandbytes holds the frozen linear layers, with
    `nested` constants; None otherwise. fp8: whether they are e4m3 instead. trainable: the names of
    the parameters that are trained, where it is not PEFT's adapter or, without one, the whole
    model. lean_lora: as the option.
    """

    config: PretrainedConfig
    dtype: torch.dtype
    peft_config: PeftConfig | None = None
    bits: int | None = None
    nested: bool = False
    fp8: bool = False
    trainable: frozenset[str] | None = None
    lean_lora: bool = True


@dataclass(frozen=True)
class StepSettings:
    """How a step is computed, as far as memory goes.

    checkpointing: False, "selective" or True (every layer). several_packs: of a step, whose 16-bit
    gradients are then summed in fp32; has_gradients: they are there already when the pack begins.
    in_backward: each is applied and freed as soon as it is whole.
    """

    cuda: bool = False
    bf16: bool = False
    flash: bool = False
    triton: bool = False
    padded: bool = False
    checkpointing: bool | str = True
    offload: bool = False
    workspace_bytes: int = 256 * 2**20
    several_packs: bool = False
    has_gradients: bool = False
    in_backward: bool = False


@dataclass(frozen=True)
class StepMemory:
    """Bytes beyond weights and optimizer states at the highest moment of a step, by kind; bytes
    held on the host instead; FLOPs of the decoder's matrix products, attention's left out: all,
    with what is recomputed, and those of the forward pass."""

    kinds: dict[str, int]
    host_bytes: int
    flops: int
    forward_flops: int

    @property
    def total(self) -> int:
        return sum(self.kinds.values())


# ---- the twin -----------------------------------------------------------------------------------


def build_twin(
    spec: TwinSpec, n_layers: int | None = None, cuda: bool = False
) -> PreTrainedModel | PeftModel:
    """The model on the `meta` device, with its adapter; of `n_layers` layers if given. cuda: an fp8
    base is computed with that device's kernel.

    Raises `ModelError` where transformers has no causal language model for the config.
    """
    config = copy.deepcopy(spec.config)
    if n_layers not in (None, config.get_text_config().num_hidden_layers):
        _shorten(config, n_layers)
    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=spec.dtype)
    except Exception as error:  # foreign code again
        raise ModelError(
            f"no plan for a {config.model_type!r} model: {_first_line(error)}"
        ) from error
    if spec.bits is not None:
        _quantize(model, spec.bits, spec.nested)
    if spec.peft_config is not None:
        adapter = copy.deepcopy(spec.peft_config)
        name_all_linear(model, adapter)
        try:
            with torch.device("meta"):
                model = get_peft_model(model, adapter)
        except ValueError as error:
            raise ModelError(f"PEFT can't add the adapter: {_first_line(error)}") from error
        if spec.lean_lora:
            use_lean_lora(model, log=False)
    if spec.fp8:
        convert_layers(model, PlannedFp8Linear if cuda else Fp8Linear)
    if spec.trainable is not None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in spec.trainable)
    return model


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _shorten(config: PretrainedConfig, n_layers: int) -> None:
    text = config.get_text_config()
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:n_layers]
    text.num_hidden_layers = n_layers


def _quantize(model: PreTrainedModel, bits: int, nested: bool) -> None:
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            module.__class__ = PlannedQuantizedLinear
            module.stored = quantized_bytes(  # type: ignore[assignment]
                module.in_features, module.out_features, bits, nested
            )
            module.requires_grad_(False)


def weight_bytes(model: nn.Module) -> tuple[int, int]:
    """(frozen, trainable) bytes of parameters and buffers; quantized ones as they are stored."""
    stored: dict[int, Any] = {
        id(module.weight): module.stored
        for module in model.modules()
        if isinstance(module, PlannedQuantizedLinear)
    }
    sizes = [0, 0]
    for parameter in model.parameters():
        sizes[parameter.requires_grad] += stored.get(id(parameter), parameter.nbytes)
    return sizes[0] + sum(buffer.nbytes for buffer in model.buffers()), sizes[1]


def _depths(spec: TwinSpec) -> tuple[int, ...]:
    """The depths at which to run: that of the model, or two smaller ones whose layers are whole
    periods of its pattern."""
    text = spec.config.get_text_config()
    depth, types = text.num_hidden_layers, getattr(text, "layer_types", None) or []
    period = next(
        (p for p in range(1, depth) if all(a == b for a, b in zip(types, types[p:], strict=False))),
        depth,
    )
    period = period if types else 1
    low = max(period, 2)
    if isinstance(getattr(type(text), "layer_types", None), property):  # can't be shortened
        return (depth,)
    uneven = ("layers_to_transform", "rank_pattern", "layer_replication")
    if any(getattr(spec.peft_config, name, None) for name in uneven):
        return (depth,)
    return (low, 2 * low) if depth > 2 * low else (depth,)


def _give_fake_tensors(model: nn.Module, mode: FakeTensorMode) -> None:
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        if id(tensor) not in made:
            with mode:
                new: Tensor = torch.empty(tensor.shape, dtype=tensor.dtype)
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, requires_grad=tensor.requires_grad)
            made[id(tensor)] = new
        return made[id(tensor)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                tensors[name] = fake(tensor)  # pyright: ignore[reportArgumentType]


# ---- the replay ---------------------------------------------------------------------------------


def replay(spec: TwinSpec, pack: Pack, settings: StepSettings) -> StepMemory:
    """What a forward and a backward pass on `pack` allocate, beyond weights and states.

    Raises `ModelError` for a model whose forward reads numbers, such as a router that decides on
    the host: it can't run without them.
    """
    depth = spec.config.get_text_config().num_hidden_layers
    runs = {n: _run(spec, n, pack, settings) for n in _depths(spec)}
    if len(runs) == 1:
        phases, *sums = next(iter(runs.values()))
    else:
        (a, (low, *low_sums)), (b, (high, *high_sums)) = runs.items()
        phases = {
            phase: Counter(
                {
                    kind: _line(a, low[phase][kind], b, high[phase][kind], depth)
                    for kind in {**low[phase], **high[phase]}
                }
            )
            for phase in high
        }
        sums = [_line(a, x, b, y, depth) for x, y in zip(low_sums, high_sums, strict=True)]
    highest = max(phases.values(), key=lambda kinds: sum(kinds.values()))
    return StepMemory({kind: n for kind, n in highest.items() if n}, *sums)


def _line(a: int, at_a: int, b: int, at_b: int, x: int) -> int:
    return max(at_a + (at_b - at_a) * (x - a) // (b - a), 0)


def _run(
    spec: TwinSpec, n_layers: int, pack: Pack, settings: StepSettings
) -> tuple[dict[str, Counter[str]], int, int, int]:
    model = build_twin(spec, n_layers, settings.cuda)
    base = base_model(model)
    mode = FakeTensorMode()
    _give_fake_tensors(model, mode)
    disable_dropout(model)
    model.train()
    if not settings.padded:
        base.set_attn_implementation(_FLASH if settings.flash else _SDPA)
    if settings.checkpointing:
        checkpoint_activations(model, settings.checkpointing, {})
    tracker = MemoryTracker(granularity=512 if settings.cuda else 1, standins=STANDINS)
    weights = [*model.parameters(), *model.buffers()]
    tracker.ignore(weights)
    _watch_gradients(model, tracker, settings, mode)
    unlabel = label_modules(model, tracker)
    offload = contextlib.nullcontext()
    if settings.offload:
        known = storages_of(weights)
        least = LEAST_BYTES if settings.cuda else 0
        offload = PlannedOffload(
            lambda tensor: takes(tensor, torch.device("cpu"), known, least), IN_FLIGHT
        )
    try:
        with mode, tracker:
            fake = pack.map_tensors(lambda t: torch.empty(t.shape, dtype=t.dtype))
            with torch.autocast("cpu", torch.bfloat16, enabled=settings.bf16), offload:
                logps = _forward(base, fake, tracker, settings)
            tracker.mark("backward begins")
            forward_flops = tracker.flops
            logps.backward(torch.empty_like(logps))
    except FastDPOError:
        raise
    except Exception as error:  # foreign code: whatever it raises, it can't run without numbers
        raise ModelError(
            f"no plan for {type(base).__name__}, whose forward or backward can't run on tensors "
            f"without numbers ({type(error).__name__}: {_first_line(error)})"
        ) from error
    finally:
        unlabel()
    host = offload.host_bytes if isinstance(offload, PlannedOffload) else 0
    return tracker.peaks, host, tracker.flops, forward_flops


def _forward(
    base: PreTrainedModel, pack: Pack, tracker: MemoryTracker, settings: StepSettings
) -> Tensor:
    middle = base.config.get_text_config().num_hidden_layers // 2
    layers = _layers(base)

    def at_middle(module: nn.Module, args: tuple, kwargs: dict) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.requires_grad:
            hidden.register_hook(lambda _: tracker.mark("backward ends"))

    handle = layers[middle].register_forward_pre_hook(at_middle, with_kwargs=True)
    try:
        hidden = decoder_output(base, pack)[0].flatten(0, 1)  # [T, D]
    finally:
        handle.remove()
    tracker.stack.append("log-probs")
    rows = gather_rows(hidden, pack.predict)
    head = output_head(base)
    rounded = torch.bfloat16 if settings.bf16 else rows.dtype
    adapter, lora = None, head_lora(head)
    if lora is not None:  # as linear_logps itself joins it
        a, adapter, scaling = lora
        rows = beside_adapter(rows, a, pack.targets, rounded, float(scaling), -100)
    logps = PlannedHead.apply(
        rows, head.weight, adapter, rounded, settings.workspace_bytes, settings.triton
    )
    tracker.stack.pop()
    assert isinstance(logps, Tensor)
    return logps


def _layers(base: PreTrainedModel) -> nn.ModuleList:
    """The decoder's layers: its longest list of modules."""
    lists = [m for m in base.modules() if isinstance(m, nn.ModuleList)]
    depth = base.config.get_text_config().num_hidden_layers
    found = [m for m in lists if len(m) == depth]
    if not found:
        raise ModelError(f"no plan for {type(base).__name__}: it has no list of {depth} layers")
    return found[0]


def _watch_gradients(
    model: nn.Module, tracker: MemoryTracker, settings: StepSettings, mode: FakeTensorMode
) -> None:
    trainable = [p for p in model.parameters() if p.requires_grad]
    accumulation = Fp32Accumulation(trainable) if settings.several_packs else None
    for parameter in trainable:
        if not settings.has_gradients:
            pass
        elif parameter.dtype in (torch.float32, torch.float64):
            with mode:
                parameter.grad = torch.empty_like(parameter)
            tracker.retag(parameter.grad, GRADIENTS)
        elif accumulation is not None and parameter in accumulation.sums:
            with mode:
                total = torch.empty_like(parameter, dtype=torch.float32)
            accumulation.sums[parameter] = total
            tracker.retag(total, GRADIENTS)

        def whole(p: Tensor) -> None:
            if p.grad is None:
                return
            if settings.in_backward:
                p.grad = None
            else:
                tracker.retag(p.grad, GRADIENTS)

        parameter.register_post_accumulate_grad_hook(whole)


@contextlib.contextmanager
def measured(model: nn.Module) -> Iterator[MemoryTracker]:
    """Counts what real steps of `model` allocate inside the context, by the same kinds."""
    tracker = MemoryTracker()
    tracker.ignore([*model.parameters(), *model.buffers()])
    unlabel = label_modules(model, tracker)
    try:
        with tracker:
            yield tracker
    finally:
        unlabel()
