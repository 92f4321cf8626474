"""Every loss is declared with its source; options that have no meaning for a loss are refused."""

import math
import re

import pytest

from fastdpo.errors import ConfigError
from fastdpo.loss_specs import LOSSES, SPECS, LossSpec
from fastdpo.losses import REGISTRY, PreferenceLoss
from fastdpo.objective import Objective
from tests.tiny_trainer import bare_config


@pytest.mark.parametrize(
    "options, parts",
    [
        ({"loss_type": "exo_pair"}, ["'exo_pair'", "label_smoothing > 0"]),
        ({"loss_type": "robust", "label_smoothing": 0.5}, ["'label_smoothing'", "< 0.5"]),
        ({"loss_type": "robust", "label_smoothing": 0.9}, ["'label_smoothing'", "0.9"]),
        ({"label_smoothing": -0.1}, ["'label_smoothing'", ">= 0", "-0.1"]),
        ({"label_smoothing": math.nan}, ["'label_smoothing'", "nan"]),
        ({"beta": 0}, ["'beta'", "> 0"]),
        ({"loss_type": "discopop", "discopop_tau": 0}, ["'discopop_tau'", "> 0"]),
        ({"loss_type": "ipo,sft", "label_smoothing": 0.1}, ["'label_smoothing'", "'ipo', 'sft'"]),
        ({"loss_type": "sigmoid,nca_pair", "f_divergence_type": "js_divergence"}, ["nca_pair"]),
        ({"loss_type": "ipo", "label_smoothing": 0.1}, ["'label_smoothing'", "'ipo'", "sigmoid"]),
        ({"loss_type": "robust,ipo", "label_smoothing": 0.1}, ["meaning for loss_type 'ipo';"]),
        ({"ld_alpha": 1.2}, ["'ld_alpha'", "<= 1", "1.2"]),
        ({"ld_alpha": -0.1}, ["'ld_alpha'", ">= 0"]),
        ({"loss_type": "sft", "ld_alpha": 0.5}, ["'ld_alpha'", "sft"]),
        ({"loss_type": "orpo", "ld_alpha": 0.5}, ["'ld_alpha'", "orpo"]),
        ({"loss_type": "nca_pair", "f_divergence_type": "forward_kl"}, ["nca_pair", "f-diverg"]),
        ({"loss_type": "sft", "f_divergence_type": "forward_kl"}, ["sft", "no f-divergence"]),
        ({"f_divergence_type": "fwd_kl"}, ["'f_divergence_type'", "forward_kl"]),
        ({"f_alpha_divergence_coef": 0.7}, ["'f_alpha_divergence_coef'", "alpha_divergence"]),
        ({"loss_weights": [1, 2]}, ["'loss_weights'", "2 weights for 1"]),
        ({"loss_type": "sigmoid,sft", "loss_weights": [1]}, ["1 weights for 2"]),
        ({"loss_weights": [-1]}, ["'loss_weights'", ">= 0"]),
        ({"loss_weights": [0]}, ["all 0"]),
        ({"loss_weights": ["a"]}, ["'loss_weights'", "list of numbers"]),
        ({"loss_type": "sigmoid,sigmoid"}, ["twice"]),
        ({"loss_type": "kto,sigmoid"}, ["'kto'", "unpaired", "goes with no other"]),
        ({"loss_type": "kto", "label_smoothing": 0.1}, ["'label_smoothing'", "'kto'"]),
        ({"loss_type": "kto", "ld_alpha": 0.5}, ["'ld_alpha'", "kto"]),
        ({"loss_type": "kto", "use_weighting": True}, ["'use_weighting'", "kto"]),
        ({"loss_type": "kto", "use_pair_weights": True}, ["'use_pair_weights'", "kto"]),
        ({"loss_type": "kto", "f_divergence_type": "forward_kl"}, ["'f_divergence_type'", "kto"]),
        ({"loss_type": "apo_zero_unpaired", "rpo_alpha": 1}, ["'rpo_alpha'", "not all chosen"]),
        ({"desirable_weight": 0.5}, ["'desirable_weight'", "kto, apo_zero_unpaired"]),
        ({"loss_type": "kto", "undesirable_weight": -1}, ["'undesirable_weight'", ">= 0"]),
        (
            {"loss_type": "kto", "desirable_weight": 0, "undesirable_weight": 0},
            ["both 0", "raise one"],
        ),
        (
            {"loss_type": "kto", "metric_for_best_model": "rewards/accuracies"},
            ["not measured", "kl"],
        ),
        ({"loss_type": "my.module:"}, ["unknown loss_type", "module:function"]),
        ({"loss_type": "aot", "use_weighting": True}, ["'use_weighting'", "aot"]),
        ({"loss_type": "aot", "use_pair_weights": True}, ["'use_pair_weights'", "aot"]),
        ({"loss_type": "nca_pair", "use_soft_labels": True}, ["'use_soft_labels'", "nca_pair"]),
        ({"use_soft_labels": True, "label_smoothing": 0.1}, ["'use_soft_labels'", "smoothing"]),
        ({"loss_type": "ipo", "score_margin_scale": 1}, ["'score_margin_scale'", "ipo"]),
        ({"discopop_tau": 0.1}, ["'discopop_tau'", "discopop"]),
        ({"simpo_gamma": 1}, ["'simpo_gamma'", "simpo"]),
        ({"loss_type": "sigmoid,sft", "rpo_alpha": 1}, ["'rpo_alpha'", "'sft'"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_refused_options(options, parts):
    with pytest.raises(ConfigError) as caught:
        bare_config(**options)
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in parts), message


def test_step_wide_losses_need_one_rank(monkeypatch):
    args = bare_config(loss_type=["aot"])
    monkeypatch.setattr(type(args), "world_size", property(lambda self: 2))
    with pytest.raises(ConfigError, match="one rank.*are 2"):
        Objective(args)


FORMULAS = {
    "nca_pair": "-log s(r_w) - log s(-r_w) / 2 - log s(-r_l) / 2",
    "robust": "((1 - e) L(w, l) - e L(l, w)) / (1 - 2 e)",
    "sft": "-log p(chosen) / mean length",
}


def test_every_loss_is_declared_and_documented():
    assert tuple(REGISTRY) == LOSSES
    for name, loss in REGISTRY.items():
        assert isinstance(loss, PreferenceLoss) and loss.spec is SPECS[name]
        assert set(loss.spec.parameters) == set(loss.fn.__kwdefaults__ or {}) | (
            set(loss.fn.__annotations__) - {"logps", "beta", "return"}
        )
        assert isinstance(loss.spec, LossSpec)
        assert re.search(r"arXiv \d{4}\.\d{5}", loss.spec.source), name
        doc = " ".join((loss.fn.__doc__ or "").split())
        for cited in re.findall(r"\d{4}\.\d{5}|eq\. [\d.]*\d|table \d", loss.spec.source):
            assert cited in doc, (name, cited)
        if "eq. " not in loss.spec.source:  # then the formula itself
            assert FORMULAS[name] in doc, name
