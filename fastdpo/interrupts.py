"""SIGTERM and SIGINT during training: the step is finished and saved, then the run ends.

The first signal is only noted; the second ends the run at once. Several ranks ask each other, which
waits for the device, only after steps that wait for it anyway: those that log, evaluate or save.
"""

import os
import signal
import threading
from types import FrameType
from typing import Any

import torch

from .runtime import rank_of_ranks, sum_over_ranks

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(KeyboardInterrupt):
    """A run that a signal ended; says what is saved. `status`: 128 + the signal's number."""

    def __init__(self, number: int, message: str):
        super().__init__(f"{signal.Signals(number).name}: {message}")
        self.status = 128 + number


class StopRequests:
    """Notes the first signal inside a `with` block and raises `Interrupted` on the second.

    In another thread than the main one Python takes no signals: there it notes none.
    """

    def __init__(self) -> None:
        self.number = 0  # of the signal that came, 0 for none
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequests":
        self.number = 0
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._note) for s in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.number:
            raise Interrupted(number, "a second one: stopped at once, and this step is not saved")
        self.number = number
        name = signal.Signals(number).name
        when = (
            "this step"
            if rank_of_ranks()[1] == 1
            else "the next step that logs, evaluates or saves"
        )
        text = f"\nfastdpo: {name}: saving after {when}; once more stops at once\n"
        os.write(2, text.encode())  # a handler may interrupt a print, and print can't be nested

    def to_obey(self, device: torch.device, *, agree: bool) -> int:
        """The signal to obey now, or 0. Several ranks ask each other, and only where `agree`:
        that waits for the device."""
        if rank_of_ranks()[1] == 1:
            return self.number
        if not agree:
            return 0
        counts = torch.zeros(65, dtype=torch.int64, device=device)
        counts[self.number] = 1
        came = sum_over_ranks(counts)[1:].nonzero().flatten().tolist()
        return came[0] + 1 if came else 0
