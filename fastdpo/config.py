"""DPOConfig: transformers' TrainingArguments with TRL's DPO options and fastdpo's own.

An unknown option, a value of the wrong type or outside its domain, and an option that fastdpo
does not honour are `ConfigError`s; nothing is ignored. ScriptArguments and ModelConfig stand in
arguments.py and obey the same rules. How options combine into a run is the trainer's affair.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.utils.import_utils import is_torch_bf16_gpu_available

from .arguments import ModelConfig, ScriptArguments, TrainingOptions, settle
from .errors import ConfigError, did_you_mean
from .options import checked_init, default_of, describe
from .unsupported import ALIASES, is_neutral, unsupported

__all__ = ["DPOConfig", "ModelConfig", "ScriptArguments", "dump_yaml", "to_plain"]


@checked_init(settle)
@dataclass(repr=False)
class DPOConfig(TrainingOptions, TrainingArguments):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Options of `DPOTrainer`, under TRL's names; `fastdpo train --help` lists them.

    `per_device_train_batch_size * gradient_accumulation_steps` (times ranks) is the number of
    pairs per step, whatever packs they are computed in. Unlike TRL, `bf16=None` means bf16 only
    on a GPU that has it. Raises `ConfigError`.
    """

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
        try:
            TrainingArguments.__post_init__(self)
        except (ValueError, ImportError) as error:
            raise ConfigError(" ".join(str(error).split())) from error

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

    def _check_trackers(self) -> None:
        known = ("all", "none", *INTEGRATION_TO_CALLBACK)
        for name in self.report_to:
            if name not in known:
                raise ConfigError(
                    f"'report_to' {name!r} is no tracker{did_you_mean(name, known)}; "
                    f"transformers has {', '.join(known)}"
                )
        if len(self.report_to) > 1 and {"all", "none"} & set(self.report_to):
            raise ConfigError(f"'report_to' mixes all or none with names: {self.report_to}")

    def to_dict(self) -> dict[str, Any]:
        """The honoured options as plain values; `DPOConfig(**config.to_dict())` is the same."""
        return to_plain(self)


def to_plain(config: ScriptArguments | ModelConfig | TrainingOptions) -> dict[str, Any]:
    """The options of `config` by name: text, numbers, booleans, lists, mappings and None."""
    cls = TrainingOptions if isinstance(config, TrainingOptions) else type(config)
    values = {name: getattr(config, name) for name in describe(cls)}
    return {name: v.value if isinstance(v, Enum) else v for name, v in values.items()}


def dump_yaml(
    path: str | Path, configs: Iterable[ScriptArguments | ModelConfig | TrainingOptions]
) -> None:
    """Writes the configs as one flat YAML file, which `fastdpo train PATH` reads back."""
    merged: dict[str, Any] = {}
    for config in configs:
        merged |= to_plain(config)
    Path(path).write_text(yaml.safe_dump(merged, sort_keys=False, allow_unicode=True))
