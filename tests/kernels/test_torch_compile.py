"""The ops inside torch.compile: in one graph, with their eager numbers and gradients.

Backends "eager" and "aot_eager": what a compiler does around an opaque op is its own affair.
"""

from typing import Any

import pytest
import torch

from fastdpo_kernels import linear_dpo_loss, linear_logps, linear_logps_call, preference_loss
from fastdpo_kernels.impls import STATS
from tests.numerics import peaked_head, sure_head

BACKENDS = ("eager", "aot_eager")
BOUNDS = torch.tensor([0, 7, 7, 20, 24, 33], dtype=torch.int32)
PAIRS = torch.tensor([[0, 2], [3, 4], [0, 4], [1, 2]])


@pytest.fixture(autouse=True)
def chunked(monkeypatch):
    """Heads here are tiny, but not for that: the way of large ones is tested."""
    monkeypatch.setattr(linear_logps_call, "is_tiny", lambda *args, **kwargs: False)


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def both(function, inputs: list[torch.Tensor], backend: str, **options):
    """(compiled, eager): the outputs, then the gradients of those inputs that require them."""
    results = []
    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=False)
    for each in (compiled, function):
        leaves = [t.detach().requires_grad_(t.requires_grad) for t in inputs]
        loss, *rest = each(*leaves, **options)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        grads = torch.autograd.grad(loss, wanted) if wanted else ()
        results.append([loss.detach(), *rest, *grads])
    return results


def assert_same(compiled, eager) -> None:
    assert len(compiled) == len(eager)
    for one, other in zip(compiled, eager, strict=True):
        assert torch.equal(one, other)
        assert one.requires_grad == other.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_linear_logps(backend, trained):
    head = peaked_head(33, 16, 101, bias=True, ignored=0.2)
    assert head.bias is not None

    def loss(hidden, weight, bias):
        logps, stats = linear_logps(
            2 * hidden, weight, head.targets, bias=bias, softcap=20.0, stats=STATS
        )
        return (logps * head.grad).sum(), logps.detach(), *(getattr(stats, s) for s in STATS)

    leaves = [head.hidden.requires_grad_(), head.weight.requires_grad_(trained)]
    assert_same(*both(loss, [*leaves, head.bias.requires_grad_(trained)], backend))


def test_fp16_with_a_factor_for_each_row():
    head = sure_head(33, 16, 101)

    def loss(hidden):
        logps = linear_logps(hidden, head.weight, head.targets)
        return (logps * head.grad).sum(), logps.detach()

    assert_same(*both(loss, [head.hidden.requires_grad_()], "aot_eager"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_adapter_under_autocast(backend):
    head = peaked_head(33, 16, 101)
    a, b = torch.randn(4, 16).requires_grad_(), torch.randn(101, 4).requires_grad_()

    def loss(hidden, a, b):
        with torch.autocast("cpu", torch.bfloat16):
            logps = linear_logps(hidden, head.weight, head.targets, lora=(a, b, 0.5))
        return (logps * head.grad).sum(), logps.detach()

    compiled, eager = both(loss, [head.hidden.requires_grad_(), a, b], backend)
    assert torch.equal(compiled[1], eager[1])  # rounded alike
    # bf16 gradients, rounded two or three times each (half of eps 8e-3)
    for one, other in zip(compiled[2:], eager[2:], strict=True):
        assert (one - other).norm() <= 3 * 2.0**-8 * other.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("by_token", [True, False])
def test_linear_dpo_loss(backend, by_token):
    head = peaked_head(33, 16, 101)
    ref = linear_logps(1.1 * head.hidden, head.weight, head.targets)
    sums = torch.stack([ref[a:b].sum() for a, b in zip(BOUNDS, BOUNDS[1:], strict=False)])
    refs: dict[str, Any] = {"ref_token_logps": ref} if by_token else {"ref_logps": sums}

    def loss(hidden, weight):
        out = linear_dpo_loss(
            hidden, weight, head.targets, BOUNDS, PAIRS, **refs, beta=0.3, loss_type="ipo"
        )
        return out.loss, out.losses.detach(), out.chosen_rewards, out.rejected_rewards, out.logps

    leaves = [head.hidden.requires_grad_(), head.weight.requires_grad_()]
    assert_same(*both(loss, leaves, backend))


def test_preference_loss_alone_and_through_its_losses():
    token_logps = -torch.rand(33).requires_grad_()

    def loss(token_logps):
        out = preference_loss(token_logps, BOUNDS, PAIRS, torch.zeros(33), beta=0.1)
        return (out.losses * torch.arange(4)).sum() + out.loss, out.logps

    assert_same(*both(loss, [token_logps.detach().requires_grad_()], "aot_eager"))


def test_one_graph_serves_every_number_of_rows():
    head = peaked_head(40, 16, 101)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    @torch.compile(backend=backend, fullgraph=True, dynamic=True)
    def logps(hidden, weight, targets):
        return linear_logps(hidden, weight, targets).sum()

    for n in (40, 17, 3):
        hidden, targets = head.hidden[:n].clone().requires_grad_(), head.targets[:n].clone()
        got = torch.autograd.grad(logps(hidden, head.weight, targets), hidden)[0]
        eager = linear_logps(hidden, head.weight, targets).sum()
        assert torch.equal(got, torch.autograd.grad(eager, hidden)[0])
    assert len(graphs) == 1


def test_no_gradient_where_none_is_wanted():
    head = peaked_head(20, 16, 101)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def logps(hidden):
        with torch.no_grad():
            return linear_logps(hidden, head.weight, head.targets)

    out = logps(head.hidden.requires_grad_())
    assert not out.requires_grad
    assert torch.equal(out, linear_logps(head.hidden, head.weight, head.targets).detach())


def test_bad_values_are_named_when_the_graph_runs():
    head = peaked_head(6, 8, 33)
    compiled = torch.compile(linear_logps, backend="eager", fullgraph=True)
    with pytest.raises(ValueError, match=r"targets\[0\] = 33 is outside \[0, V=33\)"):
        compiled(head.hidden, head.weight, head.targets.fill_(33))

    def loss(cu_responses):
        return preference_loss(torch.zeros(33), cu_responses, PAIRS, torch.zeros(33), beta=0.1).loss

    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    with pytest.raises(ValueError, match="must run from 0 to N=33, got 0 to 34"):
        compiled(torch.tensor([0, 7, 7, 20, 24, 34], dtype=torch.int32))


@pytest.mark.parametrize("name", ["linear_logps", "preference_loss"])
def test_a_second_derivative_is_refused_by_name(name):
    head = peaked_head(33, 8, 33)

    def loss(hidden):
        logps = linear_logps(hidden, head.weight, head.targets)
        return preference_loss(logps, BOUNDS, PAIRS, torch.zeros(33), beta=0.1).loss

    def of_weight(weight):
        return linear_logps(head.hidden, weight, head.targets).sum()

    function, leaf = (of_weight, head.weight) if name == "linear_logps" else (loss, head.hidden)
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    leaf.requires_grad_()
    (grad,) = torch.autograd.grad(compiled(leaf), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{name} has no second derivative"):
        torch.autograd.grad(grad.square().sum(), leaf)


def test_the_reference_runs_beside_the_graph():
    head = peaked_head(6, 8, 33)

    def loss(hidden):
        return linear_logps(2 * hidden, head.weight, head.targets, impl="reference").sum()

    assert torch.equal(torch.compile(loss, backend="eager")(head.hidden), loss(head.hidden))
