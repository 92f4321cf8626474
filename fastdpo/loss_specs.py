"""Which losses there are, which options each of them takes, and the check of what was asked for.

The standard library alone, so that a wrong combination is answered before torch is imported. The
mathematics is in losses.py, under the same names.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .errors import ConfigError, did_you_mean

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


@dataclass(frozen=True)
class LossSpec:
    """What a loss is defined for.

    source: paper and equation, of the arXiv version named where versions count differently. The
        function's docstring cites the same, and writes out what has no number there.
    scope: "pair", a pair's loss depends on that pair alone; "step", on all pairs of the step.
    reference_free: it never reads the reference.
    parameters: the options it takes beside beta.
    f_divergence: its margin is one of scores f'(policy / reference), so any f-divergence goes in.
    logps: it reads log-ratios of summed log-probs, which LD-DPO may weigh by the other response's
        length; False for losses of the policy alone and of single responses.
    weighting: WPO's weights apply: it is a sum of losses of pairs of responses.
    flips: the loss of a pair with its responses swapped has a meaning (soft labels).
    margin: a score margin may be subtracted from its beta * (chosen - rejected).
    unpaired: it is of single responses and their labels; the rejected one is a mismatched response
        where the scope is the step, and no other where it is the pair (data_pairs.py).
    """

    source: str
    scope: str = "pair"
    reference_free: bool = False
    parameters: tuple[str, ...] = ()
    f_divergence: bool = False
    logps: bool = True
    weighting: bool = True
    flips: bool = False
    margin: bool = False
    unpaired: bool = False


_SMOOTHED = ("label_smoothing",)
_BY_LABEL = ("desirable_weight", "undesirable_weight")

SPECS: dict[str, LossSpec] = {
    "sigmoid": LossSpec(
        "DPO, arXiv 2305.18290 eq. 7; label smoothing: cDPO (Mitchell, 2023) eq. 3",
        parameters=_SMOOTHED,
        f_divergence=True,
        flips=True,
        margin=True,
    ),
    "hinge": LossSpec(
        "RSO, arXiv 2309.06657 eq. 12: the hinge of SLiC-HF, 2305.10425, on DPO's margin",
        f_divergence=True,
        flips=True,
        margin=True,
    ),
    "ipo": LossSpec("IPO, arXiv 2310.12036 eq. 17, per token", f_divergence=True, flips=True),
    "exo_pair": LossSpec(
        "EXO, arXiv 2402.00856 eq. 16", parameters=_SMOOTHED, f_divergence=True, margin=True
    ),
    "nca_pair": LossSpec("NCA, arXiv 2402.05369 (v3) table 1, for pairs"),
    "robust": LossSpec(
        "robust DPO (rDPO), arXiv 2403.00409",
        parameters=_SMOOTHED,
        f_divergence=True,
        margin=True,
    ),
    "bco_pair": LossSpec("BCO, arXiv 2404.04656 (ACL 2025) eq. 6: a reward shift of 0"),
    "sppo_hard": LossSpec("SPPO, arXiv 2405.00675 eq. 4.7, P of the winner 1"),
    "aot": LossSpec(
        "AOT, arXiv 2406.05882 (v1) eq. 11 with the u and v of pairs: algorithm 2",
        scope="step",
        parameters=_SMOOTHED,
        weighting=False,
    ),
    "aot_unpaired": LossSpec(
        "AOT, arXiv 2406.05882 (v1) eq. 11, unpaired: algorithm 1",
        scope="step",
        parameters=_SMOOTHED,
        weighting=False,
    ),
    "apo_zero": LossSpec("APO, arXiv 2408.06266 eq. 7"),
    "apo_down": LossSpec("APO, arXiv 2408.06266 eq. 8"),
    "discopop": LossSpec(
        "DiscoPOP, arXiv 2406.08414 eq. 5", parameters=("discopop_tau",), f_divergence=True
    ),
    "sft": LossSpec(
        "negative log-likelihood of the chosen responses, mean over the step's tokens; mixed in "
        "as in MPO, arXiv 2411.10442"
    ),
    "sigmoid_norm": LossSpec(
        "length-normalised DPO, Tulu 3, arXiv 2411.15124 eq. 6", f_divergence=True
    ),
    "simpo": LossSpec(
        "SimPO, arXiv 2405.14734 eq. 6",
        reference_free=True,
        parameters=("simpo_gamma", "label_smoothing"),
        logps=False,
    ),
    "cpo": LossSpec(
        "CPO, arXiv 2401.08417 eq. 3, and its NLL term",
        reference_free=True,
        parameters=("cpo_alpha", "label_smoothing"),
        logps=False,
        weighting=False,
    ),
    "orpo": LossSpec(
        "ORPO, arXiv 2403.07691 eq. 6 and 7", reference_free=True, logps=False, weighting=False
    ),
    "kto": LossSpec(
        "KTO, arXiv 2402.01306 (v4) eq. 8",
        scope="step",
        parameters=_BY_LABEL,
        logps=False,
        weighting=False,
        unpaired=True,
    ),
    "apo_zero_unpaired": LossSpec(
        "APO, arXiv 2408.06266 eq. 7, its two terms apart",
        parameters=_BY_LABEL,
        logps=False,
        weighting=False,
        unpaired=True,
    ),
}
LOSSES = tuple(SPECS)
# Of these `sft` alone says nothing about the reference: it goes with either kind.
PLAIN_NLL = "sft"
UNPAIRED_LOSSES = tuple(name for name, spec in SPECS.items() if spec.unpaired)


def is_users(name: str) -> bool:
    """Whether `name` is a loss of the user's own, `module:function`."""
    module, colon, function = name.partition(":")
    return bool(colon) and function.isidentifier() and all(map(str.isidentifier, module.split(".")))


def needs_reference(specs: dict[str, LossSpec]) -> bool:
    """Whether a mix reads a reference. `sft` alone does, for the rewards that are logged."""
    return not any(spec.reference_free for spec in specs.values()) or any(
        not spec.reference_free for name, spec in specs.items() if name != PLAIN_NLL
    )


def check_loss_names(names: Sequence[str]) -> None:
    """Raises `ConfigError` for a loss that is unknown or named twice."""
    if not names:
        raise ConfigError(f"'loss_type' names no loss; fastdpo has {', '.join(LOSSES)}")
    for name in names:
        if name not in SPECS and not is_users(name):
            raise ConfigError(
                f"unknown loss_type {name!r}; fastdpo has {', '.join(LOSSES)}, and takes your own "
                f"as module:function{did_you_mean(name, LOSSES)}"
            )
        if list(names).count(name) > 1:
            raise ConfigError(f"loss_type names {name!r} twice; add up its loss_weights instead")


def check_loss_options(options: Any, specs: dict[str, LossSpec | None]) -> None:
    """Holds loss options to their domains and to the losses, by name, that were asked for.

    An option must mean something to at least one of them. `specs[name]` is None for a user's own
    loss that is not loaded yet: it may take anything. Raises `ConfigError`.
    """
    names = ", ".join(specs)
    known = [spec for spec in specs.values() if spec is not None]
    open_ended = len(known) < len(specs)

    def takes(parameter: str) -> bool:
        return open_ended or any(parameter in spec.parameters for spec in known)

    for name in (name for name, spec in specs.items() if spec is not None and spec.unpaired):
        if len(specs) > 1:
            raise ConfigError(
                f"loss_type {name!r} is of unpaired data and goes with no other; got {names}"
            )
    _check_label_smoothing(options, specs)
    if options.loss_weights is not None and len(options.loss_weights) != len(specs):
        raise ConfigError(
            f"'loss_weights' has {len(options.loss_weights)} weights for {len(specs)} losses "
            f"({names}); give one each"
        )
    if options.loss_weights is not None and min(options.loss_weights) < 0:
        raise ConfigError(f"'loss_weights' expects numbers >= 0, got {options.loss_weights}")
    if options.loss_weights is not None and max(options.loss_weights) == 0:
        raise ConfigError("'loss_weights' are all 0, so nothing would be trained; raise one")
    defaults = {
        **{"discopop_tau": 0.05, "simpo_gamma": 0.5, "cpo_alpha": 1.0},
        **{"desirable_weight": 1.0, "undesirable_weight": 1.0},
    }
    for parameter, default in defaults.items():
        if getattr(options, parameter) != default and not takes(parameter):
            owners = [name for name, spec in SPECS.items() if parameter in spec.parameters]
            raise ConfigError(
                f"{parameter!r} belongs to loss_type {', '.join(owners)}, and loss_type is "
                f"{names}; leave it out"
            )
    if options.desirable_weight == options.undesirable_weight == 0:
        raise ConfigError(
            "'desirable_weight' and 'undesirable_weight' are both 0, so nothing would be trained; "
            "raise one"
        )
    if options.f_alpha_divergence_coef != 0.5 and options.f_divergence_type != "alpha_divergence":
        raise ConfigError(
            "'f_alpha_divergence_coef' belongs to f_divergence_type 'alpha_divergence', and that "
            f"is {options.f_divergence_type!r}; leave it out"
        )
    _check_extras(options, specs, names)


def _check_label_smoothing(options: Any, specs: dict[str, LossSpec | None]) -> None:
    """One number for all losses of a mix: none of them may have no use for it."""
    value = options.label_smoothing
    if not 0 <= value < 0.5:
        raise ConfigError(f"'label_smoothing' expects a number >= 0 and < 0.5, got {value:g}")
    lacking = [
        name
        for name, spec in specs.items()
        if spec is not None and "label_smoothing" not in spec.parameters
    ]
    if value and lacking:
        owners = [name for name, spec in SPECS.items() if "label_smoothing" in spec.parameters]
        instead = "; rpo_alpha adds the chosen responses' NLL too" if PLAIN_NLL in lacking else ""
        raise ConfigError(
            f"'label_smoothing' has no meaning for loss_type {', '.join(map(repr, lacking))}; set "
            f"it to 0, or use one of {', '.join(owners)}{instead}"
        )
    if value == 0 and "exo_pair" in specs:
        raise ConfigError(
            "loss_type 'exo_pair' needs label_smoothing > 0: its loss is infinite at 0; "
            "set label_smoothing, to 0.001 for instance"
        )


def _check_extras(options: Any, specs: dict[str, LossSpec | None], names: str) -> None:
    """Options that change how the losses of a mix are fed or added up."""

    def without(trait: str) -> list[str]:
        lacking = [n for n, spec in specs.items() if spec is not None and not getattr(spec, trait)]
        if trait == "logps":
            return lacking or ([PLAIN_NLL] if list(specs) == [PLAIN_NLL] else [])
        return lacking

    def refuse_for(option: str, lacking: list[str], why: str) -> None:
        if lacking:
            raise ConfigError(
                f"{option!r} does not apply to loss_type {', '.join(lacking)}: {why}; leave one of "
                "the two out"
            )

    if options.f_divergence_type != "reverse_kl":
        lacking = without("f_divergence")
        if list(specs) != [PLAIN_NLL]:
            lacking = [name for name in lacking if name != PLAIN_NLL]
        refuse_for("f_divergence_type", lacking, "it has no f-divergence")
    if options.ld_alpha is not None:
        refuse_for("ld_alpha", without("logps"), "LD-DPO weighs the tokens of summed log-probs")
    if options.use_weighting:
        refuse_for("use_weighting", without("weighting"), "WPO weighs the losses of single pairs")
    by_pair = {n: s for n, s in specs.items() if s is not None and s.scope == "step"}
    if options.use_pair_weights:
        refuse_for("use_pair_weights", list(by_pair), "its loss is not a sum over pairs")
    if options.use_soft_labels:
        refuse_for("use_soft_labels", without("flips"), "it has no meaning for swapped responses")
        if options.label_smoothing:
            raise ConfigError(
                "'use_soft_labels' gives every pair its own probability, and 'label_smoothing' "
                "gives all the same; leave one of the two out"
            )
    if options.score_margin_scale:
        refuse_for("score_margin_scale", without("margin"), "it has no margin to offset")
        if options.f_divergence_type != "reverse_kl":
            raise ConfigError(
                "'score_margin_scale' and 'f_divergence_type' both redefine the margin; leave one "
                "of the two out"
            )
    if options.rpo_alpha:
        single = [name for name, spec in specs.items() if spec is not None and spec.unpaired]
        refuse_for("rpo_alpha", single, "its responses are not all chosen ones")
    if options.rpo_alpha and PLAIN_NLL in specs:
        raise ConfigError(
            "'rpo_alpha' and loss_type 'sft' both add the chosen responses' NLL; keep one"
        )
