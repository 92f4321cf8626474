"""What the command line says of itself: `fastdpo train --help`, and the other commands' parsers."""

import argparse
import textwrap
from typing import Any, NoReturn

from .config_files import RECIPE, recipes
from .errors import ConfigError
from .option_names import options_by_name

# The first option of each part of the help.
HELP_PARTS = {
    "model_name_or_path": "Model",
    "use_peft": "Adapter",
    "load_in_8bit": "Quantization",
    "dataset_name": "Dataset",
    "output_dir": "Where it is written",
    "loss_type": "Preference loss",
    "reference": "Reference",
    "max_length": "Data",
    "max_tokens_per_pack": "Packs",
    "per_device_train_batch_size": "Steps",
    "learning_rate": "Optimizer",
    "bf16": "Precision, memory and machine",
    "eval_strategy": "Evaluation",
    "save_strategy": "Checkpoints",
    "push_to_hub": "Hub",
    "logging_strategy": "Log",
}


class CommandParser(argparse.ArgumentParser):
    """argparse for `fastdpo COMMAND`, whose errors are `ConfigError`s that say what it `takes`."""

    def __init__(self, command: str, takes: str, description: str):
        super().__init__(allow_abbrev=False, prog=f"fastdpo {command}", description=description)
        self.command, self.takes = command, takes

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.command}: {message}; it takes {self.takes}")


def help_lines(command: str = "train") -> list[str]:
    """`fastdpo train --help` or `fastdpo precompute --help`: every option in its part, with its
    values and default."""
    lines = [
        f"usage: fastdpo {command} [CONFIG.yaml | {RECIPE}NAME] [--option value …]",
        "",
        "CONFIG.yaml holds the same names, one `option: value` a line. Flags win over the file.",
        "Lists take commas, several words, or the flag again. Names are TRL's where TRL has them.",
        f"Recipes: {', '.join(recipes())}",
    ]
    for name, opt in options_by_name().items():
        if name in HELP_PARTS:
            lines += ["", f"{HELP_PARTS[name]}:"]
        lines += _wrap(f"--{name}", f"{opt.help} [{opt.expected}; default {_shown(opt.default)}]")
    return lines


def _shown(default: Any) -> str:
    if isinstance(default, list):
        return ",".join(map(str, default))
    return str(default).lower() if default is None or isinstance(default, bool) else str(default)


def _wrap(flag: str, text: str) -> list[str]:
    indent = " " * 34
    head = f"  {flag}".ljust(len(indent))
    lines = textwrap.wrap(text, 100, initial_indent=indent, subsequent_indent=indent)
    if head[-1] != " ":
        return [head, *lines]
    return [head + lines[0].lstrip(), *lines[1:]]
