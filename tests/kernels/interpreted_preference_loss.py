"""The Triton kernel of `preference_loss`, run by Triton's interpreter on a CPU.

`test_preference_loss_triton.py` runs this file in a process of its own, with TRITON_INTERPRET=1.
"""

import contextlib
import itertools

import pytest
import torch

from fastdpo_kernels import preference_loss_triton as driver
from fastdpo_kernels.preference_loss import preference_loss
from fastdpo_kernels.reference import preference_loss_reference
from tests.kernels.interpreter import patch_once
from tests.kernels.test_preference_loss import UNSEEN, unseen

patch_once()
LOSSES = [("sigmoid", 0.0), ("sigmoid", 0.2), ("hinge", 0.0), ("ipo", 0.0)]
OUTPUTS = ("losses", "chosen_rewards", "rejected_rewards", "logps")
# Sums are fp64 on both sides, so what remains is the rounding of beta to fp32 (half an ulp, 2^-24,
# relative in whatever is proportional to it) and of the result: a few times 2^-24 of the terms.
RELATIVE = 4 * 2.0**-24


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fresh memory holds NaN, so that whatever is not written shows."""
    empty = torch.empty

    def poison(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", poison)


def pack(lengths, seed=0, dtype=torch.float32):
    """Token log-probs of responses of these lengths, the reference's, and where they begin."""
    rng = torch.Generator().manual_seed(seed)
    cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    n = int(cu[-1])
    policy = -3 * torch.rand(n, generator=rng).to(dtype)
    reference = policy.float() + 0.1 * torch.randn(n, generator=rng)
    return policy, reference.to(dtype), cu


def check(policy, cu, pairs, *, beta, loss_type, label_smoothing, **references):
    results = []
    for _ in range(2):
        leaf = policy.clone().requires_grad_()
        out = preference_loss(
            leaf, cu, pairs, beta=beta, loss_type=loss_type, label_smoothing=label_smoothing,
            impl="triton", **references,
        )  # fmt: skip
        weight = torch.arange(1.0, len(pairs) + 1)
        (grad,) = torch.autograd.grad(out.loss + (weight * out.losses).sum(), leaf)
        results.append((out, grad))
    (out, grad), (again, grad_again) = results
    leaf = policy.double().requires_grad_()
    wanted = preference_loss_reference(
        leaf, cu, pairs, beta=beta, loss_type=loss_type, label_smoothing=label_smoothing,
        **{name: tensor.double() for name, tensor in references.items()},
    )  # fmt: skip
    loss = wanted.losses.mean() + (weight * wanted.losses).sum()
    (grad_wanted,) = torch.autograd.grad(loss, leaf)
    # A log-ratio is a difference of sums: fp32 cannot hold ref_logps [R] finer than half an ulp,
    # but that is its input here; what is compared are equal inputs.
    for name in OUTPUTS:
        got, want = getattr(out, name), getattr(wanted, name).detach()
        assert torch.equal(got, getattr(again, name)), name
        scale = want.abs() + 1
        assert ((got.double() - want).abs() <= RELATIVE * scale).all(), name
    assert torch.equal(grad, grad_again)
    share = weight.sum() + 1
    # gradients are rounded to the dtype of the token log-probs
    rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}.get(policy.dtype, RELATIVE)
    budget = 2 * rounding * grad_wanted.abs() + RELATIVE * share
    assert ((grad.double() - grad_wanted).abs() <= budget).all()


@pytest.mark.parametrize(("loss_type", "label_smoothing"), LOSSES)
@pytest.mark.parametrize("per_token", [True, False])
def test_losses(loss_type, label_smoothing, per_token):
    policy, reference, cu = pack([5, 0, 600, 1, 37, 512])
    pairs = torch.tensor([[0, 2], [4, 2], [3, 1], [5, 0]])
    if per_token:
        references = {"ref_token_logps": reference}
    else:
        sums = [reference[a:b].sum() for a, b in itertools.pairwise(cu.tolist())]
        references = {"ref_logps": torch.stack(sums)}
    options = {"beta": 0.1, "loss_type": loss_type, "label_smoothing": label_smoothing}
    check(policy, cu, pairs, **options, **references)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs(dtype):
    policy, reference, cu = pack([9, 30, 4], dtype=dtype)
    pairs = torch.tensor([[0, 1], [2, 1]])
    options = {"beta": 0.5, "loss_type": "sigmoid", "label_smoothing": 0.1}
    check(policy, cu, pairs, ref_token_logps=reference, **options)


def test_strided_inputs():
    policy, reference, cu = pack([6, 3, 8])
    wide = torch.stack([policy, reference], 1)
    pairs = torch.tensor([[0, 2], [1, 0]]).T.contiguous().T
    options = {"beta": 0.3, "loss_type": "ipo", "label_smoothing": 0.0}
    check(wide[:, 0], cu, pairs, ref_token_logps=wide[:, 1], **options)


def test_far_margins_stay_finite():
    """The sigmoid's tails: margins of +-1000."""
    policy = torch.tensor([-1.0, -1001.0])
    cu = torch.tensor([0, 1, 2], dtype=torch.int32)
    pairs = torch.tensor([[0, 1], [1, 0]])
    check(
        policy, cu, pairs, ref_logps=torch.zeros(2), beta=1.0, loss_type="sigmoid",
        label_smoothing=0.1,
    )  # fmt: skip


@pytest.mark.parametrize(("loss_type", "label_smoothing"), LOSSES)
@pytest.mark.parametrize("per_token", [True, False])
def test_what_is_not_a_number_stays_one(loss_type, label_smoothing, per_token):
    """A NaN log-prob (of a target out of range), and pairs of responses that do not exist, which a
    GPU's host does not look at."""
    policy, reference, cu = pack([4, 2, 3])
    policy[5] = torch.nan
    pairs = torch.tensor([[0, 2], [1, 0], [2, 3], [-1, 0]])
    options = {"beta": 0.1, "loss_type": loss_type, "label_smoothing": label_smoothing}
    refs = (reference, None) if per_token else (None, torch.zeros(3))
    out = driver.forward(policy, cu, pairs, *refs, **options)
    assert out.losses.isnan().tolist() == [False, True, True, True]
    assert out.logps.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("name", UNSEEN)
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "hinge"])
@pytest.mark.parametrize("per_token", [True, False])
def test_what_nobody_has_looked_at_stays_inside_its_memory(name, loss_type, per_token):
    policy, cu, pairs, reference, spoilt = unseen(name)
    # Before and behind the log-probs lies what must not be read.
    policy, reference = (torch.cat([t.new_full((9,), 1e30)] * 2 + [t]) for t in (policy, reference))
    policy, reference = (torch.cat([t, t.new_full((9,), 1e30)])[18:27] for t in (policy, reference))
    refs = (reference, None) if per_token else (None, torch.zeros(3))
    options = {"beta": 0.1, "loss_type": loss_type, "label_smoothing": 0.0}
    out = driver.forward(policy, cu, pairs, *refs, **options)
    assert out.losses.isnan().nonzero().flatten().tolist() == spoilt
    assert (out.logps[~out.logps.isnan()].abs() < 100).all()


def test_no_pairs_and_no_responses():
    policy, reference, cu = pack([4, 2])
    none = torch.empty(0, 2, dtype=torch.int64)
    out = preference_loss(policy, cu, none, ref_token_logps=reference, beta=0.1, impl="triton")
    assert out.loss == 0 and torch.isfinite(out.logps).all() and out.losses.shape == (0,)
    empty = torch.zeros(1, dtype=torch.int32)
    out = preference_loss(policy[:0], empty, none, ref_logps=policy[:0], beta=0.1, impl="triton")
    assert out.logps.shape == (0,)


def test_one_launch(monkeypatch):
    launches = []

    class Kernel:
        def __getitem__(self, grid):
            launches.append(grid)
            return lambda *args, **kwargs: None

    @contextlib.contextmanager
    def device_of(tensor):
        launches.append(tensor.device)
        yield

    monkeypatch.setattr(driver, "_preference_loss_kernel", Kernel())
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    policy, reference, cu = pack([4, 2, 7])
    pairs = torch.tensor([[0, 1], [2, 1]])
    preference_loss(policy, cu, pairs, ref_token_logps=reference, beta=0.1, impl="triton")
    assert launches == [policy.device, (3 + 2,)]
