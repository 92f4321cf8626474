"""DPOConfig: transformers' TrainingArguments with TRL's DPO options and fastdpo's own.

An unknown option, a value of the wrong type or outside its domain, and an option that fastdpo
does not honour are `ConfigError`s; nothing is ignored. Those that are honoured are declared in
training_options.py; ScriptArguments and ModelConfig, in files of their own, obey the same rules.
How options combine into a run is the trainer's affair.
"""

from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import LoggerType
from transformers import TrainingArguments, get_scheduler
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.utils.import_utils import is_torch_bf16_gpu_available

from .config_files import read_yaml, write_yaml
from .errors import ConfigError, did_you_mean
from .model_config import ModelConfig
from .option_names import overridden, settle
from .options import AUTO, checked_init, default_of, describe
from .script_arguments import ScriptArguments
from .training_options import PLANNED, TrainingOptions
from .unsupported import ALIASES, is_neutral, unsupported

__all__ = ["DPOConfig", "ModelConfig", "ScriptArguments", "to_plain"]

# What may change on resuming is left out: where and how often is logged, evaluated and saved, and
# how the same mathematics is computed (packs, kernels, checkpointing, machine).
SHAPES_THE_RUN = (
    *("loss_type", "loss_weights", "beta", "label_smoothing", "f_divergence_type"),
    *("f_alpha_divergence_coef", "ld_alpha", "use_weighting", "rpo_alpha", "discopop_tau"),
    *("simpo_gamma", "cpo_alpha", "use_pair_weights", "use_soft_labels", "score_margin_scale"),
    *("desirable_weight", "undesirable_weight", "router_aux_loss_coef"),
    *("reference", "max_length", "group_by_prompt"),
    *("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs"),
    *("max_steps", "train_sampling_strategy", "dataloader_drop_last", "seed", "data_seed"),
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim"),
    *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("max_grad_norm", "bf16", "disable_dropout"),
    "lean_lora",  # without autocast it rounds otherwise than PEFT, which computes in fp32 there
)


@checked_init(settle)
@dataclass(repr=False)
class DPOConfig(TrainingOptions, TrainingArguments):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Options of `DPOTrainer`, under TRL's names; `fastdpo train --help` lists them.

    `per_device_train_batch_size * gradient_accumulation_steps` (times ranks) is the number of
    pairs per step, whatever packs they are computed in. Unlike TRL, `bf16=None` means bf16 only
    on a GPU that has it. Raises `ConfigError`.
    """

    @property
    def pairs_per_step(self) -> int:
        """Pairs (or examples of unpaired data) of one optimizer step, over all ranks."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size

    def __post_init__(self) -> None:
        TrainingOptions.__post_init__(self)
        self._refuse_unsupported()
        self._check_trackers()
        has_bf16 = not self.use_cpu and is_torch_bf16_gpu_available()
        if self.bf16 and not (has_bf16 or self.use_cpu):
            raise ConfigError(
                "'bf16' needs a GPU with bfloat16, and none is here; leave it out, or set "
                "use_cpu: true to compute in bfloat16 on the CPU"
            )
        if self.bf16 is None:
            self.bf16 = has_bf16
        for alias, name in ALIASES.items():
            if hasattr(self, alias):  # from transformers 5.20 or so, which then reads only these
                setattr(self, alias, getattr(self, name))
        optim = self.optim
        if optim == AUTO:  # which transformers does not know
            self.optim = PLANNED["optim"]
        trackers, self.report_to = self.report_to, ["none"]  # accelerate's, not transformers'
        try:
            TrainingArguments.__post_init__(self)
        except (ValueError, ImportError) as error:
            raise ConfigError(" ".join(str(error).split())) from error
        self.optim = AUTO if optim == AUTO else self.optim
        self.report_to = [] if trackers == ["none"] else trackers
        self._try_schedule()

    def _refuse_unsupported(self) -> None:
        """Every field of TrainingArguments that is no option of ours must ask for nothing."""
        honoured = describe(TrainingOptions)
        for f in fields(TrainingArguments):
            value = getattr(self, f.name)
            if f.name in honoured or f.name in ALIASES or is_neutral(value, default_of(f)):
                continue
            if not self._is_implied(f.name, value):
                raise unsupported(f.name, value)

    def _is_implied(self, name: str, value: Any) -> bool:
        """What the honoured options say already, or transformers derives from them: a config
        that was built once may be built again from its own values."""
        if name == "do_train":
            return value is True
        if name == "do_eval":
            return value is True and self.eval_strategy != "no"
        if name == "dataloader_pin_memory":
            return self.use_cpu
        if name == "accelerator_config":
            return value in (AcceleratorConfig(), AcceleratorConfig().to_dict())
        return False

    def _try_schedule(self) -> None:
        """Builds the schedule once, over nothing: its arguments are wrong now or never."""
        nothing = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        kwargs = cast(dict[str, Any], self.lr_scheduler_kwargs or {})
        try:
            get_scheduler(self.lr_scheduler_type, nothing, 1, 10, scheduler_specific_kwargs=kwargs)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"'lr_scheduler_kwargs' {kwargs} do not fit lr_scheduler_type "
                f"{str(self.to_dict()['lr_scheduler_type'])!r}: {' '.join(str(error).split())}"
            ) from error

    def _check_trackers(self) -> None:
        known = ("all", "none", *(name for name in LoggerType.list() if name != "all"))
        for name in self.report_to:
            if name not in known:
                raise ConfigError(
                    f"'report_to' {name!r} is no tracker of accelerate's, which has "
                    f"{', '.join(known)}; transformers' own callbacks go into DPOTrainer(callbacks="
                    f"[…]){did_you_mean(name, known)}"
                )
        if len(self.report_to) > 1 and {"all", "none"} & set(self.report_to):
            raise ConfigError(f"'report_to' mixes all or none with names: {self.report_to}")

    def to_dict(self) -> dict[str, Any]:
        """The honoured options as plain values; `DPOConfig(**config.to_dict())` is the same."""
        return to_plain(self)

    def save_yaml(self, path: str | Path) -> None:
        """Writes the options as a file that `fastdpo train` and `from_yaml` read."""
        write_yaml(path, to_plain(self))

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> "DPOConfig":
        """The training options of a config file or `recipe:NAME`, with `overrides`. Options that
        name the model and the dataset belong to the command line and are left to it."""
        elsewhere = {**describe(ScriptArguments), **describe(ModelConfig)}
        ours = describe(TrainingOptions)
        values = read_yaml(path)
        own = {k: v for k, v in values.items() if k in ours or k not in elsewhere}
        return cls(**overridden(own, overrides))

    def identity(self) -> dict[str, Any]:
        """The options that a resumed run must share with the run that wrote its checkpoint."""
        plain = to_plain(self)
        return {name: plain[name] for name in SHAPES_THE_RUN}


def to_plain(*configs: ScriptArguments | ModelConfig | TrainingOptions) -> dict[str, Any]:
    """The options of `configs` by name: text, numbers, booleans, lists, mappings and None.

    All but `overwrite_output_dir`, a permission given once: a repeated run has to ask again.
    """
    plain: dict[str, Any] = {}
    for config in configs:
        cls = TrainingOptions if isinstance(config, TrainingOptions) else type(config)
        for name in describe(cls):
            if name == "overwrite_output_dir":
                continue
            value = getattr(config, name)
            plain[name] = value.value if isinstance(value, Enum) else value
    return plain
