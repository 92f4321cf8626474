"""The README.md beside a saved model: what it was made from, with which options, and what came out.

Only what the run knows is said; a user's own card is never replaced.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from . import __version__
from .errors import CheckpointError
from .options import describe
from .training_options import TrainingOptions

MARK = "<!-- written by fastdpo -->"
# Beside these, everything that is not at its default is shown.
ALWAYS = ("loss_type", "beta", "learning_rate", "num_train_epochs", "max_length")
# Where and how often things are written, and names that have a place of their own in the card.
NOT_SHOWN = (
    *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "run_name", "disable_tqdm"),
    *("report_to", "project", "trackio_space_id", "logging_steps", "logging_strategy"),
    *("logging_first_step", "save_strategy", "save_steps", "save_total_limit", "use_cpu"),
    *("push_to_hub", "hub_model_id", "hub_private_repo", "hub_revision", "hub_strategy"),
    *("sample_prompts", "num_sample_prompts", "sample_max_new_tokens", "dataset_num_proc"),
)


@dataclass(frozen=True)
class Card:
    """base_model: a hub name or folder. adapter: the saved folder holds one. metrics: by name.
    data: the lines of the data reports. options: of the run, plain."""

    name: str
    base_model: str
    adapter: bool
    options: dict[str, Any]
    metrics: dict[str, float] = field(default_factory=dict)
    data: list[str] = field(default_factory=list)
    dataset: str | None = None
    tags: Iterable[str] = ()

    def text(self) -> str:
        """The card, as the hub reads it: YAML between dashes, then Markdown."""
        head: dict[str, Any] = {
            "library_name": "peft" if self.adapter else "transformers",
            "pipeline_tag": "text-generation",
            "tags": list(dict.fromkeys(["dpo", "fastdpo", *self.tags])),
        }
        if _is_hub_name(self.base_model):
            head["base_model"] = self.base_model
        if self.dataset is not None and _is_hub_name(self.dataset):
            head["datasets"] = [self.dataset]
        base = f"`{self.base_model}`" if self.base_model else "a model without a name"
        kind = "A LoRA adapter for" if self.adapter else "A language model made from"
        lines = ["---", yaml.safe_dump(head, sort_keys=False).strip(), "---", MARK, ""]
        lines += [f"# {self.name}", ""]
        lines += [
            f"{kind} {base}, trained on preference pairs with DPO "
            f"([arXiv:2305.18290](https://arxiv.org/abs/2305.18290)) by fastdpo {__version__}.",
            "",
            "## Loading",
            "",
            "```python",
            *self._loading(),
            "```",
        ]
        if self.metrics:
            lines += ["", "## Results", "", "| metric | value |", "|---|---|"]
            lines += [f"| {name} | {value:.4f} |" for name, value in self.metrics.items()]
        if self.data or self.dataset:
            lines += ["", "## Data", ""]
            lines += [f"Dataset: `{self.dataset}`.", ""] if self.dataset else []
            # A model card may be published: an example of the data stays in the run's folder.
            shown = [line for line in self.data if "data:" in line or "tokens:" in line]
            lines += ["```", *shown, "```"] if shown else []
        if options := self._options():  # unknown of a folder that was saved beside its run
            lines += ["", "## Options", "", "| option | value |", "|---|---|"]
            lines += [f"| {name} | `{value}` |" for name, value in options.items()]
        return "\n".join(lines) + "\n"

    def _loading(self) -> list[str]:
        names = ("AutoPeftModelForCausalLM", "peft")
        if not self.adapter:
            names = ("AutoModelForCausalLM", "transformers")
        lines = [f"from {names[1]} import {names[0]}", "from transformers import AutoTokenizer", ""]
        lines.append(f'model = {names[0]}.from_pretrained("{self.name}")')
        return [*lines, f'tokenizer = AutoTokenizer.from_pretrained("{self.name}")']

    def _options(self) -> dict[str, Any]:
        known = describe(TrainingOptions)
        return {
            name: value
            for name, value in self.options.items()
            if name in ALWAYS
            or (name in known and name not in NOT_SHOWN and value != known[name].default)
        }


def write_card(folder: Path, card: Card) -> None:
    """Writes README.md, unless somebody else wrote the one that is there (PEFT's blank is none)."""
    path = folder / "README.md"
    try:
        if path.exists():
            text = path.read_text(encoding="utf-8", errors="replace")
            if MARK not in text and "[More Information Needed]" not in text:
                return
        path.write_text(card.text(), encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{str(path)!r} can't be written: {error.strerror}") from error


def _is_hub_name(name: str) -> bool:
    """`user/name`, and no folder of this machine: the hub refuses others, and paths are private."""
    return name.count("/") == 1 and name[0] not in "./~" and not Path(name).exists()
