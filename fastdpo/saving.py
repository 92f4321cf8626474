"""The result of a run as files: the adapter or the model, and the tokenizer.

What is needed to go on training is a checkpoint's affair (checkpoint.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from peft import PeftModel
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import base_record
from .config import to_plain
from .config_files import read_yaml
from .errors import CheckpointError
from .export import of_evaluation
from .model import base_model
from .model_card import Card
from .run_folder import CONFIG_FILE

if TYPE_CHECKING:
    from .trainer_interface import TrainerInterface


def save_model(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path
) -> None:
    """Writes the active adapter (PEFT's format) and how its base was loaded, or the model
    (transformers'), and the tokenizer.

    Raises `CheckpointError` where the folder can't be written.
    """
    try:
        if isinstance(model, PeftModel):
            model.save_pretrained(str(folder), selected_adapters=model.active_adapters)
            base_record.write(folder, base_model(model))
        else:
            model.save_pretrained(str(folder))
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"the model could not be saved in {str(folder)!r}: {error}"
        ) from error


def card_of(
    trainer: TrainerInterface, name: str, dataset: str | None = None, tags: Iterable[str] = ()
) -> Card:
    """The model card of a trainer's result, called `name`."""
    config = trainer.output_dir / CONFIG_FILE
    resolved = read_yaml(config) if config.is_file() else {}  # the command line's, with the data
    evaluated = [log for log in trainer.state.log_history if "eval_loss" in log]
    return Card(
        name,
        base_model=base_model(trainer.model).config._name_or_path,
        adapter=isinstance(trainer.model, PeftModel),
        options=to_plain(trainer.args),
        metrics=of_evaluation(evaluated[-1]) if evaluated else {},
        data=[line for lines in trainer.data_reports.values() for line in lines],
        dataset=dataset or resolved.get("dataset_name"),
        tags=tags,
    )
