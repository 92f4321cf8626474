"""`linear_logps` on a GPU: which kernel runs on which part of the tokens and of the vocabulary.

With z_y = h . W[y] known first, one GEMM gives E = exp(z - z_y - 40.2), target zeroed, and its row
sums; a second one, E @ W in fp32 over chunks of the vocabulary, finishes d hidden in the forward
pass (GEMMs: 1 without gradient, 2 for a frozen head). For dW either E is kept, then one more GEMM
(3), or it is computed again chunk by chunk (4); a bias takes sums of E's columns, no GEMM of its
own. The second GEMMs are the library's (cuBLAS).
16-bit inputs: E is bf16 (it spans fp32's range, fp16's does not) and meets bf16 operands: fp16
weights are rounded to bf16 for the gradients, chunk by chunk. fp32 inputs: all fp32, never TF32.
Rows come in blocks, which share the workspace: of vectors [N] there are only results.
`tiles.py` sizes the chunks.
"""

import contextlib
import dataclasses

import torch
from torch import Tensor

from . import tiles, tuning
from .impls import ForwardResult, TokenStats, is_factored
from .linear_logps_targets import blocks, left_out
from .linear_logps_triton_dw import add_target_rows, column_sums, dw_operand
from .linear_logps_triton_exact import FIELDS, exact_rows, splits_of
from .linear_logps_triton_job import (
    Job,
    can_keep,
    check_room,
    device_of,
    exponentials,
    matrix_of,
    problem_of,
)
from .linear_logps_triton_math import Logits
from .linear_logps_triton_products import multiply, multiply_splits, whole_sums
from .linear_logps_triton_rows import hidden_grad, row_sums, target_logits
from .linear_logps_triton_space import Space, columns, operand
from .tiles import Plan


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
    need_bias_grad: bool,
    keep: bool,
    workspace_bytes: int,
) -> ForwardResult:
    """`hidden` [N, D], `weight` [V, D], `targets` [N]; see `impls.ForwardResult`.

    With an `adapter` [V, r], `hidden` is what `beside_adapter` returns. `keep`: E may stay for
    `weight_grad`.
    """
    head_grad = need_weight_grad or need_bias_grad
    job = Job(
        hidden, rounded, matrix_of(weight, adapter, rounded),
        Logits.of(bias, softcap, scale, temperature),
        stats, need_hidden_grad, need_weight_grad, head_grad, head_grad and keep, device_of(hidden),
    )  # fmt: skip
    work = "hidden" if need_hidden_grad else "sums"
    if job.kept and not can_keep(job, work, workspace_bytes):
        job = dataclasses.replace(job, kept=False)
    check_room(job, work, workspace_bytes)

    def run(plan: Plan) -> ForwardResult:
        return run_forward(job, targets, ignore_index, plan)

    with whole_sums(), _on(hidden):
        plan = tuning.choose(
            problem_of(job, work, workspace_bytes), job.device, run,
            measure=tuning.measurable(hidden.device),
        )  # fmt: skip
        return run(plan)


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
    need_weight_grad: bool,
    need_bias_grad: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """dW [V, D] and db [V] in the dtypes of the weight and the bias; None for what is not asked.

    With an `adapter` [V, r] its gradient takes the place of dW.
    dW = -slope E^T @ (g / (s_o + s_y) H), plus slope g (1 - p_y) h_n at the target rows; db is the
    same with a column of ones as H: sums of E's columns, which take no GEMM.
    """
    job = Job(
        hidden, rounded, matrix_of(weight, adapter, rounded),
        Logits.of(bias, softcap, scale, temperature),
        (), False, need_weight_grad, True, len(saved) == 3, device_of(hidden),
    )  # fmt: skip

    def run(plan: Plan) -> tuple[Tensor | None, Tensor | None]:
        return run_weight_grad(job, targets, ignore_index, saved, grad_logps, need_bias_grad, plan)

    with whole_sums(), _on(hidden):
        plan = tuning.choose(
            problem_of(job, "weight", workspace_bytes), job.device, run,
            measure=tuning.measurable(hidden.device),
        )  # fmt: skip
        return run(plan)


def run_forward(job: Job, targets: Tensor, ignore_index: int, plan: Plan) -> ForwardResult:
    n, d, v = job.n, job.d, job.v
    hidden, matrix, device = job.hidden, job.matrix, job.hidden.device
    logps = torch.empty(n, device=device)
    saved = [torch.empty(n, device=device) for _ in range(2)] if job.trained else []
    any_flag = torch.zeros(1, dtype=torch.int32, device=device)
    grad = torch.empty(n, d, dtype=job.rounded, device=device) if job.need_hidden_grad else None
    factor = None
    if grad is not None and is_factored(job.rounded):
        factor = torch.empty(n, device=device)
    kept = None
    if job.kept:
        kept = torch.empty(n, tiles.round_up(v, 8), dtype=job.e_dtype, device=device)
    stats = _empty_stats(n, device) if job.stats else None

    space = Space(plan.bytes, device)
    n_tiles = -(-v // plan.variant.gemm.block_v)
    splits = splits_of(n_tiles)
    for r0, r1 in blocks(n, plan.rows):
        space.clear()
        k, rows = r1 - r0, slice(r0, r1)
        z, share, inverse, lse = (space.take((k,), torch.float32) for _ in range(4))
        target, flag = (space.take((k,), torch.int32) for _ in range(2))
        if job.trained:
            share = saved[0][rows]
            if job.kept:
                inverse = saved[1][rows]
            else:
                lse = saved[1][rows]
        y = targets[rows]
        if not y.is_contiguous():
            y = space.take((k,), torch.int64).copy_(y)
        h = operand(hidden[rows], job.rounded, space)
        target_logits(h, matrix, y, target, z, ignore_index=ignore_index, logits=job.logits)
        room = space.take((max(job.fields * n_tiles, FIELDS * splits) * k,), torch.float32)
        partial = room[: job.fields * n_tiles * k].view(job.fields, n_tiles, k)
        product = None
        if grad is not None:
            product = space.take((plan.splits, k, d), torch.float32)
        for c0, c1 in blocks(v, plan.cols):
            mark = space.mark()
            w = columns(matrix, c0, c1, job.rounded, space)
            e = None if kept is None else kept[rows, c0:c1]
            e = exponentials(
                job, plan, space, h, w, e, z, target, None, partial, c0, store=grad is not None
            )
            if product is not None:
                assert e is not None
                # rounded from the weight itself, if it has the dtype: that of fp16 hidden does not
                if w.dtype != job.e_dtype:
                    w = columns(matrix, c0, c1, job.e_dtype, space)
                multiply_splits(product, e, w, add=c0 > 0)
            space.release(mark)
        part = _rows_of(stats, rows)
        row = (logps[rows], share, inverse, lse)
        row_sums(partial, z, target, *row, flag, any_flag, part, v=v)
        if grad is not None and product is not None:
            hidden_grad(product, matrix, target, z, share, inverse, grad[rows], logits=job.logits)
        exact_rows(
            h, matrix, target, z, flag, any_flag, room, *row,
            None if grad is None else grad[rows], None if kept is None else kept[rows], part,
            logits=job.logits, splits=splits, programs=2 * job.device.sms,
        )  # fmt: skip
        if factor is not None:
            torch.mul(share, job.logits.slope, out=factor[rows])
        if job.trained and job.logits.softcap:
            share.mul_(z.div_(job.logits.cap).square_().neg_().add_(1))
    if kept is not None:
        saved.append(kept)
    return ForwardResult(logps, grad, factor, tuple(saved), _chosen_stats(stats, job.stats))


def run_weight_grad(
    job: Job,
    targets: Tensor,
    ignore_index: int,
    saved: tuple[Tensor, ...],
    grad_logps: Tensor,
    need_bias_grad: bool,
    plan: Plan,
) -> tuple[Tensor | None, Tensor | None]:
    """With `saved` = (share, 1 / (s_o + s_y), E), or, to compute E again, (share, log-sum-exp);
    share is 1 - p_y times the target's tanh slope.

    Vectors [N] exist for `plan.block` rows at a time. Where those are all rows, the target rows of
    dW come last, from one sort; else they go into each chunk of dW, block by block.
    """
    share, row, *rest = saved
    kept = rest[0] if rest else None
    n, d, v = job.n, job.d_trained, job.v
    hidden, bias = job.hidden, job.logits.bias
    of_trained = job.matrix.met(hidden)

    def vectors(start: int, end: int) -> tuple[Tensor, Tensor]:
        """The target (-1: none) and slope * g, 0 where there is none, of some rows."""
        y = targets[start:end]
        none = left_out(y, v, ignore_index)
        g = (job.logits.slope * grad_logps[start:end].float()).masked_fill_(none, 0)
        return y.masked_fill(none, -1).int(), g

    whole = vectors(0, n) if plan.block >= n else None
    dw = None
    if job.need_weight_grad:
        dw = torch.empty(v, d, dtype=job.matrix.trained.dtype, device=hidden.device)
    db = torch.zeros(v, device=hidden.device) if bias is not None and need_bias_grad else None
    direct = plan.rows >= n and job.matrix.trained.dtype in (job.e_dtype, torch.float32)
    space = Space(plan.bytes, hidden.device)
    n_tiles = -(-v // plan.variant.gemm.block_v)
    for c0, c1 in blocks(v, plan.cols):
        space.clear()
        out = None
        if dw is not None:
            out = dw[c0:c1] if direct else space.take((c1 - c0, d), torch.float32)
            if n == 0:
                out.zero_()
        db_part = None if db is None else db[c0:c1]
        w = None if kept is not None else columns(job.matrix, c0, c1, job.rounded, space)
        for b0, b1 in blocks(n, plan.block):
            target, g = whole or vectors(b0, b1)
            for start, end in blocks(b1 - b0, plan.rows):
                mark = space.mark()
                rows, here = slice(b0 + start, b0 + end), slice(start, end)
                # The minus sign, g and 1 / (s_o + s_y) go into H where E is kept, else into E.
                factor = -g[here] * row[rows] if kept is not None else -g[here]
                of_kept = None if kept is None else factor
                if kept is not None:
                    e = kept[rows, c0:c1]
                else:
                    assert w is not None
                    h = operand(hidden[rows], job.rounded, space)
                    e = exponentials(
                        job, plan, space, h, w, None, row[rows], target[here], factor, None, c0,
                        store=True, n_tiles=n_tiles,
                    )  # fmt: skip
                    assert e is not None
                later = b0 + start > 0
                if out is not None:
                    h2 = space.take((end - start, d), job.e_dtype)
                    dw_operand(of_trained[rows], target[here], of_kept, h2, job.rounded)
                    multiply(out, e.mT, h2, add=later)
                if db_part is not None:
                    column_sums(e, of_kept, db_part, add=later)
                space.release(mark)
            if whole is None:  # then `out`, if any, is fp32
                here = torch.where((target >= c0) & (target < c1), target - c0, -1)
                add_target_rows(
                    here, g * share[b0:b1], of_trained[b0:b1], out, db_part, job.rounded
                )
        if dw is not None and out is not None and not direct:
            dw[c0:c1].copy_(out)
    if whole is not None and n > 0:
        add_target_rows(whole[0], whole[1] * share, of_trained, dw, db, job.rounded)
    return dw, None if db is None or bias is None else db.to(bias.dtype)


def _on(tensor: Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


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
