"""What a run has measured so far, beside losses and rewards: tokens, waste, rates; and its log.

The log is `metrics.jsonl`, one JSON object a line; the progress bar shows the newest numbers.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from .errors import CheckpointError
from .metrics import PackStats, Throughput
from .runtime import peak_memory_gib, total_over_ranks


class RunLog:
    """Counts of the whole run on this rank, rates since the last log, and the bar."""

    def __init__(self, device: torch.device):
        self.device = device
        self.packs = PackStats()
        self.throughput = Throughput()
        self.bar: tqdm | None = None

    def add(self, packs: PackStats) -> None:
        """Counts one step's packs."""
        self.packs += packs
        self.throughput.add(packs)
        if self.bar is not None:
            self.bar.update()

    def read(self) -> dict[str, Any]:
        """`num_tokens`, `waste`, rates, and peak memory, of all ranks; rates start anew."""
        packs = self.packs_of_all_ranks()
        numbers = {
            "num_tokens": packs.n_tokens,
            **self.throughput.read(self.device),
            "waste": packs.waste,
            "peak_memory_gib": peak_memory_gib(self.device),
        }
        self.throughput.reset()
        return numbers

    def packs_of_all_ranks(self) -> PackStats:
        counts = {
            name: int(total_over_ranks(count, self.device))
            for name, count in asdict(self.packs).items()
        }
        return PackStats(**counts)

    def show(self, logs: dict[str, Any]) -> None:
        """The newest numbers on the bar."""
        if self.bar is not None:
            shown = {"loss": "loss", "margin": "rewards/margins", "accuracy": "rewards/accuracies"}
            shown |= {"pairs_s": "pairs_per_second", "tokens_s": "tokens_per_second"}
            self.bar.set_postfix(
                {name: f"{logs[key]:.4g}" for name, key in shown.items() if key in logs}
            )


class MetricsFile:
    """`metrics.jsonl`: one JSON object a log, appended and flushed at once."""

    def __init__(self, path: Path):
        self.path = path

    def append(self, logs: dict) -> None:
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(logs) + "\n")
        except OSError as error:
            raise _unwritten(self.path, error) from error

    def rewrite(self, history: list[dict]) -> None:
        """Holds exactly `history` from now on: what an interrupted run logged after its
        checkpoint, and a line that its end cut short, are gone."""
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        try:
            temporary.write_text("".join(json.dumps(log) + "\n" for log in history), "utf-8")
            os.replace(temporary, self.path)
        except OSError as error:
            raise _unwritten(self.path, error) from error


def _unwritten(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{str(path)!r} can't be written: {error.strerror}; free space there and resume from the "
        "last checkpoint"
    )
