"""Losses without a reference, users' own losses, and losses that read columns of the data."""

import math
import sys

import pytest
import torch

from fastdpo import DPOTrainer
from fastdpo.data import tokenize_pairs
from fastdpo.errors import ConfigError, DataError
from fastdpo.losses import REGISTRY, PairLogps, f_scores
from fastdpo.objective import Objective
from fastdpo.users_losses import load_losses
from tests.tiny import tiny_llama, tiny_pairs, tiny_rows, tiny_tokenizer
from tests.tiny_trainer import bare_config, trained_on_rows


@pytest.mark.parametrize("loss_type", ["simpo", "cpo", "orpo"])
def test_reference_free_losses_ask_no_reference(tmp_path, loss_type):
    made = trained_on_rows(tmp_path, loss_type=[loss_type])
    assert made.train_reference.name == "none"
    assert list(made.train_reference.token_logps([])) == []
    logs = [log for log in made.state.log_history if "loss" in log]
    assert logs[-1]["loss"] < logs[0]["loss"]
    with pytest.raises(ConfigError, match="'precompute_ref_log_probs'.*reads no reference"):
        trained_on_rows(tmp_path / "b", loss_type=[loss_type], precompute_ref_log_probs=True)


def test_orpo_stays_finite_where_a_response_is_certain():
    logps = torch.tensor([0.0, -1e-12, -1e-3], dtype=torch.float64, requires_grad=True)
    ones = torch.ones(3, dtype=torch.float64)
    losses = REGISTRY["orpo"].fn(
        PairLogps(logps, -ones, None, None, ones, ones, -logps, ones[0]), beta=0.1
    )
    losses.sum().backward()
    assert losses.isfinite().all() and logps.grad is not None and logps.grad.isfinite().all()


@pytest.mark.parametrize("divergence", ["forward_kl", "alpha_divergence"])
def test_discopop_stays_finite_where_chosen_became_unlikely(divergence):
    """A few nat suffice: forward_kl's score is 1 - exp(-log-ratio). TRL 1.16 gives no number."""
    policy = torch.tensor([-12.0, -60.0], dtype=torch.float64, requires_grad=True)
    score = f_scores(policy, divergence, 0.5)
    zeros, ones = torch.zeros_like(policy), torch.ones_like(policy)
    logps = PairLogps(score, zeros, zeros, zeros, ones, ones, -policy, ones[0])
    losses = REGISTRY["discopop"].fn(logps, beta=5.0, discopop_tau=0.05)
    # The share of the exponential is 0, and -log sigmoid(x) is -x.
    assert losses.tolist() == pytest.approx((-5 * score).tolist(), rel=1e-12)
    assert float(losses[0].detach()) > 750  # exp of it is inf
    (gradient,) = torch.autograd.grad(losses.sum(), policy)
    (slope,) = torch.autograd.grad(-5 * f_scores(policy, divergence, 0.5).sum(), policy)
    torch.testing.assert_close(gradient, slope, rtol=1e-12, atol=0)


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge"])
def test_forward_kl_where_exp_overflows(loss_type):
    """A rejected response that became impossible has the limit's gradient, 0, as its neighbour at
    -700 nat has; an impossible chosen one has a loss that a run can't take for a number."""
    fell = torch.tensor([-700.0, -800.0, 0.0, 0.0, -800.0], dtype=torch.float64)
    stayed = torch.zeros_like(fell)
    chosen = torch.where(torch.arange(5) >= 3, torch.tensor(-800.0).double(), stayed)
    chosen, rejected = chosen.requires_grad_(), fell.requires_grad_()
    won, lost = (f_scores(x, "forward_kl", 0.5) for x in (chosen, rejected))
    ones = torch.ones(5, dtype=torch.float64)
    logps = PairLogps(won, lost, stayed, stayed, ones, ones, ones, ones[0])
    losses = REGISTRY[loss_type].fn(logps, beta=0.1)
    gradients = torch.autograd.grad(losses[:3].sum(), (chosen, rejected))
    for gradient in gradients:
        assert gradient[:2].tolist() == [0, 0] and gradient[2] != 0
    assert losses[:2].tolist() == [0, 0] and not losses[3:].isfinite().any()
    # Elsewhere the derivative is the function's own.
    x = torch.linspace(-5, 5, 21, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: f_scores(x, "forward_kl", 0.5), x)


USERS = """
import torch.nn.functional as F
from fastdpo.loss_specs import LossSpec
from fastdpo.losses import PreferenceLoss

def mine(logps, *, beta, label_smoothing=0.0):
    m = beta * logps.margins
    return -(1 - label_smoothing) * F.logsigmoid(m) - label_smoothing * F.logsigmoid(-m)

def scalar(logps, *, beta):
    return logps.margins.mean()

def coupled(logps, *, beta):
    return -F.logsigmoid(beta * (logps.margins - logps.margins.mean()))

def detached(logps, *, beta):
    return logps.margins.detach()

def wants(logps, *, beta, secret):
    return logps.margins

def fails(logps, *, beta):
    return logps.no_such_logps

def partly(logps, *, beta):  # no number where chosen is not the likelier one
    return -logps.margins.log()

def nothing():
    return 0

lost = PreferenceLoss(mine, LossSpec("mine", reference_free=True))
whole = PreferenceLoss(coupled, LossSpec("mine", scope="step"))
free = PreferenceLoss(lambda logps, beta: -beta * logps.policy_chosen_logps,
                      LossSpec("mine", reference_free=True))
number = 3
"""


@pytest.fixture
def users(tmp_path, monkeypatch):
    (tmp_path / "users_losses.py").write_text(USERS)
    monkeypatch.chdir(tmp_path)  # a command finds the losses of the folder it runs in


def test_a_users_loss_is_used_the_same_way(tmp_path, users):
    runs = [
        trained_on_rows(tmp_path / name.replace(":", "-"), loss_type=[name], label_smoothing=0.1)
        for name in ("sigmoid", "users_losses:mine")
    ]
    a, b = ([log["loss"] for log in run.state.log_history if "loss" in log] for run in runs)
    # The fused loss sums in fp64 and so does the other path; fp32 is left at the end.
    assert a == pytest.approx(b, rel=1e-5)
    assert Objective(bare_config(loss_type=["users_losses:whole"])).needs_whole_step
    assert not Objective(bare_config(loss_type=["users_losses:free"])).needs_reference
    assert load_losses(["users_losses:partly"])  # whose example holds what is no number


@pytest.mark.parametrize(
    "name, parts",
    [
        ("scalar", ["one loss a pair", "()"]),
        ("coupled", ["other company", "scope='step'"]),
        ("detached", ["differentiable"]),
        ("wants", ["'secret'", "beta"]),
        ("number", ["int", "not a function"]),
        ("fails", ["made-up pairs", "AttributeError", "no_such_logps"]),
        ("lost", ["without a reference", "no loss of this run reads a reference"]),
        ("nothing", ["no function of log-probs", "fn(logps, beta=…)"]),
        ("min", ["no 'min'", "did you mean 'mine'"]),
    ],
)
def test_a_users_loss_that_would_not_do(users, name, parts):
    with pytest.raises(ConfigError) as caught:
        load_losses([f"users_losses:{name}"])
    assert all(part in str(caught.value) for part in parts), caught.value
    with pytest.raises(ConfigError, match="'torch:add' is no function of log-probs.*wrap it"):
        load_losses(["torch:add"])
    with pytest.raises(ConfigError, match="can't import 'no_such_module'"):
        load_losses(["no_such_module:x"])


def test_a_users_loss_leaves_the_path_as_it_is(users, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    before = list(sys.path)
    load_losses(["users_losses:mine"])
    assert sys.path == before


def test_a_users_loss_takes_only_what_its_signature_names(users):
    for mix in (["users_losses:whole"], ["sigmoid", "users_losses:whole"]):
        with pytest.raises(ConfigError, match="'label_smoothing' has no meaning.*'users_losses:wh"):
            Objective(bare_config(loss_type=mix, label_smoothing=0.1))
    assert Objective(bare_config(loss_type=["sigmoid", "users_losses:mine"], label_smoothing=0.1))


def rows_with(**columns) -> list[dict]:
    return [
        {**row, **{name: values[i] for name, values in columns.items()}}
        for i, row in enumerate(tiny_rows(4))
    ]


def test_columns_are_carried_only_where_asked_for(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = rows_with(weight=[1, 0.5, 0, 2])
    for dataset in (rows, datasets.Dataset.from_list(rows)):
        plain, report = tokenize_pairs(dataset, tiny_tokenizer(), max_length=None, progress=False)
        assert not plain.columns and report.unused_columns == ("weight",)
        carried, report = tokenize_pairs(
            dataset, tiny_tokenizer(), max_length=None, progress=False, number_columns=["weight"]
        )
        assert carried.columns["weight"].tolist() == [1, 0.5, 0, 2] and not report.unused_columns
        assert carried.select([3, 1]).columns["weight"].tolist() == [2, 0.5]
    trained_on_rows(tmp_path, rows, use_pair_weights=True)
    with pytest.raises(DataError, match="no column 'p_chosen'"):
        trained_on_rows(tmp_path / "b", rows, use_soft_labels=True)
    with pytest.raises(DataError, match="no column 'weight'"):
        DPOTrainer(
            model=tiny_llama(), args=bare_config(use_pair_weights=True), train_dataset=tiny_pairs(4)
        )


@pytest.mark.parametrize(
    "column, option, values, parts",
    [
        ("weight", {"use_pair_weights": True}, [1, -1, 1, 1], ["row 1", "'weight'", "-1", ">= 0"]),
        ("weight", {"use_pair_weights": True}, [1, 1, None, 1], ["row 2", "None"]),
        ("p_chosen", {"use_soft_labels": True}, [1, 1, 1, 1.5], ["row 3", "1.5", "<= 1"]),
        ("p_chosen", {"use_soft_labels": True}, [math.nan, 1, 1, 1], ["row 0", "nan"]),
        ("weight", {"use_pair_weights": True}, ["a", 1, 1, 1], ["row 0", "'a'"]),
    ],
)
def test_bad_numbers_are_named_by_row(tmp_path, column, option, values, parts):
    with pytest.raises(DataError) as caught:
        trained_on_rows(tmp_path, rows_with(**{column: values}), **option)
    assert all(part in str(caught.value) for part in parts), caught.value
