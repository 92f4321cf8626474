"""The result of a run as files: the adapter or the model, and the tokenizer.

What is needed to go on training is a checkpoint's affair (checkpoint.py).
"""

from pathlib import Path

from peft import PeftModel
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .errors import CheckpointError


def save_model(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path
) -> None:
    """Writes the active adapter (PEFT's format) or the model (transformers'), and the tokenizer.

    Raises `CheckpointError` where the folder can't be written.
    """
    try:
        if isinstance(model, PeftModel):
            model.save_pretrained(str(folder), selected_adapters=model.active_adapters)
        else:
            model.save_pretrained(str(folder))
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"the model could not be saved in {str(folder)!r}: {error}"
        ) from error
