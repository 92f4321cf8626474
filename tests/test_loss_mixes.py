"""No option of the losses is accepted and ignored: by a loss alone, or by one loss of a mix."""

import itertools
from typing import Any

import pytest

from fastdpo import DPOConfig
from fastdpo.errors import ConfigError
from fastdpo.loss_specs import LOSSES, SPECS, UNPAIRED_LOSSES
from fastdpo.objective import Objective
from tests.test_losses_random import Case

PAIR_LOSSES = tuple(name for name in LOSSES if name not in UNPAIRED_LOSSES)
# Options of a whole mix, each away from its default. exo_pair has a label_smoothing throughout.
SHARED: dict[str, dict[str, Any]] = {
    "label_smoothing": {"label_smoothing": 0.2},
    "f_divergence_type": {"f_divergence_type": "forward_kl"},
    "ld_alpha": {"ld_alpha": 0.4},
    "use_weighting": {"use_weighting": True},
    "use_soft_labels": {"use_soft_labels": True},
    "score_margin_scale": {"score_margin_scale": 0.5},
    "use_pair_weights": {"use_pair_weights": True},
}
# The chosen responses' NLL compares nothing. In a mix these leave it as it is, which their help
# says; TRL has it so too.
LEAVE_SFT = ("f_divergence_type", "ld_alpha")
# Options that belong to one loss, by name.
OWN = {
    "discopop": {"discopop_tau": 0.5},
    "simpo": {"simpo_gamma": 1.5},
    "cpo": {"cpo_alpha": 0.3},
}


def options_of(*names: str, **options: Any) -> dict[str, Any]:
    smoothing = {"label_smoothing": 0.1} if "exo_pair" in names else {}
    return {"loss_type": list(names), **smoothing, **options}


def refusal(*names: str, **options: Any) -> str:
    """The message, empty where the options are accepted."""
    try:
        given = options_of(*names, **options)
        Objective(DPOConfig(output_dir="unused", use_cpu=True, **given))
    except ConfigError as error:
        assert "\n" not in str(error)
        return str(error)
    return ""


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_what_a_loss_accepts_changes_its_gradient(name):
    case = Case(0)
    plain = case.ours(options_of(name))[1]
    by_rows = ("use_soft_labels", "score_margin_scale", "use_pair_weights")  # columns: test_losses
    for option, given in {**{k: v for k, v in SHARED.items() if k not in by_rows}, **OWN}.items():
        message = refusal(name, **given)
        if option in OWN:
            assert bool(message) == (name != option), option
        assert not message or f"'{next(iter(given))}'" in message
        if not message:
            changed = case.ours(options_of(name, **given))[1]
            assert float((changed - plain).abs().max()) > 1e-6, option
    # beta too; sft has it for the rewards that are logged.
    changed = case.ours(options_of(name, beta=0.4))
    assert (float((changed[1] - plain).abs().max()) > 1e-6) == (name != "sft")
    assert changed[2]["rewards/chosen"] != case.ours(options_of(name))[2]["rewards/chosen"]


@pytest.mark.parametrize("option", SHARED)
def test_a_mix_accepts_what_each_of_its_losses_accepts(option):
    alone = {name: not refusal(name, **SHARED[option]) for name in PAIR_LOSSES}
    assert any(alone.values()) and not all(alone.values())
    for a, b in itertools.combinations(PAIR_LOSSES, 2):
        if refusal(a, b):  # exo_pair, which needs a label_smoothing, with a loss that takes none
            assert "exo_pair" in (a, b)
            continue
        accepts = {name: alone[name] or (name == "sft" and option in LEAVE_SFT) for name in (a, b)}
        message = refusal(a, b, **SHARED[option])
        assert bool(message) != all(accepts.values()), (a, b, message)
        if message:  # it names the option, and the losses that lack it
            said = message.split(";")[0]
            assert f"'{option}'" in said, message
            assert all(name in said for name in (a, b) if not accepts[name]), message


@pytest.mark.parametrize("name", [n for n in PAIR_LOSSES if n != "exo_pair"])
def test_exo_pair_is_mixed_with_losses_that_take_label_smoothing(name):
    """It needs one > 0, and a mix has one for all its losses."""
    takes = "label_smoothing" in SPECS[name].parameters
    assert bool(refusal("exo_pair", name)) != takes
    assert "needs label_smoothing > 0" in refusal("exo_pair", name, label_smoothing=0.0)


def test_the_way_out_of_smoothing_a_mix_with_the_nll():
    message = refusal("robust", "sft", label_smoothing=0.1)
    assert "'label_smoothing' has no meaning for loss_type 'sft'" in message
    assert "rpo_alpha" in message and "'robust'" not in message
    assert not refusal("robust", label_smoothing=0.1, rpo_alpha=1.0)
