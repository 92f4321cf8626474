"""Inputs like a language model's, the fp64 oracle, and error budgets, for the kernel tests.

The oracle is `fastdpo_kernels.reference` in fp64 on the very inputs the op gets (already rounded to
their dtype); so a budget holds the arithmetic alone. Not here: anything about packs or models.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdpo_kernels.impls import STATS, TokenStats
from fastdpo_kernels.reference import linear_logps_reference, logits_reference

ULP = {  # relative spacing at 1; a rounding errs by half of it
    torch.float64: 2.0**-52,
    torch.float32: 2.0**-23,
    torch.float16: 2.0**-10,
    torch.bfloat16: 2.0**-7,
}


@dataclass(frozen=True)
class Head:
    """hidden [N, D], weight [V, D], targets [N], bias [V] or None, incoming gradient [N], whose
    dtype is that of sums. `slack` [N]: what the raw logits of a row may err by beforehand."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None
    grad: Tensor
    slack: Tensor | None = None


@dataclass(frozen=True)
class Outcome:
    """What `linear_logps` gives for a Head and its gradient."""

    logps: Tensor
    d_hidden: Tensor
    d_weight: Tensor
    d_bias: Tensor | None
    stats: TokenStats


def peaked_head(
    n: int,
    d: int,
    v: int,
    *,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
    bias: bool = False,
    ignored: float = 0.0,
    seed: int = 0,
) -> Head:
    """Logits with Zipf's unigram frequencies, and targets from all but certain to surprising.

    A third of the rows favour their target by 0 to 30 nat, as a trained model does.
    """
    rng = torch.Generator().manual_seed(seed)
    frequency = 1.0 / torch.arange(1, v + 1, dtype=torch.float64)
    targets = torch.multinomial(frequency.expand(max(n, 1), v), 1, generator=rng)[:n, 0]
    weight = torch.randn(v, d, generator=rng, dtype=torch.float64) / d**0.5
    weight[:, 0] = frequency.log() / 4
    hidden = 1.5 * torch.randn(n, d, generator=rng, dtype=torch.float64)
    hidden[:, 0] = 4.0
    lift = 30 * torch.rand(n, generator=rng, dtype=torch.float64)
    lift *= torch.rand(n, generator=rng) < 1 / 3
    rows = weight[targets]
    hidden += lift[:, None] * rows / rows.square().sum(1, keepdim=True).clamp(min=0.1)
    biases = torch.randn(v, generator=rng, dtype=torch.float64).to(weight_dtype or dtype)
    grad = torch.randn(n, generator=rng, dtype=torch.float64).to(_wide(dtype))
    targets = targets.masked_fill(torch.rand(n, generator=rng) < ignored, -100)
    return Head(
        hidden.to(dtype), weight.to(weight_dtype or dtype), targets, biases if bias else None, grad
    )


def flat_head(n: int, d: int, v: int, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Head:
    """All logits within about 0.05 of each other: an untrained model."""
    head = peaked_head(n, d, v, dtype=dtype, seed=seed)
    return Head((0.01 * head.hidden.double()).to(dtype), head.weight, head.targets, None, head.grad)


def far_head(
    n: int, d: int, v: int, *, gap: float, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Head:
    """Targets at the least logit, about `gap` nat below the largest: logp near -gap."""
    head = peaked_head(n, d, v, dtype=torch.float64, seed=seed)
    z = logits_reference(head.hidden, head.weight)
    targets = z.argmin(1)
    spread = (z.amax(1) - z.amin(1)).clamp(min=1e-3)
    hidden = head.hidden * (gap / spread)[:, None]
    return Head(hidden.to(dtype), head.weight.to(dtype), targets, None, head.grad.to(_wide(dtype)))


def sure_head(
    n: int, d: int, v: int, *, scale: float = 1.0, dtype: torch.dtype = torch.float16, seed: int = 0
) -> Head:
    """A head of standard deviation 0.02 that is 10^-1 to 10^-8 short of certain of its targets,
    and the gradients of a GradScaler: 2^16 times a DPO loss's, beta / 4 = 0.025."""
    rng = torch.Generator().manual_seed(seed)
    weight = (0.02 * torch.randn(v, d, generator=rng)).to(dtype)
    targets = torch.randint(v, (n,), generator=rng)
    short = 10.0 ** -torch.linspace(1, 8, max(n, 1), dtype=torch.float64)[:n]
    rows = weight[targets].double()
    base = 0.5 * torch.randn(n, d, generator=rng, dtype=torch.float64)
    low = torch.zeros(n, dtype=torch.float64)
    high = torch.full((n,), 60 / scale, dtype=torch.float64)  # of the lift, in nat
    for _ in range(30):
        lift = (low + high) / 2
        hidden = (base + (lift / rows.square().sum(1))[:, None] * rows).to(dtype)
        z = logits_reference(hidden.double(), weight.double(), scale=scale)
        sure = -torch.log_softmax(z, 1).gather(1, targets[:, None]).squeeze(1).expm1() < short
        low, high = torch.where(sure, low, lift), torch.where(sure, lift, high)
    grad = torch.full((n,), -0.025 * 2.0**16, dtype=_wide(dtype))
    return Head(hidden, weight, targets, None, grad)


def negative_head(
    n: int, d: int, v: int, *, level: float, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Head:
    """Like `peaked_head`, with every logit lowered by `level`."""
    head = peaked_head(n, d, v, dtype=torch.float64, seed=seed)
    hidden = torch.cat([head.hidden, torch.ones(n, 1, dtype=torch.float64)], 1)
    lower = torch.full((v, 1), -level, dtype=torch.float64)
    weight = torch.cat([head.weight, lower], 1)
    return Head(hidden.to(dtype), weight.to(dtype), head.targets, None, head.grad.to(_wide(dtype)))


def run(op, head: Head, *, stats: Sequence[str] = STATS, **options) -> Outcome:
    """Runs `linear_logps` and its backward; gradients in the inputs' dtypes."""
    hidden = head.hidden.detach().requires_grad_()
    weight = head.weight.detach().requires_grad_()
    bias = None if head.bias is None else head.bias.detach().requires_grad_()
    result = op(hidden, weight, head.targets, bias=bias, stats=stats, **options)
    logps, found = result if isinstance(result, tuple) else (result, TokenStats())
    inputs = (hidden, weight) if bias is None else (hidden, weight, bias)
    grads = torch.autograd.grad(logps, inputs, head.grad.to(logps.dtype))
    return Outcome(
        logps.detach(), grads[0], grads[1], grads[2] if bias is not None else None, found
    )


def run_some(op, head: Head, wanted: Collection[str], **options) -> Outcome:
    """As `run`, with only these of "hidden", "weight" and "bias" requiring a gradient."""
    inputs = {"hidden": head.hidden, "weight": head.weight, "bias": head.bias}
    leaves = {
        name: None if tensor is None else tensor.detach().requires_grad_(name in wanted)
        for name, tensor in inputs.items()
    }
    logps, stats = op(
        leaves["hidden"], leaves["weight"], head.targets, bias=leaves["bias"], stats=STATS,
        **options,
    )  # fmt: skip
    assert logps.requires_grad == bool(wanted)
    if wanted:
        logps.backward(head.grad.to(logps.dtype))
    grads = {f"d_{name}": None if leaf is None else leaf.grad for name, leaf in leaves.items()}
    assert {name for name, grad in grads.items() if grad is not None} == {f"d_{n}" for n in wanted}
    return Outcome(logps.detach(), **grads, stats=stats)  # pyright: ignore[reportArgumentType]


def assert_each_gradient_alone(
    op, head: Head, subsets: Iterable[Collection[str]], *, e_ulp: float = 0.0, **transform
) -> None:
    """Log-probs, statistics and the gradients asked for, for every one of these subsets."""
    for wanted in subsets:
        outcome = run_some(op, head, wanted, **transform)
        assert_logps_close(head, outcome.logps, **transform)
        assert_stats_close(head, outcome.stats, **transform)
        assert_grads_close(head, outcome, e_ulp=e_ulp, **transform)


def exact(head: Head, dtype: torch.dtype = torch.float64, **transform) -> Outcome:
    """The reference in `dtype` on the head's rounded inputs (fp64: the oracle)."""
    weight = head.weight.to(head.hidden.dtype)

    def reference(hidden, weight, targets, *, bias, stats, **transform):
        return linear_logps_reference(hidden, weight, targets, bias=bias, **transform)

    raised = Head(
        head.hidden.to(dtype),
        weight.to(dtype),
        head.targets,
        None if head.bias is None else head.bias.to(dtype),
        head.grad.to(dtype),
    )
    return run(reference, raised, **transform)


def logps_budget(head: Head, oracle: Outcome, plain: Outcome, **transform) -> Tensor:
    """[N]: twice the error of an fp32-accumulate reference (`plain`), row by row.

    That error is a draw from a distribution and may be 0 by luck: it counts as at least half an ulp
    of what is rounded on the way, namely the largest logit, its partial sums (at most |h| |w|, by
    Cauchy and Schwarz; once for the target, once for the others), and the log-prob.
    """
    ignored = head.targets == transform.get("ignore_index", -100)
    h = head.hidden.double().masked_fill(ignored[:, None], 0)
    slope = abs(transform.get("scale", 1.0)) / transform.get("temperature", 1.0)
    sums = slope * h.norm(dim=1) * head.weight.double().norm(dim=1).amax()
    z = _logits(head, **transform).abs().amax(1)
    least = _half_ulp(head) * (z + 2 * sums + oracle.logps.abs() + 1)
    if head.slack is not None:
        least += slope * head.slack
    return 2 * torch.maximum((plain.logps.double() - oracle.logps).abs(), least)


def assert_logps_close(head: Head, actual: Tensor, **transform) -> None:
    oracle, plain = exact(head, **transform), exact(head, head.grad.dtype, **transform)
    budget = logps_budget(head, oracle, plain, **transform)
    error = (actual.double() - oracle.logps).abs()
    assert torch.isfinite(actual).all()
    worst = _worst(error / budget)
    assert worst <= 1, f"log-prob error is {worst:.2f} of its budget"


def grad_budgets(
    head: Head, oracle: Outcome, plain: Outcome, *, e_ulp: float = 0.0, **transform
) -> dict[str, Tensor]:
    """Every element of every gradient: twice the error of an fp32-accumulate reference (`plain`).

    A gradient is a sum of c_nv x over v or n, with c = g dlogp/dz, so that sum_v |c_nv| is
    2 |g| (1 - p_y). Each c errs relatively by the error of its logit (half the log-prob budget) and
    a few roundings; the sum then by that times sum |c| max |x|, whatever cancels in it. `e_ulp`:
    relative rounding of c where an implementation stores it in 16 bits. The rounding of results is
    not in it.
    """
    budget = logps_budget(head, oracle, plain, **transform)
    relative = budget / 2 + 8 * _half_ulp(head) + e_ulp  # [N]
    g, h, w = head.grad.double(), head.hidden.double(), head.weight.double()
    ignored = head.targets == transform.get("ignore_index", -100)
    g, h = g.abs().masked_fill(ignored, 0), h.abs().masked_fill(ignored[:, None], 0)
    g = g * abs(transform.get("scale", 1.0)) / transform.get("temperature", 1.0)
    c = g * 2 * -torch.expm1(oracle.logps) * relative
    # Near p_y = 1 the oracle cancels, and is the less exact of the two: a few of its own ulps.
    c = (c + 4 * ULP[torch.float64] * g)[:, None]
    least = {"d_hidden": c * w.abs().amax(0), "d_weight": (c * h).sum(0), "d_bias": c.sum()}
    budgets = {}
    for name, scale in least.items():
        want, near = getattr(oracle, name), getattr(plain, name)
        if want is not None:
            budgets[name] = 2 * torch.maximum((near - want).abs(), scale)
    return budgets


def assert_grads_close(head: Head, actual: Outcome, *, e_ulp: float = 0.0, **transform) -> None:
    """Within `grad_budgets`, and the rounding of the results to their dtype: once for weight and
    bias, twice for hidden, stored before and after it is multiplied by the incoming gradient.

    A rounding errs by half an ulp, or a subnormal at most; what is stored before, in fp16, is
    relative to slope (1 - p_y), and so is that error."""
    oracle, plain = exact(head, **transform), exact(head, head.grad.dtype, **transform)
    for name, budget in grad_budgets(head, oracle, plain, e_ulp=e_ulp, **transform).items():
        got, want = getattr(actual, name), getattr(oracle, name)
        if got is None:
            continue
        assert torch.isfinite(got).all(), name
        least = torch.finfo(got.dtype).tiny * ULP[got.dtype]  # the smallest subnormal
        rounding = ULP[got.dtype] / 2 * want.abs() + least
        if name == "d_hidden":
            slope = abs(transform.get("scale", 1.0)) / transform.get("temperature", 1.0)
            factor = slope * head.grad.double().abs() * -torch.expm1(oracle.logps)
            rounding = rounding + ULP[got.dtype] / 2 * want.abs() + least * factor[:, None]
        worst = _worst((got.double() - want).abs() / (budget + rounding))
        assert worst <= 1, f"{name} error is {worst:.2f} of its budget"


def assert_adapter_close(
    op, n: int, d: int, v: int, r: int, *, scaling: float = 1.7, e_ulp: float = 0.0,
    dtype: torch.dtype = torch.float32, bias: bool = False, ignored: float = 0.0,
    stats: Sequence[str] = STATS, **options,
) -> None:  # fmt: skip
    """`linear_logps` with a LoRA adapter of rank r on a frozen head, all it computes.

    It is the head [W, B] on [hidden, u] with u = scaling hidden A^T, and its oracle is that of u in
    fp64, unrounded. So that head's budgets hold, with what u may err by as their slack, and go on
    through u to hidden and A by absolute values.
    """
    transform = {k: v for k, v in options.items() if k != "workspace_bytes"}
    whole = peaked_head(n, d + r, v, dtype=dtype, bias=bias, ignored=ignored)
    rng = torch.Generator().manual_seed(1)
    a = (torch.randn(r, d, generator=rng) / d**0.5).to(dtype).requires_grad_()
    hidden = whole.hidden[:, :d].contiguous().requires_grad_()
    weight, b = (part.contiguous() for part in whole.weight.split([d, r], 1))
    b.requires_grad_()
    result = op(
        hidden, weight, whole.targets, lora=(a, b, scaling), bias=whole.bias, stats=stats, **options
    )
    logps, found = result if stats else (result, None)
    d_hidden, d_a, d_b = torch.autograd.grad(logps, (hidden, a, b), whole.grad.to(logps.dtype))

    half, wide_half = ULP[dtype] / 2, ULP[_wide(dtype)] / 2
    least = torch.finfo(dtype).tiny * ULP[dtype]  # the smallest subnormal
    h, steep = hidden.detach().double(), scaling * a.detach().double()
    h = h.masked_fill((whole.targets == -100)[:, None], 0)
    u = h @ steep.mT
    # u is a sum in fp32, whose partial sums are at most |h| |A| (Cauchy and Schwarz), scaled, then
    # held in one number, or of 16 bits in two: the second is half an ulp of the first, and rounded.
    held = half if dtype.itemsize > 2 else half * half
    u_error = wide_half * (2 * h.norm(dim=1)[:, None] * steep.norm(dim=1) + u.abs())
    u_error += held * u.abs() + least
    joined = Head(
        torch.cat([hidden.detach().double(), u], 1), whole.weight.double(), whole.targets,
        whole.bias, whole.grad, u_error @ b.detach().double().abs().amax(0),
    )  # fmt: skip
    assert_logps_close(joined, logps.detach(), **transform)
    if found is not None:
        assert_stats_close(joined, found, **transform)
    oracle, plain = exact(joined, **transform), exact(joined, _wide(dtype), **transform)
    budgets = grad_budgets(joined, oracle, plain, e_ulp=e_ulp, **transform)
    # d hidden of [hidden, u] is rounded twice in its dtype, then again as part of a sum or result;
    # sums over r or N of products of such numbers err by as many fp32 roundings.
    slope = abs(transform.get("scale", 1.0)) / transform.get("temperature", 1.0)
    g = slope * whole.grad.double().abs().masked_fill(whole.targets == -100, 0)[:, None]
    slack = budgets["d_hidden"] + 3 * half * oracle.d_hidden.abs() + least * (1 + g)
    of_h, of_u = oracle.d_hidden.split([d, r], 1)
    slack_h, slack_u = slack.split([d, r], 1)
    sums = (n + r) * wide_half
    through = of_u @ steep
    rough = half + sums
    # |dB| <= sum of |g| 2 (1 - p_y) |u|, so u's error counts by as much; once it is rounded itself.
    of_b = oracle.d_weight[:, d:]
    c = g * 2 * -torch.expm1(oracle.logps)[:, None]
    expected = {
        "hidden": (d_hidden, of_h + through, slack_h + slack_u @ steep.abs()
                   + rough * (of_u.abs() @ steep.abs() + of_h.abs() + through.abs())),
        "A": (d_a, scaling * (of_u.mT @ h), abs(scaling) * (
            slack_u.mT @ h.abs() + (rough + 2 * half) * (of_u.abs().mT @ h.abs()))),
        "B": (d_b, of_b, budgets["d_weight"][:, d:] + (c * u_error).sum(0) + half * of_b.abs()),
    }  # fmt: skip
    for name, (got, want, allowed) in expected.items():
        assert got.dtype == dtype
        worst = _worst((got.double() - want).abs() / (allowed + least))
        assert worst <= 1, f"d {name} error is {worst:.2f} of its budget"


def assert_stats_close(head: Head, stats: TokenStats, **transform) -> None:
    """The four statistics: errors scale with the log-probs' (entropy sums p log p, and so on)."""
    oracle, plain = exact(head, **transform), exact(head, head.grad.dtype, **transform)
    budget = logps_budget(head, oracle, plain, **transform)
    for name in ("entropy", "mean_logits", "log_sum_sq_probs"):
        got, want = getattr(stats, name), getattr(oracle.stats, name)
        near = (getattr(plain.stats, name) - want).abs()
        # A factor p has a relative error of the logits' error, and multiplies a log p or a z.
        allowed = 2 * torch.maximum(near, 2 * budget * (1 + want.abs()))
        worst = _worst((got.double() - want).abs() / allowed)
        assert worst <= 1, f"{name} error is {worst:.2f} of its budget"
    z = _logits(head, **transform)
    top = z.amax(1)
    y = head.targets.clamp(min=0)
    near_tie = (top - z.scatter(1, y[:, None], -torch.inf).amax(1)).abs() <= budget
    assert stats.is_top1 is not None and oracle.stats.is_top1 is not None
    assert ((stats.is_top1 == oracle.stats.is_top1) | near_tie).all(), "is_top1"


def _logits(head: Head, **transform) -> Tensor:
    ignored = head.targets == transform.pop("ignore_index", -100)
    h = head.hidden.double().masked_fill(ignored[:, None], 0)
    bias = None if head.bias is None else head.bias.double()
    return logits_reference(h, head.weight.double(), bias=bias, **transform)


def _worst(shares: Tensor) -> float:
    return shares.max().item() if shares.numel() else 0.0


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _half_ulp(head: Head) -> float:
    return ULP[head.grad.dtype] / 2
