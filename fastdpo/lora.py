"""LoRA's products without its overhead: PEFT's layers with another forward.

PEFT computes base(x) + s B A x as four operations over [T, out] for every layer, and keeps a copy
of x in the adapter's dtype for each. Here layers that share their input (q, k, v; gate, up) are one
autograd function: x is kept once, as it is computed with; A x of all is one product; s B is added
inside the product that makes it; backward, the gradients of x are summed inside theirs. Adapters
stay in their own dtype and are cast as small matrices. What autograd keeps beside x has the rank's
width. Modules, names, checkpoints and merging are PEFT's, and so is what this can't do. Hooks that
torch keeps for all modules at once (FLOP counters) see the layers, not the modules inside them.
"""

from __future__ import annotations

import logging
import types
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

logger = logging.getLogger(__name__)

# Called one after the other with one input, in transformers' decoders.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
_QUANTIZED = ("Linear4bit", "Linear8bitLt")  # peft.tuners.lora.bnb's, which may not be there


# ---- which layers --------------------------------------------------------------------------------


def use_lean_lora(model: nn.Module, log: bool = True) -> int:
    """Gives PEFT's LoRA layers in `model` the forward below; returns how many.

    Logs which are left to PEFT, and why. Doing it twice is doing it once.
    """
    layers, left = {}, []
    for name, module in model.named_modules():
        if isinstance(module, lora.LoraLayer):
            reason = _why_not(module)
            if reason is None:
                layers[name] = module
            else:
                left.append((reason, name))
    for family in _families(layers):
        siblings = Siblings(family)
        for place, layer in enumerate(family):
            layer._fastdpo_siblings, layer._fastdpo_place = siblings, place
            layer.forward = types.MethodType(_forward, layer)
    for name, layer in layers.items():
        layer._fastdpo_name, layer._fastdpo_told = name, False
    if not log:
        return len(layers)
    for reason, n in Counter(reason for reason, _ in left).items():
        example = next(name for why, name in left if why == reason)
        logger.warning("LoRA: PEFT's own forward for %d layers, %s: %s, …", n, reason, example)
    if layers:
        logger.info("LoRA: %d layers without copies of activations", len(layers))
    return len(layers)


def _why_not(layer: Any) -> str | None:
    """What keeps a layer from the lean forward as long as its model lives."""
    kind = type(layer)
    quantized = kind.__name__ in _QUANTIZED and kind.__module__ == "peft.tuners.lora.bnb"
    if kind is not lora.Linear and not quantized:
        return f"which are lora.{kind.__name__}"
    if getattr(layer.forward, "__func__", None) not in (kind.forward, _forward):
        return "whose forward was replaced"
    return next((why for name in layer.lora_A if (why := _special(layer, name))), None)


_HOOKED = "with hooks inside"


def _special(layer: Any, adapter: str) -> str | None:
    """What `adapter` does that is not base(x) + s B A x.

    Asked in every pass, as hooks may come late: so by dicts, which cost a tenth of attributes.
    """
    if adapter in layer.lora_variant:
        return f"of type {type(layer.lora_variant[adapter]).__name__}"
    modules = layer._modules
    base, dropout = modules["base_layer"], modules["lora_dropout"]._modules[adapter]
    down, up = (modules[name]._modules[adapter] for name in ("lora_A", "lora_B"))
    if type(dropout) is not nn.Identity and getattr(dropout, "p", 1):
        return "with dropout"
    if down._parameters.get("bias") is not None or up._parameters.get("bias") is not None:
        return "with a bias"
    for one in (base, down, up, dropout):
        if one._forward_hooks or one._forward_pre_hooks:
            return _HOOKED
        if one._backward_hooks or one._backward_pre_hooks:
            return _HOOKED
    for parameter in base._parameters.values():
        if parameter is not None and parameter.requires_grad:
            return "whose base is trained"
    return None


def _families(layers: dict[str, Any]) -> list[list[Any]]:
    """`layers` by name, those with one parent and one input together, in the order of calls."""
    families: dict[tuple[str, Any], list[tuple[int, Any]]] = {}
    for name, layer in layers.items():
        parent, _, own = name.rpartition(".")
        names = next((names for names in SIBLINGS if own in names), (own,))
        families.setdefault((parent, names), []).append((names.index(own), layer))
    return [[layer for _, layer in sorted(f, key=lambda one: one[0])] for f in families.values()]


class Siblings:
    """LoRA layers that are called with one input: the first to be called computes for all.

    x: that input; outputs: by place, what the others have not asked for yet, with their adapter;
    moment: what else the outputs belong to.
    """

    def __init__(self, layers: list[Any]):
        self.layers = layers
        self.x: Tensor | None = None
        self.moment: tuple[int, bool] | None = None
        self.outputs: dict[int, tuple[str, Tensor]] = {}
        self.missed = 0

    def __getstate__(self) -> dict[str, Any]:
        """Copies have nothing that waits: it belongs to a pass of the original's."""
        return {**self.__dict__, "x": None, "moment": None, "outputs": {}, "missed": 0}

    def take(self, place: int, x: Tensor) -> Tensor | None:
        """The output of the layer at `place` if it has been computed already, from x as it is now
        and under the adapter that it has now."""
        if self.x is not x or place not in self.outputs or self.moment != _moment(x):
            return None
        if self.outputs[place][0] != _active(self.layers[place]):
            return None
        _, out = self.outputs.pop(place)
        if not self.outputs:
            self.x = None
            if self.missed:
                self.missed = 0
        return out

    def keep(self, x: Tensor, outputs: dict[int, tuple[str, Tensor]]) -> None:
        if self.outputs:  # a pass was cut short, or these layers have inputs of their own
            self.missed += 1
        if self.missed > 1:
            self._part()
        elif outputs or self.outputs:
            self.x, self.outputs = (x if outputs else None), outputs
            self.moment = _moment(x)

    def _part(self) -> None:
        for layer in self.layers:
            layer._fastdpo_siblings, layer._fastdpo_place = Siblings([layer]), 0
        self.x, self.outputs = None, {}
        logger.info(
            "LoRA: %d layers do not share their input, each computes alone", len(self.layers)
        )


def _moment(x: Tensor) -> tuple[int, bool]:
    """How often x was written to, where that is counted, and whether a graph is made."""
    uncounted = torch.compiler.is_compiling() or x.is_inference()
    return 0 if uncounted else x._version, torch.is_grad_enabled()


# ---- the forward ---------------------------------------------------------------------------------


def _active(layer: Any) -> str | None:
    """The one adapter that `layer` adds to its base now; None where PEFT's own forward must run."""
    if layer.disable_adapters or layer.merged:
        return None
    names = _names(layer)
    return names[0] if len(names) == 1 and _special(layer, names[0]) is None else None


def _names(layer: Any) -> list[str]:
    """The adapters that `layer` has of those that are active."""
    own = layer._modules["lora_A"]._modules
    return [name for name in layer.active_adapters if name in own]


def _tell(layer: Any) -> None:
    """Says once that a layer has been left to PEFT since it was made lean, and why."""
    names = _names(layer)
    if layer._fastdpo_told or layer.disable_adapters or layer.merged or len(names) != 1:
        return
    layer._fastdpo_told = True
    reason = _special(layer, names[0])
    logger.warning("LoRA: PEFT's own forward from here on for %s, %s", layer._fastdpo_name, reason)


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """x [..., in] -> [..., out], in the dtype of the base's output."""
    siblings, place = layer._fastdpo_siblings, layer._fastdpo_place
    known = None if args or kwargs else siblings.take(place, x)
    if known is not None:
        return known
    if args or kwargs or _active(layer) is None:
        if not (args or kwargs or torch.compiler.is_compiling()):
            _tell(layer)
        return type(layer).forward(layer, x, *args, **kwargs)
    adapters = {i: _active(one) for i, one in enumerate(siblings.layers)}
    adapters = {i: name for i, name in adapters.items() if name is not None}
    layers = [siblings.layers[i] for i in adapters]
    made = _products(x, layers, list(adapters.values()))
    outputs = {i: (adapters[i], out) for i, out in zip(adapters, made, strict=True)}
    _, own = outputs.pop(place)
    siblings.keep(x, outputs)
    return own


_forward.__name__ = "forward"  # what a pickle asks the layer for: it gets PEFT's own


def _products(x: Tensor, layers: list[Any], adapters: list[str]) -> list[Tensor]:
    """base(x) + s B A x of each layer under its adapter."""
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    downs = [layer.lora_A[name].weight for layer, name in zip(layers, adapters, strict=True)]
    ups = [layer.lora_B[name].weight for layer, name in zip(layers, adapters, strict=True)]
    scales = [float(layer.scaling[name]) for layer, name in zip(layers, adapters, strict=True)]
    if torch.compiler.is_compiling():
        return _formula(x, [layer.base_layer for layer in layers], downs, ups, scales, dtype)
    tensors: list[Tensor | None] = []
    for layer, down, up in zip(layers, downs, ups, strict=True):
        base = layer.base_layer
        if type(base) is nn.Linear and "forward" not in base.__dict__:
            tensors += [base.weight, base.bias, None, down, up]
        else:  # quantized, or in fp8: its product is its own
            tensors += [None, None, base(x).flatten(0, -2), down, up]
    with torch.autocast(x.device.type, enabled=False):
        outs: Any = LeanProducts.apply(x.flatten(0, -2), dtype, tuple(scales), *tensors)
    return [out.unflatten(0, x.shape[:-1]) for out in outs]


def _formula(
    x: Tensor,
    bases: list[nn.Module],
    downs: list[Tensor],
    ups: list[Tensor],
    scales: list[float],
    dtype: torch.dtype,
) -> list[Tensor]:
    """The same for torch.compile, whose own passes fuse it and choose what to keep."""
    parts = nn.functional.linear(x.to(dtype), torch.cat([down.to(dtype) for down in downs]))
    outs = []
    sizes = [len(down) for down in downs]
    for base, part, up, scale in zip(bases, parts.split(sizes, -1), ups, scales, strict=True):
        y = base(x)
        outs.append(y + (nn.functional.linear(part, up.to(dtype)) * scale).to(y.dtype))
    return outs


class LeanProducts(torch.autograd.Function):
    """y_i = x W_i^T + b_i + s_i (x A_i^T) B_i^T for the n layers that share x [T, in].

    x is computed with, and kept, in `dtype`. For each layer follow W [out, in] and b [out] or None,
    or else in their place what the base gave [T, out], and A [r, in], B [out, r]. W and b get no
    gradient. The sum of the gradients of x is rounded once a product.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dtype: torch.dtype, scales: tuple[float, ...], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        weights, biases, bases, downs, ups = (list[Any](tensors[i::5]) for i in range(5))
        rows = x.to(dtype)
        down, up = _cast(downs, dtype), _cast(ups, dtype)
        stacked = down[0] if len(down) == 1 else torch.cat(down)  # [R, in]
        parts = rows @ stacked.t()  # [T, R]
        sizes = [len(a) for a in down]
        outs = []
        for weight, bias, base, b, scale, part in zip(
            weights, biases, bases, up, scales, parts.split(sizes, 1), strict=True
        ):
            if weight is not None:
                y = nn.functional.linear(rows, *_cast((weight,), dtype), *_cast((bias,), dtype))
                y = torch.addmm(y, part, b.t(), alpha=scale, out=y)
            elif base.dtype == dtype:
                y = torch.addmm(base, part, b.t(), alpha=scale)
            else:
                y = base + (part @ b.t()).mul_(scale)
            outs.append(y)
        ctx.save_for_backward(rows, parts, stacked, *up, *weights)
        ctx.scales, ctx.sizes, ctx.dtype, ctx.x_dtype = scales, sizes, dtype, x.dtype
        ctx.masters = [(a.dtype, b.dtype) for a, b in zip(downs, ups, strict=True)]
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        n, dtype, needs = len(ctx.scales), ctx.dtype, ctx.needs_input_grad
        rows, parts, stacked, *rest = ctx.saved_tensors
        up, weights = rest[:n], rest[n:]
        grads = _cast(grad_outputs, dtype)
        d_parts = rows.new_empty(len(rows), len(stacked))  # [T, R]
        for grad, b, scale, d_part in zip(
            grads, up, ctx.scales, d_parts.split(ctx.sizes, 1), strict=True
        ):
            torch.addmm(d_part, grad, b, beta=0, alpha=scale, out=d_part)
        d_x = None
        if needs[0]:
            for grad, weight in zip(grads, weights, strict=True):
                if weight is not None:
                    d_x = _add_product(d_x, grad, weight.to(dtype))
            d_x = _add_product(d_x, d_parts, stacked).to(ctx.x_dtype)
        d_down = None
        if any(needs[i] for i in range(6, len(needs), 5)):
            d_down = (d_parts.t() @ rows).split(ctx.sizes)
        d_tensors: list[Tensor | None] = []
        for i, (part, (down_dtype, up_dtype)) in enumerate(
            zip(parts.split(ctx.sizes, 1), ctx.masters, strict=True)
        ):
            _, _, to_base, to_down, to_up = needs[3 + 5 * i : 8 + 5 * i]
            d_up = None
            if to_up:
                d_up = (grads[i].t() @ part).to(up_dtype).mul_(ctx.scales[i])
            d_tensors += [
                None,
                None,
                grad_outputs[i] if to_base else None,
                d_down[i].to(down_dtype) if to_down and d_down is not None else None,
                d_up,
            ]
        return d_x, None, None, *d_tensors


def _cast(tensors: Sequence[Any], dtype: torch.dtype) -> list[Any]:
    return [None if t is None else t.to(dtype) for t in tensors]


def _add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total + a @ b, in place of total."""
    return a @ b if total is None else torch.addmm(total, a, b, out=total)
