"""tensorboard, wandb, mlflow, trackio, … through accelerate's trackers, on the main process.

They open with `train()` and close with it, whatever ends it. A resumed run continues the one that
its checkpoint names. What is logged outside `train()` opens the run for itself alone.
"""

import json
import os
import re
from pathlib import Path
from typing import Any, Self

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from transformers import TrainerCallback
from transformers.integrations.integration_utils import rewrite_logs
from transformers.trainer_callback import ExportableState

from .config import DPOConfig, to_plain
from .errors import MissingPackageError
from .runtime import rank_of_ranks

IN_THE_EXTRA = ("tensorboard", "wandb", "mlflow", "trackio")
REFUSED_BY_MLFLOW = re.compile(r"[^0-9A-Za-z_\-. :/]")  # in a metric's name


class Trackers(TrainerCallback, ExportableState):
    """The trackers of a run. run_ids: what continues each one's run, kept in checkpoints.

    Raises `MissingPackageError` where a package is absent.
    """

    def __init__(self, args: DPOConfig):
        self.names = _names(args.report_to)
        self.run_ids: dict[str, str] = {}
        self._args = args
        self._accelerator: Accelerator | None = None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {}, "attributes": {"run_ids": self.run_ids}}

    # ---- events -----------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._start(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        if self._accelerator is not None:
            self._log(self._accelerator, kwargs["logs"], state.global_step)
            return
        with self:  # evaluate() before or after training
            self._log(self._start(state.global_step), kwargs["logs"], state.global_step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        accelerator, self._accelerator = self._accelerator, None
        if accelerator is None:
            return
        if rank_of_ranks()[1] == 1:
            accelerator.end_training()
            return
        for tracker in accelerator.trackers:  # end_training() would end the ranks' group as well
            tracker.finish()

    # ---- accelerate's calls -------------------------------------------------------------------

    def _start(self, step: int) -> Accelerator:
        args = self._args
        folder = _tensorboard_folder(args)
        accelerator = Accelerator(
            cpu=args.use_cpu,
            log_with=self.names,  # pyright: ignore[reportArgumentType]
            project_dir=str(folder),
        )
        if "tensorboard" in self.names:
            folder.mkdir(parents=True, exist_ok=True)
        accelerator.init_trackers(self._project(), init_kwargs=self._init_kwargs(step))
        self._accelerator = accelerator
        options = _flat(to_plain(args))
        trackers: list[Any] = accelerator.trackers
        for tracker in trackers:
            if tracker.name not in self.run_ids:  # mlflow takes an option once
                tracker.store_init_configuration(options)
                self.run_ids[tracker.name] = _run_id(tracker)
        return accelerator

    def _log(self, accelerator: Accelerator, logs: dict[str, Any], step: int) -> None:
        """Under the names that transformers gives: `train/loss`, `eval/loss`, `eval/NAME_loss`."""
        values = {
            REFUSED_BY_MLFLOW.sub("_", name): value
            for name, value in rewrite_logs(logs).items()
            if isinstance(value, int | float)
        }
        accelerator.log(values, step=step)

    def _project(self) -> str:
        """`project`; where it is at its default, wandb's own variable."""
        default: Any = type(self._args).__dataclass_fields__["project"].default
        if "wandb" in self.names and self._args.project == default:
            return str(os.environ.get("WANDB_PROJECT", default))
        return self._args.project

    def _init_kwargs(self, step: int) -> dict[str, dict[str, Any]]:
        """What each tracker's start is given beside the project. step: the one that is done."""
        args, ids = self._args, self.run_ids
        named: dict[str, Any] = {} if args.run_name is None else {"name": args.run_name}
        wandb, trackio = named.copy(), named.copy()
        if "wandb" in ids and "WANDB_RUN_ID" not in os.environ:
            wandb |= {"id": ids["wandb"], "resume": "allow"}
        if "trackio" in ids:
            trackio |= {"name": ids["trackio"], "resume": "allow"}
        if args.trackio_space_id is not None:
            trackio["space_id"] = args.trackio_space_id
        if args.hub_private_repo is not None:
            trackio["private"] = args.hub_private_repo
        # Hides what an interrupted run wrote after its checkpoint, or an earlier run here.
        after = step + 1 if "tensorboard" in ids else step
        return {
            "tensorboard": {"purge_step": after},
            "wandb": wandb,
            "mlflow": {"run_name": args.run_name, "run_id": ids.get("mlflow")},
            "trackio": trackio,
        }


def _names(report_to: list[str]) -> list[str]:
    """The trackers to start; `all` are those installed."""
    if report_to in ([], ["none"]):
        return []
    available = [str(name) for name in get_available_trackers()]
    if report_to == ["all"]:
        return available
    for name in report_to:
        if name not in available:
            wanted = "'fastdpo[trackers]'" if name in IN_THE_EXTRA else name
            raise MissingPackageError(
                f"report_to {name!r}: its package is not installed; pip install {wanted}"
            )
    return list(dict.fromkeys(report_to))


def _tensorboard_folder(args: DPOConfig) -> Path:
    """Inside `output_dir`, or a folder of this run in TENSORBOARD_LOGGING_DIR."""
    output_dir = Path(args.output_dir or "dpo_output")
    shared = os.environ.get("TENSORBOARD_LOGGING_DIR")
    if shared is None:
        return output_dir / "runs"
    return Path(shared).expanduser() / (args.run_name or output_dir.name)


def _flat(options: dict[str, Any]) -> dict[str, Any]:
    """Numbers, strings and None, which every tracker takes; lists and mappings as JSON."""
    plain = (bool, int, float, str, type(None))
    return {
        name: value if isinstance(value, plain) else json.dumps(value)
        for name, value in options.items()
    }


def _run_id(tracker: Any) -> str:
    """What continues this tracker's run: wandb's and mlflow's id, trackio's name."""
    run = tracker.tracker
    if tracker.name == "mlflow":
        return str(run.info.run_id)
    return str(getattr(run, {"wandb": "id", "trackio": "name"}.get(tracker.name, ""), ""))
