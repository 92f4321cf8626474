"""What a checkpoint takes from a trainer between two steps, and how it is put back, bit for bit.

How a checkpoint lies on disk is checkpoint.py's affair.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerState
from transformers.trainer_callback import ExportableState

from . import __version__, saving
from . import checkpoint as ckpt
from .errors import CheckpointError
from .interrupts import Interrupted
from .metrics import PackStats
from .model import load_weights, model_identity
from .nonfinite import refuse_nonfinite
from .options import default_of
from .reference_sync import load_reference_state, reference_state
from .run_folder import SAMPLES_FILE, prepare_output_dir, tidy
from .runtime import sum_over_ranks, wait_for_ranks
from .samples import SamplesFile
from .training_options import TrainingOptions

if TYPE_CHECKING:
    from .trainer import DPOTrainer

logger = logging.getLogger(__name__)

WEIGHTS = "base and reference weights"


def identity(trainer: DPOTrainer) -> dict[str, Any]:
    """What a checkpoint belongs to: options that shape the run, the data, the reference."""
    assert trainer.train_pairs is not None
    return {
        **trainer.args.identity(),
        **model_identity(trainer.model),
        "train_dataset": ckpt.fingerprint(trainer.train_pairs),
        "reference model": trainer._reference_name,
        WEIGHTS: trainer.frozen_weights,
        "world_size": trainer.args.world_size,
    }


def newer_keys(current: dict[str, Any]) -> list[str]:
    """Those of `current` that the checkpoint of an earlier fastdpo or PEFT may lack and be this
    run's all the same: what an option or a setting of the adapter does at its default, which is
    what was done before there was one, and a hash that was not taken yet."""
    defaults = {f.name: default_of(f) for f in fields(TrainingOptions)}
    return [
        key
        for key, value in current.items()
        if key == WEIGHTS
        or (key in defaults and value == defaults[key])
        or (key.startswith("adapter ") and not value)
    ]


def take(trainer: DPOTrainer) -> ckpt.ResumeState:
    """The trainer's state; counts and sums are those of all ranks. Every rank takes part."""
    assert trainer.optimizer is not None and trainer.lr_scheduler is not None
    args = trainer.args
    moving = args.sync_ref_model and not args.save_only_model
    if moving:
        assert trainer.live_reference is not None
    state: Any = trainer.state  # whose annotation of stateful_callbacks is not what it holds
    state.stateful_callbacks = {
        type(stateful).__name__: stateful.state() for stateful in _stateful(trainer)
    }
    return ckpt.ResumeState(
        trainer_state=trainer.state,
        optimizer={} if args.save_only_model else trainer.optimizer.state_dict(),
        scheduler=trainer.lr_scheduler.state_dict(),
        rng=ckpt.rng_state(),
        sums={
            "metrics": sum_over_ranks(trainer.metrics.sums.clone()).cpu(),
            "packs": asdict(trainer.run_log.packs_of_all_ranks()),
            "place": trainer.next_place(),
            "skipped steps": trainer.guard.n_bad,
        },
        identity=identity(trainer),
        reference=reference_state(trainer.live_reference)
        if moving and trainer.live_reference is not None
        else None,
    )


def put_back(trainer: DPOTrainer, found: list[Path]) -> None:
    """Makes the trainer what it was when it wrote the first whole checkpoint of `found`.

    Raises `CheckpointError` where the checkpoint is another run's, or was not written to resume.
    """
    assert trainer.optimizer is not None and trainer.lr_scheduler is not None
    folder, saved = ckpt.load_newest(found)
    current = identity(trainer)
    ckpt.check_identity(saved, current, folder, newer_keys(current))
    if not saved.optimizer:
        raise CheckpointError(
            f"checkpoint {str(folder)!r} was written with save_only_model, so it has no "
            "optimizer to resume; start afresh with it as the model"
        )
    sums = _sums(saved, trainer, folder)
    try:
        load_weights(trainer.model, folder)
        if saved.reference is not None:
            assert trainer.live_reference is not None
            load_reference_state(trainer.live_reference, saved.reference)
        trainer.optimizer.load_state_dict(saved.optimizer)
        trainer.lr_scheduler.load_state_dict(saved.scheduler)
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"checkpoint {str(folder)!r} does not fit this model or optimizer: {error}"
        ) from error
    trainer.state = _fitted(saved.trainer_state, trainer)
    trainer.place, trainer.guard.n_bad = sums.place, sums.skipped
    states: Any = trainer.state.stateful_callbacks or {}
    for stateful in _stateful(trainer):
        for name, value in states.get(type(stateful).__name__, {}).get("attributes", {}).items():
            setattr(stateful, name, value)
    if trainer.state.is_world_process_zero:  # which holds the sums of all ranks
        trainer.metrics.sums.copy_(sums.metrics)
        trainer.run_log.packs = sums.packs
        if trainer.metrics_file is not None:
            trainer.metrics_file.rewrite(trainer.state.log_history)
        SamplesFile(trainer.output_dir / SAMPLES_FILE).keep_until(trainer.state.global_step)
    ckpt.set_rng_state(saved.rng)
    logger.info("resumed from %s, at step %d", folder, trainer.state.global_step)


@dataclass(frozen=True)
class _Sums:
    """What a run had counted, as `take` wrote it."""

    place: tuple[int, int]
    skipped: int
    metrics: torch.Tensor
    packs: PackStats


def _sums(saved: ckpt.ResumeState, trainer: DPOTrainer, folder: Path) -> _Sums:
    """Those of `saved`, before anything of the trainer is changed; `CheckpointError` where they
    are not what this fastdpo counts."""
    now = trainer.metrics.sums.shape
    try:
        of = saved.sums
        (epoch, done), metrics = of["place"], of["metrics"]
        sums = _Sums((epoch, done), of["skipped steps"], metrics, PackStats(**of["packs"]))
        if metrics.shape != now:
            raise ValueError(f"{metrics.shape[1]} sums of metrics, {now[1]} now")
    except (KeyError, TypeError, ValueError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else error
        raise CheckpointError(
            f"checkpoint {str(folder)!r} of fastdpo {saved.written_by} counts otherwise than this "
            f"run under {__version__} ({what}); set log_token_stats as it was, resume under that "
            "version, or start afresh in another output_dir with the checkpoint as the model"
        ) from error
    return sums


def _fitted(state: TrainerState, trainer: DPOTrainer) -> TrainerState:
    """The saved state, with what this process decides: its rank, and how often it logs."""
    args = trainer.args
    state.compute_steps(args, trainer.plan.max_steps)
    state.is_world_process_zero = args.process_index == 0
    state.is_local_process_zero = args.local_process_index == 0
    return state


def _stateful(trainer: DPOTrainer) -> Iterable[ExportableState]:
    """The callbacks that have a state of their own (early stopping's patience)."""
    found = trainer.callback_handler.callbacks
    return (callback for callback in found if isinstance(callback, ExportableState))


def open_folder(trainer: DPOTrainer, asked: str | bool | None) -> list[Path]:
    """Makes the folder ready; the checkpoints to resume from, the first choice first."""
    if trainer.args.process_index == 0:
        tidy(trainer.output_dir)
    wait_for_ranks()
    found = ckpt.candidates(trainer.output_dir, asked) if asked else []
    if asked and not found:
        logger.info("%s holds no checkpoint: the run begins from the start", trainer.output_dir)
    if trainer.args.process_index == 0:
        prepare_output_dir(
            trainer.output_dir,
            resuming=bool(found),
            overwrite=trainer.args.overwrite_output_dir,
            restarting=bool(asked),
        )
    return found


def save(trainer: DPOTrainer) -> None:
    """Writes a checkpoint of the step that is done, once, and rotates the older ones."""
    folder = trainer.output_dir / f"checkpoint-{trainer.state.global_step}"
    if trainer.state.best_global_step == trainer.state.global_step:
        trainer.state.best_model_checkpoint = str(folder)
    if trainer._saved_step == trainer.state.global_step:  # at a step's end, and again at the run's
        return
    trainer._saved_step = trainer.state.global_step
    refuse_nonfinite(trainer)
    state = take(trainer)
    if trainer.state.is_world_process_zero:
        save = functools.partial(saving.save_model, trainer.model, trainer.processing_class)
        ckpt.save_checkpoint(folder, state, save)
        best = trainer.state.best_model_checkpoint
        limit = trainer.args.save_total_limit
        ckpt.rotate(trainer.output_dir, limit, folder, Path(best) if best else None)
    trainer.control = trainer._event("on_save")


def end_if_asked(trainer: DPOTrainer, signal_number: int) -> None:
    """Saves and raises `Interrupted` where a signal asked for it."""
    if not signal_number:
        return
    save(trainer)
    trainer.control = trainer._event("on_train_end")
    wait_for_ranks()  # a launcher ends the others as soon as one rank ends, the one that saves too
    way = "resume_from_checkpoint 'auto' goes on from there"
    if trainer.args.save_only_model:
        way = "save_only_model left out what a resume needs"
    step = trainer.state.global_step
    raise Interrupted(
        signal_number, f"stopped after step {step}; {trainer.output_dir}/checkpoint-{step}: {way}"
    )
