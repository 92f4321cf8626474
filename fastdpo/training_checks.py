"""What two training options say together, where each alone is in its domain.

Reads the options and changes none. Every error names both options and the way out. The standard
library alone: see options.py.
"""

from typing import TYPE_CHECKING, Any

from .errors import ConfigError, did_you_mean
from .loss_specs import SPECS, UNPAIRED_LOSSES, check_loss_names, check_loss_options
from .options import parse_bytes

if TYPE_CHECKING:
    from .training_options import TrainingOptions

REFERENCES = ("auto", "adapters_off", "copy", "model")
METRICS = (
    *("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
    *("logps/chosen", "logps/rejected"),
)
UNPAIRED_METRICS = (*(name for name in METRICS if name != "rewards/accuracies"), "kl")
TOKEN_METRICS = ("entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy")


def check_together(args: "TrainingOptions") -> None:
    """Raises `ConfigError` where two options contradict each other, or one has no effect."""
    check_loss_names(args.loss_type)
    check_loss_options(args, {name: SPECS.get(name) for name in args.loss_type})
    _check_reference(args)
    _check_optimizer(args)
    _check_steps_and_memory(args)
    _check_evaluation(args)
    for name in ("hub_model_id", "hub_private_repo", "hub_revision"):
        if getattr(args, name) is not None and not args.push_to_hub:
            raise ConfigError(f"{name!r} is for uploads: set push_to_hub: true, or leave it out")


def _check_steps_and_memory(args: "TrainingOptions") -> None:
    if args.max_steps == 0 or args.max_steps < -1:
        raise ConfigError(
            f"'max_steps' expects a whole number >= 1, or -1 to go by epochs; got {args.max_steps}"
        )
    if args.gpu_memory is not None:
        parse_bytes(args.gpu_memory)
    if args.optimizer_in_backward and args.max_grad_norm:
        raise ConfigError(
            f"'optimizer_in_backward' uses gradients one by one, and max_grad_norm "
            f"{args.max_grad_norm:g} needs the norm of all of them; set max_grad_norm: 0"
        )
    if args.gradient_checkpointing_kwargs and args.gradient_checkpointing is False:
        raise ConfigError(
            "'gradient_checkpointing_kwargs' has no effect where gradient_checkpointing is off; "
            "set gradient_checkpointing: full, selective or auto, or leave it out"
        )
    if args.packing_mode not in ("auto", "shared") and args.group_by_prompt:
        raise ConfigError(
            f"'group_by_prompt' shares prompts, which packing_mode={args.packing_mode!r} does "
            "not; leave one of the two out"
        )


def _check_evaluation(args: "TrainingOptions") -> None:
    in_step = args.save_strategy in ("best", args.eval_strategy)
    if args.load_best_model_at_end and not in_step:
        raise ConfigError(
            "'load_best_model_at_end' needs an evaluation at every checkpoint: eval_strategy "
            f"is {args.eval_strategy!r} and save_strategy {args.save_strategy!r}; use one"
        )
    best = (args.metric_for_best_model or "loss").removeprefix("eval_")
    measured = UNPAIRED_METRICS if args.loss_type[0] in UNPAIRED_LOSSES else METRICS
    measured += TOKEN_METRICS if args.log_token_stats else ()
    if not any(best == name or best.endswith(f"_{name}") for name in measured):
        raise ConfigError(
            f"'metric_for_best_model' {best!r} is not measured; there are "
            f"{', '.join(measured)}{did_you_mean(best, measured)}"
        )
    if args.save_strategy == "best" and args.eval_strategy == "no":
        raise ConfigError("'save_strategy' best needs evaluations; set eval_strategy")
    samples = [name for name in ("sample_prompts", "num_sample_prompts") if getattr(args, name)]
    if samples and args.eval_strategy == "no" and not args.eval_on_start:
        raise ConfigError(
            f"{samples[0]!r} are answered at evaluations, and there are none; set eval_strategy "
            "(or eval_on_start), or leave it out"
        )
    if not samples and not _is_default(args, "sample_max_new_tokens"):
        raise ConfigError(
            "'sample_max_new_tokens' is how long samples get, and none are asked for; set "
            "num_sample_prompts or sample_prompts, or leave it out"
        )


def _check_optimizer(args: "TrainingOptions") -> None:
    for name in ("adam_beta1", "adam_beta2", "adam_epsilon"):
        if args.optim == "sgd" and not _is_default(args, name):
            raise ConfigError(f"{name!r} belongs to AdamW, and optim is 'sgd'; leave it out")
    schedule = args.lr_scheduler_type
    if schedule == "constant" and args.warmup_steps:
        raise ConfigError(
            "lr_scheduler_type 'constant' has no warm-up, and warmup_steps is "
            f"{args.warmup_steps}; use 'constant_with_warmup'"
        )
    if schedule in ("constant", "constant_with_warmup") and args.lr_scheduler_kwargs:
        raise ConfigError(f"lr_scheduler_type {schedule!r} takes no lr_scheduler_kwargs")


def _check_reference(args: "TrainingOptions") -> None:
    kind, colon, name = args.reference.partition(":")
    if (colon and (kind != "adapter" or not name)) or not (colon or kind in REFERENCES):
        raise ConfigError(
            f"'reference' expects one of {', '.join(REFERENCES)} or adapter:NAME; got "
            f"{args.reference!r}{did_you_mean(kind, REFERENCES)}"
        )
    if not args.sync_ref_model:
        for name in ("ref_model_mixup_alpha", "ref_model_sync_steps"):
            if not _is_default(args, name):
                raise ConfigError(
                    f"{name!r} is for TR-DPO: set sync_ref_model: true, or leave it out"
                )
        return
    for name in ("precompute_ref_log_probs", "ref_cache_dir"):
        if getattr(args, name):
            raise ConfigError(
                f"'sync_ref_model' moves the reference during training, and {name!r} "
                "computes it once before; keep one of them"
            )
    if args.reference not in ("auto", "copy", "model"):
        raise ConfigError(
            f"'sync_ref_model' moves a copy of the policy, and 'reference' {args.reference!r} "
            "is none; use reference='copy'"
        )


def _is_default(args: Any, name: str) -> bool:
    return getattr(args, name) == getattr(type(args), name)  # dataclasses keep defaults there
