"""Log-probs of a linear head, by ours and by everybody else who can be found, called alike.

Each implementation takes hidden [N, D], weight [V, D] and targets [N] and gives the log-probs [N],
or, where it knows only a scalar loss, their sum; gradients come by autograd. `find` raises `Absent`
with the reason for what is not here; nothing is replaced by something else.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo_kernels import linear_logps, linear_logps_eager

from .harness import timed

MIB = 2**20
STATISTICS = ("entropy", "mean_logits", "is_top1")  # what TRL's DPOTrainer asks its head for
LogProbs = Callable[[Tensor, Tensor, Tensor], Tensor]


class Absent(Exception):
    """Why an implementation cannot be measured here."""


@dataclass(frozen=True)
class Implementation:
    """`modes`: forward (no gradient), frozen (d hidden), trained (d hidden and dW).
    `per_token`: gives [N], not the sum."""

    name: str
    modes: tuple[str, ...] = ("forward", "frozen", "trained")
    per_token: bool = True


# The order of the table. "gemms" is no implementation but the limit: bare library products,
# on a CPU those of the faster library.
IMPLEMENTATIONS = (
    Implementation("fastdpo"),
    Implementation("gemms"),
    Implementation("trl"),
    Implementation("fastdpo E kept", ("trained",)),
    Implementation("fastdpo 16 MiB"),
    Implementation("fastdpo torch"),
    Implementation("fastdpo statistics"),
    Implementation("trl statistics"),
    Implementation("quack", ("frozen", "trained"), per_token=False),
    Implementation("liger", ("frozen", "trained"), per_token=False),
    Implementation("cce"),
    Implementation("F.linear_cross_entropy"),
    Implementation("eager"),
    Implementation("torch.compile"),
)
NAMES = tuple(each.name for each in IMPLEMENTATIONS)


def find(name: str, device: torch.device, n: int, v: int) -> LogProbs:
    """The implementation as a function. Raises `Absent` with the reason if it is not here."""
    if name == "fastdpo":
        return linear_logps
    if name == "fastdpo E kept":
        room = 4 * n * v + 512 * MIB  # E in 16 or 32 bits, and the chunks beside it
        return functools.partial(linear_logps, workspace_bytes=room)
    if name == "fastdpo 16 MiB":
        return functools.partial(linear_logps, workspace_bytes=16 * MIB)
    if name == "fastdpo torch":
        if device.type != "cuda" and v > linear_logps_eager.LARGEST_V:
            raise Absent("is what fastdpo runs on a CPU at more than a small vocabulary")
        return functools.partial(linear_logps, impl="torch")
    if name == "fastdpo statistics":
        return lambda h, w, y: linear_logps(h, w, y, stats=STATISTICS)[0]
    if name == "trl statistics":
        return _trl(STATISTICS)
    if name == "eager":
        return eager
    if name == "torch.compile":
        if device.type != "cuda":
            raise Absent("needs a C++ compiler on a CPU; measured on a GPU only")
        return torch.compile(eager)
    if name == "F.linear_cross_entropy":
        return _torch_linear_cross_entropy()
    if name == "trl":
        return _trl()
    if device.type != "cuda":
        raise Absent("runs on a GPU only")
    if name == "liger":
        function = _import("liger_kernel.transformers.functional", "liger_kernel")
        return lambda h, w, y: -function.liger_fused_linear_cross_entropy(h, w, y, reduction="sum")
    if name == "cce":
        function = _import("cut_cross_entropy", "cut_cross_entropy")
        return lambda h, w, y: -function.linear_cross_entropy(h, w, y, reduction="none")
    if name == "quack":
        function = _import("quack.linear_cross_entropy", "quack")
        return lambda h, w, y: -function.chunked_linear_cross_entropy(h, w, y, reduction="sum")
    raise Absent("is unknown")


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """What a trainer without a fused head does: logits in the model's dtype, softmax in fp32."""
    return -F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none")


def _torch_linear_cross_entropy() -> LogProbs:
    function = getattr(F, "linear_cross_entropy", None)
    if function is None:
        raise Absent(f"is not in torch {torch.__version__}")
    options = getattr(torch.nn, "LinearCrossEntropyOptions", lambda: None)()
    return lambda h, w, y: -function(h, w, y, reduction="none", options=options)


def _trl(outputs: tuple[str, ...] = ()) -> LogProbs:
    """The function as TRL's fused head calls it, on the rows that are scored."""
    module = _import("trl.trainer.utils", "trl")
    chunked = getattr(module, "_ChunkedLogProbFunction", None)
    if chunked is None:
        raise Absent("this version of trl has no chunked head (1.16 has)")
    size = module._CHUNKED_LOGPROB_CHUNK_SIZE
    return lambda h, w, y: chunked.apply(h, w, None, y, 1.0, size, None, 1.0, outputs)[0]


def _import(module: str, package: str):
    if importlib.util.find_spec(package) is None:
        raise Absent("is not installed")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Absent(f"does not import: {error}") from error


def bare_gemms(mode: str, hidden: Tensor, weight: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """The library products that no method can do without: [N, V] = H W^T; for gradients E W and
    E^T H besides. On a CPU two libraries have them, and tiles may suit them better than whole
    matrices: whichever way is the fastest here, in one call each after a first, is the limit.
    Results of torch.mm are allocated beforehand."""
    ways = [_whole_products(mode, hidden, weight)]
    if hidden.device.type == "cpu":
        ways.append(_tiled_products(mode, hidden, weight, lambda a, b: torch.mm(a, b.mT)))
        if hidden.dtype == torch.float32 and torch.backends.mkldnn.is_available():
            linear = torch.ops.mkldnn._linear_pointwise
            products = _tiled_products(
                mode, hidden, weight, lambda a, b: linear(a, b, None, "none", [], "")
            )
            ways.append(products)
    if len(ways) == 1:
        return ways[0]
    return min(ways, key=lambda way: timed(way, hidden.device, repeats=1, warmup=1)[0])


def _whole_products(mode: str, hidden: Tensor, weight: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    logits = torch.empty(len(hidden), len(weight), dtype=hidden.dtype, device=hidden.device)
    torch.mm(hidden, weight.mT, out=logits)
    d_hidden = torch.empty_like(hidden)
    d_weight = torch.empty_like(weight) if mode == "trained" else None

    def run() -> tuple[Tensor, ...]:
        torch.mm(hidden, weight.mT, out=logits)
        if mode != "forward":
            torch.mm(logits, weight, out=d_hidden)
        if d_weight is not None:
            torch.mm(logits.mT, hidden, out=d_weight)
        return ()

    return run


def _tiled_products(
    mode: str, hidden: Tensor, weight: Tensor, product: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[], tuple[Tensor, ...]]:
    """In tiles of 1024 x 2048, a @ b.T by `product` of a [m, k] and b [n, k]; nothing is summed."""

    def run() -> tuple[Tensor, ...]:
        for w in weight.split(2048):
            for h in hidden.split(1024):
                tile = product(h, w)
                if mode != "forward":
                    product(tile, w.mT)
                if mode == "trained":
                    product(h.mT, tile.mT)
        return ()

    return run


def gemm_flops(mode: str, n: int, d: int, v: int) -> float:
    """Floating-point operations that are necessary, as the bare products do them."""
    return 2.0 * n * d * v * {"forward": 1, "frozen": 2, "trained": 3}[mode]
