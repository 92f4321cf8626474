"""`linear_logps` on a GPU: which kernel runs on which part of the tokens and of the vocabulary.

With z_y = h . W[y] known first, one GEMM gives E = exp(z - z_y - 40.2), target zeroed, and its row
sums; a second one, E @ W in fp32 over chunks of the vocabulary, finishes d hidden in the forward
pass (GEMMs: 1 without gradient, 2 for a frozen head). For dW either E is kept, then one more GEMM
(3), or it is computed again chunk by chunk (4). The second GEMMs are the library's (cuBLAS).
16-bit inputs: E is bf16 (it spans fp32's range, fp16's does not) and meets bf16 operands: fp16
weights are rounded to bf16 for the gradients, chunk by chunk. fp32 inputs: all fp32, never TF32.
Callers have checked the arguments; `tiles.py` sizes the chunks.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import tiles, tuning
from .impls import ForwardResult, TokenStats
from .linear_logps_triton_dw import add_target_rows, column_sums, dw_operand
from .linear_logps_triton_exact import FIELDS, exact_rows, splits_of
from .linear_logps_triton_gemm import describable, exp_gemm, exp_tile
from .linear_logps_triton_math import Logits, Matrix
from .linear_logps_triton_rows import hidden_grad, row_sums, target_logits
from .tiles import Plan, Problem

_PARTIAL_FIELDS = 6  # with statistics; see linear_logps_triton_math


@dataclass(frozen=True)
class _Job:
    """The arguments of a call; `kept`: E stays for dW. An adapter's columns count in D.

    `hidden` and the matrix are rounded to `rounded` where they are multiplied, chunk by chunk."""

    hidden: Tensor
    rounded: torch.dtype
    matrix: Matrix
    logits: Logits
    stats: tuple[str, ...]
    need_hidden_grad: bool
    kept: bool
    device: tiles.Device

    @property
    def n(self) -> int:
        return self.hidden.shape[0]

    @property
    def d(self) -> int:
        return self.hidden.shape[1]

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


def forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    rounded: torch.dtype,
    adapter: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    temperature: float,
    ignore_index: int,
    stats: tuple[str, ...],
    need_hidden_grad: bool,
    need_weight_grad: bool,
    keep: bool,
    workspace_bytes: int,
) -> ForwardResult:
    """`hidden` [N, D], `weight` [V, D], `targets` [N]; see `impls.ForwardResult`.

    With an `adapter` [V, r], `hidden` is [N, D + r]. `keep`: E may stay for dW.
    """
    job = _Job(
        hidden, rounded, _matrix(weight, adapter), Logits.of(bias, softcap, scale, temperature),
        stats, need_hidden_grad, need_weight_grad and keep, _device(hidden),
    )  # fmt: skip
    work = "hidden" if need_hidden_grad else "sums"
    if job.kept and not _can_keep(job, work, workspace_bytes):
        job = dataclasses.replace(job, kept=False)
    if need_weight_grad:  # a workspace too small for it is refused now, not in the backward pass
        _default_plan(dataclasses.replace(job, stats=()), "weight", workspace_bytes)

    def run(plan: Plan) -> ForwardResult:
        return run_forward(job, targets, ignore_index, plan)

    with _whole_sums(), _on(hidden):
        plan = tuning.choose(
            _problem(job, work, workspace_bytes), job.device, run,
            measure=tuning.measurable(hidden.device),
        )  # fmt: skip
        result = run(plan)
    return result if need_weight_grad else dataclasses.replace(result, saved=())


def weight_grad(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    saved: tuple[Tensor, ...],
    grad_logps: Tensor,
    *,
    rounded: torch.dtype,
    adapter: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    temperature: float,
    ignore_index: int,
    workspace_bytes: int,
    need_bias_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """dW [V, D] and db [V] (None if not asked for), in the dtypes of the weight and the bias.

    With an `adapter` [V, r] its gradient takes the place of dW.
    dW = -slope E^T @ (g / (s_o + s_y) H), plus slope g (1 - p_y) h_n at the target rows.
    """
    job = _Job(
        hidden, rounded, _matrix(weight, adapter), Logits.of(bias, softcap, scale, temperature),
        (), False, len(saved) == 5, _device(hidden),
    )  # fmt: skip

    def run(plan: Plan) -> tuple[Tensor, Tensor | None]:
        return run_weight_grad(job, saved, grad_logps, need_bias_grad, plan)

    with _whole_sums(), _on(hidden):
        plan = tuning.choose(
            _problem(job, "weight", workspace_bytes), job.device, run,
            measure=tuning.measurable(hidden.device),
        )  # fmt: skip
        return run(plan)


def run_forward(job: _Job, targets: Tensor, ignore_index: int, plan: Plan) -> ForwardResult:
    n, d, v = job.n, job.d, job.v
    hidden, matrix, device = job.hidden, job.matrix, job.hidden.device
    floats = [torch.empty(n, device=device) for _ in range(5)]
    z, logps, share, inverse, lse = floats
    target, flag = (torch.empty(n, dtype=torch.int32, device=device) for _ in range(2))
    any_flag = torch.zeros(1, dtype=torch.int32, device=device)
    grad = torch.empty(n, d, dtype=job.rounded, device=device) if job.need_hidden_grad else None
    kept = None
    if job.kept:
        kept = torch.empty(n, tiles.round_up(v, 8), dtype=job.e_dtype, device=device)
    stats = _empty_stats(n, device) if job.stats else None

    targets = targets.contiguous()
    space = _Space(plan.bytes, device)
    n_tiles = -(-v // plan.variant.gemm.block_v)
    splits = splits_of(n_tiles)
    for r0, r1 in _spans(n, plan.rows):
        space.clear()
        rows = slice(r0, r1)
        h = _operand(hidden[rows], job.rounded, space)
        target_logits(
            h, matrix, targets[rows], target[rows], z[rows],
            ignore_index=ignore_index, logits=job.logits,
        )  # fmt: skip
        room = space.take((max(job.fields * n_tiles, FIELDS * splits) * (r1 - r0),), torch.float32)
        partial = room[: job.fields * n_tiles * (r1 - r0)].view(job.fields, n_tiles, r1 - r0)
        product = None
        if grad is not None:
            product = space.take((plan.splits, r1 - r0, d), torch.float32)
        for c0, c1 in _spans(v, plan.cols):
            mark = space.mark()
            w = _columns(matrix, c0, c1, job.rounded, space)
            e = None if kept is None else kept[rows, c0:c1]
            e = _exponentials(
                job, plan, space, h, w, e, z[rows], target[rows], None, partial, c0,
                store=grad is not None,
            )  # fmt: skip
            if product is not None:
                assert e is not None
                # rounded from the weight itself, if it has the dtype: that of fp16 hidden does not
                if w.dtype != job.e_dtype:
                    w = _columns(matrix, c0, c1, job.e_dtype, space)
                multiply_splits(product, e, w, add=c0 > 0)
            space.release(mark)
        part = _rows_of(stats, rows)
        row = (logps[rows], share[rows], inverse[rows], lse[rows])
        row_sums(partial, z[rows], target[rows], *row, flag[rows], any_flag, part, v=v)
        if grad is not None and product is not None:
            hidden_grad(
                product, matrix, target[rows], z[rows], share[rows], inverse[rows], grad[rows],
                logits=job.logits,
            )  # fmt: skip
        exact_rows(
            h, matrix, target[rows], z[rows], flag[rows], any_flag, room, *row,
            None if grad is None else grad[rows], None if kept is None else kept[rows], part,
            logits=job.logits, splits=splits, programs=2 * job.device.sms,
        )  # fmt: skip
    saved = (target, z, share) + ((lse,) if kept is None else (inverse, kept))
    return ForwardResult(logps, grad, saved, _chosen_stats(stats, job.stats))


def run_weight_grad(
    job: _Job, saved: tuple[Tensor, ...], grad_logps: Tensor, need_bias_grad: bool, plan: Plan
) -> tuple[Tensor, Tensor | None]:
    """With `saved` = (target, z, share, 1 / (s_o + s_y), E), or, to compute E again,
    (target, z, share, log-sum-exp)."""
    target, z, share, row, *rest = saved
    kept = rest[0] if rest else None
    n, v = job.n, job.v
    hidden, trained, bias = job.hidden, job.matrix.trained, job.logits.bias
    d = trained.shape[1]
    of_trained = hidden[:, job.d - d :]  # the columns that it meets
    g = (job.logits.slope * grad_logps.float()).masked_fill(target < 0, 0).contiguous()
    dw = torch.empty(v, d, dtype=trained.dtype, device=hidden.device)
    db = torch.zeros(v, device=hidden.device) if bias is not None and need_bias_grad else None
    direct = plan.rows >= n and dw.dtype in (job.e_dtype, torch.float32)
    space = _Space(plan.bytes, hidden.device)
    n_tiles = -(-v // plan.variant.gemm.block_v)
    for c0, c1 in _spans(v, plan.cols):
        space.clear()
        out = dw[c0:c1] if direct else space.take((c1 - c0, d), torch.float32)
        w = None if kept is not None else _columns(job.matrix, c0, c1, job.rounded, space)
        if n == 0:
            out.zero_()
        for r0, r1 in _spans(n, plan.rows):
            mark = space.mark()
            rows = slice(r0, r1)
            # The minus sign, g and 1 / (s_o + s_y) go into H where E is kept, else into E.
            factor = -g[rows] * row[rows] if kept is not None else -g[rows]
            h2 = space.take((r1 - r0, d), job.e_dtype)
            of_kept = None if kept is None else factor
            dw_operand(of_trained[rows], target[rows], of_kept, h2, job.rounded)
            if kept is not None:
                e = kept[rows, c0:c1]
            else:
                assert w is not None
                h = _operand(hidden[rows], job.rounded, space)
                e = _exponentials(
                    job, plan, space, h, w, None, row[rows], target[rows], factor, None, c0,
                    store=True, n_tiles=n_tiles,
                )  # fmt: skip
                assert e is not None
            multiply(out, e.mT, h2, add=r0 > 0)
            if db is not None:
                column_sums(e, None if kept is None else factor, db[c0:c1], add=r0 > 0)
            space.release(mark)
        if not direct:
            dw[c0:c1].copy_(out)
    if n > 0:
        coefficient = g * share
        if job.logits.softcap:
            coefficient *= 1 - (z / job.logits.cap).square()
        add_target_rows(target, coefficient, of_trained, dw, db, job.rounded)
    return dw, None if db is None or bias is None else db.to(bias.dtype)


def _exponentials(
    job: _Job,
    plan: Plan,
    space: "_Space",
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
    if e is None and store:
        e = space.take((n, wide), job.e_dtype)[:, :c]
    exp_gemm(
        h, w, e, ref, target, row_scale, partial,
        gemm=plan.variant.gemm, programs=job.device.sms, **shared,
    )  # fmt: skip
    return e


def multiply(out: Tensor, a: Tensor, b: Tensor, *, add: bool) -> None:
    """out [m, n] = a @ b, or += in fp32 (then `out` is fp32)."""
    if a.dtype == torch.float32 or a.dtype == out.dtype:
        if not a.is_cuda and a.dtype != torch.float32:  # the interpreter: CPUs sum bf16 coarsely
            out.copy_(a.float() @ b.float())
        elif add:
            torch.addmm(out, a, b, out=out)
        else:
            torch.mm(a, b, out=out)
    elif not a.is_cuda:
        product = a.float() @ b.float()
        out.copy_(out + product if add else product)
    elif add:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def multiply_splits(out: Tensor, e: Tensor, w: Tensor, *, add: bool) -> None:
    """out [splits, n, D] (+)= e [n, c] @ w [c, D] by equal parts of c, in one batched GEMM.

    What does not divide goes to the first part.
    """
    splits, (n, c), d = out.shape[0], e.shape, w.shape[1]
    part = c // splits // 8 * 8
    if splits == 1 or part == 0:
        multiply(out[0], e, w, add=add)
        if not add:
            out[1:].zero_()
        return
    a = e.as_strided((splits, n, part), (part, e.stride(0), 1))
    b = w.as_strided((splits, part, d), (part * w.stride(0), w.stride(0), 1))
    if a.dtype != out.dtype and a.is_cuda:
        if add:
            torch.baddbmm(out, a, b, out_dtype=out.dtype, out=out)
        else:
            torch.bmm(a, b, out_dtype=out.dtype, out=out)
    elif add:
        torch.baddbmm(out, a.float(), b.float(), out=out)
    else:
        torch.bmm(a.float(), b.float(), out=out)
    if splits * part < c:
        multiply(out[0], e[:, splits * part :], w[splits * part :], add=True)


class _Space:
    """One buffer for a call's temporaries, handed out from its start; never more than planned."""

    def __init__(self, size: int, device: torch.device):
        self.buffer = torch.empty(size, dtype=torch.uint8, device=device)
        self.used = 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        start = tiles.round_up(self.used, 256)
        count = 1
        for size in shape:
            count *= size
        self.used = start + count * dtype.itemsize
        if self.used > len(self.buffer):
            raise AssertionError(f"workspace: planned {len(self.buffer)} bytes, need {self.used}")
        return self.buffer[start : self.used].view(dtype).view(shape)

    def mark(self) -> int:
        return self.used

    def release(self, mark: int) -> None:
        self.used = mark

    def clear(self) -> None:
        self.used = 0


def _operand(matrix: Tensor, dtype: torch.dtype, space: _Space) -> Tensor:
    """The matrix in this dtype with contiguous rows: itself, or a copy in the workspace."""
    if matrix.dtype == dtype and matrix.stride(1) == 1:
        return matrix
    return space.take(tuple(matrix.shape), dtype).copy_(matrix)


def _matrix(weight: Tensor, adapter: Tensor | None) -> Matrix:
    if adapter is not None and adapter.stride(1) != 1:
        adapter = adapter.contiguous()
    return Matrix(weight, adapter)


def _columns(matrix: Matrix, start: int, end: int, dtype: torch.dtype, space: _Space) -> Tensor:
    """The matrix of some columns of the logits as a GEMM takes it: [end - start, D]."""
    weight, adapter = matrix.weight[start:end], matrix.adapter
    if adapter is None:
        return _operand(weight, dtype, space)
    d = weight.shape[1]
    joined = space.take((end - start, d + adapter.shape[1]), dtype)
    joined[:, :d].copy_(weight)
    joined[:, d:].copy_(adapter[start:end])
    return joined


def _problem(job: _Job, work: str, workspace: int) -> Problem:
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
        d_trained=job.matrix.trained.shape[1],
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


def _can_keep(job: _Job, work: str, workspace: int) -> bool:
    """Whether the whole E leaves room for the rest, now and in the backward pass."""
    for each in (work, "weight"):
        try:
            _default_plan(job, each, workspace)
        except ValueError:
            return False
    return True


def _default_plan(job: _Job, work: str, workspace: int) -> Plan:
    """Raises ValueError if nothing fits the workspace."""
    problem = _problem(job, work, workspace)
    return tiles.plan(problem, tiles.default_variant(problem, job.device), job.device)


def _device(tensor: Tensor) -> tiles.Device:
    return tiles.describe(tensor.device.index if tensor.is_cuda else None)


def _on(tensor: Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@contextlib.contextmanager
def _whole_sums() -> Iterator[None]:
    """Library GEMMs without bf16 between the parts of a split sum."""
    matmul = torch.backends.cuda.matmul
    reduction = (
        matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction_split_k,
    )
    matmul.allow_bf16_reduced_precision_reduction = (False, reduction[1])
    try:
        yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction = reduction


def _spans(size: int, step: int) -> Iterator[tuple[int, int]]:
    for start in range(0, size, max(step, 1)):
        yield start, min(start + step, size)


def _empty_stats(n: int, device: torch.device) -> TokenStats:
    a, b, c = (torch.empty(n, device=device) for _ in range(3))
    return TokenStats(a, b, torch.empty(n, dtype=torch.int8, device=device), c)


def _rows_of(stats: TokenStats | None, rows: slice) -> TokenStats | None:
    if stats is None:
        return None
    fields = dataclasses.fields(stats)
    return TokenStats(**{field.name: getattr(stats, field.name)[rows] for field in fields})


def _chosen_stats(stats: TokenStats | None, names: tuple[str, ...]) -> TokenStats | None:
    if stats is None:
        return None
    chosen = {name: getattr(stats, name) for name in names}
    if "is_top1" in chosen:
        chosen["is_top1"] = chosen["is_top1"].bool()
    return TokenStats(**chosen)
