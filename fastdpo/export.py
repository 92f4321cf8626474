"""`fastdpo export RUN -o FOLDER [--merge] [--dtype T] [--push_to_hub NAME]`: a result to hand on.

Without --merge what the run saved is copied: an adapter stays an adapter. With it, the adapter is
added to its base's weights in fp32 and rounded once; a quantized base is unpacked first, so that
the result is the model that was trained. Nothing is trained.
"""

import dataclasses
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import base_record
from .config_files import read_yaml
from .errors import CheckpointError, ConfigError, ModelError
from .help import CommandParser
from .model_card import Card, write_card
from .run_folder import CONFIG_FILE, METRICS_FILE, RESULT_FILES, checkpoints

logger = logging.getLogger(__name__)

DTYPES = ("auto", "bfloat16", "float16", "float32")


def main(argv: Sequence[str]) -> int:
    """Runs `fastdpo export` with the arguments after that word; returns the exit status."""
    takes = "RUN -o FOLDER [--merge] [--dtype T] [--push_to_hub NAME] [--private]"
    parser = CommandParser(
        "export", takes, "A result to hand on. " + str(__doc__).partition("\n\n")[2]
    )
    parser.add_argument("run", metavar="RUN", help="a training's output_dir, or a checkpoint in it")
    parser.add_argument("-o", "--output", required=True, help="a new folder")
    parser.add_argument("--merge", action="store_true", help="add the adapter to its base")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the weights; by default as the base's are saved"
    )
    parser.add_argument("--push_to_hub", metavar="NAME", help="upload FOLDER as this model")
    parser.add_argument("--private", action="store_true", help="as a private one")
    options = parser.parse_args(list(argv))
    if options.private and not options.push_to_hub:
        raise ConfigError("export: --private is about --push_to_hub NAME; give both or neither")
    if options.push_to_hub:
        from .hub import check_can_push

        check_can_push()
    output = Path(options.output)
    export(Path(options.run), output, merge=options.merge, dtype=options.dtype)
    is_adapter = (output / "adapter_config.json").is_file()
    print(f"{output}  the {'adapter' if is_adapter else 'model'} and the tokenizer")
    if options.push_to_hub:
        from .hub import push_folder

        address = push_folder(
            output,
            options.push_to_hub,
            private=options.private or None,
            revision=None,
            message="Upload by fastdpo export",
        )
        print(address)
    return 0


def export(run: Path, output: Path, *, merge: bool, dtype: str | None) -> None:
    """Writes what `run` saved into the new folder `output`.

    Raises `CheckpointError` where there is nothing to export or no place for it, `ModelError`
    where the adapter can't be merged, `ConfigError` for options that don't go together.
    """
    is_adapter = (run / "adapter_model.safetensors").is_file()
    if not is_adapter and not any(run.glob("model*.safetensors")):
        hint = f"; export {checkpoints(run)[-1]}" if checkpoints(run) else ""
        what = "holds no saved model or adapter" if run.is_dir() else "does not exist"
        raise CheckpointError(f"run {str(run)!r} {what}{hint}")
    if merge and not is_adapter:
        raise ConfigError(
            f"--merge adds an adapter to its base, and {str(run)!r} holds a whole model; leave it "
            "out"
        )
    if dtype is not None and is_adapter and not merge:
        raise ConfigError("--dtype is about a whole model; add --merge, or leave it out")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{str(output)!r} exists; choose a new folder")
    options = _options_of(run)
    base = _base_name(run, options) if is_adapter else str(options.get("model_name_or_path") or "")
    try:
        if merge:
            _save_merged(run, base, output, dtype, options)
        elif dtype is not None:
            _save_cast(run, output, dtype)
        output.mkdir(parents=True, exist_ok=True)
        for path in run.iterdir():
            if not RESULT_FILES.fullmatch(path.name) or (output / path.name).exists():
                continue
            is_weights = path.name.startswith(("adapter_", "model"))
            is_weights |= path.name in ("config.json", base_record.BASE_FILE)
            if not (is_weights and (merge or dtype is not None)):
                shutil.copy2(path, output / path.name)
    except OSError as error:
        shutil.rmtree(output, ignore_errors=True)
        raise CheckpointError(f"{str(output)!r} can't be written: {error}") from error
    write_card(output, _card(run, output.name, base, options, adapter=is_adapter and not merge))


def _save_merged(
    run: Path, base: str, output: Path, dtype: str | None, options: dict[str, Any]
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoConfig

    from .model import load_pretrained

    recorded = base_record.read(run)
    load = _load_options(run, base, options, recorded)
    saved = AutoConfig.from_pretrained(base, **load)
    if "fp8" in (options.get("base_precision"), (recorded or {}).get("base_precision")):
        raise ModelError(
            "the adapter was trained on a base in 8-bit floats (base_precision: fp8), whose scales "
            "are the run's own, so nothing is left to merge into; export without --merge"
        )
    if recorded is None and "model_name_or_path" not in options:
        logger.warning(
            "export: %r holds no %s, so there is no record of how its base was loaded; the adapter "
            "goes into the weights as %s has them",
            str(run),
            base_record.BASE_FILE,
            base,
        )
    if getattr(saved, "quantization_config", None) is None:  # else as it is saved
        quantized = _quantized(options) if recorded is None else base_record.load_options(recorded)
        load |= quantized or {"dtype": "float32"}
    model: Any = load_pretrained(base, torch.device("cpu"), **load)
    if getattr(model, "hf_quantizer", None) is not None:
        model = _dequantized(model)
    model = PeftModel.from_pretrained(model, str(run)).merge_and_unload(safe_merge=True)
    wanted = saved.dtype if dtype in (None, "auto") else getattr(torch, dtype)
    model.to(wanted or torch.float32).save_pretrained(str(output))


def _load_options(
    run: Path, base: str, options: dict[str, Any], recorded: dict[str, Any] | None
) -> dict[str, Any]:
    """Which revision of `base` the adapter was trained on, and whether its code may run."""
    revision = None
    if recorded is not None and recorded["base_model_name_or_path"] == base:
        revision = recorded["revision"]
    if revision is None:
        adapter = json.loads((run / "adapter_config.json").read_text(encoding="utf-8"))
        revision = adapter.get("revision")
    if revision is None and options.get("model_name_or_path") in (None, base):
        init = options.get("model_init_kwargs") or {}
        revision = init.get("revision") or options.get("model_revision")
    trusted = bool(options.get("trust_remote_code"))
    return {"revision": revision or "main", "trust_remote_code": trusted}


def _quantized(options: dict[str, Any]) -> dict[str, Any]:
    """How the run with these `options` had its base quantized, for runs without `base.json`; {}
    where it did not.

    Raises `MissingPackageError` without bitsandbytes.
    """
    from .model import quantization_config
    from .model_config import ModelConfig

    names = {f.name for f in dataclasses.fields(ModelConfig)}
    config = ModelConfig(**{name: value for name, value in options.items() if name in names})
    quantization = quantization_config(config)
    if quantization is None:
        return {}
    dtype = {} if config.dtype is None else {"dtype": config.dtype}
    return {"quantization_config": quantization, **dtype}


def _dequantized(model: Any) -> Any:
    """`model` with the weights that its quantized ones stand for, in fp32: what the adapter was
    trained on."""
    import torch

    try:
        return model.dequantize(dtype=torch.float32).float()
    except (NotImplementedError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"the base's quantized weights can't be unpacked here: {' '.join(str(error).split())}; "
            "export without --merge and load the adapter over the quantized base"
        ) from error


def _save_cast(run: Path, output: Path, dtype: str) -> None:
    import torch

    from .model import load_pretrained

    model: Any = load_pretrained(str(run), torch.device("cpu"), dtype=dtype)
    model.save_pretrained(str(output))


def _base_name(run: Path, options: dict[str, Any]) -> str:
    config = json.loads((run / "adapter_config.json").read_text(encoding="utf-8"))
    base = config.get("base_model_name_or_path") or options.get("model_name_or_path")
    if not base:
        raise ModelError(
            f"{str(run / 'adapter_config.json')!r} names no base model; write its name there as "
            "base_model_name_or_path"
        )
    return str(base)


def _options_of(run: Path) -> dict[str, Any]:
    """Those of the run that `run` is, or is a checkpoint of; {} where they are gone."""
    for folder in (run, run.parent):
        if (folder / CONFIG_FILE).is_file():
            return read_yaml(folder / CONFIG_FILE)
    return {}


def _card(run: Path, name: str, base: str, options: dict[str, Any], *, adapter: bool) -> Card:
    from .report import read_metrics

    metrics = {}
    for folder in (run, run.parent):
        if (folder / METRICS_FILE).is_file():
            evaluated = [log for log in read_metrics(folder / METRICS_FILE) if "eval_loss" in log]
            if evaluated:
                metrics = of_evaluation(evaluated[-1])
            break
    dataset = options.get("dataset_name")
    return Card(name, base, adapter, options, metrics, [], dataset)


def of_evaluation(log: dict[str, Any]) -> dict[str, float]:
    """The metrics of an evaluation without its times."""
    return {
        key: value
        for key, value in log.items()
        if key.startswith("eval_") and not key.endswith(("_runtime", "_per_second"))
    }
