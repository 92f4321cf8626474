"""What the kernels find wrong on a GPU is raised where the trainer waits for it, and only there.

Here with stand-ins for the events of a GPU: they arrive on nobody's asking, only when waited for.
"""

import pytest
import torch
from transformers import TrainerCallback

import fastdpo_kernels
from fastdpo.precompute import precompute
from fastdpo_kernels import late, linear_logps_targets, preference_loss_check
from tests.tiny import tiny_pairs
from tests.tiny_trainer import trainer


class Underway:
    """A CUDA event that has not come yet."""

    def __init__(self, found: str | None):
        self.found, self.waited = found, 0

    def query(self):
        return False

    def synchronize(self):
        self.waited += 1

    def look(self):
        assert self.waited == 1
        if self.found:
            raise ValueError(f"linear_logps: {self.found}")


@pytest.fixture(autouse=True)
def pending(monkeypatch):
    monkeypatch.setattr(late, "_pending", type(late._pending)())
    return late._pending


def report(found: str | None = None) -> Underway:
    event = Underway(found)
    late._pending.append((event, event.look, ()))
    return event


class BadStep(TrainerCallback):
    """One report a step, as a GPU would leave it; that of step 2 is bad."""

    def __init__(self):
        self.events: list[Underway] = []
        self.waited_in_steps = 0

    def on_step_begin(self, args, state, control, **kwargs):
        self.before = sum(event.waited for event in self.events)
        self.events.append(report("step 2" if state.global_step == 1 else None))

    def on_step_end(self, args, state, control, **kwargs):
        self.waited_in_steps += sum(event.waited for event in self.events) - self.before


@pytest.mark.parametrize(
    ("options", "step"),
    [
        ({"logging_steps": 3}, 3),
        ({"save_strategy": "steps", "save_steps": 3}, 3),
        ({"eval_strategy": "steps", "eval_steps": 3}, 3),
        ({}, 4),
    ],
    ids=["log", "checkpoint", "evaluation", "end"],
)
def test_a_report_is_raised_where_the_trainer_waits(tmp_path, options, step):
    watch = BadStep()
    options = {"logging_steps": 100, "max_steps": 4, **options}
    made = trainer(tmp_path, callbacks=[watch], eval_dataset=tiny_pairs(4), **options)
    with pytest.raises(ValueError, match="in an earlier call, linear_logps: step 2"):
        made.train()
    assert made.state.global_step == step
    assert not watch.waited_in_steps  # what a step asks for, it does not wait for
    assert [event.waited for event in watch.events] == [1, 1, 0, 0][:step]


def test_an_evaluation_and_a_precomputed_reference_ask_at_their_end(tmp_path):
    made = trainer(tmp_path, eval_dataset=tiny_pairs(4))
    report("the last pack")
    with pytest.raises(ValueError, match="in an earlier call, linear_logps: the last pack"):
        made.evaluate()
    assert made.evaluate()["eval_loss"] > 0
    report("the last pack")
    assert made.live_reference is not None
    with pytest.raises(ValueError, match="in an earlier call, linear_logps: the last pack"):
        precompute(
            made.live_reference, tiny_pairs(4), made.packer, description="all", progress=False
        )


def test_raise_pending_waits_for_all_and_names_each_in_turn(pending):
    fine, bad, worse, last = report(), report("bad"), report("worse"), report()
    fastdpo_kernels.raise_pending(wait=False)
    assert len(pending) == 4
    with pytest.raises(ValueError, match="in an earlier call, linear_logps: bad"):
        fastdpo_kernels.raise_pending()
    with pytest.raises(ValueError, match="in an earlier call, linear_logps: worse"):
        fastdpo_kernels.raise_pending()
    assert not last.waited
    fastdpo_kernels.raise_pending()
    assert [event.waited for event in (fine, bad, worse, last)] == [1, 1, 1, 1] and not pending


def test_raise_pending_leaves_a_cuda_graph_alone(pending, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    event = report("bad")
    fastdpo_kernels.raise_pending()
    assert not event.waited and len(pending) == 1


@pytest.mark.parametrize("device", ["mps", "xpu"])
def test_devices_that_nobody_looks_at_later_are_looked_at_at_once(device, pending):
    class Elsewhere(torch.Tensor):
        """On a CPU, and says otherwise."""

    Elsewhere.device = torch.device(device)  # pyright: ignore[reportAttributeAccessIssue]

    def there(*values: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype).as_subclass(Elsewhere)

    linear_logps_targets.check_targets(there(3, 32, -100), 33, -100)
    with pytest.raises(ValueError, match=r"^linear_logps: targets\[1\] = 33 is outside"):
        linear_logps_targets.check_targets(there(3, 33), 33, -100)
    check = preference_loss_check.check_values
    pairs = there(0, 1).view(1, 2)
    check(there(0, 2, 5, dtype=torch.int32), pairs, 5)
    with pytest.raises(ValueError, match="^preference_loss: cu_responses must run from 0 to N=5"):
        check(there(0, 2, 6, dtype=torch.int32), pairs, 5)
    assert not pending


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_last_call_of_a_run_is_named_on_a_gpu():
    hidden, weight = torch.randn(9, 8, device="cuda"), torch.randn(33, 8, device="cuda")
    targets = torch.arange(9, device="cuda")
    targets[4] = 33
    torch.cuda._sleep(10**8)  # the copy can't have arrived by the next line
    fastdpo_kernels.linear_logps(hidden, weight, targets)
    fastdpo_kernels.raise_pending(wait=False)
    with pytest.raises(ValueError, match=r"in an earlier call, .*targets\[4\] = 33"):
        fastdpo_kernels.raise_pending()
    fastdpo_kernels.raise_pending()
