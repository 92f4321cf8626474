"""A call of `linear_logps` on a GPU: its arguments, its division of work, and its exponentials.

What the forward pass and the head's gradient share; `tiles.py` sizes their chunks.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from . import tiles
from .impls import adapter_parts, triton_interprets
from .linear_logps_triton_gemm import describable, exp_gemm, exp_tile
from .linear_logps_triton_math import Logits, Matrix
from .linear_logps_triton_products import multiply
from .linear_logps_triton_space import Space
from .tiles import Plan, Problem

_PARTIAL_FIELDS = 6  # with statistics; see linear_logps_triton_math


@dataclass(frozen=True)
class Job:
    """The arguments of a call; `trained`: the head's gradient will be due, dW only if
    `need_weight_grad`, else the bias's alone; `kept`: E stays for it. An adapter's columns count
    in D.

    `hidden` and the matrix are rounded to `rounded` where they are multiplied, chunk by chunk."""

    hidden: Tensor
    rounded: torch.dtype
    matrix: Matrix
    logits: Logits
    stats: tuple[str, ...]
    need_hidden_grad: bool
    need_weight_grad: bool
    trained: bool
    kept: bool
    device: tiles.Device

    @property
    def n(self) -> int:
        return self.hidden.shape[0]

    @property
    def d(self) -> int:
        return self.hidden.shape[1]

    @property
    def d_trained(self) -> int:
        """Columns of dW; 0 where the bias alone is trained."""
        return self.matrix.trained.shape[1] if self.need_weight_grad else 0

    @property
    def v(self) -> int:
        return self.matrix.v

    @property
    def e_dtype(self) -> torch.dtype:
        """Of E, and of the operands it is multiplied with."""
        return torch.float32 if self.rounded == torch.float32 else torch.bfloat16

    @property
    def fields(self) -> int:
        return _PARTIAL_FIELDS if self.stats else 1


def matrix_of(weight: Tensor, adapter: Tensor | None, rounded: torch.dtype) -> Matrix:
    if adapter is not None and adapter.stride(1) != 1:
        adapter = adapter.contiguous()
    return Matrix(weight, adapter, 1 if adapter is None else adapter_parts(rounded))


def problem_of(job: Job, work: str, workspace: int) -> Problem:
    hidden, weight = job.hidden, job.matrix.weight
    whole = job.matrix.adapter is None
    recomputed = not (work == "weight" and job.kept)
    row = job.d * job.rounded.itemsize
    ready = hidden.dtype == job.rounded and hidden.stride(1) == 1
    row_copy = 0 if ready or not recomputed else row
    ready_w = whole and weight.dtype == job.rounded and weight.stride(1) == 1
    col_copy = 0 if ready_w or not recomputed else row
    if work == "hidden" and job.rounded != job.e_dtype:
        own = whole and weight.dtype == job.e_dtype and weight.stride(1) == 1
        col_copy += 0 if own else job.d * job.e_dtype.itemsize
    aligned = job.d % 8 == 0
    if aligned:
        aligned = (not ready or describable(hidden)) and (not ready_w or describable(weight))
    return Problem(
        work=work,
        n=max(job.n, 1),
        d=job.d,
        d_trained=job.d_trained,
        v=job.v,
        float32=job.e_dtype == torch.float32,
        rich=job.logits.softcap or job.logits.bias is not None,
        fields=job.fields,
        row_copy=row_copy,
        col_copy=col_copy,
        kept=job.kept,
        direct=job.matrix.trained.dtype in (job.e_dtype, torch.float32),
        aligned=aligned,
        workspace=workspace,
    )


def can_keep(job: Job, work: str, workspace: int) -> bool:
    """Whether the whole E leaves room for the rest, now and in the backward pass."""
    for each in (work, "weight"):
        try:
            default_plan(job, each, workspace)
        except ValueError:
            return False
    return True


def check_room(job: Job, work: str, workspace: int) -> None:
    """Raises TooSmall where a pass finds no room, now or for dW: of two, that which needs more."""
    works = [(job, work)]
    if job.trained:
        works.append((dataclasses.replace(job, stats=()), "weight"))
    short = []
    for each, its_work in works:
        try:
            default_plan(each, its_work, workspace)
        except tiles.TooSmall as error:
            short.append(error)
    if short:
        raise max(short, key=lambda error: error.least)


def default_plan(job: Job, work: str, workspace: int) -> Plan:
    """Raises ValueError if nothing fits the workspace."""
    problem = problem_of(job, work, workspace)
    return tiles.plan(problem, tiles.default_variant(problem, job.device), job.device)


def device_of(tensor: Tensor) -> tiles.Device:
    return tiles.describe(tensor.device.index if tensor.is_cuda else None)


def exponentials(
    job: Job,
    plan: Plan,
    space: Space,
    h: Tensor,
    w: Tensor,
    e: Tensor | None,
    ref: Tensor,
    target: Tensor,
    row_scale: Tensor | None,
    partial: Tensor | None,
    first_col: int,
    *,
    store: bool,
    n_tiles: int = 0,
) -> Tensor | None:
    """E [n, c] of `h` [n, D] against `w` [c, D], into `e` if given, else into the workspace if it
    is to be stored; its sums go to `partial`."""
    n, c = h.shape[0], w.shape[0]
    wide = tiles.round_up(c, 8)
    if partial is not None:
        n_tiles = partial.shape[1]
    shared = {"first_col": first_col, "n_tiles": n_tiles, "logits": job.logits}
    shared["stats"] = bool(job.stats)
    if plan.variant.library:
        product = space.take((n, wide), torch.float32)[:, :c]
        multiply(product, h, w.mT, add=False)
        if e is None and store:
            in_place = job.e_dtype == torch.float32
            e = product if in_place else space.take((n, wide), job.e_dtype)[:, :c]
        exp_tile(
            product, e, ref, target, row_scale, partial,
            block_v=plan.variant.gemm.block_v, **shared,
        )  # fmt: skip
        return e
    if h.dtype == torch.bfloat16 and not h.is_cuda and triton_interprets():
        raise RuntimeError(
            "linear_logps: Triton's interpreter multiplies bfloat16 as raw integers; give it "
            "float16 or float32"
        )
    if e is None and store:
        e = space.take((n, wide), job.e_dtype)[:, :c]
    exp_gemm(
        h, w, e, ref, target, row_scale, partial,
        gemm=plan.variant.gemm, programs=job.device.sms, **shared,
    )  # fmt: skip
    return e
