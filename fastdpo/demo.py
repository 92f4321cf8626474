"""`fastdpo demo`: the main job on data and a model that come with the package, told to a person.

DPO with LoRA teaches a half-million-parameter Llama, pre-trained on mostly curt, rude and evasive
answers, to be courteous; scripts/make_demo_assets.py made both. The run is the trainer's own, with
the options below; what is here is measuring before and after, and printing.
"""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .help import CommandParser

if TYPE_CHECKING:
    from .metrics import PackStats
    from .trainer import DPOTrainer

ASSETS = Path(__file__).parent / "demo_assets"
OPTIONS: dict[str, Any] = {
    "model_name_or_path": str(ASSETS / "model"),
    "dataset_name": str(ASSETS / "data"),
    "use_peft": True,
    "lora_r": 16,
    "lora_alpha": 32,
    "beta": 0.3,
    "rpo_alpha": 1.0,  # pairs alone let the chosen answers' own log-probs fall, and facts with them
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "num_train_epochs": 3,
    "per_device_train_batch_size": 32,
    "group_by_prompt": True,
    "max_length": 256,
    "gradient_checkpointing": False,
    "eval_strategy": "steps",
    "eval_steps": 25,
    "per_device_eval_batch_size": 32,
    "save_strategy": "no",
    "logging_steps": 2,
    "logging_first_step": True,
    "seed": 0,
}
"""What `fastdpo train` would be given; the run's resolved_config.yaml repeats it."""


@dataclass(frozen=True)
class HeldOut:
    """On the held-out pairs: the share whose chosen response is the likelier of the two, and the
    share whose chosen response gained more on the reference than the rejected one."""

    chosen_likelier: float
    reward_accuracy: float


@dataclass(frozen=True)
class DemoResult:
    """What a demo run measured. generations: (question, answer before, answer after)."""

    output_dir: Path
    n_train_pairs: int
    n_held_out_pairs: int
    before: HeldOut
    after: HeldOut
    generations: tuple[tuple[str, str, str], ...]
    pack_stats: PackStats
    train_seconds: float


def main(argv: Sequence[str]) -> int:
    """Runs `fastdpo demo` with the arguments after that word; returns the exit status."""
    parser = CommandParser("demo", "--output_dir DIR", "Train on the built-in example.")
    parser.add_argument(
        "--output_dir",
        "--output-dir",
        help="a new folder; by default runs/demo, or runs/demo-2 and so on where that exists",
    )
    options = parser.parse_args(list(argv))
    print(_introduction())
    result = run_demo(Path(options.output_dir) if options.output_dir else _new_folder())
    print("\n".join(report_lines(result)))
    return 0


def _new_folder() -> Path:
    folder, n = Path("runs/demo"), 1
    while folder.exists():
        n += 1
        folder = Path(f"runs/demo-{n}")
    return folder


def _introduction() -> str:
    return textwrap.fill(
        "The clerk of an information desk, a Llama of half a million parameters, knows its facts "
        "and has bad manners: it was pre-trained on answers that are mostly curt, rude or evasive. "
        "DPO with LoRA now shows it pairs of a courteous answer and a bad one.",
        width=96,
    )


def run_demo(output_dir: Path, **overrides: Any) -> DemoResult:
    """Trains and measures; `overrides` replace entries of OPTIONS. Raises `FastDPOError`."""
    from .adapters import lora_config
    from .cli import build_configs, config_writer, show_progress
    from .data import load_dataset_split
    from .model import load_model, load_tokenizer
    from .run_folder import prepare_output_dir
    from .trainer import DPOTrainer

    show_progress(logging.INFO)
    script, model, args = build_configs({**OPTIONS, "output_dir": str(output_dir), **overrides})
    assert script.dataset_name is not None
    prepare_output_dir(output_dir, resuming=False, overwrite=False)  # says no before any work
    held_out = load_dataset_split(script.dataset_name, script.dataset_test_split)
    trainer = DPOTrainer(
        model=load_model(model, args),
        args=args,
        train_dataset=load_dataset_split(script.dataset_name, script.dataset_train_split),
        eval_dataset=held_out,
        processing_class=load_tokenizer(model),
        peft_config=lora_config(model),
        callbacks=[config_writer(script, model, args)],
    )
    questions = _one_question_per_topic(held_out, n=3)
    before, answers_before = _measure(trainer), [_answer(trainer, q) for q in questions]
    output = trainer.train()
    after, answers_after = _measure(trainer), [_answer(trainer, q) for q in questions]
    trainer.save_model()
    assert trainer.train_pairs is not None
    return DemoResult(
        output_dir=output_dir,
        n_train_pairs=len(trainer.train_pairs),
        n_held_out_pairs=len(held_out),
        before=before,
        after=after,
        generations=tuple(
            (question[-1]["content"], old, new)
            for question, old, new in zip(questions, answers_before, answers_after, strict=True)
        ),
        pack_stats=trainer.pack_stats,
        train_seconds=output.metrics["train_runtime"],
    )


def _one_question_per_topic(rows: Any, n: int) -> list[list[dict[str, str]]]:
    """The prompts of the first rows that are on n different topics."""
    first: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        first.setdefault(row["topic"], row["prompt"])
    return list(first.values())[:n]


def _measure(trainer: DPOTrainer) -> HeldOut:
    import numpy as np
    import torch

    from fastdpo_kernels import preference_loss

    from .reference_logps import evaluating

    (pairs,) = trainer.eval_pairs.values()
    n_likelier = 0
    with evaluating(trainer.model), torch.no_grad():
        for pack in trainer.packer.packs(pairs, np.arange(len(pairs))):
            token_logps = trainer.model(pack=pack).token_logps  # [N]
            # Rewards of beta 1 over a reference of 0 are the log-probs themselves.
            zeros = torch.zeros(len(pack.cu_responses) - 1, device=token_logps.device)
            logps = preference_loss(
                token_logps, pack.cu_responses, pack.pairs, ref_logps=zeros, beta=1.0
            )
            n_likelier += int((logps.chosen_rewards > logps.rejected_rewards).sum())
    accuracy = trainer.evaluate()["eval_rewards/accuracies"]
    return HeldOut(n_likelier / len(pairs), accuracy)


def _answer(trainer: DPOTrainer, messages: list[dict[str, str]]) -> str:
    """The likeliest answer, token by token."""
    import torch

    from .reference_logps import evaluating

    tokenizer: Any = trainer.processing_class
    model: Any = trainer.model
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(trainer.device)
    with evaluating(model), torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=48, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def report_lines(result: DemoResult) -> list[str]:
    """The demo's tables, as they are printed."""
    stats = result.pack_stats
    before, after = result.before, result.after
    lines = [
        "",
        f"On {result.n_held_out_pairs} held-out pairs, whose prompts were never seen"
        "            before   after",
        f"  chosen response is the likelier of the two{before.chosen_likelier:>25.3f}"
        f"{after.chosen_likelier:>8.3f}",
        f"  reward accuracy (0 while policy = reference){before.reward_accuracy:>23.3f}"
        f"{after.reward_accuracy:>8.3f}",
        "",
        *_side_by_side(result.generations),
        "",
        f"{stats.n_pairs:,} pairs in {result.train_seconds:.0f} s "
        f"({stats.n_pairs / result.train_seconds:.0f} pairs/s). Tokens computed:",
        f"  batches padded to their longest   {stats.n_tokens_padded:>10,}",
        f"  packs, each pair's prompt twice   {stats.n_tokens_unshared:>10,}"
        f"   {stats.n_tokens_padded / stats.n_tokens_unshared:>5.2f} x fewer",
        f"  packs with shared prompts (this)  {stats.n_tokens:>10,}"
        f"   {stats.n_tokens_padded / stats.n_tokens:>5.2f} x fewer",
        "",
        f"Written to {result.output_dir}:",
    ]
    return lines + [f"  {name:<28}{what}" for name, what in _files()]


def _files() -> list[tuple[str, str]]:
    from .run_folder import CONFIG_FILE, CURVES_FILE, METRICS_FILE

    return [
        ("adapter_model.safetensors", "the adapter; peft.PeftModel.from_pretrained loads it"),
        (CONFIG_FILE, "every option; `fastdpo train` on it repeats the run"),
        (METRICS_FILE, "the log, one JSON object a line"),
        (CURVES_FILE, "loss, rewards, accuracy and speed as a picture"),
    ]


def _side_by_side(generations: Sequence[tuple[str, str, str]], width: int = 31) -> list[str]:
    lines = [f"{'Asked (held out)':<{width}}  {'before':<{width}}  after"]
    for cells in generations:
        columns = [textwrap.wrap(cell, width) or ["(nothing)"] for cell in cells]
        for i in range(max(map(len, columns))):
            row = [column[i] if i < len(column) else "" for column in columns]
            lines.append("  ".join(f"{cell:<{width}}" for cell in row).rstrip())
    return lines
