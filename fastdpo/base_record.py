"""`base.json` beside a saved adapter: how the base under it was loaded, read off the model itself.

`adapter_config.json` names the base alone. Merging needs the very weights that the adapter was
trained over: of which revision, and rounded and quantized how.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import CheckpointError, ConfigError, MissingPackageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BASE_FILE = "base.json"


def record(base: PreTrainedModel) -> dict[str, Any]:
    """Plain values: the name, the hub's commit (None of a folder), the dtype that it was loaded in,
    transformers' quantization config (None where nothing is quantized), and "fp8" where its linear
    layers were turned into that (else None)."""
    from .fp8 import Fp8Linear

    quantization = getattr(base.config, "quantization_config", None)
    if quantization is not None and not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    dtype = base.config.dtype
    return {
        "base_model_name_or_path": base.config._name_or_path or None,
        "revision": getattr(base.config, "_commit_hash", None),
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "quantization_config": quantization,
        "base_precision": "fp8" if any(isinstance(m, Fp8Linear) for m in base.modules()) else None,
    }


def write(folder: Path, base: PreTrainedModel) -> None:
    """Into the folder that an adapter over `base` is saved in."""
    text = json.dumps(record(base), indent=2, default=str)
    (folder / BASE_FILE).write_text(text + "\n", encoding="utf-8")


def read(folder: Path) -> dict[str, Any] | None:
    """What `write` wrote there; None where nothing is (another library's, or an older fastdpo's).
    `base_precision` is None in older ones, which did not know of it.

    Raises `CheckpointError` where it can't be read.
    """
    path = folder / BASE_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        keys = {"base_model_name_or_path", "revision", "dtype", "quantization_config"}
        if not isinstance(found, dict) or not keys <= found.keys():
            raise ValueError(f"expected an object with {', '.join(sorted(keys))}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{str(path)!r}, which says how the base was loaded, can't be read ({error}); take it "
            "from a checkpoint of the same run, or delete it where the base was not quantized"
        ) from error
    return {"base_precision": None, **found}


def load_options(of: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `from_pretrained` that quantize the base again as it was; {} where it was
    not quantized.

    Raises `MissingPackageError` without the package that does it, `ConfigError` where transformers
    does not know the method.
    """
    if of["quantization_config"] is None:
        return {}
    from transformers.quantizers.auto import AutoQuantizationConfig

    method = of["quantization_config"].get("quant_method")
    try:
        if method == "bitsandbytes":
            import bitsandbytes  # noqa: F401  # pyright: ignore[reportMissingImports]
        quantization = AutoQuantizationConfig.from_dict(dict(of["quantization_config"]))
    except ImportError as error:
        extra = ": pip install 'fastdpo[qlora]'" if method == "bitsandbytes" else f" ({error})"
        raise MissingPackageError(
            f"the base was quantized by {method}, which is not installed here{extra}"
        ) from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"the base was quantized by {method!r}, in a way that this transformers can't do "
            f"again: {error}; use the version of the run"
        ) from error
    dtype = {} if of["dtype"] is None else {"dtype": of["dtype"]}
    return {"quantization_config": quantization, **dtype}
