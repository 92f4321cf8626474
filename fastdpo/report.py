"""Pictures of a run, from its `metrics.jsonl` alone: `plot_curves` draws `curves.png`."""

import json
from pathlib import Path

PANELS = (
    ("loss", ("loss", "eval_loss")),
    ("reward accuracy", ("rewards/accuracies", "eval_rewards/accuracies")),
    (
        "rewards (the margin is what is trained)",
        ("rewards/chosen", "rewards/rejected", "rewards/margins"),
    ),
    ("log-probs of a response", ("logps/chosen", "logps/rejected")),
    ("learning rate", ("learning_rate",)),
    ("pairs per second", ("pairs_per_second",)),
)


def read_metrics(path: Path) -> list[dict]:
    """The logs of a run, in order."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def plot_curves(metrics_path: Path, png_path: Path, title: str = "") -> None:
    """Draws loss, accuracy, rewards, log-probs, learning rate and speed over steps as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, no global state
    from matplotlib.figure import Figure

    logs = read_metrics(metrics_path)
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for number, (name, keys) in enumerate(PANELS, start=1):
        axes = figure.add_subplot(2, 3, number)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.grid(alpha=0.3)
        for key in keys:
            points = [(log["step"], log[key]) for log in logs if key in log]
            if points:
                steps, values = zip(*points, strict=True)
                axes.plot(steps, values, marker="o" if len(points) < 20 else None, label=key)
        if axes.lines:
            axes.legend(fontsize=8)
    figure.savefig(png_path, dpi=110)
