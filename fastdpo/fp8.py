"""The frozen base in 8-bit floats: half the memory of bf16, and twice its matrix rate on Hopper.

Frozen linear layers under an adapter hold e4m3 weights with a scale for every output; activations
and gradients get a scale for every token. Adapters, norms, embeddings and the head stay as they
are. On a CPU the same numbers come from fp32 products, for tests. Experts' stacked weights are not
touched.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .batch import Pack
from .body import layers_of
from .errors import ConfigError, ModelError
from .model import base_model, is_quantized

logger = logging.getLogger(__name__)

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max  # 448
_MULTIPLE = 16  # of both sizes of a weight, for torch._scaled_mm
# Where PEFT keeps adapters, frozen ones such as a reference's too, and what they train in full.
_ADAPTERS = ("lora_", "modules_to_save")


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """[M, K] -> e4m3 [M, K], row by row whatever x's strides are, as the kernel reads it, and fp32
    scales [M, 1], such that x is about their product."""
    x = x.float()
    scale = (x.abs().amax(-1, keepdim=True) / LARGEST).clamp(min=1e-30)
    rounded = (x / scale).clamp(-LARGEST, LARGEST)
    return rounded.to(FP8, memory_format=torch.contiguous_format), scale


def _scaled_product(
    a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor, out: torch.dtype, has_kernel: bool
) -> Tensor:
    """(scale_a a) @ (scale_b b).T for e4m3 a [M, K], b [N, K], scales [M, 1] and [N, 1]; summed in
    fp32. With CUDA's kernel the result is rounded to bf16 whatever `out` is: it has no other."""
    if has_kernel:
        kwargs: dict[str, Any] = {"scale_a": scale_a, "scale_b": scale_b.t().contiguous()}
        return torch.ops.aten._scaled_mm(a, b.t(), out_dtype=torch.bfloat16, **kwargs).to(out)
    return ((a.float() @ b.float().t()) * scale_a * scale_b.t()).to(out)


class _Fp8Linear(torch.autograd.Function):
    """x [M, in], weight e4m3 [out, in], scale [out, 1] -> [M, out]. The weight has no gradient, so
    nothing of x is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, has_kernel: bool) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.has_kernel = has_kernel
        return _scaled_product(*quantize_rows(x), weight, scale, x.dtype, has_kernel)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        weight, scale = ctx.saved_tensors
        (grad,) = grad_outputs
        # The sum runs over outputs here, so their scales go into the gradient beforehand.
        rows, row_scale = quantize_rows(grad.float() * scale.t())
        ones = torch.ones_like(scale[:1]).expand(weight.shape[1], 1)
        columns = weight.t().contiguous()  # [in, out]: the kernel reads along the sum
        product = _scaled_product(rows, row_scale, columns, ones, grad.dtype, ctx.has_kernel)
        return product, None, None, None


class Fp8Linear(nn.Module):
    """A frozen `nn.Linear` in e4m3 with a scale for every output."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = quantize_rows(linear.weight.detach())
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Buffer(scale)
        self.bias = linear.bias

    @property
    def has_kernel(self) -> bool:
        return self.weight.is_cuda

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            out = _Fp8Linear.apply(x.flatten(0, -2), self.weight, self.scale, self.has_kernel)
        out = out.unflatten(0, x.shape[:-1])
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, e4m3"


def check_base_precision(model: nn.Module, precision: str | None, device: torch.device) -> None:
    """`ConfigError` or `ModelError` unless the base of `model` is in `precision`, or can be turned
    into it, which is done for fp8 alone."""
    if precision == "fp8":
        _check_can_use_fp8(model, device)
    elif precision is not None:
        base = base_model(model)
        loaded = "bf16" if base.dtype == torch.bfloat16 else str(base.dtype).removeprefix("torch.")
        if is_quantized(base):
            loaded = "4bit" if getattr(base, "is_loaded_in_4bit", False) else "8bit"
        if precision != loaded:
            raise ConfigError(
                f"'base_precision' is {precision!r}, and the model was loaded in {loaded}; load it "
                "so, or leave base_precision out"
            )


def _check_can_use_fp8(model: nn.Module, device: torch.device) -> None:
    if not isinstance(model, PeftModel):
        raise ConfigError(
            "'base_precision' fp8 holds frozen weights, which only an adapter can train; add "
            "use_peft: true (--use_peft)"
        )
    if is_quantized(base_model(model)):
        raise ConfigError("'base_precision' fp8 and load_in_4bit or load_in_8bit: keep one")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        major, minor = torch.cuda.get_device_capability(device)
        raise ModelError(
            f"'base_precision' fp8 needs compute capability 9.0 (Hopper), this is {major}.{minor}; "
            "leave it out, or use load_in_8bit"
        )
    if any(config.to_dict().get("use_dora") for config in model.peft_config.values()):
        raise ConfigError("'base_precision' fp8 and use_dora, which reads base weights: keep one")
    _layers(model)


def _layers(model: nn.Module) -> nn.ModuleList:
    """Those of `model`'s decoder; `ModelError` where they don't stand in a list named so."""
    layers = layers_of(base_model(model))
    if layers is None:
        raise ModelError(
            f"'base_precision' fp8: {type(base_model(model)).__name__} has no list of layers to "
            "convert; leave it out"
        )
    return layers


@torch.no_grad()
def convert_layers(
    model: nn.Module, make: Callable[[nn.Linear], nn.Module] = Fp8Linear
) -> tuple[list[tuple[int, int]], list[str]]:
    """Puts what `make` gives in the place of the frozen linear layers of `model`'s decoder, one by
    one. Returns the sizes (in, out) of those, and the names of others whose sizes do not allow it.

    Raises `ModelError` where there is none, or no list of layers.
    """
    layers = _layers(model)
    replaced, skipped = [], []
    for parent_name, parent in list(layers.named_modules()):
        if any(part.startswith(_ADAPTERS) for part in parent_name.split(".")):
            continue
        for name, child in list(parent.named_children()):
            # What modules_to_save trains in full must start from what the reference reads.
            if type(child) is not nn.Linear or name == "original_module":
                continue
            if child.weight.requires_grad:
                continue
            if child.in_features % _MULTIPLE or child.out_features % _MULTIPLE:
                skipped.append(f"{parent_name}.{name}")
                continue
            parent._modules[name] = make(child)
            replaced.append((child.in_features, child.out_features))
    if not replaced:
        raise ModelError(
            f"'base_precision' fp8: {type(base_model(model)).__name__} has no frozen linear layer "
            f"with sizes in steps of {_MULTIPLE}; leave it out"
        )
    return replaced, skipped


@torch.no_grad()
def use_fp8_base(
    model: nn.Module, pack: Pack | None, token_logps: Callable[[nn.Module, Pack], Tensor]
) -> float | None:
    """Turns the frozen linear layers of `model`'s decoder into `Fp8Linear`, one by one.

    Returns, and logs, the root mean square error of `pack`'s `token_logps` against those of the
    base as it was, in nat; None without a pack.
    """
    before = None if pack is None else token_logps(model, pack)
    width = base_model(model).dtype.itemsize
    replaced, skipped = convert_layers(model)
    n_bytes = (width - 1) * sum(n_in * n_out for n_in, n_out in replaced)
    layers = _layers(model)
    how = "" if next(layers.parameters()).is_cuda else ", emulated on this device"
    logger.info("base: %d linear layers in fp8%s, %.3g GB less", len(replaced), how, n_bytes / 1e9)
    if skipped:
        logger.warning("base: %d layers not in fp8, such as %s", len(skipped), skipped[0])
    if pack is None or before is None:
        return None
    error = float((token_logps(model, pack) - before).square().mean().sqrt())
    logger.info("base: fp8 moves token log-probs by %.2e nat (root mean square)", error)
    return error
