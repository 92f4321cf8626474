"""What is not finite never reaches the weights: the run stops and names it, or skips and counts."""

import logging
import math

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from fastdpo.errors import ConfigError, ModelError
from fastdpo.held_step import step_unless
from fastdpo.nonfinite import FiniteGuard
from tests.no_reads import no_reads
from tests.tiny import tiny_pairs
from tests.tiny_trainer import trainer, weights


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr("fastdpo.trainer.plot_curves", lambda *args: None)


BAD_STEP = 3  # of 6, with 4 of 16 pairs each


class StopAfter(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == BAD_STEP - 1


def poisoned(tmp_path, what: str, **overrides):
    """A run whose pair 9, in step BAD_STEP, has a loss that is NaN, or a gradient that is inf."""
    made = trainer(
        tmp_path,
        pairs=tiny_pairs(16),
        train_sampling_strategy="sequential",
        max_steps=6,
        **{"max_tokens_per_pack": 96, **overrides},
    )
    plain = made.objective

    class Poison:
        needs_whole_step = plain.needs_whole_step
        stats = plain.stats
        trained_pairs = staticmethod(plain.trained_pairs)

        def __call__(self, scored, mean_length, *, grad, trained=None):
            losses = plain(scored, mean_length, grad=grad, trained=trained)
            for one, loss in zip(scored, losses, strict=True):
                hit = torch.from_numpy(one.pack.pair_ids == 9)
                if what == "loss":
                    loss.losses[hit] = math.nan
                if hit.any() and what == "gradient" and grad:
                    # Only its own tokens: another pair of the pack stays innocent.
                    lengths = one.pack.cu_responses.diff()
                    owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
                    of_pair = torch.isin(owner, one.pack.pairs[hit])
                    assert loss.token_grad is not None
                    loss.token_grad[of_pair] = math.inf
            return losses

    made.objective = Poison()  # type: ignore[assignment]
    return made


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch"])
def test_stop_names_pack_pair_and_row_and_keeps_the_weights(tmp_path, what, optim):
    made = poisoned(tmp_path / "bad", what, logging_steps=6, optim=optim)
    assert made.train_pairs is not None
    made.train_pairs.rows[9] = 1009  # a row is not a pair's number where rows were dropped
    with pytest.raises(ModelError) as caught:
        made.train()
    said = str(caught.value)
    assert said.startswith(f"step {BAD_STEP}: the {what}"), said
    assert "pair 9 (dataset row 1009, pack " in said and "on_nonfinite: skip" in said
    assert all(p.isfinite().all() for p in made.model.parameters())
    assert not list((tmp_path / "bad" / "run").glob("checkpoint-*"))
    # Nothing was applied from the bad step on: the weights are those after two steps.
    clean = poisoned(tmp_path / "clean", "nothing", optim=optim)
    clean.add_callback(StopAfter)
    clean.train()
    for (name, a), b in zip(
        weights(made.model).items(), weights(clean.model).values(), strict=True
    ):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch", "sgd"])
def test_skip_leaves_the_step_out_and_counts_it(tmp_path, what, optim, caplog):
    made = poisoned(tmp_path, what, on_nonfinite="skip", logging_steps=2, optim=optim)
    before: list[dict] = []
    plain = made._train_step

    def watched(step):
        before.append(weights(made.model))
        plain(step)

    made._train_step = watched
    with caplog.at_level(logging.WARNING, "fastdpo"):
        made.train()
    for number in range(1, 6):
        same = all(torch.equal(before[number - 1][n], p) for n, p in before[number].items())
        assert same == (number == BAD_STEP), number
    assert made.optimizer is not None
    states = made.optimizer.state_dict()["state"].values()
    assert all(float(state["step"]) == 5 for state in states if "step" in state)
    logs = [log for log in made.state.log_history if "loss" in log]
    assert [log["skipped_steps"] for log in logs] == [0, 1, 1]
    assert all(np.isfinite(list(log.values())).all() for log in logs)
    assert all(p.isfinite().all() for p in made.model.parameters())
    assert f"step {BAD_STEP}: the {what}" in caplog.text and "skipped, as 1 steps" in caplog.text


def test_the_limit_of_forward_kl_is_named(tmp_path):
    """Here the policy can't be 88 nat away after a step: its reference is made to be."""
    made = trainer(tmp_path, f_divergence_type="forward_kl", first_step_check=False, max_steps=1)
    plain = made._score

    def far(pack, reference):
        assert reference is not None
        return plain(pack, reference + 100)

    made._score = far  # type: ignore[method-assign]
    with pytest.raises(
        ModelError, match="step 1: the loss of pair .* forward_kl, whose score 1 - exp"
    ):
        made.train()


def test_a_checkpoint_never_holds_what_is_not_finite(tmp_path):
    made = poisoned(tmp_path, "loss", save_strategy="steps", save_steps=1, logging_steps=6)
    with pytest.raises(ModelError, match=f"step {BAD_STEP}"):
        made.train()
    found = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert found == ["checkpoint-1", "checkpoint-2"]


def test_the_count_survives_a_resume(tmp_path):
    options = {"on_nonfinite": "skip", "save_strategy": "steps", "save_steps": 4}
    whole = poisoned(tmp_path, "loss", **options)
    whole.train()
    resumed = poisoned(tmp_path, "loss", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert resumed.state.log_history[-2]["skipped_steps"] == 1


def test_an_infinite_norm_of_finite_gradients_is_held_back():
    guard = FiniteGuard("skip", torch.device("cpu"))
    guard.note(np.array([0]), torch.tensor([0.5]))
    assert guard.judge(1, torch.tensor(math.inf)) == 1
    guard.note(np.array([1]), torch.tensor([0.5]))
    assert guard.judge(2, torch.tensor(1.0)) == 0
    bad = guard.read()
    assert bad is not None and (bad.number, bad.pair_id, bad.pair_ids) == (1, None, [[0]])
    assert guard.read() is None and guard.n_bad == 1


# ---- updates inside the backward pass -----------------------------------------------------------


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_the_optimizer_in_backward_stops_too(tmp_path, what, optim):
    """A loss is known before the first update, so all weights stay. A gradient may be bad after
    some were updated: nothing that is not finite reaches a weight, and nothing is saved."""
    options = {
        **{"optimizer_in_backward": True, "max_grad_norm": 0.0, "max_tokens_per_pack": 4096},
        **{"optim": optim, "save_strategy": "steps", "save_steps": 1},
    }
    made = poisoned(tmp_path / "bad", what, logging_steps=6, **options)
    with pytest.raises(ModelError, match=f"step {BAD_STEP}: the {what}"):
        made.train()
    assert all(p.isfinite().all() for p in made.model.parameters())
    found = sorted(path.name for path in (tmp_path / "bad" / "run").glob("checkpoint-*"))
    assert found == ["checkpoint-1", "checkpoint-2"]
    if what == "loss":
        clean = poisoned(tmp_path / "clean", "nothing", **options)
        clean.add_callback(StopAfter)
        clean.train()
        ours, theirs = weights(made.model), weights(clean.model)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_bad_last_step_without_a_log_behind_it_stops_too(tmp_path):
    made = poisoned(tmp_path, "loss", logging_steps=100)
    made.args.max_steps = BAD_STEP
    with pytest.raises(ModelError, match=f"step {BAD_STEP}: the loss"):
        made.train()


# ---- holding back an optimizer that can't be told -----------------------------------------------

OPTIMIZERS = {
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.1, weight_decay=0.1, fused=False),
    "one by one": lambda ps: torch.optim.AdamW(ps, lr=0.1, foreach=False),
    "momentum": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, nesterov=True),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, lr=0.1),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=0.1, momentum=0.5, centered=True),
    "nadam": lambda ps: torch.optim.NAdam(ps, lr=0.1),
    "rprop": lambda ps: torch.optim.Rprop(ps, lr=0.1),
}


def optimized(kind: str, steps: str, max_bytes: int = 2**20) -> tuple[list[torch.Tensor], list]:
    """Weights and states after `steps`: a digit is a gradient; x is a bad one, held back."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 3), (5,), (2, 2)]
    parameters = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
    groups = [{"params": parameters[:1], "lr": 0.05}, {"params": parameters[1:]}]
    optimizer = OPTIMIZERS[kind](groups)
    for step in steps:
        generator.manual_seed(ord(step))
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            if step == "x":
                parameter.grad.view(-1)[0] = math.nan
        step_unless(torch.tensor(float(step == "x")), optimizer, max_bytes)
        assert len(optimizer.param_groups[1]["params"]) == 2
    states = [state for _, state in sorted(optimizer.state_dict()["state"].items())]
    return [p.detach() for p in parameters], states


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("steps", ["1x2", "x12", "12xx3"])
def test_a_step_that_is_held_back_leaves_no_trace(kind, steps):
    """Bitwise, in weights and states. A step at all: without the x it moves every weight."""
    weights, states = optimized(kind, steps)
    plain, plain_states = optimized(kind, steps.replace("x", ""))
    assert all(torch.equal(a, b) for a, b in zip(weights, plain, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(weights, optimized(kind, "1")[0], strict=True))
    for a, b in zip(states, plain_states, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            same = torch.equal(a[name], b[name]) if torch.is_tensor(b[name]) else a[name] == b[name]
            assert same, name


@pytest.mark.parametrize("kind", ["adamw", "momentum"])
def test_parts_of_the_parameters_take_the_same_steps(kind):
    whole, parts = optimized(kind, "1x2"), optimized(kind, "1x2", max_bytes=1)
    assert all(torch.equal(a, b) for a, b in zip(whole[0], parts[0], strict=True))


def test_a_gpu_is_not_asked_whether_a_step_is_held_back():
    """The guard of a GPU, on this machine's tensors: counts go to the device, paged states are
    refused, and `stop` takes the gradients away."""
    guard = FiniteGuard("skip", torch.device("cpu"))
    guard.device = torch.device("cuda")
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], fused=False)
    guard.prepare(optimizer)
    assert optimizer.param_groups[0]["capturable"]
    paged = torch.optim.SGD([parameter])
    paged.is_paged = True  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ConfigError, match="on_nonfinite 'skip'.*paged.*use adamw_8bit"):
        guard.prepare(paged)
    for mode in ("skip", "stop"):
        guard = FiniteGuard(mode, torch.device("cpu"))
        guard.device = torch.device("cuda")
        guard._held = torch.ones(())
        parameter.grad = torch.full((3,), math.nan)
        with no_reads():
            guard.apply(torch.optim.SGD([parameter], lr=1.0))
        assert torch.equal(parameter.detach(), torch.ones(3))
