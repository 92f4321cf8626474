"""`preference_loss` on CPU: against the fp64 reference, against TRL's formulas, and its contract.

The Triton implementation has its own tests.
"""

import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdpo_kernels import late, preference_loss, preference_loss_check, preference_loss_torch
from fastdpo_kernels.reference import preference_loss_reference

preference_loss_module = importlib.import_module("fastdpo_kernels.preference_loss")

LOSSES = [("sigmoid", 0.0), ("sigmoid", 0.2), ("ipo", 0.0), ("hinge", 0.0)]
# Empty responses first, last and between; pairs that share responses; response 4 in no pair.
LENGTHS = [0, 5, 1, 130, 7, 0, 12, 0]
PAIRS = [[1, 2], [3, 6], [1, 6], [6, 1], [0, 3], [2, 7], [5, 0]]


def pack(
    lengths: list[int] = LENGTHS, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """token_logps [N], cu_responses [R + 1], ref_token_logps [N]: a policy near its reference."""
    rng = torch.Generator().manual_seed(seed)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    n = int(bounds[-1])
    ref = -torch.empty(n, dtype=torch.float64).exponential_(0.5, generator=rng)
    token_logps = (ref + 0.1 * torch.randn(n, generator=rng, dtype=torch.float64)).clamp(max=0)
    return token_logps.to(dtype), bounds, ref.to(dtype)


def per_response(values: Tensor, bounds: Tensor) -> Tensor:
    ends = bounds.tolist()
    return torch.stack([values[a:b].sum() for a, b in zip(ends, ends[1:], strict=False)])


def weights_of(pairs: Tensor, seed: int) -> Tensor:
    """[P] within [-2, 2]: what the losses are summed with, beside three times their mean."""
    rng = torch.Generator().manual_seed(seed)
    return 4 * torch.rand(len(pairs), generator=rng, dtype=torch.float64) - 2


def with_grads(token_logps: Tensor, bounds: Tensor, pairs: Tensor, *refs, seed: int = 0, **options):
    """The output, and the gradient of a weighted sum of `loss` and `losses`."""
    leaf = token_logps.detach().requires_grad_()
    out = preference_loss(leaf, bounds, pairs, *refs, **options)
    mix = weights_of(pairs, seed).to(out.losses.dtype)
    (grad,) = torch.autograd.grad(3 * out.loss + (mix * out.losses).sum(), leaf)
    return out, grad


def check(dtype, lengths, pairs, loss_type, label_smoothing, beta, by_token, seed=0) -> None:
    """Against the reference in fp64 on the same inputs.

    All vectors [R] and [P] are fp64 inside, so results err by their own rounding, half an ulp, and
    by the order of fp64 sums (`order`, at most N ulp64 of the sum of sizes, times a Lipschitz
    bound). A gradient is rounded as a slope, as its product with the incoming gradient, in the sum
    over the pairs that use the response, and to the dtype of the log-probs.
    """
    token_logps, bounds, ref = pack(lengths, dtype, seed)
    options = {"beta": beta, "loss_type": loss_type, "label_smoothing": label_smoothing}
    refs = (ref, None) if by_token else (None, per_response(ref.double(), bounds))
    out, grad = with_grads(token_logps, bounds, pairs, *refs, seed=seed, **options)
    wide = tuple(None if r is None else r.double() for r in refs)
    want, want_grad = with_grads(
        token_logps.double(), bounds, pairs, *wide, seed=seed, impl="reference", **options
    )
    result = torch.promote_types(dtype, torch.float32)
    ulp = torch.finfo(result).eps
    sizes = token_logps.double().abs().sum() + ref.double().abs().sum()
    order = float(len(token_logps) * torch.finfo(torch.float64).eps * sizes)
    ratio = float(max((token_logps.double() - ref.double()).abs().sum(), 1.0))
    steep = 4 * (1 + beta) * (ratio + 1 / beta)
    for name in ("loss", "losses", "chosen_rewards", "rejected_rewards", "logps"):
        got, expected = getattr(out, name), getattr(want, name)
        assert got.dtype == result and got.shape == expected.shape, name
        gap = (got.double() - expected).abs()
        assert (gap <= ulp * expected.abs() + steep * order).all(), name
    assert grad.dtype == dtype
    if not len(pairs):
        assert grad.eq(0).all()
        return
    slopes = preference_loss_reference(token_logps.double(), bounds, pairs, *wide, **options)
    slope = torch.maximum(slopes.chosen_slope.abs(), slopes.rejected_slope.abs())
    factor = (weights_of(pairs, seed) + 3 / len(pairs)).abs() * slope
    uses = pairs.unique(return_counts=True)[1].max()
    allowed = (2 + uses) * ulp * uses * factor.max() + uses * 5 * steep * order
    gap = (grad.double() - want_grad).abs()
    assert (gap <= torch.finfo(dtype).eps * want_grad.abs() + allowed).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("loss_type", "label_smoothing"), LOSSES)
@pytest.mark.parametrize("by_token", [True, False], ids=["ref_token_logps", "ref_logps"])
def test_losses_rewards_and_gradients(dtype, loss_type, label_smoothing, by_token):
    check(dtype, LENGTHS, torch.tensor(PAIRS), loss_type, label_smoothing, 0.1, by_token)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_pack(data):
    lengths = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=12))
    response = st.integers(0, len(lengths) - 1)
    pairs = data.draw(st.lists(st.tuples(response, response), max_size=20))
    loss_type, label_smoothing = data.draw(st.sampled_from(LOSSES))
    check(
        data.draw(st.sampled_from([torch.float32, torch.float64])),
        lengths,
        torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2),
        loss_type,
        label_smoothing,
        data.draw(st.floats(0.01, 2.0)),
        data.draw(st.booleans()),
        data.draw(st.integers(0, 1000)),
    )


@pytest.mark.parametrize(("loss_type", "label_smoothing"), LOSSES)
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_gradcheck(loss_type, label_smoothing, impl):
    token_logps, bounds, ref = pack([3, 0, 4, 2], torch.float64)
    pairs = torch.tensor([[0, 2], [2, 3], [0, 3], [1, 0]])

    def of(values):
        out = preference_loss(
            values,
            bounds,
            pairs,
            ref,
            beta=0.7,
            loss_type=loss_type,
            label_smoothing=label_smoothing,
            impl=impl,
        )
        return out.loss, out.losses

    assert torch.autograd.gradcheck(of, token_logps.requires_grad_())


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "hinge"])
def test_padded_batches_as_trl_computes_them(loss_type):
    """The formulas of TRL's DPOTrainer, on its layout: [2P, L] with a mask, chosen rows first."""
    beta, lengths = 0.3, [4, 9, 1, 6, 2, 8]
    token_logps, bounds, ref = pack(lengths, torch.float64)
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]

    def padded(values):
        return torch.zeros(6, 9, dtype=torch.float64).masked_scatter(mask, values).sum(1)

    ratios = padded(token_logps) - padded(ref)
    chosen, rejected = ratios.chunk(2)
    delta = chosen - rejected
    if loss_type == "sigmoid":
        want = -F.logsigmoid(beta * delta)
    elif loss_type == "hinge":
        want = torch.relu(1 - beta * delta)
    else:
        chosen_mask, rejected_mask = mask.chunk(2)
        gap = chosen / chosen_mask.sum(1) - rejected / rejected_mask.sum(1)
        want = (gap - 1 / (2 * beta)) ** 2
    pairs = torch.tensor([[0, 3], [1, 4], [2, 5]])
    out = preference_loss(token_logps, bounds, pairs, ref, beta=beta, loss_type=loss_type)
    torch.testing.assert_close(out.losses, want)
    torch.testing.assert_close(out.loss, want.mean())
    torch.testing.assert_close(out.chosen_rewards, beta * chosen)
    torch.testing.assert_close(out.rejected_rewards, beta * rejected)


def test_a_policy_equal_to_its_reference():
    token_logps, bounds, _ = pack()
    pairs = torch.tensor(PAIRS)
    out = preference_loss(token_logps, bounds, pairs, token_logps, beta=0.1)
    assert out.losses.eq(math.log(2.0)).all() and out.chosen_rewards.eq(0).all()
    smoothed = preference_loss(
        token_logps, bounds, pairs, token_logps, beta=0.1, label_smoothing=0.3
    )
    torch.testing.assert_close(smoothed.losses, out.losses)


@pytest.mark.parametrize("margin", [-1e4, -200.0, 200.0, 1e4])
def test_extreme_margins_stay_finite(margin):
    """-log sigmoid(m) is -m far below 0, and e^-m, not 0, far above it (in fp64)."""
    values = torch.tensor([margin, 0.0], dtype=torch.float64)
    bounds, pairs = torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([[0, 1]])
    out, grad = with_grads(values, bounds, pairs, torch.zeros_like(values), beta=1.0)
    assert torch.isfinite(grad).all()
    torch.testing.assert_close(out.loss.item(), -margin if margin < 0 else math.exp(-margin))


def test_a_nan_response_spoils_only_its_pairs():
    token_logps, bounds, ref = pack()
    token_logps[bounds[2]] = math.nan  # response 2, of one token
    out = preference_loss(token_logps, bounds, torch.tensor(PAIRS), ref, beta=0.1)
    assert out.losses.isnan().tolist() == [2 in pair for pair in PAIRS]
    assert out.logps.isnan().sum() == 1


def test_no_pairs_and_no_tokens():
    token_logps, bounds, ref = pack()
    none = torch.empty(0, 2, dtype=torch.int64)
    out, grad = with_grads(token_logps, bounds, none, ref, beta=0.1)
    assert out.loss == 0 and out.losses.shape == (0,) and grad.eq(0).all()
    empty = torch.zeros(3, dtype=torch.int32)
    pairs = torch.tensor([[0, 1]])
    out, grad = with_grads(token_logps[:0], empty, pairs, ref[:0], beta=0.1)
    assert out.logps.eq(0).all() and grad.shape == (0,)
    torch.testing.assert_close(out.loss.item(), math.log(2.0))
    out, grad = with_grads(token_logps[:0], empty[:1], none, ref[:0], beta=0.1)
    assert out.logps.shape == (0,) and out.loss == 0


def test_a_response_in_no_pair_gets_no_gradient():
    token_logps, bounds, ref = pack()
    _, grad = with_grads(token_logps, bounds, torch.tensor(PAIRS), ref, beta=0.1)
    assert grad[bounds[4] : bounds[5]].eq(0).all() and grad[bounds[3] : bounds[4]].ne(0).all()


def test_only_the_losses_carry_gradients():
    token_logps, bounds, ref = pack()
    out = preference_loss(
        token_logps.requires_grad_(), bounds, torch.tensor(PAIRS), ref.requires_grad_(), beta=0.1
    )
    assert out.loss.requires_grad and out.losses.requires_grad
    for name in ("chosen_rewards", "rejected_rewards", "logps"):
        assert not getattr(out, name).requires_grad
    (out.loss + out.losses.sum()).backward()
    assert token_logps.grad is not None and ref.grad is None


def test_strided_and_repeated():
    token_logps, bounds, ref = pack()
    pairs = torch.tensor(PAIRS)
    want, want_grad = with_grads(token_logps, bounds, pairs, ref, beta=0.1, loss_type="ipo")
    strided = [torch.stack([x, x], -1)[..., 0] for x in (token_logps, bounds, pairs, ref)]
    assert not any(x.is_contiguous() for x in strided)
    got, grad = with_grads(*strided, beta=0.1, loss_type="ipo")
    again, grad_again = with_grads(*strided, beta=0.1, loss_type="ipo")
    for name in ("loss", "losses", "chosen_rewards", "rejected_rewards", "logps"):
        assert torch.equal(getattr(got, name), getattr(want, name))
        assert torch.equal(getattr(got, name), getattr(again, name))
    assert torch.equal(grad, want_grad) and torch.equal(grad, grad_again)


def test_long_responses_keep_small_log_ratios():
    """100,000 tokens of -3 nat: one ulp of an fp32 sum is 0.03 nat, a third of the log-ratio."""
    n = 100_000
    ref = torch.full((2 * n,), -3.0)
    policy = ref.clone()
    policy[:n] += 2.0**-20
    bounds = torch.tensor([0, n, 2 * n], dtype=torch.int32)
    pairs = torch.tensor([[0, 1]])
    for refs in ((ref, None), (None, torch.tensor([-3.0 * n] * 2))):
        out = preference_loss(policy, bounds, pairs, *refs, beta=1.0)
        torch.testing.assert_close(out.chosen_rewards.item(), n * 2.0**-20, rtol=1e-6, atol=0)


def test_autocast_changes_nothing():
    token_logps, bounds, ref = pack()
    pairs = torch.tensor(PAIRS)
    want, want_grad = with_grads(token_logps, bounds, pairs, ref, beta=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        got, grad = with_grads(token_logps, bounds, pairs, ref, beta=0.1)
    assert torch.equal(got.losses, want.losses) and torch.equal(grad, want_grad)


def test_double_backward_and_transforms_are_refused_by_name():
    token_logps, bounds, ref = pack()
    pairs = torch.tensor(PAIRS)
    out = preference_loss(token_logps.requires_grad_(), bounds, pairs, ref, beta=0.1)
    (grad,) = torch.autograd.grad(out.loss, token_logps, create_graph=True)
    with pytest.raises(RuntimeError, match="preference_loss has no second derivative"):
        torch.autograd.grad(grad.square().sum(), token_logps)
    with pytest.raises(RuntimeError, match="preference_loss does not work under torch.func"):
        torch.func.grad(lambda x: preference_loss(x, bounds, pairs, ref, beta=0.1).loss)(ref)


def test_triton_by_name_never_falls_back(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    token_logps, bounds, ref = pack()
    with pytest.raises(RuntimeError, match='impl="triton" cannot run here'):
        preference_loss(token_logps, bounds, torch.tensor(PAIRS), ref, beta=0.1, impl="triton")


def bad_calls():
    t, c, r = pack()
    p = torch.tensor(PAIRS)
    n = len(t)
    late, falling = c.clone(), c.clone()
    late[-1] += 1
    falling[3] = 1
    return {
        "no reference": ((t, c, p), {}, ValueError, "got neither"),
        "two references": ((t, c, p, r, torch.zeros(8)), {}, ValueError, "got both"),
        "ref N": ((t, c, p, r[1:]), {}, ValueError, f"expected N={n} ref_token_logps, got {n - 1}"),
        "ref R": ((t, c, p, None, torch.zeros(7)), {}, ValueError, "expected 8 ref_logps.*got 7"),
        "int64 bounds": ((t, c.long(), p, r), {}, TypeError, "cu_responses must be torch.int32"),
        "int32 pairs": ((t, c, p.int(), r), {}, TypeError, "pairs must be torch.int64"),
        "integers": ((t.long(), c, p, r), {}, TypeError, "token_logps must be a float dtype"),
        "rank": ((t[None], c, p, r), {}, ValueError, r"token_logps must have 1 .* \(1, 155\)"),
        "triples": ((t, c, torch.zeros(2, 3).long(), r), {}, ValueError, r"\[P, 2\], got \(2, 3\)"),
        "device": ((t, c, p.to("meta"), r), {}, ValueError, "pairs is on meta, token_logps on cpu"),
        "end": ((t, late, p, r), {}, ValueError, f"from 0 to N={n}, got 0 to {n + 1}"),
        "falling": ((t, falling, p, r), {}, ValueError, "falls from 5 to 1 at response 2"),
        "no bounds": ((t[:0], c[:0], p, r[:0]), {}, ValueError, "cu_responses is empty"),
        "pair": ((t, c, p + 2, r), {}, ValueError, r"pairs\[1\] = \[5, 8\] names.*\[0, 8\)"),
        "list": ((t, c, PAIRS, r), {}, TypeError, "pairs must be a tensor, got list"),
        "beta": ((t, c, p, r), {"beta": -1}, ValueError, "beta must be positive, got -1"),
        "loss": ((t, c, p, r), {"loss_type": "dpo"}, ValueError, "'dpo' is not fused; expected"),
        "smoothing": ((t, c, p, r), {"label_smoothing": 0.5}, ValueError, r"\[0, 0.5\), got 0.5"),
        "smoothed ipo": (
            (t, c, p, r),
            {"label_smoothing": 0.1, "loss_type": "ipo"},
            ValueError,
            "for sigmoid alone, not for ipo",
        ),
        "impl": ((t, c, p, r), {"impl": "fast"}, ValueError, "impl='fast' is unknown"),
    }


@pytest.mark.parametrize("name", bad_calls())
def test_bad_arguments_are_named(name):
    args, options, error, message = bad_calls()[name]
    with pytest.raises(error, match=message) as caught:
        preference_loss(*args, **{"beta": 0.1, **options})
    assert str(caught.value).startswith("preference_loss: ") and "\n" not in str(caught.value)


# What is wrong with bounds or pairs, when nobody has looked at them, and which pairs it spoils. The
# lengths are [4, 2, 3], the pairs [0, 2], [1, 0], [2, 1].
UNSEEN = {
    "nothing": ([0, 4, 6, 9], None, []),
    "past the end": ([0, 4, 6, 10**6], None, [0, 2]),
    "before the start": ([-7, 4, 6, 9], None, [0, 1]),
    "falling": ([0, 4, 2, 9], None, [1, 2]),
    "far falling": ([0, 2**31 - 1, -(2**31), 9], None, [0, 1, 2]),
    "no such response": ([0, 4, 6, 9], [[0, 3], [-1, 0], [2, 1]], [0, 1]),
    "far away": ([0, 4, 6, 9], [[0, 2], [2**62, 0], [2, -(2**62)]], [1, 2]),
}


def unseen(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor, list[int]]:
    """token_logps, cu_responses, pairs, ref_token_logps, and the pairs that are NaN."""
    bounds, pairs, spoilt = UNSEEN[name]
    token_logps, _, ref = pack([4, 2, 3])
    pairs = torch.tensor(pairs or [[0, 2], [1, 0], [2, 1]])
    return token_logps, torch.tensor(bounds, dtype=torch.int32), pairs, ref, spoilt


@pytest.mark.parametrize("name", UNSEEN)
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "hinge"])
@pytest.mark.parametrize("by_token", [True, False])
def test_what_nobody_has_looked_at_stays_inside_its_memory(name, loss_type, by_token, monkeypatch):
    """As on a GPU: NaN where there is nothing to compute, the rest as ever, no access outside."""
    token_logps, bounds, pairs, ref, spoilt = unseen(name)
    refs = (ref, None) if by_token else (None, torch.zeros(3))
    options = {"beta": 0.1, "loss_type": loss_type, "label_smoothing": 0.0}

    class Elsewhere(torch.Tensor):
        """On a CPU, and says otherwise."""

        device = torch.device("cuda")  # pyright: ignore[reportAssignmentType]

    there = token_logps.as_subclass(Elsewhere)
    out = preference_loss_torch.forward(there, bounds, pairs, *refs, **options)
    _, whole, _ = pack([4, 2, 3])
    rest = [p for p in range(3) if p not in spoilt]
    want = preference_loss_torch.forward(token_logps, whole, pairs[rest], *refs, **options)
    assert out.losses.isnan().nonzero().flatten().tolist() == spoilt
    assert out.logps.shape == (3,)
    if name == "falling":
        return  # responses overlap: whose tokens they are is anybody's guess
    for field, value in vars(out).items():
        if field != "logps":
            assert torch.equal(value[rest].as_subclass(Tensor), getattr(want, field)), field


@pytest.mark.parametrize("name", UNSEEN)
def test_gradients_of_what_nobody_has_looked_at(name):
    _, bounds, _, _, spoilt = unseen(name)
    values = torch.tensor([1.0, 2.0, 3.0])
    spread = preference_loss_module._spread(values, bounds, 9)
    assert spread.shape == (9,) and set(spread.tolist()) <= {1.0, 2.0, 3.0}
    if not spoilt:
        assert torch.equal(spread, values.repeat_interleave(bounds.diff()))
    assert torch.equal(preference_loss_module._spread(values[:0], bounds[:1], 4), torch.zeros(4))


def test_a_devices_late_report_of_bad_bounds_is_raised_when_it_has_arrived(monkeypatch):
    """With a stand-in for the copies of a GPU's tensors and for their event."""

    class Arrived:
        def query(self):
            return True

    def keep(look, *tensors):
        late._pending.append((Arrived(), look, tuple(copies)))

    monkeypatch.setattr(preference_loss_check, "check_later", keep)
    for name, message in {
        "past the end": r"in an earlier call, .* from 0 to N=9, got 0 to 1000000",
        "falling": "falls from 4 to 2 at response 1",
        "no such response": r"pairs\[0\] = \[0, 3\] names a response outside \[0, 3\)",
    }.items():
        _, *copies, _, _ = unseen(name)
        bounds, pairs = (t.to("meta") for t in copies)
        preference_loss_check.check_values(bounds, pairs, 9)
        with pytest.raises(ValueError, match=message):
            late.raise_late()
        assert not late._pending


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("name", UNSEEN)
def test_bad_bounds_on_a_gpu_give_nan_and_then_an_error(name, impl, monkeypatch):
    *inputs, spoilt = unseen(name)
    token_logps, bounds, pairs, ref = (t.cuda() for t in inputs)
    token_logps.requires_grad_()
    with monkeypatch.context() as patch:  # so small a call's copies may arrive before its backward
        patch.setattr(torch.cuda.Event, "query", lambda event: False)
        out = preference_loss(token_logps, bounds, pairs, ref, beta=0.1, impl=impl)
        (grad,) = torch.autograd.grad(out.losses.nansum(), token_logps)
    torch.cuda.synchronize()
    assert out.losses.isnan().nonzero().flatten().tolist() == spoilt and grad.shape == (9,)
    if spoilt:
        with pytest.raises(ValueError, match="in an earlier call, preference_loss"):
            late.raise_late()
    late.raise_late()
