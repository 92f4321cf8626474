"""Checkpoints and output folders: written whole or not at all, resumed bit for bit.

A checkpoint is a folder `checkpoint-STEP`: the model or adapter in its library's own format, and
`optimizer.pt`, `scheduler.pt`, `rng_state.pt`, `trainer_state.json`, `fastdpo_state.json`, and
`reference.pt` where the reference moves with the policy.
"""

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerState

from .data import TokenizedPairs
from .errors import CheckpointError

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
STATE_FILE = "fastdpo_state.json"
CONFIG_FILE = "resolved_config.yaml"
METRICS_FILE = "metrics.jsonl"
CURVES_FILE = "curves.png"
# What a run leaves in its folder, beside checkpoints: overwriting deletes these and nothing else.
OURS = re.compile(
    r"resolved_config\.yaml|metrics\.jsonl|curves\.png|README\.md|chat_template\.jinja"
    r"|adapter_(model\.safetensors|config\.json)|model.*\.safetensors(\.index\.json)?"
    r"|(generation_|tokenizer_)?config\.json|tokenizer\.(json|model)|special_tokens_map\.json"
    r"|added_tokens\.json|vocab\.json|merges\.txt"
)


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


def prepare_output_dir(output_dir: Path, *, resuming: bool, overwrite: bool) -> None:
    """Makes `output_dir` ready for a fresh run, or refuses: nothing is overwritten unasked."""
    if output_dir.exists() and not output_dir.is_dir():
        raise CheckpointError(f"output_dir {str(output_dir)!r} is a file; choose another folder")
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        entries = sorted(entry.name for entry in output_dir.iterdir())
        probe = output_dir / ".fastdpo_write_test"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise CheckpointError(
            f"output_dir {str(output_dir)!r} can't be written: {error.strerror}; choose another"
        ) from error
    if resuming or not entries:
        return
    is_run = CONFIG_FILE in entries
    if not overwrite or not is_run:
        what = "an earlier run" if is_run else f"other files ({', '.join(entries[:3])}…)"
        ways = (
            "or resume it with resume_from_checkpoint, or replace it with overwrite_output_dir"
            if is_run
            else "overwrite_output_dir only replaces runs of fastdpo"
        )
        raise CheckpointError(
            f"output_dir {str(output_dir)!r} already holds {what}; choose another folder, {ways}"
        )
    for entry in entries:
        if CHECKPOINT.fullmatch(entry):
            shutil.rmtree(output_dir / entry)
        elif OURS.fullmatch(entry):
            (output_dir / entry).unlink()


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoint folders of `output_dir`, oldest first."""
    found = [
        (int(match[1]), path)
        for path in (output_dir.iterdir() if output_dir.is_dir() else ())
        if path.is_dir() and (match := CHECKPOINT.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found)]


def find_checkpoint(output_dir: Path, resume: str | bool) -> Path:
    """The checkpoint to resume: a path, or for True / "auto" / "true" the newest one."""
    if resume is True or str(resume).lower() in ("auto", "true"):
        found = checkpoints(output_dir)
        if not found:
            raise CheckpointError(
                f"nothing to resume: output_dir {str(output_dir)!r} holds no checkpoint-N folder"
            )
        return found[-1]
    path = Path(str(resume))
    if not path.is_dir():
        raise CheckpointError(f"checkpoint {str(path)!r} does not exist")
    if not (path / STATE_FILE).is_file():
        raise CheckpointError(
            f"{str(path)!r} holds no {STATE_FILE}, so it is no checkpoint of fastdpo; to start "
            "from its weights, pass it as the model"
        )
    return path


def save_checkpoint(
    folder: Path, state: ResumeState, save_model: Callable[[Path], None] | None
) -> None:
    """Writes `folder` under a temporary name, syncs it, then renames it: whole or not there."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        if save_model is not None:
            save_model(temporary)
        torch.save(state.optimizer, temporary / "optimizer.pt")
        torch.save(state.scheduler, temporary / "scheduler.pt")
        torch.save({"rng": state.rng, "sums": state.sums}, temporary / "rng_state.pt")
        if state.reference is not None:
            torch.save(state.reference, temporary / "reference.pt")
        state.trainer_state.save_to_json(str(temporary / "trainer_state.json"))
        files = {path.name: _digest(path) for path in temporary.iterdir() if path.is_file()}
        summary = {"identity": state.identity, "sha256": files}
        (temporary / STATE_FILE).write_text(json.dumps(summary, indent=2) + "\n")
        _sync(temporary)
    except (OSError, RuntimeError, CheckpointError) as error:  # torch.save raises RuntimeError
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"checkpoint {folder.name} could not be written: {error}; "
            "the earlier checkpoints are whole"
        ) from error
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(temporary, folder)
    _sync_entry(folder.parent)


def load_checkpoint(folder: Path) -> ResumeState:
    """Reads what `save_checkpoint` wrote beside the weights, after checking every file's hash."""
    try:
        summary = json.loads((folder / STATE_FILE).read_text())
        for name, digest in summary["sha256"].items():
            if _digest(folder / name) != digest:
                raise CheckpointError(
                    f"checkpoint {str(folder)!r} is damaged: {name} is not what was written; "
                    "resume an earlier checkpoint"
                )
        moment = torch.load(folder / "rng_state.pt", weights_only=False)
        return ResumeState(
            trainer_state=TrainerState.load_from_json(str(folder / "trainer_state.json")),
            optimizer=torch.load(folder / "optimizer.pt", map_location="cpu"),
            scheduler=torch.load(folder / "scheduler.pt", weights_only=False),
            rng=moment["rng"],
            sums=moment["sums"],
            identity=summary["identity"],
            reference=(
                torch.load(folder / "reference.pt", map_location="cpu")
                if "reference.pt" in summary["sha256"]
                else None
            ),
        )
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise CheckpointError(
            f"checkpoint {str(folder)!r} is incomplete: {error}; resume an earlier checkpoint"
        ) from error


def check_identity(saved: dict[str, Any], current: dict[str, Any], folder: Path) -> None:
    """A run resumes only on its own options, data and model; names the keys that differ."""
    differing = sorted(
        key for key in saved.keys() | current.keys() if saved.get(key) != current.get(key)
    )
    if differing:
        shown = "; ".join(
            f"{key}: {saved.get(key)!r} then, {current.get(key)!r} now" for key in differing[:4]
        )
        raise CheckpointError(
            f"checkpoint {str(folder)!r} belongs to another run ({shown}"
            f"{'; …' if len(differing) > 4 else ''}); restore them, or start afresh in another "
            "output_dir with the checkpoint as the model"
        )


def fingerprint(pairs: TokenizedPairs) -> str:
    """A hash of every token id of `pairs`, in order, and of the numbers that losses use."""
    digest = hashlib.sha256(pairs.offsets.tobytes())
    digest.update(pairs.ids.tobytes())
    for name, values in sorted(pairs.columns.items()):
        digest.update(name.encode() + values.tobytes())
    return digest.hexdigest()[:16]


def rotate(output_dir: Path, limit: int | None, keep: Path | None) -> None:
    """Deletes the oldest checkpoints beyond `limit`, never `keep` (the best one)."""
    if limit is None or limit <= 0:
        return
    found = checkpoints(output_dir)
    for path in [p for p in found[:-1] if p != keep][: max(0, len(found) - limit)]:
        shutil.rmtree(path)


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


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            _sync_entry(path)
    _sync_entry(folder)


def _sync_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
