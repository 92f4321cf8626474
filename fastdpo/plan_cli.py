"""`fastdpo plan CONFIG`: predicted memory and time of a run, before any weight is loaded.

Reads the options of `fastdpo train`, the model's config and, where one is named, the dataset's
lengths; needs neither weights nor a GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .errors import ConfigError, ModelError
from .model_config import ModelConfig
from .options import AUTO, Bound, Option, check, parse_bytes
from .plan_device import (
    Device,
    cpu_flops,
    known_device,
    nearest_in_memory,
    present_device,
    show_bytes,
)
from .script_arguments import ScriptArguments
from .training_options import PLANNED

if TYPE_CHECKING:
    from .config import DPOConfig
    from .data import TokenizedPairs
    from .plan import Job, Prediction

USAGE = """\
usage: fastdpo plan [CONFIG.yaml | recipe:NAME] [--gpu NAME] [--gpu_memory 24GiB] [--flops N]
                    [--option value …]

Predicts the peak memory and the time of a step, and chooses what is left on `auto`:
max_tokens_per_pack, gradient_checkpointing, activation_offloading, optim, base_precision,
logps_workspace_bytes. Needs no weights and no GPU; without a dataset_name every pair is taken to be
as long as max_length allows.

  --gpu NAME      a GPU of the table (H100, A100-40GB, L4, …): its memory and its rates
  --gpu_memory    the memory that the run may take, instead of that GPU's or this machine's; without
                  --gpu or a GPU here, its rates are those of the table's nearest in memory
  --flops         bf16 operations per second, for the time of a step, such as 3.1e14

The other options are those of `fastdpo train --help`. Order of sacrifice, where memory is short:
smaller packs, down to 4096 tokens; selective, then full checkpointing; activations on the host;
packs down to the longest pair; a smaller workspace. None of these changes a result. Then, where
they are on auto: 8-bit and paged optimizer states; the base in 8, then in 4 bits.
"""


def main(words: Sequence[str]) -> int:
    """Prints the plan; returns the exit status. Raises `FastDPOError`."""
    from .cli import build_configs, parse_arguments

    if {"-h", "--help"} & set(words):
        print(USAGE, end="")
        return 0
    words, own = _own_flags(list(words))
    values = parse_arguments(words)
    device = _device(own, values.get("gpu_memory"))
    bf16 = values.get("bf16")
    if device.cuda:  # the GPU may be elsewhere
        values.pop("bf16", None)
        values["use_cpu"] = not torch.cuda.is_available()
    script, model, args = build_configs(values, needs_dataset=False)
    computes_bf16 = device.cuda if bf16 is None else check(Option("bf16", (bool,)), bf16)
    job = job_of_config(script, model, args, device, computes_bf16)
    from .plan import Planner
    from .plan_choose import choose

    planner = Planner(job)
    prediction = choose(planner, device.memory)
    print("\n".join(table(job, prediction, planner.longest, model)))
    return 0


def _own_flags(words: list[str]) -> tuple[list[str], dict[str, str]]:
    """The words without `--gpu` and `--flops`, and the values of those."""
    own: dict[str, str] = {}
    rest: list[str] = []
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if name not in ("--gpu", "--flops"):
            rest.append(word)
            continue
        if not equals and (not words or words[0].startswith("--")):
            raise ConfigError(f"'{name}' expects a value, and nothing follows it")
        own[name[2:]] = value if equals else words.pop(0)
    return rest, own


def _device(own: dict[str, str], gpu_memory: Any) -> Device:
    if "gpu" in own:
        device = known_device(own["gpu"])
    elif torch.cuda.is_available():
        device = present_device(torch.device("cuda", torch.cuda.current_device()))
    elif gpu_memory is not None:
        device = Device("a GPU", True)
    else:
        device = present_device(torch.device("cpu"))
    if gpu_memory is not None:
        device = replace(device, memory=parse_bytes(str(gpu_memory)))
    if "flops" in own:
        flops = check(Option("--flops", (float,), bound=Bound(above=0)), own["flops"])
        return replace(device, flops=flops)
    if device.flops is not None:
        return device
    if not device.cuda:
        return replace(device, flops=cpu_flops())
    assert device.memory is not None
    like = nearest_in_memory(device.memory)
    name = f"{device.name}, taken to be as fast as the {like.name}"
    return replace(device, name=name, flops=like.flops, bandwidth=like.bandwidth)


def job_of_config(
    script: ScriptArguments, model: ModelConfig, args: DPOConfig, device: Device, bf16: bool
) -> Job:
    """What a plan needs to know, from the options alone. Raises `ModelError`, `DataError`."""
    from .objective import Objective
    from .plan import Job
    from .plan_replay import TwinSpec, build_twin, weight_bytes
    from .steps import Packer

    objective = Objective(args)
    config, adapter = _read_config(model, args)
    spec = TwinSpec(
        config,
        *_precision(model, config),
        adapter,
        *_bits(model),
        fp8=model.base_precision == "fp8",
        lean_lora=args.lean_lora,
    )
    kind, size = "adapters_off", 0
    if not objective.needs_reference:
        kind = "none"
    elif args.computes_reference_first:
        kind = "precomputed"
    elif model.ref_model_name_or_path is not None:
        other = _auto_config(model.ref_model_name_or_path, model.trust_remote_code)
        bits = 4 if model.ref_load_in_4bit else None
        ref = TwinSpec(other, spec.dtype, None, bits, model.use_bnb_nested_quant)
        kind, size = "model", sum(weight_bytes(build_twin(ref)))
    elif adapter is None or args.reference == "copy":
        kind, size = "copy", None if adapter is None else 0
    if adapter is not None and kind in ("adapters_off", "copy") and _is_adapter(model):
        kind, size = "adapter copy", weight_bytes(build_twin(spec))[1]
    pairs = _pairs(script, model, args, objective)
    return Job(
        spec=spec,
        args=args,
        pairs=pairs if pairs is not None else _assumed_pairs(args),
        device=device,
        bf16=bf16,
        packer=Packer(
            "shared" if args.packing_mode == "auto" else args.packing_mode, 1, torch.device("cpu")
        ).of_tokens(1, padded=args.compile == "layers"),
        reference=kind,
        reference_bytes=size,
        rows_are_real=pairs is not None,
        base_precision=AUTO if model.base_precision == AUTO else None,
        attention=args.attn_implementation or "sdpa",
    )


def _is_adapter(model: ModelConfig) -> bool:
    from .model import ADAPTER_CONFIG

    return (Path(model.model_name_or_path or "") / ADAPTER_CONFIG).is_file()


def _read_config(model: ModelConfig, args: DPOConfig) -> tuple[Any, Any]:
    """(the model's config, the adapter's or None); of an adapter's folder its base's."""
    from peft import PeftConfig

    from .adapters import lora_config

    name = model.model_name_or_path
    assert name is not None
    if not _is_adapter(model):
        return _auto_config(name, model.trust_remote_code), lora_config(model)
    adapter = PeftConfig.from_pretrained(name)
    adapter.inference_mode = False
    if not adapter.base_model_name_or_path:
        raise ModelError(f"{name!r} holds an adapter that names no base model to plan with")
    return _auto_config(adapter.base_model_name_or_path, model.trust_remote_code), adapter


def _auto_config(name: str, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    from .model import check_exists

    check_exists(name)
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"no config of model {name!r}: {str(error).strip().splitlines()[0]}"
        ) from error


def _precision(model: ModelConfig, config: Any) -> tuple[torch.dtype]:
    name = model.dtype
    if name in (None, "auto"):
        saved = getattr(config, "dtype", None)
        return (saved if isinstance(saved, torch.dtype) else torch.float32,)
    return (getattr(torch, str(name)),)


def _bits(model: ModelConfig) -> tuple[int | None, bool]:
    bits = 4 if model.load_in_4bit else 8 if model.load_in_8bit else None
    return bits, model.use_bnb_nested_quant


def _pairs(
    script: ScriptArguments, model: ModelConfig, args: DPOConfig, objective: Any
) -> TokenizedPairs | None:
    if script.dataset_name is None:
        return None
    from .data import load_dataset_split
    from .model import load_tokenizer
    from .run_data import tokenized

    logging.getLogger("fastdpo").setLevel(logging.WARNING)
    dataset = load_dataset_split(
        script.dataset_name, script.dataset_train_split, config=script.dataset_config
    )
    return tokenized(dataset, "train", objective, load_tokenizer(model))


def _assumed_pairs(args: DPOConfig) -> TokenizedPairs:
    """A step of pairs with a prompt of one token, and responses as long as `max_length` lets."""
    from .data import TokenizedPairs

    if args.max_length is None:
        raise ConfigError("a plan without dataset_name needs max_length: how long pairs may be")
    n = max(args.max_length - 1, 1)
    size = args.pairs_per_step // args.world_size
    ids = np.arange(size)  # prompts differ, so that nothing is shared
    return TokenizedPairs.from_lists(
        [[int(i)] for i in ids], [[1] * n for _ in ids], [[2] * n for _ in ids]
    )


# ---- what is printed ----------------------------------------------------------------------------


def table(
    job: Job, prediction: Prediction, longest: tuple[int, int], model: ModelConfig
) -> list[str]:
    """The plan, a line each kind of memory."""
    from .plan import ALLOWANCE

    choice, device = prediction.choice, job.device
    room = "no budget" if device.memory is None else show_bytes(device.memory)
    lines = [f"{model.model_name_or_path} on {device.name}, {room}", ""]
    rows = [
        *prediction.memory.items(),
        ("peak", prediction.peak),
        *([(ALLOWANCE, prediction.allowance)] if prediction.allowance else []),
        *([("total", prediction.total)] if prediction.allowance else []),
        *([("before step 1", prediction.making)] if prediction.making else []),
        *([("on the host", prediction.host_bytes)] if prediction.host_bytes else []),
    ]
    lines += [f"  {name:<26}{show_bytes(size):>12}" for name, size in rows]
    lines += ["", f"  reference: {job.reference}"]
    how: dict[bool | str, str] = {False: "none", True: "full", "selective": "selective"}
    chosen = {
        "max_tokens_per_pack": choice.max_tokens_per_pack,
        "gradient_checkpointing": how[choice.gradient_checkpointing],
        "activation_offloading": str(choice.activation_offloading).lower(),
        "optim": choice.optim,
        "base_precision": choice.base_precision or _given_precision(job),
        "logps_workspace_bytes": choice.logps_workspace_bytes,
    }
    auto = {name for name in PLANNED if getattr(job.args, name) == AUTO}
    auto |= {"base_precision"} if job.base_precision == AUTO else set()
    for name, value in chosen.items():
        lines.append(f"  {name}: {value}" + ("  # chosen" if name in auto else ""))
    row, tokens = longest
    of = f"row {row}" if job.rows_are_real else "assumed, at max_length"
    lines += [
        "",
        f"longest pair: {tokens} tokens ({of}); heaviest pack: {prediction.pack_tokens} tokens; "
        f"packs a step: up to {prediction.n_packs}",
    ]
    assert prediction.seconds is not None  # the command always has a rate
    lines.append(
        f"time per step: at least {prediction.seconds:.3g} s (a roofline: every operation at the "
        "device's full rate)"
    )
    return lines


def _given_precision(job: Job) -> str:
    bits = job.spec.bits
    if job.spec.fp8:
        return "fp8"
    return f"{bits}bit" if bits else str(job.spec.dtype).removeprefix("torch.")


def settle_precision(
    script: ScriptArguments, model: ModelConfig, args: DPOConfig
) -> TokenizedPairs | None:
    """Gives `base_precision: auto` its value before weights are loaded; returns the training
    pairs, tokenized on the way, or None where the value needed none of that.

    Without a GPU or gpu_memory there is no bound, and the base is bf16.
    """
    if model.base_precision != AUTO:
        return None
    from .plan import Planner
    from .plan_choose import choose

    device = present_device(args.device)
    memory = device.memory if args.gpu_memory is None else parse_bytes(args.gpu_memory)
    if memory is None:
        model.take_precision("bf16")
        return None
    job = job_of_config(script, model, args, device, bool(args.bf16))
    chosen = choose(Planner(job), memory).choice
    assert chosen.base_precision is not None
    model.take_precision(chosen.base_precision)
    return job.pairs
