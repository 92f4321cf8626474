"""What the ops refuse in one line that names the argument, what was given and the way out: numbers
that are none, tensors that are not plain, and ways to differentiate that they don't have."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastdpo_kernels import linear_dpo_loss, linear_logps, preference_loss
from tests.numerics import peaked_head

BOUNDS = torch.tensor([0, 2, 5], dtype=torch.int32)
PAIRS = torch.tensor([[0, 1]])


class DTensor(Tensor):
    """Stands for torch.distributed.tensor.DTensor."""


def call_logps(**options: Any) -> Tensor:
    head = peaked_head(5, 8, 33, dtype=options.pop("dtype", torch.float32))
    return linear_logps(head.hidden, head.weight, head.targets, **options)


def call_loss(**given: Any) -> Any:
    tensors = {
        "token_logps": -torch.ones(5),
        "cu_responses": BOUNDS,
        "pairs": PAIRS,
        "ref_token_logps": -torch.ones(5),
    }
    return preference_loss(**{"beta": 0.1, **tensors, **given})


NUMBERS = {
    "bytes as text": ({"workspace_bytes": "256MB"}, TypeError, "workspace_bytes must be a number, "
                      r"got '256MB'; write workspace_bytes=256 \* 2"),
    "bytes None": ({"workspace_bytes": None}, TypeError, "workspace_bytes .* got None; write"),
    "bytes True": ({"workspace_bytes": True}, TypeError, "workspace_bytes .* got True; write"),
    "bytes far": ({"workspace_bytes": 2**63}, ValueError, "below 2.63, got 9223372036854775808"),
    "cap as text": ({"softcap": "30"}, TypeError, "softcap .* got '30'; write softcap=None for"),
    "cap True": ({"softcap": True}, TypeError, "softcap must be a number, got True"),
    "cap tensor": ({"softcap": torch.ones(())}, TypeError, "softcap .* got a tensor; write"),
    "cap beyond fp32": ({"softcap": 1e39}, ValueError,
                        r"softcap=1e\+39 leaves float32; choose one between 1.2e-38 and 1.7e\+38"),
    "cap below fp32": ({"softcap": 1e-39}, ValueError, "softcap=1e-39 leaves float32"),
    "scale None": ({"scale": None}, TypeError, "scale must .* got None; write scale=1.0 for none"),
    "scale beyond": ({"scale": -1e39}, ValueError, r"scale=-1e\+39 leaves float32"),
    "scale far": ({"scale": 10**400}, ValueError, "scale=a long int leaves float32"),
    "heat as text": ({"temperature": "1"}, TypeError, "temperature .* got '1'; write temper"),
    "heat None": ({"temperature": None}, TypeError, "temperature .* got None; write temper"),
    "heat below": ({"temperature": 1e-300}, ValueError, "temperature=1e-300 leaves float32"),
    "quotient": ({"scale": 1e20, "temperature": 1e-20}, ValueError,
                 r"scale / temperature=1e\+40 leaves float32"),
    "capped": ({"softcap": 1e30, "scale": 1e-10}, ValueError,
               "scale / softcap=1.*e-40 leaves float32"),
    "ignored far": ({"ignore_index": 10**30}, ValueError, "ignore_index=10{30} is outside int64; "),
    "ignored float": ({"ignore_index": 2.5}, TypeError, "ignore_index must be an integer, got 2.5"),
    "ignored whole": ({"ignore_index": 2.0}, TypeError, "must be an integer, got 2.0; write ignor"),
    "ignored True": ({"ignore_index": True}, TypeError, "ignore_index .* got True; write ignore_i"),
    "ignored None": ({"ignore_index": None}, TypeError, "ignore_index .* got None; write ignore_i"),
    "no lora": ({"lora": 2.0}, TypeError, r"lora must be a tuple \(A, B, scaling\), got float"),
    "scaling": ({"lora": (torch.ones(2, 8), torch.ones(33, 2), "2")}, TypeError,
                r"lora's scaling must be a number, got '2'; write lora=\(A, B, 1.0\) for none"),
    "scaling far": ({"lora": (torch.ones(2, 8), torch.ones(33, 2), 1e39)}, ValueError,
                    r"lora's scaling=1e\+39 leaves float32"),
    "beta as text": ({"beta": "0.1"}, TypeError, "beta .* got '0.1'; write beta=0.1"),
    "beta None": ({"beta": None}, TypeError, "beta must be a number, got None; write beta=0.1"),
    "beta True": ({"beta": True}, TypeError, "beta must be a number, got True; write beta=0.1"),
    "beta below": ({"beta": 1e-300}, ValueError, "beta=1e-300 leaves float32"),
    "smooth None": ({"label_smoothing": None}, TypeError, "label_smoothing .* got None; write la"),
}  # fmt: skip


def refused(error: type[Exception], message: str, function: Any, **given: Any) -> None:
    with pytest.raises(error, match=message) as caught:
        function(**given)
    op = "preference_loss: " if function is call_loss else "linear_logps: "
    assert str(caught.value).startswith(op) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_no_number_or_too_far_is_named(name):
    options, error, message = NUMBERS[name]
    of_loss = bool({"beta", "label_smoothing"} & options.keys())
    refused(error, message, call_loss if of_loss else call_logps, **options)


def test_numbers_of_other_kinds_and_sizes_are_taken():
    plain = call_logps(softcap=30.0, scale=2.0, temperature=2.0, ignore_index=-1)
    other = call_logps(
        softcap=np.float32(30), scale=2, temperature=np.float64(2), ignore_index=np.int64(-1),
        workspace_bytes=float(2**28),
    )  # fmt: skip
    assert torch.equal(plain, other)
    # The ends of what is taken are numbers; in fp64 there is more room.
    for options in ({"softcap": 1e30}, {"softcap": 1e-30}, {"scale": 1e-30}, {"temperature": 1e30}):
        assert call_logps(**options).isfinite().all(), options
    assert call_logps(dtype=torch.float64, softcap=1e39, scale=1e-39).isfinite().all()
    assert call_loss(beta=np.float32(0.1)).loss.isfinite()


@pytest.mark.parametrize("name", ["hidden", "weight", "targets", "bias"])
def test_sparse_and_nested_tensors_are_named(name):
    head = peaked_head(5, 8, 33, bias=True)
    given: dict[str, Any] = {key: getattr(head, key) for key in ("hidden", "weight", "targets")}
    given["bias"] = head.bias
    nested = torch.nested.nested_tensor([torch.ones(2, 8), torch.ones(3, 8)])
    jagged = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    for value, message in {
        given[name].to_sparse(): f"{name} is of layout sparse_coo; pass its to_dense",
        nested: f"{name} is a nested tensor; .* torch.cat.{name}.unbind",
        jagged: f"{name} is a nested tensor; .* torch.cat.{name}.unbind",
    }.items():
        refused(TypeError, message, lambda **g: linear_logps(**g), **given | {name: value})


@pytest.mark.parametrize("name", ["token_logps", "cu_responses", "pairs", "ref_token_logps"])
def test_preference_loss_names_what_is_no_plain_tensor(name):
    plain = {
        "token_logps": torch.ones(5),
        "ref_token_logps": torch.ones(5),
        "cu_responses": BOUNDS,
        "pairs": PAIRS,
    }[name]
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    for value, message in {
        plain.as_subclass(DTensor): f"{name} is a DTensor; pass its full_tensor",
        plain.to_sparse(): f"{name} is of layout sparse_coo; pass its to_dense",
        nested: f"{name} is a nested tensor; .* torch.cat.{name}.unbind",
    }.items():
        refused(TypeError, message, call_loss, **{name: value})


def test_a_device_without_fp64_is_named():
    class Mps(Tensor):
        """On a CPU, and says otherwise."""

        device = torch.device("mps")  # pyright: ignore[reportAssignmentType]

    names = ("token_logps", "cu_responses", "pairs", "ref_token_logps")
    tensors = (torch.ones(5), BOUNDS, PAIRS, torch.ones(5))
    there = {k: t.as_subclass(Mps) for k, t in zip(names, tensors, strict=True)}
    refused(TypeError, r"sums in float64, which mps devices lack; pass all of it .cpu", call_loss,
            **there)  # fmt: skip


def test_an_adapter_may_lie_on_a_trained_head_where_no_gradient_is_asked_for():
    lora = (torch.randn(2, 8), torch.randn(33, 2), 0.5)
    head = peaked_head(5, 8, 33)
    frozen = linear_logps(head.hidden, head.weight, head.targets, lora=lora)
    trained = head.weight.clone().requires_grad_()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            logps = linear_logps(head.hidden, trained, head.targets, lora=lora)
        assert torch.equal(logps, frozen)
    with pytest.raises(ValueError, match="weight requires a gradient beneath a lora adapter"):
        linear_logps(head.hidden, trained, head.targets, lora=lora)


# ---- ways to differentiate


def differentiable(trained: bool, impl: str) -> dict[str, tuple[Any, Tensor]]:
    """By op: a function to a vector, and the leaf that it is of."""
    head = peaked_head(5, 8, 33)
    weight, ref = head.weight.requires_grad_(trained), torch.zeros(2)

    def logps(hidden):
        return linear_logps(hidden, weight, head.targets, impl=impl)

    def loss(token_logps):
        out = preference_loss(token_logps, BOUNDS, PAIRS, None, ref, beta=0.1, impl=impl)
        return torch.cat([out.losses, out.loss[None]])

    def both(hidden):
        return linear_dpo_loss(
            hidden, weight, head.targets, BOUNDS, PAIRS, ref, beta=0.1, impl=impl
        ).losses

    hidden = head.hidden.requires_grad_()
    token_logps = (-torch.ones(5)).requires_grad_()
    return {
        "linear_logps": (logps, hidden),
        "preference_loss": (loss, token_logps),
        "linear_dpo_loss": (both, hidden),
    }


def batched_ways(function: Any, leaf: Tensor) -> dict[str, Any]:
    out = function(leaf)

    def gradient(grad: Tensor, **options: Any) -> Tensor:
        return torch.autograd.grad(out, leaf, grad, retain_graph=True, **options)[0]

    rows = torch.eye(len(out))
    return {
        "is_grads_batched": lambda: gradient(rows, is_grads_batched=True),
        "vmap": lambda: torch.func.vmap(gradient)(rows),
        "jacobian": lambda: torch.autograd.functional.jacobian(function, leaf, vectorize=True),
    }


def tangent(function: Any, leaf: Tensor, direction: Tensor) -> Tensor | None:
    with forward_ad.dual_level():
        out = function(forward_ad.make_dual(leaf.detach(), direction))
        return forward_ad.unpack_dual(out).tangent


@pytest.mark.parametrize("op", ["linear_logps", "preference_loss", "linear_dpo_loss"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("impl", ["auto", "torch"])
def test_batches_of_gradients_and_forward_mode_are_refused_by_name(op, trained, impl):
    function, leaf = differentiable(trained, impl)[op]
    whole = "linear_logps" if op == "linear_logps" else "preference_loss"
    for way, run in batched_ways(function, leaf).items():
        with pytest.raises(RuntimeError, match=f"^{whole} takes one gradient at a time.*loop") as e:
            run()
        assert "\n" not in str(e.value), way
    first = "preference_loss" if op == "preference_loss" else "linear_logps"
    with pytest.raises(RuntimeError, match=f"^{first} has no forward-mode .*call backward"):
        tangent(function, leaf, torch.ones_like(leaf))
    # One at a time, as the errors say, and inside a level that no input has a tangent of.
    with forward_ad.dual_level():
        out = function(leaf)
    torch.autograd.grad(out.sum(), leaf)


@pytest.mark.parametrize("op", ["linear_logps", "preference_loss", "linear_dpo_loss"])
def test_the_reference_has_what_is_refused(op):
    """As the errors say: every way gives the Jacobian, row by row."""
    function, leaf = differentiable(True, "reference")[op]
    out = function(leaf)
    rows = [torch.autograd.grad(one, leaf, retain_graph=True)[0] for one in out]
    for run in batched_ways(function, leaf).values():
        torch.testing.assert_close(run(), torch.stack(rows))
    direction = torch.randn_like(leaf)
    want = torch.stack([(row * direction).sum() for row in rows])
    torch.testing.assert_close(tangent(function, leaf, direction), want)


@pytest.mark.parametrize("where", ["weight", "bias", "adapter", "reference"])
def test_a_tangent_of_any_input_is_seen(where):
    head = peaked_head(5, 8, 33, bias=True)
    given = {"weight": head.weight, "bias": head.bias, "adapter": torch.randn(33, 2)}
    given["reference"] = -torch.ones(5)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="has no forward-mode"):
        given[where] = forward_ad.make_dual(given[where], torch.ones_like(given[where]))
        lora = (torch.randn(2, 8), given["adapter"], 1.0)
        linear_logps(
            head.hidden, given["weight"], head.targets, bias=given["bias"], lora=lora
        )  # fmt: skip
        preference_loss(-torch.ones(5), BOUNDS, PAIRS, given["reference"], beta=0.1)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("op", ["linear_logps", "preference_loss", "linear_dpo_loss"])
def test_forward_mode_is_refused_in_a_graph_and_dropped_by_none(op, backend):
    torch.compiler.reset()
    function, leaf = differentiable(False, "auto")[op]
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    first = "preference_loss" if op == "preference_loss" else "linear_logps"
    with pytest.raises(RuntimeError, match=f"{first} has no forward-mode"):
        tangent(compiled, leaf, torch.ones_like(leaf))
    torch.testing.assert_close(compiled(leaf), function(leaf))
    torch.compiler.reset()


def test_a_graph_takes_numbers_as_they_come():
    torch.compiler.reset()
    head = peaked_head(5, 8, 33)

    def logps(hidden, scale, temperature, ignore_index, workspace_bytes):
        return linear_logps(
            hidden, head.weight, head.targets, scale=scale, temperature=temperature,
            ignore_index=ignore_index, workspace_bytes=workspace_bytes,
        )  # fmt: skip

    compiled = torch.compile(logps, backend="aot_eager", fullgraph=True)
    for numbers in ((1.0, 2.0, -100, 2**28), (0.5, 1.5, -1, 2**27), (2, 1, -2, 2**26)):
        torch.testing.assert_close(compiled(head.hidden, *numbers), logps(head.hidden, *numbers))
    torch.compiler.reset()
