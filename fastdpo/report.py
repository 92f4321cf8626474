"""Pictures of runs, from what they wrote: `curves.png` of one, or a PNG a panel of several.

The page around them is report_page.py's affair.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import DataError
from .run_folder import METRICS_FILE, PLAN_FILE

CHOSEN, REJECTED = "rewards/chosen", "rewards/rejected"
# Title, and the logs' keys; where they are evaluated, `eval_KEY` and `eval_NAME_KEY` are drawn too.
PANELS = {
    "loss": ("loss", ("loss",)),
    "margins": ("reward margin: what is trained", ("rewards/margins",)),
    "accuracies": ("reward accuracy", ("rewards/accuracies",)),
    "rewards": ("rewards", (CHOSEN, REJECTED)),
    "logps": ("log-probs of a response", ("logps/chosen", "logps/rejected")),
    "learning_rate": ("learning rate", ("learning_rate",)),
    "grad_norm": ("gradient norm, before clipping", ("grad_norm",)),
    "throughput": ("tokens per second", ("tokens_per_second",)),
    "pairs": ("pairs per second", ("pairs_per_second",)),
    "memory": ("peak memory, GiB", ("peak_memory_gib",)),
    "waste": ("waste: share of computed tokens that was not needed", ("waste",)),
}
CURVES = ("loss", "accuracies", "rewards", "logps", "learning_rate", "pairs")
GIB = 2**30


@dataclass(frozen=True)
class Run:
    """What a run left in its folder. logs: metrics.jsonl; plan: plan.json, {} where none is."""

    label: str
    folder: Path
    logs: list[dict[str, Any]]
    plan: dict[str, Any] = field(default_factory=dict)

    def points(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of `key`."""
        found = {log["step"]: log[key] for log in self.logs if key in log}
        return list(found), list(found.values())

    def measured(self, key: str) -> list[str]:
        """`key` and its evaluations, as far as they were logged."""
        logged = {name for log in self.logs for name in log}
        evaluated = (n for n in logged if n.startswith("eval_") and n.endswith(f"_{key}"))
        return [name for name in (key, *sorted(evaluated)) if name in logged]


def read_metrics(path: Path) -> list[dict]:
    """The logs of a run, in order; a last line that its end cut short is left out.

    Raises `DataError` where a line is no log.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise DataError(f"{str(path)!r} can't be read: {reason}") from error
    logs = []
    for number, line in enumerate(lines, start=1):
        try:
            log = json.loads(line)
            logs.append({"step": int(log["step"]), **log})
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise DataError(
                f"{str(path)!r}, line {number}: expected an object with a step, got {line[:60]!r}"
            ) from error
    return logs


def read_run(folder: Path, label: str) -> Run:
    """Raises `DataError` where `folder` is no run's, or nothing was logged yet."""
    if not folder.is_dir():
        raise DataError(f"run {str(folder)!r} does not exist; expected an output_dir of a training")
    path = folder / METRICS_FILE
    if not path.is_file():
        raise DataError(f"run {str(folder)!r} holds no {METRICS_FILE}, so no run of fastdpo")
    logs = read_metrics(path)
    if not logs:
        raise DataError(f"run {str(folder)!r} has logged nothing yet: {METRICS_FILE} is empty")
    plan: dict[str, Any] = {}
    if (folder / PLAN_FILE).is_file():
        try:
            plan = json.loads((folder / PLAN_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{str(folder / PLAN_FILE)!r} can't be read: {error}") from error
    return Run(label, folder, logs, plan)


# ---- drawing ------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, no global state
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _draw(axes: Any, name: str, runs: Sequence[Run]) -> bool:
    """One panel; whether there was anything to draw. A colour a run, a dash a quantity."""
    title, keys = PANELS[name]
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("step", fontsize=9)
    axes.grid(alpha=0.3)
    styles = ("-", "--", ":", "-.")
    for number, run in enumerate(runs):
        names = [name for key in keys for name in run.measured(key)]
        for place, key in enumerate(names):
            steps, values = run.points(key)
            several = len(runs) > 1
            axes.plot(
                steps,
                values,
                marker="o" if len(steps) < 20 else None,
                markersize=4,
                color=f"C{number % 10}" if several else None,
                linestyle=styles[place % len(styles)] if several else "-",
                label=f"{run.label}: {key}" if several else key,
            )
        if name == "memory" and run.plan.get("peak_bytes"):
            axes.axhline(
                run.plan["peak_bytes"] / GIB,
                color=f"C{number % 10}",
                linestyle=":",
                label=f"{run.label}: planned" if len(runs) > 1 else "planned",
            )
    if axes.lines:
        axes.legend(fontsize=7)
    return bool(axes.lines)


def plot_curves(metrics_path: Path, png_path: Path, title: str = "") -> None:
    """Draws loss, accuracy, rewards, log-probs, learning rate and speed over steps as a PNG."""
    figure = _figure(12, 6.5)
    figure.suptitle(title)
    run = Run("", metrics_path.parent, read_metrics(metrics_path))
    for number, name in enumerate(CURVES, start=1):
        _draw(figure.add_subplot(2, 3, number), name, [run])
    figure.savefig(png_path, dpi=110)


def plot_panels(runs: Sequence[Run], folder: Path) -> dict[str, Path]:
    """A PNG in `folder` for every panel that `runs` have anything for, by the panel's name."""
    pictures = {}
    for name in PANELS:
        figure = _figure(6.4, 3.6)
        if _draw(figure.add_subplot(), name, runs):
            pictures[name] = folder / f"{name}.png"
            figure.savefig(pictures[name], dpi=110)
    planned = [run for run in runs if run.plan.get("memory_bytes")]
    if planned:
        pictures["memory_by_kind"] = folder / "memory_by_kind.png"
        _plot_memory(planned, pictures["memory_by_kind"])
    return pictures


def _plot_memory(runs: Sequence[Run], path: Path) -> None:
    """The plan's memory by kind as a bar a run, and beside it what was measured."""
    figure = _figure(6.4, 1.6 + 0.8 * len(runs))
    axes = figure.add_subplot()
    axes.set_title("memory by kind as planned, GiB", fontsize=10)
    kinds = list(dict.fromkeys(kind for run in runs for kind in run.plan["memory_bytes"]))
    left = [0.0] * len(runs)
    for number, kind in enumerate(kinds):
        sizes = [run.plan["memory_bytes"].get(kind, 0) / GIB for run in runs]
        if any(sizes):
            axes.barh(
                range(len(runs)), sizes, left=left, color=f"C{number % 10}", label=kind, height=0.5
            )
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    for place, run in enumerate(runs):
        if run.plan.get("measured_peak_bytes"):
            x = run.plan["measured_peak_bytes"] / GIB
            axes.plot([x, x], [place - 0.4, place + 0.4], color="black", linewidth=2,
                      label="measured" if place == 0 else None)  # fmt: skip
    axes.set_yticks(range(len(runs)), [run.label for run in runs])
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=110)
