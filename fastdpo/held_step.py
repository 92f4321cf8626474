"""An optimizer's step that leaves everything as it was where a number on the device says so.

For optimizers that can't be told themselves (the fused ones of torch can): what they are about to
change is copied, and put back by `torch.where`. The host learns nothing and waits for nothing.
"""

from collections.abc import Iterator
from typing import Any

import torch

COPIES_BYTES = 256 * 2**20  # of weights and states, at a time: a larger parameter is alone
# States that a gradient of 0 moves too: a count, NAdam's product of momenta.
BEGINNINGS = {"step": 0.0, "mu_product": 1.0}


@torch.no_grad()
def step_unless(
    held: torch.Tensor, optimizer: torch.optim.Optimizer, max_bytes: int = COPIES_BYTES
) -> None:
    """`optimizer.step()`, without effect on weights and states where held [] is not 0.

    Parameters are stepped in parts of about `max_bytes` of weights and states, which is how much
    memory the copies take. What an optimizer counts on the host goes on, as the schedule does.
    """
    mask_gradients(held, optimizer)
    groups = optimizer.param_groups
    parts = list(_parts(optimizer, max_bytes))
    try:
        for part in parts:
            if len(parts) > 1:
                optimizer.param_groups = part
            _step_part(held, optimizer)
    finally:
        optimizer.param_groups = groups
    if len(parts) > 1:  # what groups keep of their own: a count, say
        for group, last in zip(groups, parts[-1], strict=True):
            group.update({name: value for name, value in last.items() if name != "params"})


def mask_gradients(held: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Makes every gradient 0 where held [] is not 0: NaN would stay NaN in any product."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.masked_fill_(held > 0, 0)


def _step_part(held: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    weights = [(p, p.detach().clone()) for p in parameters if p.grad is not None]
    states = [
        (optimizer.state[p], name, value.clone())
        for p, _ in weights
        for name, value in _on_device(optimizer, p, held.device)
    ]
    new = [p for p, _ in weights if not optimizer.state.get(p)]
    optimizer.step()
    for parameter, was in weights:
        parameter.copy_(torch.where(held > 0, was, parameter))
    for state, name, was in states:
        now = state[name]
        kept = torch.where(held > 0, was, now)
        if now.shape == was.shape and now.dtype == was.dtype:
            now.copy_(kept)  # an optimizer may hold the very tensor elsewhere
        else:
            state[name] = kept
    for parameter in new:  # made just now, from gradients of 0 where held: averages are 0 still
        for name, value in _on_device(optimizer, parameter, held.device):
            if name in BEGINNINGS:
                value.masked_fill_(held > 0, BEGINNINGS[name])


def _on_device(
    optimizer: torch.optim.Optimizer, parameter: torch.Tensor, device: torch.device
) -> list[tuple[str, torch.Tensor]]:
    """The states of `parameter` that lie on `device`."""
    return [
        (name, value)
        for name, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, torch.Tensor) and value.device == device
    ]


def _parts(optimizer: torch.optim.Optimizer, max_bytes: int) -> Iterator[list[dict[str, Any]]]:
    """The groups with a run of their parameters each, all of them once."""
    part: list[dict[str, Any]] = [{**group, "params": []} for group in optimizer.param_groups]
    size = 0
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            tensors = [parameter, *optimizer.state.get(parameter, {}).values()]
            n_bytes = sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))
            if size and size + n_bytes > max_bytes:
                yield part
                part = [{**of, "params": []} for of in optimizer.param_groups]
                size = 0
            part[number]["params"].append(parameter)
            size += n_bytes
    yield part
