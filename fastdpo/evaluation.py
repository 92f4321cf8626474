"""One evaluation: loss and rewards of a dataset under TRL's names; and which evaluation is best.

When to evaluate, and what to do with the numbers, is the trainer's affair.
"""

import time
from collections.abc import Callable

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import TrainerState

from fastdpo_kernels import raise_pending

from .batch import Pack
from .config import DPOConfig
from .data import TokenizedPairs
from .errors import ConfigError
from .logps import PackedOutput
from .metrics import PreferenceMetrics
from .objective import Objective, ScoredPack
from .reference_logps import Reference
from .steps import Packer, mean_chosen_length

Score = Callable[[Pack, torch.Tensor | None], tuple[ScoredPack, PackedOutput]]


@torch.no_grad()
def evaluate_pairs(
    pairs: TokenizedPairs,
    reference: Reference,
    score: Score,
    *,
    objective: Objective,
    metrics: PreferenceMetrics,
    packer: Packer,
    args: DPOConfig,
    prefix: str,
    after_batch: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Means over `pairs`, `prefix`_loss and so on; `score` is the policy's, in eval mode.

    after_batch: called after every batch of `per_device_eval_batch_size` pairs a rank.
    """
    batch = args.per_device_eval_batch_size * args.world_size
    mean_length = mean_chosen_length(pairs, np.arange(len(pairs)))
    started = time.perf_counter()
    waiting: list[ScoredPack] = []  # [N] each; a loss of the whole set waits for all of them
    for start in tqdm(
        range(0, len(pairs), batch),
        desc=f"Evaluating {prefix}",
        leave=False,
        disable=args.disable_tqdm,
    ):
        ids = np.arange(start, min(start + batch, len(pairs)))
        packs = list(packer.packs(pairs, ids[args.process_index :: args.world_size]))
        for pack, values in zip(packs, reference.token_logps(packs), strict=True):
            waiting.append(score(pack, values)[0])
        is_last = start + batch >= len(pairs)
        if is_last or not objective.needs_whole_step:
            losses = objective(waiting, mean_length, grad=False)
            for scored, loss in zip(waiting, losses, strict=True):
                metrics.add(loss, scored.pack, scored.stats)
            waiting.clear()
        after_batch()
    raise_pending()  # the numbers below wait for the device anyway
    seconds = time.perf_counter() - started
    logs = {f"{prefix}_{key}": value for key, value in metrics.read().items()}
    logs[f"{prefix}_runtime"] = seconds
    logs[f"{prefix}_samples_per_second"] = len(pairs) / seconds
    return logs


def note_if_best(metrics: dict[str, float], state: TrainerState, args: DPOConfig) -> bool:
    """Whether `args.metric_for_best_model` is better than ever before; if so `state` says so.

    Raises `ConfigError` where it is not among `metrics`.
    """
    name = args.metric_for_best_model
    if name is None:
        return False
    key = name if name.startswith("eval_") else f"eval_{name}"
    if key not in metrics:
        raise ConfigError(
            f"metric_for_best_model {name!r} is not measured; there are "
            f"{', '.join(sorted(metrics))}"
        )
    value, best = metrics[key], state.best_metric
    if best is not None and not (value > best if args.greater_is_better else value < best):
        return False
    state.best_metric, state.best_global_step = value, state.global_step
    return True
