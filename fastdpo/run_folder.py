"""A run's folder: what its files are called, and how it is made ready. Nothing of other hands is
ever overwritten; a run of fastdpo's only where that was asked for."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from .errors import CheckpointError

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
CONFIG_FILE = "resolved_config.yaml"
METRICS_FILE = "metrics.jsonl"
CURVES_FILE = "curves.png"
DATA_REPORT_FILE = "data_report.json"
SAMPLES_FILE = "samples.jsonl"
PLAN_FILE = "plan.json"
RESULT = re.compile(r"adapter_model\.safetensors|model.*\.safetensors|curves\.png")
# A saved model or adapter, with its tokenizer and card.
RESULT_FILES = re.compile(
    r"adapter_(model\.safetensors|config\.json)|base\.json|model.*\.safetensors(\.index\.json)?"
    r"|(generation_|tokenizer_)?config\.json|tokenizer\.(json|model)|special_tokens_map\.json"
    r"|added_tokens\.json|vocab\.json|merges\.txt|chat_template\.jinja|README\.md"
)
# What a run leaves in its folder, beside checkpoints: overwriting deletes these and nothing else.
OURS = re.compile(
    r"resolved_config\.yaml|metrics\.jsonl|curves\.png|data_report\.json|samples\.jsonl"
    r"|plan\.json|report\.html|\.(metrics|samples)\.jsonl\.tmp|" + RESULT_FILES.pattern
)
LEFTOVER = re.compile(r"\.(checkpoint-\d+)\.(tmp|old)")


def prepare_output_dir(
    output_dir: Path, *, resuming: bool, overwrite: bool, restarting: bool = False
) -> None:
    """Makes `output_dir` ready for a run, or refuses: nothing is overwritten unasked.

    restarting: a run that ended before its first checkpoint may begin again.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise CheckpointError(f"output_dir {str(output_dir)!r} is a file; choose another folder")
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        entries = sorted(entry.name for entry in output_dir.iterdir())
        probe = output_dir / ".fastdpo_write_test"
        probe.write_bytes(b"x")  # a full disk takes a name and no byte
        probe.unlink()
    except OSError as error:
        raise CheckpointError(
            f"output_dir {str(output_dir)!r} can't be written: {error.strerror}; choose another"
        ) from error
    tidy(output_dir)
    if resuming or not entries:
        return
    is_run = CONFIG_FILE in entries
    begins_again = restarting and not any(
        RESULT.fullmatch(entry) or CHECKPOINT.fullmatch(entry) for entry in entries
    )
    if not is_run or not (overwrite or begins_again):
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
            remove(output_dir / entry)
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


def temporary(folder: Path) -> Path:
    """Where the checkpoint `folder` is written until it is whole."""
    return folder.with_name(f".{folder.name}.tmp")


def put_in_place(folder: Path) -> None:
    """Gives what `temporary(folder)` holds its name; what had that name before is kept aside
    until then."""
    aside = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        folder.rename(aside)
    temporary(folder).rename(folder)
    shutil.rmtree(aside, ignore_errors=True)


def remove(folder: Path) -> None:
    """Deletes a checkpoint: its name is gone before its first file."""
    aside = temporary(folder)
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    shutil.rmtree(aside)


def tidy(output_dir: Path) -> None:
    """Clears what a killed process left half done: unfinished checkpoints go, and one that was
    set aside for its successor comes back if that never came."""
    for path in list(output_dir.iterdir() if output_dir.is_dir() else ()):
        match = LEFTOVER.fullmatch(path.name)
        if match is None:
            continue
        whole = output_dir / match[1]
        if match[2] == "old" and not whole.exists():
            path.rename(whole)
        else:
            shutil.rmtree(path, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Raises `CheckpointError` where it can't be written."""
    try:
        path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{str(path)!r} can't be written: {error.strerror}") from error
