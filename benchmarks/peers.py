"""Whole trainers under one roof: fastdpo, TRL and Unsloth, built and run as their users do it.

Each gets the same model, pairs, order, optimizer and number of steps. "-best" is each with the
reference precomputed and activations kept; TRL's also sorts by length and takes large batches,
flash-attention and Liger's layers where they can be had. An absent peer is named, not faked, and so
is what a peer lacks of its best.
"""

import gc
import importlib.util
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from peft import LoraConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from .harness import synchronize
from .workloads import LORA_RANK


@dataclass(frozen=True)
class Job:
    """What every trainer is asked to do: two epochs over `rows`, in their order.

    The first epoch warms up (compilation, caches, allocator); the second is timed, so that all
    trainers are timed on the same pairs whatever order they take them in. `epochs=1`: no warm-up.
    """

    rows: list[dict]
    pairs_per_step: int
    max_length: int
    lora: bool
    bf16: bool
    device: torch.device
    epochs: int = 2
    micro_batch: int = 8  # pairs in a forward pass of a padding trainer; TRL's default
    gradient_checkpointing: bool = True
    max_tokens_per_pack: int | None = None  # fastdpo's alone; None: its default

    @property
    def steps_per_epoch(self) -> int:
        return len(self.rows) // self.pairs_per_step


@dataclass(frozen=True)
class Timing:
    """Seconds and counts of one run; `seconds` and `tokens` are those of the timed epoch."""

    construction_seconds: float
    training_seconds: float
    seconds: float
    cpu_seconds: float  # of all threads, construction and training: what a busy machine can't blur
    tokens: int  # that the trainer computed, padding and repetition included
    peak_bytes: int | None  # beyond what was allocated before the trainer; None on CPU
    first_loss: float
    last_loss: float


TIMED = tuple(field.name for field in fields(Timing))


class StepClock(TrainerCallback):
    """Waits for the device after step `start` and after step `end` and reads the clock."""

    def __init__(self, device: torch.device, start: int, end: int):
        self.device, self.start, self.end = device, start, end
        self.started = self.finished = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        if self.start == 0:
            self.started = self._read()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.start:
            self.started = self._read()
        if state.global_step == self.end:
            self.finished = self._read()

    def _read(self) -> float:
        synchronize(self.device)
        return time.perf_counter()


def _options(job: Job, folder: str) -> dict[str, Any]:
    """What both trainers are told, in the names they share."""
    n_steps = job.epochs * job.steps_per_epoch
    return {
        "output_dir": folder,
        "max_steps": n_steps,
        "per_device_train_batch_size": job.pairs_per_step,
        "max_length": job.max_length,
        "learning_rate": 1e-5,
        "train_sampling_strategy": "sequential",
        "bf16": job.bf16,
        "gradient_checkpointing": job.gradient_checkpointing,
        "use_cpu": job.device.type == "cpu",
        "logging_steps": job.steps_per_epoch,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def _fastdpo(job: Job, options: dict[str, Any]) -> tuple[type, Any, Any]:
    from fastdpo import DPOConfig, DPOTrainer, TokenizedPairs

    dataset: Any = job.rows
    if "prompt_ids" in job.rows[0]:
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        dataset = TokenizedPairs.from_lists(*([row[name] for row in job.rows] for name in names))
    if job.max_tokens_per_pack is not None:
        options["max_tokens_per_pack"] = job.max_tokens_per_pack
    return DPOTrainer, DPOConfig(**options), dataset


def _fastdpo_best(job: Job, options: dict[str, Any]) -> tuple[type, Any, Any]:
    options |= {"gradient_checkpointing": False, "precompute_ref_log_probs": True}
    return _fastdpo(job, options)


def _fastdpo_compiled(job: Job, options: dict[str, Any]) -> tuple[type, Any, Any]:
    return _fastdpo(job, options | {"compile": "layers"})


def _fastdpo_liger(job: Job, options: dict[str, Any]) -> tuple[type, Any, Any]:
    return _fastdpo(job, options | {"use_liger_kernel": True})


def _fastdpo_graphs(job: Job, options: dict[str, Any]) -> tuple[type, Any, Any]:
    options |= {"compile": "layers", "cuda_graphs": True, "gradient_checkpointing": False}
    return _fastdpo(job, options)


def _trl(job: Job, options: dict[str, Any]) -> tuple[type, Any, Any]:
    from datasets import Dataset
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    class Counting(DPOTrainer):
        """TRL's trainer, counting the tokens it computes; pairs of token ids pass as they are."""

        n_tokens = 0

        def _prepare_dataset(self, dataset, *args, **kwargs):
            if "prompt_ids" in dataset.column_names:
                return dataset
            return super()._prepare_dataset(dataset, *args, **kwargs)

        def compute_loss(self, model, inputs, *args, **kwargs):
            self.n_tokens += inputs["input_ids"].numel()
            return super().compute_loss(model, inputs, *args, **kwargs)

    micro_batch = min(job.micro_batch, job.pairs_per_step)
    options |= {
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": job.pairs_per_step // micro_batch,
    }
    return Counting, DPOConfig(**options), Dataset.from_list(job.rows)


def _trl_best(job: Job, options: dict[str, Any]) -> tuple[type, Any, Any]:
    options |= {
        "precompute_ref_log_probs": True,
        "train_sampling_strategy": "group_by_length",
        "remove_unused_columns": False,  # it would remove `length` before the sampler reads it
        "use_liger_kernel": _liger_missing(job.device) is None,
    }
    if "length" not in job.rows[0]:  # of text, by its characters: for the order alone
        rows = [
            row | {"length": len(row["prompt"]) + max(len(row["chosen"]), len(row["rejected"]))}
            for row in job.rows
        ]
        job = replace(job, rows=rows)
    return _trl(job, options)


TRAINERS: dict[str, Callable[[Job, dict[str, Any]], tuple[type, Any, Any]]] = {
    "fastdpo": _fastdpo,
    "fastdpo-best": _fastdpo_best,
    "fastdpo-compiled": _fastdpo_compiled,
    "fastdpo-liger": _fastdpo_liger,
    "fastdpo-graphs": _fastdpo_graphs,
    "trl": _trl,
    "trl-best": _trl_best,
    "unsloth": _trl,  # it replaces TRL's classes when it is imported
}


def settings(trainer: str, pairs_per_step: int) -> list[dict[str, Any]]:
    """What to try one after the other while memory runs out: the fields of `Job` to replace."""
    if trainer != "trl-best":
        return [{}]
    quarter, less = max(pairs_per_step // 4, 1), max(pairs_per_step // 16, 1)
    return [
        {"micro_batch": quarter, "gradient_checkpointing": False},
        {"micro_batch": less, "gradient_checkpointing": False},
        {"micro_batch": quarter, "gradient_checkpointing": True},
    ]


def precomputes_reference(trainer: str) -> bool:
    return trainer.endswith("-best")


def absent(trainer: str) -> str | None:
    """Why `trainer` can't run here, or None."""
    needed = ("trl", "datasets") if trainer.startswith("trl") else ()
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    return f"{', '.join(missing)} not installed" if missing else None


def layers_absent(trainer: str, device: torch.device, tuning: str) -> str | None:
    """Why fastdpo can't have these layers here, or None."""
    if trainer == "fastdpo-liger":
        return _liger_missing(device)
    if tuning == "qlora":
        return "fastdpo doesn't compile quantized layers"
    return "needs a GPU" if trainer == "fastdpo-graphs" and device.type != "cuda" else None


def unsloth_absent(device: torch.device, tuning: str, python: str | None) -> str | None:
    """Why Unsloth can't run here, or None; nothing of it is imported."""
    if tuning == "full":
        return "Unsloth's DPO trains adapters: no full fine-tuning beside a reference"
    if device.type != "cuda":
        return "Unsloth needs a GPU"
    if python is None and importlib.util.find_spec("unsloth") is None:
        return "unsloth not installed; --unsloth-python names a Python that has it"
    return None


def without(trainer: str, device: torch.device) -> list[str]:
    """What a peer at its best lacks here, each with the reason."""
    if trainer != "trl-best":
        return []
    missing = {"Liger's layers": _liger_missing(device), "flash-attention": _flash_missing(device)}
    # TRL 1.16 warns and pads all the same where padding_free is asked for.
    known = ["padding-free batches (TRL has switched them off)"]
    return known + [f"{part} ({reason})" for part, reason in missing.items() if reason]


def rewrites_transformers(trainer: str, device: torch.device) -> bool:
    """Whether running `trainer` changes classes that the trainers after it would use."""
    with_liger = trainer in ("trl-best", "fastdpo-liger") and _liger_missing(device) is None
    return trainer == "unsloth" or with_liger


def _liger_missing(device: torch.device) -> str | None:
    return _missing("liger_kernel", device)


def _flash_missing(device: torch.device) -> str | None:
    return _missing("flash_attn", device)


def _missing(package: str, device: torch.device) -> str | None:
    if importlib.util.find_spec(package) is None:
        return f"{package} not installed"
    return None if device.type == "cuda" else "needs a GPU"


def unsloth_model(
    folder: str, job: Job, *, bits4: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model saved in `folder`, loaded by Unsloth; in a process that imported it first."""
    from unsloth import FastLanguageModel  # pyright: ignore[reportMissingImports]

    return FastLanguageModel.from_pretrained(
        folder,
        max_seq_length=job.max_length,
        dtype=torch.bfloat16 if job.bf16 else torch.float32,
        load_in_4bit=bits4,
        fix_tokenizer=False,  # there is no text
        use_exact_model_name=True,  # a folder, not a name to be looked up
    )


def _unsloth_adapters(model: PreTrainedModel) -> PreTrainedModel:
    from unsloth import FastLanguageModel  # pyright: ignore[reportMissingImports]

    return FastLanguageModel.get_peft_model(
        model,
        r=LORA_RANK,
        lora_alpha=2 * LORA_RANK,
        lora_dropout=0,
        bias="none",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
                        "down_proj"],
        use_gradient_checkpointing="unsloth",
        random_state=0,
    )  # fmt: skip


def run(
    trainer: str,
    job: Job,
    model: PreTrainedModel,
    ref_model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Timing:
    """Builds `trainer` around the loaded models and trains; both are timed.

    Full fine-tuning passes `ref_model`; with LoRA the reference is the model without adapters.
    """
    device = job.device
    with tempfile.TemporaryDirectory() as folder:
        trainer_class, config, dataset = TRAINERS[trainer](job, _options(job, folder))
        if trainer == "trl-best" and _flash_missing(device) is None:
            model.set_attn_implementation("flash_attention_2")
        torch._dynamo.reset()  # another trainer's graphs would count towards its limit
        lora = LoraConfig(
            task_type="CAUSAL_LM",
            r=LORA_RANK,
            lora_alpha=2 * LORA_RANK,
            target_modules="all-linear",
        )
        end = job.epochs * job.steps_per_epoch
        clock = StepClock(device, end - job.steps_per_epoch, end)
        gc.collect()
        before = _reset_memory(device)
        started, cpu_started = time.perf_counter(), time.process_time()
        if trainer == "unsloth":
            model = _unsloth_adapters(model)
        made = trainer_class(
            model=model,
            ref_model=ref_model,
            args=config,
            train_dataset=dataset,
            processing_class=tokenizer,
            peft_config=lora if job.lora and trainer != "unsloth" else None,
            callbacks=[clock, *callbacks],
        )
        synchronize(device)
        built = time.perf_counter()
        made.train()
        synchronize(device)
        finished, cpu_finished = time.perf_counter(), time.process_time()
        logs = [log for log in made.state.log_history if "loss" in log]
        ours = trainer.startswith("fastdpo")
        tokens = made.pack_stats.n_tokens if ours else made.n_tokens
        return Timing(
            construction_seconds=built - started,
            training_seconds=finished - built,
            seconds=clock.finished - clock.started,
            cpu_seconds=cpu_finished - cpu_started,
            tokens=tokens // job.epochs,
            peak_bytes=_peak_memory(device, before),
            first_loss=float(logs[0]["loss"]),
            last_loss=float(logs[-1]["loss"]),
        )


def _reset_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak_memory(device: torch.device, before: int) -> int | None:
    return torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None
