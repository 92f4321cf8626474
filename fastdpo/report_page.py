"""`fastdpo report RUN [RUN …] -o report.html`: one page that needs nothing else, and its PNGs.

What it says is read off the runs' folders; nothing is trained or loaded.
"""

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .config_files import read_yaml
from .errors import CheckpointError, ConfigError, DataError
from .help import CommandParser
from .report import CHOSEN, REJECTED, Run, plot_panels, read_run
from .run_folder import CONFIG_FILE, DATA_REPORT_FILE, SAMPLES_FILE

GENERATOR = '<meta name="generator" content="fastdpo report">'
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1360px; margin: 2em auto; padding: 0 1em }
figure { display: inline-block; margin: 0 1em 1em 0 } img { max-width: 100%; width: 640px }
table { border-collapse: collapse; margin: 1em 0 } td, th { border: 1px solid #ccc;
padding: .25em .6em; text-align: left; vertical-align: top } td.n { text-align: right }
pre { background: #f6f6f6; padding: .6em; white-space: pre-wrap }
.note { background: #fff6e0; border-left: 4px solid #e0a000; padding: .5em 1em }
"""
# The numbers of the table, the best evaluation's name first.
LAST = (
    *("loss", "eval_loss", "rewards/margins", "eval_rewards/margins", "rewards/accuracies"),
    *("eval_rewards/accuracies", CHOSEN, REJECTED, "grad_norm", "pairs_per_second"),
    *("tokens_per_second", "peak_memory_gib", "waste", "num_tokens", "skipped_steps"),
)


def main(argv: Sequence[str]) -> int:
    """Runs `fastdpo report` with the arguments after that word; returns the exit status."""
    about = "A page about one or several runs."
    parser = CommandParser("report", "RUN [RUN …] -o report.html", about)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the output_dir of a training")
    parser.add_argument(
        "-o",
        "--output",
        help="the page; its PNGs go beside it. By default report.html, in the run if there is one",
    )
    options = parser.parse_args(list(argv))
    folders = [Path(run) for run in options.runs]
    default = folders[0] / "report.html" if len(folders) == 1 else Path("report.html")
    page = Path(options.output) if options.output else default
    pictures = write_report(folders, page)
    print(f"{page}  the report, in one file")
    print(f"{pictures}  its pictures")
    return 0


def write_report(folders: Sequence[Path], page: Path) -> Path:
    """Writes `page` about the runs in `folders`; returns the folder of its PNGs.

    Raises `DataError` for a folder that is no run's, `CheckpointError` where the page can't be
    written or would replace another's file.
    """
    runs = [
        read_run(folder, label) for folder, label in zip(folders, _labels(folders), strict=True)
    ]
    if page.is_dir():
        raise CheckpointError(f"report {str(page)!r} is a folder; name a file, report.html say")
    pictures = page.with_name(f"{page.stem}_png")
    try:
        if page.exists() and GENERATOR not in page.read_text("utf-8", errors="replace"):
            raise CheckpointError(f"{str(page)!r} is no report of fastdpo's; choose another name")
        pictures.mkdir(parents=True, exist_ok=True)
        drawn = plot_panels(runs, pictures)
        page.write_text(_page(runs, drawn), encoding="utf-8")
    except OSError as error:
        raise CheckpointError(
            f"report {str(page)!r} can't be written: {error.strerror}; choose another place"
        ) from error
    return pictures


def _labels(folders: Sequence[Path]) -> list[str]:
    """The runs' folder names, or as much of their paths as tells them apart."""
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ConfigError("report: a run is named twice")
    for depth in range(1, 20):
        labels = ["/".join(folder.resolve().parts[-depth:]) for folder in folders]
        if len(set(labels)) == len(labels):
            break
    return labels


def _page(runs: Sequence[Run], pictures: dict[str, Path]) -> str:
    title = "fastdpo: " + ", ".join(run.label for run in runs)
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8">{GENERATOR}',
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>",
        *(f'<p class="note">{html.escape(note)}</p>' for note in _notes(runs)),
        "<h2>Last numbers</h2>",
        _last_numbers(runs),
        "<h2>Over steps</h2>",
        *(_figure(name, path) for name, path in pictures.items()),
        *(_memory(run) for run in runs),
        "<h2>Data</h2>",
        *(_data(run) for run in runs),
        *(_samples(run) for run in runs),
        "<h2>Options</h2>",
        _options(runs),
        "</body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _notes(runs: Sequence[Run]) -> list[str]:
    notes = []
    for run in runs:
        steps, chosen = run.points(CHOSEN)
        if chosen and chosen[-1] < 0:
            notes.append(
                f"{run.label}: the reward of chosen responses is {chosen[-1]:.3f} at step "
                f"{steps[-1]}, below 0: they are now less likely than under the reference. DPO "
                "trains the difference to the rejected ones only, so both may fall; that is no "
                "fault by itself. Where the answers suffer, hold the chosen ones up: rpo_alpha: 1 "
                "adds their negative log-likelihood, and loss_type: [sigmoid, sft] with "
                "loss_weights mixes it in."
            )
        skipped = run.points("skipped_steps")[1]
        if skipped and skipped[-1]:
            notes.append(f"{run.label}: {skipped[-1]} steps were not finite and were skipped.")
        measured = run.plan.get("measured_peak_bytes")
        planned = run.plan.get("first_steps_peak_bytes") or run.plan.get("peak_bytes")
        if planned and measured:
            apart = abs(measured - planned) / planned
            word = "above" if measured > planned else "below"
            notes.append(
                f"{run.label}: peak memory {measured / 2**30:.2f} GiB, {apart:.0%} {word} the "
                f"plan's {planned / 2**30:.2f} GiB."
            )
    return notes


def _last_numbers(runs: Sequence[Run]) -> str:
    rows = []
    for key in LAST:
        values = [run.points(key)[1] for run in runs]
        if any(values):
            cells = "".join(f'<td class="n">{_number(of[-1]) if of else ""}</td>' for of in values)
            rows.append(f"<tr><td>{html.escape(key)}</td>{cells}</tr>")
    head = "".join(f"<th>{html.escape(run.label)}</th>" for run in runs)
    return f"<table><tr><th></th>{head}</tr>{''.join(rows)}</table>"


def _memory(run: Run) -> str:
    """The measured kinds of memory beside the plan's, of the steps that were measured."""
    measured = run.plan.get("measured_memory_bytes")
    if not measured:
        return ""
    planned = run.plan["first_steps_memory_bytes"]
    rest = sum(size for kind, size in planned.items() if kind not in measured)
    rows = [(kind, planned.get(kind, rest), size) for kind, size in measured.items()]
    rows.append(("peak", sum(planned.values()), run.plan["measured_peak_bytes"]))
    cells = "".join(
        f'<tr><td>{html.escape(kind)}</td><td class="n">{a / 2**20:,.2f}</td>'
        f'<td class="n">{b / 2**20:,.2f}</td></tr>'
        for kind, a, b in rows
    )
    return (
        f"<h2>Memory of {html.escape(run.label)} by kind, MiB</h2>"
        "<p>Of the first steps. Planned: what is there at their peak. Measured: sizes of tensors, "
        "gradients when they are whole; activations and workspace are the rest of the peak.</p>"
        f"<table><tr><th></th><th>planned</th><th>measured</th></tr>{cells}</table>"
    )


def _number(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else html.escape(str(value))


def _figure(name: str, path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<figure><img alt="{name}" src="data:image/png;base64,{data}"></figure>'


def _data(run: Run) -> str:
    path = run.folder / DATA_REPORT_FILE
    name = html.escape(run.label)
    if not path.is_file():
        return f"<p>{name}: the datasets were tokenized before, so nothing is known of their rows."
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        lines = [line for lines in report.values() for line in lines]
    except (ValueError, AttributeError, TypeError) as error:
        raise DataError(f"{str(path)!r} can't be read: {error}") from error
    return f"<h3>{name}</h3><pre>{html.escape(chr(10).join(lines))}</pre>"


def _samples(run: Run) -> str:
    """The first and the last answer to every prompt."""
    path = run.folder / SAMPLES_FILE
    if not path.is_file():
        return ""
    prompts: dict[str, list[tuple[int, str]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            sample = json.loads(line)
        except ValueError:  # the last line of a run that was killed
            continue
        prompts.setdefault(sample["prompt"], []).append((sample["step"], sample["response"]))
    rows = "".join(
        f"<tr><td><pre>{html.escape(prompt)}</pre></td>"
        + "".join(
            f"<td>step {step}<pre>{html.escape(response)}</pre></td>"
            for step, response in (answers[0], answers[-1])
        )
        + "</tr>"
        for prompt, answers in prompts.items()
    )
    head = "<tr><th>prompt</th><th>first answer</th><th>last answer</th></tr>"
    return f"<h3>Samples of {html.escape(run.label)}</h3><table>{head}{rows}</table>"


def _options(runs: Sequence[Run]) -> str:
    """All options of one run; of several, those that differ."""
    options: list[dict[str, Any]] = []
    for run in runs:
        path = run.folder / CONFIG_FILE
        options.append(read_yaml(path) if path.is_file() else {})
    names = list(dict.fromkeys(name for of in options for name in of))
    if len(runs) > 1:
        names = [n for n in names if any(of.get(n) != options[0].get(n) for of in options)]
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td>"
        + "".join(f"<td>{html.escape(str(of.get(name, '')))}</td>" for of in options)
        + "</tr>"
        for name in names
    )
    head = "".join(f"<th>{html.escape(run.label)}</th>" for run in runs)
    about = "<p>Those that differ.</p>" if len(runs) > 1 else ""
    return f"{about}<table><tr><th></th>{head}</tr>{rows}</table>"
