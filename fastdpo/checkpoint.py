"""Checkpoints: written whole or not at all, and found whole or passed over.

A checkpoint is a folder `checkpoint-STEP`: the model or adapter in its library's own format, and
`optimizer.pt`, `scheduler.pt`, `moment.pt` (random number generators, sums), `trainer_state.json`,
`reference.pt` where the reference moves with the policy, and the manifest `fastdpo_state.json`.
"""

import hashlib
import json
import logging
import os
import random
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerState

from . import __version__
from .data import TokenizedPairs
from .errors import CheckpointError
from .run_folder import CHECKPOINT, checkpoints, put_in_place, remove, temporary

logger = logging.getLogger(__name__)

STATE_FILE = "fastdpo_state.json"
FORMAT = 1
"""Of the folder, the manifest and the state in it; one more where an older fastdpo could not read
them. What a newer one also records, of a run's identity, an older one's checkpoints lack."""


class TornCheckpoint(CheckpointError):
    """A checkpoint that is not what was written, or not fastdpo's: an earlier one may be whole."""


@dataclass
class ResumeState:
    """What a checkpoint holds beside weights: everything a bitwise resume needs."""

    trainer_state: TrainerState
    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    rng: dict[str, Any]
    sums: dict[str, Any]  # what was counted so far: of metrics, of packs
    identity: dict[str, Any]
    reference: dict[str, Any] | None = None  # where it moves with the policy
    written_by: str = __version__  # which fastdpo


# ---- finding ------------------------------------------------------------------------------------


def candidates(output_dir: Path, resume: str | bool) -> list[Path]:
    """The checkpoints that `resume` may mean, the first choice first.

    resume: a folder; True or "true": the newest whole one of `output_dir`; "auto": the same, or
    none of them where `output_dir` holds none, to begin from the start.
    """
    word = str(resume).lower()
    if word in ("auto", "true"):
        found = checkpoints(output_dir)[::-1]
        if not found and word == "true":
            raise CheckpointError(
                f"nothing to resume: output_dir {str(output_dir)!r} holds no checkpoint-N folder; "
                "resume 'auto' would begin from the start"
            )
        return found
    path = Path(str(resume))
    if not path.is_dir():
        there = ", ".join(str(found) for found in checkpoints(output_dir)) or "none"
        raise CheckpointError(
            f"checkpoint {str(path)!r} does not exist; {str(output_dir)!r} holds {there}"
        )
    if CHECKPOINT.fullmatch(path.name) is None and checkpoints(path):
        raise CheckpointError(
            f"{str(path)!r} is a run, not a checkpoint; name its {checkpoints(path)[-1].name}, or "
            "set output_dir to it and resume 'auto'"
        )
    return [path]


def load_newest(found: list[Path]) -> tuple[Path, ResumeState]:
    """The first whole one of `found`, and what it holds; says which were passed over, and why."""
    for place, folder in enumerate(found):
        try:
            return folder, load_checkpoint(folder)
        except TornCheckpoint as error:
            if place == len(found) - 1:
                raise
            logger.warning("%s", error)
    raise CheckpointError("there is no checkpoint to resume")


# ---- writing and reading ------------------------------------------------------------------------


def save_checkpoint(
    folder: Path, state: ResumeState, save_model: Callable[[Path], None] | None
) -> None:
    """Writes `folder` under a temporary name, syncs it, then renames it: whole or not there.

    Raises `CheckpointError` where it can't be written (a full disk); then nothing is left of it.
    """
    draft = temporary(folder)
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir(parents=True)
        if save_model is not None:
            save_model(draft)
        torch.save(state.optimizer, draft / "optimizer.pt")
        torch.save(state.scheduler, draft / "scheduler.pt")
        torch.save({"rng": state.rng, "sums": state.sums}, draft / "moment.pt")
        if state.reference is not None:
            torch.save(state.reference, draft / "reference.pt")
        state.trainer_state.save_to_json(str(draft / "trainer_state.json"))
        manifest = {
            "format": FORMAT,
            "fastdpo": __version__,
            "identity": state.identity,
            "sha256": {
                str(path.relative_to(draft)): _digest(path)
                for path in sorted(draft.rglob("*"))
                if path.is_file()
            },
        }
        text = json.dumps({**manifest, "manifest": _digest_of(manifest)}, indent=2)
        (draft / STATE_FILE).write_text(text + "\n", encoding="utf-8")
        _sync(draft)
        put_in_place(folder)
        _sync_entry(folder.parent)
    except (OSError, RuntimeError, CheckpointError) as error:  # torch.save raises RuntimeError
        room = _room(folder.parent)
        shutil.rmtree(draft, ignore_errors=True)
        raise CheckpointError(
            f"checkpoint {folder.name} could not be written: {error}{room}; "
            "the earlier checkpoints are whole"
        ) from error


def load_checkpoint(folder: Path) -> ResumeState:
    """Reads what `save_checkpoint` wrote beside the weights, after checking every file's hash.

    Raises `TornCheckpoint` where it is not whole or not fastdpo's, `CheckpointError` where a newer
    fastdpo wrote it.
    """
    manifest = check_whole(folder)
    moment = torch.load(folder / "moment.pt", weights_only=False)
    reference = None
    if "reference.pt" in manifest["sha256"]:
        reference = torch.load(folder / "reference.pt", map_location="cpu")
    return ResumeState(
        trainer_state=TrainerState.load_from_json(str(folder / "trainer_state.json")),
        optimizer=torch.load(folder / "optimizer.pt", map_location="cpu"),
        scheduler=torch.load(folder / "scheduler.pt", weights_only=False),
        rng=moment["rng"],
        sums=moment["sums"],
        identity=manifest["identity"],
        reference=reference,
        written_by=str(manifest.get("fastdpo")),
    )


def check_whole(folder: Path) -> dict[str, Any]:
    """The manifest of `folder`, every file of which is as it was written."""
    name = f"checkpoint {str(folder)!r}"
    try:
        manifest = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TornCheckpoint(
            f"{name} holds no {STATE_FILE}, so it is no checkpoint of fastdpo; to start from its "
            "weights, pass it as the model"
        ) from None
    except (OSError, ValueError) as error:
        raise _torn(name, f"{STATE_FILE} can't be read ({error})") from error
    written = manifest.get("format") if isinstance(manifest, dict) else None
    if isinstance(written, int) and written > FORMAT:
        raise CheckpointError(
            f"{name} has format {written}, written by fastdpo {manifest.get('fastdpo')}; this "
            f"fastdpo {__version__} reads format {FORMAT}: update it, or use the checkpoint as "
            "the model of a new run"
        )
    own = manifest.pop("manifest", None) if isinstance(manifest, dict) else None
    if own is None or own != _digest_of(manifest):
        raise _torn(name, f"{STATE_FILE} is not what was written")
    for file, digest in manifest["sha256"].items():
        try:
            same = _digest(folder / file) == digest
        except OSError as error:
            raise _torn(name, f"{file} can't be read ({error.strerror})") from error
        if not same:
            raise _torn(name, f"{file} is not what was written")
    return manifest


def _torn(name: str, what: str) -> TornCheckpoint:
    return TornCheckpoint(f"{name} is damaged: {what}; resume an earlier checkpoint")


def check_identity(
    saved: ResumeState, current: dict[str, Any], folder: Path, newer: Collection[str] = ()
) -> None:
    """A run resumes only on its own options, data and model; names the keys that differ.

    newer: keys that an earlier fastdpo or PEFT did not record yet, so that a checkpoint without
        them may be this run's; a warning names those that can't be checked.
    """
    then = saved.identity
    unknown = sorted(key for key in newer if key in current and key not in then)
    differing = sorted(
        key
        for key in then.keys() | current.keys()
        if key not in unknown and then.get(key) != current.get(key)
    )
    way = "start afresh in another output_dir with the checkpoint as the model"
    if differing:
        shown = "; ".join(
            f"{key}: {then.get(key)!r} then, {current.get(key)!r} now" for key in differing[:4]
        )
        more = f"; and {', '.join(differing[4:])}" if len(differing) > 4 else ""
        raise CheckpointError(
            f"checkpoint {str(folder)!r} belongs to another run ({shown}{more}); restore them, or "
            f"{way}"
        )
    if unknown:
        logger.warning(
            "checkpoint %r was written by an earlier fastdpo (%s) or PEFT and does not record: %s; "
            "it is resumed without checking that. If it may differ now, stop, and restore it or %s",
            str(folder),
            saved.written_by,
            ", ".join(unknown),
            way,
        )


def rotate(output_dir: Path, limit: int | None, newest: Path, best: Path | None) -> None:
    """Deletes checkpoints beyond `limit`, never the newest written nor the best: first those of
    steps that this run has not reached again, then the oldest."""
    if limit is None or limit <= 0:
        return
    found = checkpoints(output_dir)
    ahead = [path for path in found if _step(path) > _step(newest)]
    order = [*ahead, *(path for path in found if path not in ahead)]
    for path in [p for p in order if p not in (newest, best)][: max(0, len(found) - limit)]:
        remove(path)


def _step(path: Path) -> int:
    match = CHECKPOINT.fullmatch(path.name)
    return int(match[1]) if match else 0


# ---- contents -----------------------------------------------------------------------------------


def fingerprint(pairs: TokenizedPairs) -> str:
    """A hash of every token id of `pairs`, in order, and of the numbers that losses use."""
    digest = hashlib.sha256(pairs.offsets.tobytes())
    digest.update(pairs.ids.tobytes())
    for name, values in sorted(pairs.columns.items()):
        digest.update(name.encode() + values.tobytes())
    return digest.hexdigest()[:16]


def rng_state() -> dict[str, Any]:
    """The state of every random number generator in use."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _room(folder: Path) -> str:
    """How much the disk of `folder` still takes: torch.save does not say that it is full."""
    try:
        return f" (the disk has {shutil.disk_usage(folder).free / 2**20:.1f} MiB left)"
    except OSError:
        return ""


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync_entry(path)
    _sync_entry(folder)


def _sync_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
