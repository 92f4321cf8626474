"""`linear_dpo_loss`: the two ops together, its docstring's example, and life without a trainer.

The accuracy of each op has its own tests.
"""

import inspect
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastdpo_kernels import linear_dpo_loss, linear_logps, preference_loss
from fastdpo_kernels.reference import linear_logps_reference, preference_loss_reference
from tests.numerics import peaked_head

BOUNDS = torch.tensor([0, 7, 7, 20, 24, 33], dtype=torch.int32)
PAIRS = torch.tensor([[0, 2], [3, 4], [0, 4], [1, 2]])
PACKAGE = Path(__file__).parents[2] / "kernels" / "torch-ext"


def case(dtype: torch.dtype = torch.float64):
    head = peaked_head(33, 16, 101, dtype=dtype, bias=True)
    assert head.bias is not None
    ref = linear_logps(1.1 * head.hidden, head.weight, head.targets, bias=head.bias)
    return head.hidden, head.weight, head.bias, head.targets, ref


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "hinge"])
@pytest.mark.parametrize("by_token", [True, False])
def test_equals_the_reference_end_to_end(loss_type, by_token):
    hidden, weight, bias, targets, ref = case()
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    transform: dict[str, Any] = {"softcap": 12.0, "scale": 0.8, "temperature": 1.2}
    sums = torch.stack([ref[a:b].sum() for a, b in zip(BOUNDS, BOUNDS[1:], strict=False)])
    refs: dict[str, Any] = {"ref_token_logps": ref} if by_token else {"ref_logps": sums}
    out = linear_dpo_loss(
        hidden,
        weight,
        targets,
        BOUNDS,
        PAIRS,
        **refs,
        beta=0.3,
        loss_type=loss_type,
        bias=bias,
        **transform,
    )
    token_logps, _ = linear_logps_reference(hidden, weight, targets, bias=bias, **transform)
    want = preference_loss_reference(
        token_logps, BOUNDS, PAIRS, **refs, beta=0.3, loss_type=loss_type
    )
    torch.testing.assert_close(out.loss, want.losses.mean())
    torch.testing.assert_close(out.chosen_rewards, want.chosen_rewards)
    torch.testing.assert_close(out.logps, want.logps)
    got = torch.autograd.grad(out.loss, leaves)
    torch.testing.assert_close(got, torch.autograd.grad(want.losses.mean(), leaves))


def test_is_the_two_ops_bit_for_bit():
    hidden, weight, bias, targets, ref = case(torch.float32)
    options: dict[str, Any] = {"beta": 0.1, "loss_type": "ipo"}
    out = linear_dpo_loss(
        hidden, weight, targets, BOUNDS, PAIRS, ref_token_logps=ref, bias=bias, **options
    )
    logps = linear_logps(hidden, weight, targets, bias=bias)
    assert torch.equal(out.losses, preference_loss(logps, BOUNDS, PAIRS, ref, **options).losses)


def test_an_adapter_on_the_head_counts():
    hidden, weight, _, targets, ref = case(torch.float32)
    a, b = torch.randn(3, 16).requires_grad_(), torch.randn(101, 3).requires_grad_()
    grads = []
    for of_adapter in (True, False):
        if of_adapter:
            out = linear_dpo_loss(
                hidden, weight, targets, BOUNDS, PAIRS,
                ref_token_logps=ref, beta=0.1, lora=(a, b, 0.5),
            )  # fmt: skip
        else:
            logps = linear_logps(hidden, weight, targets, lora=(a, b, 0.5))
            out = preference_loss(logps, BOUNDS, PAIRS, ref, beta=0.1)
        grads.append([out.losses.detach(), *torch.autograd.grad(out.loss, (a, b))])
    assert all(torch.equal(*both) for both in zip(*grads, strict=True))
    assert grads[0][1].any() and grads[0][2].any()


def test_the_docstrings_example_runs():
    """On a padded batch of 2 pairs, against eager log-probs of that batch; and what it says of a
    reference's sums."""
    text = inspect.getdoc(linear_dpo_loss) or ""
    example = text.partition("around the responses):\n")[2].partition("Stored beforehand")[0]
    lines = textwrap.dedent(example).strip().splitlines()
    assert len(lines) == 11
    torch.manual_seed(0)
    ids = torch.randint(0, 50, (4, 9))
    ends = torch.tensor([9, 7, 8, 6])
    mask = torch.arange(9) < ends[:, None]
    labels = ids.masked_fill(~(mask & (torch.arange(9) >= 3)), -100)
    scored = labels[:, 1:] != -100

    def model() -> tuple[SimpleNamespace, torch.Tensor]:
        """A model, and its summed log-probs [2P]."""
        table, lm_head = torch.nn.Embedding(50, 8), torch.nn.Linear(8, 50, bias=False)

        def body(ids, attention_mask):
            return SimpleNamespace(last_hidden_state=table(ids))

        log_p = lm_head(table(ids))[:, :-1].log_softmax(-1)
        logps = (log_p.gather(2, ids[:, 1:, None]).squeeze(2) * scored).sum(1)
        return SimpleNamespace(model=body, lm_head=lm_head, table=table), logps

    (policy, logps), (reference, ref_logps) = model(), model()
    scope: dict[str, Any] = {
        "torch": torch,
        "linear_dpo_loss": linear_dpo_loss,
        "linear_logps": linear_logps,
        "model": policy,
        "ref_model": reference,
        "input_ids": ids,
        "mask": mask,
        "labels": labels,
    }
    exec("\n".join(lines), scope)
    margin = 0.1 * (logps - ref_logps).view(2, 2)
    want = -torch.nn.functional.logsigmoid(margin[0] - margin[1]).mean()
    assert abs(want.item() - 0.6931) > 1e-2  # the reference is another model
    torch.testing.assert_close(scope["out"].loss, want)
    assert policy.lm_head.weight.grad is not None and policy.table.weight.grad is not None
    assert reference.lm_head.weight.grad is None and reference.table.weight.grad is None
    of_sums = linear_dpo_loss(
        scope["hidden"][scored], policy.lm_head.weight, scope["targets"], scope["cu_responses"],
        scope["pairs"], ref_logps, beta=0.1,
    )  # fmt: skip
    torch.testing.assert_close(of_sums.loss, want)


def test_a_target_to_ignore_is_refused():
    """Its row would count in its response's length: the caller leaves it out."""
    hidden, weight, bias, targets, ref = case()
    targets[3] = -100
    with pytest.raises(ValueError, match=r"targets\[3\] = -100 .* pass only the rows to be scored"):
        linear_dpo_loss(hidden, weight, targets, BOUNDS, PAIRS, ref_token_logps=ref, beta=0.1)


def test_training_with_autocast_and_a_gradient_scaler():
    """Steps in bf16 autocast with scaled losses: the loss falls and every pair's margin turns."""
    torch.manual_seed(0)
    body, lm_head = torch.nn.Linear(16, 16), torch.nn.Linear(16, 64, bias=False)
    inputs, targets = torch.randn(33, 16), torch.randint(0, 64, (33,))
    pairs = torch.tensor([[0, 2], [3, 4]])
    optimizer = torch.optim.SGD([*body.parameters(), *lm_head.parameters()], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    ref, losses = None, []
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            hidden = body(inputs)
            if ref is None:
                ref = linear_logps(hidden.detach(), lm_head.weight.detach(), targets)
            out = linear_dpo_loss(
                hidden, lm_head.weight, targets, BOUNDS, pairs, ref_token_logps=ref, beta=0.1
            )
        scaler.scale(out.loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(out.loss.item())
    assert abs(losses[0] - 0.6931) < 1e-3 and losses[-1] < 0.3
    assert (out.chosen_rewards > out.rejected_rewards).all()


def test_works_where_transformers_does_not_exist(tmp_path):
    """In a fresh interpreter that refuses to import anything of the trainer's world."""
    script = """
        import sys
        refused = "transformers", "fastdpo", "accelerate", "peft", "datasets"
        class Refuse:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in refused:
                    raise ImportError("refused: " + name)
        sys.meta_path.insert(0, Refuse())
        import torch
        from fastdpo_kernels import linear_dpo_loss
        bounds, pairs = torch.tensor([0, 2, 4], dtype=torch.int32), torch.tensor([[0, 1]])
        hidden = torch.randn(4, 8, requires_grad=True)
        out = linear_dpo_loss(hidden, torch.randn(9, 8), torch.arange(4), bounds, pairs,
                              torch.zeros(2), beta=0.1)
        out.loss.backward()
        print(hidden.grad.isfinite().all().item())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(PACKAGE), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "True", done.stderr
