"""One run of a trainer in a process of its own, for peers that rewrite transformers when imported.

Unsloth does, and Liger's layers do; a row measured after them would be another one's. The model of
a run with Unsloth is saved by this process, before anything is rewritten, and loaded by Unsloth.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import child_environment, stop

if TYPE_CHECKING:
    from .train_cases import Bench

TAIL = 1500  # characters of a failed process's output that are kept


class Failed(RuntimeError):
    """The process failed, or was stopped for time; the message ends with what it said last."""


def run(bench: "Bench", trainer: str, seconds: float | None = None) -> dict[str, Any]:
    """What `Bench.measure_here` returns, from another process; raises `Failed` or out of memory."""
    import torch

    python = bench.unsloth_python if trainer == "unsloth" else None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        if trainer == "unsloth":
            policy, _ = bench.models(quantized=False)
            policy.save_pretrained(folder / "model")
            bench.tokenizer.save_pretrained(folder / "model")
            del policy
        request = {
            "case": asdict(bench.case),
            "trainer": trainer,
            "device": bench.device.type,
            "data": str(bench.data),
            "epochs": bench.epochs,
        }
        (folder / "request.json").write_text(json.dumps(request))
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
        _start(python or sys.executable, folder, seconds)
        found = json.loads((folder / "found.json").read_text())
    if found.get("error") == "out of memory":
        raise torch.OutOfMemoryError(f"{trainer} in its own process")
    return found


def _start(python: str, folder: Path, seconds: float | None) -> None:
    """Runs the other half there, in `folder`: peers write caches where they are."""
    environment = child_environment(
        UNSLOTH_DISABLE_STATISTICS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false"
    )
    log = folder / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen(
            [python, "-m", "benchmarks.isolated", str(folder)],
            cwd=folder, env=environment, process_group=0,
            stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise Failed(f"stopped after {seconds:.0f} s") from None
        finally:
            stop(process)
    if status != 0 or not (folder / "found.json").exists():
        raise Failed(f"exit status {status}: {log.read_text(errors='replace')[-TAIL:].strip()}")


def main(folder: Path) -> None:
    """The other half: reads request.json, writes found.json."""
    request = json.loads((folder / "request.json").read_text())
    trainer = request["trainer"]
    if trainer == "unsloth":
        import unsloth  # noqa: F401  # pyright: ignore[reportMissingImports]  # before transformers
    import torch

    from . import peers
    from .train_cases import Bench, Case

    case = Case(**request["case"] | {"trainers": tuple(request["case"]["trainers"])})
    device = torch.device(request["device"])
    bench = Bench(case, device, Path(request["data"]), request["epochs"])
    try:
        if trainer == "unsloth":
            bits4 = case.tuning == "qlora"
            model, tokenizer = peers.unsloth_model(str(folder / "model"), bench.job(), bits4=bits4)
            found = asdict(peers.run(trainer, bench.job(), model, None, tokenizer))
        else:
            found = bench.measure_here(trainer)
    except torch.OutOfMemoryError:
        found = {"error": "out of memory"}
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
