"""ScriptArguments: which dataset, and which of its splits; TRL's names and defaults.

What does not stand here is refused by name (option_names.py). The standard library alone: see
options.py.
"""

from dataclasses import dataclass

from .option_names import settle
from .options import check_fields, checked_init, option


@checked_init(settle)
@dataclass
class ScriptArguments:
    """Which dataset; TRL's ScriptArguments."""

    dataset_name: str | None = option(
        None, "A file (.jsonl, .jsonl.gz, .parquet, .csv), a folder, or a dataset of the hub."
    )
    dataset_config: str | None = option(None, "Configuration of a hub dataset.")
    dataset_train_split: str = option("train", "Split to train on.")
    dataset_test_split: str = option(
        "test", "Split to evaluate on, read where eval_strategy or eval_on_start asks for it."
    )

    def __post_init__(self) -> None:
        check_fields(self, ScriptArguments)
