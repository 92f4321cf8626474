"""Optimizer and learning-rate schedule, by the names that transformers gives them.

The classes come from transformers' own factory (`optim="adamw_torch"`, `"paged_adamw_8bit"`, …),
the schedules from `transformers.get_scheduler`; nothing is reimplemented here.
"""

from typing import Any, cast

import torch
from torch import nn
from transformers import Trainer, get_scheduler
from transformers.trainer_pt_utils import get_parameter_names

from .config import DPOConfig
from .errors import ConfigError, MissingPackageError

# Weight decay leaves biases and normalisation weights alone, as in transformers' Trainer.
NO_DECAY = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]


def make_optimizer(model: nn.Module, args: DPOConfig) -> torch.optim.Optimizer:
    """The optimizer named by `args.optim` over the parameters of `model` that require grad.

    Raises `MissingPackageError` where the optimizer's package (bitsandbytes) is not installed,
    `ConfigError` where nothing is trainable.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise ConfigError(
            "no parameter of the model requires grad: pass peft_config (or --use_peft) to train "
            "an adapter, or a model whose parameters are not frozen"
        )
    decays = set(get_parameter_names(model, [nn.LayerNorm], NO_DECAY))
    groups = [
        {
            "params": [p for name, p in trainable.items() if name in decays],
            "weight_decay": args.weight_decay,
        },
        {
            "params": [p for name, p in trainable.items() if name not in decays],
            "weight_decay": 0.0,
        },
    ]
    try:
        optimizer_class, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
    except ImportError as error:
        name = getattr(args.optim, "value", args.optim)
        raise MissingPackageError(
            f"optim={name!r} needs a package that is not installed ({error}); "
            "pip install 'fastdpo[qlora]' brings bitsandbytes"
        ) from error
    return optimizer_class(groups, **kwargs)


def make_scheduler(
    optimizer: torch.optim.Optimizer, args: DPOConfig, max_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The schedule named by `args.lr_scheduler_type` over `max_steps` optimizer steps."""
    kwargs = cast(dict[str, Any] | None, args.lr_scheduler_kwargs)  # checked in config.py
    return get_scheduler(
        args.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=args.get_warmup_steps(max_steps),
        num_training_steps=max_steps,
        scheduler_specific_kwargs=kwargs or {},
    )
