"""Chooses what was left on `auto`, so that the run fits the memory it is given.

The order of sacrifice: first what changes no result (smaller packs down to a comfortable size,
selective and then full checkpointing, activations on the host, packs down to the longest pair, a
smaller workspace for the log-probs), then what does: 8-bit and paged optimizer states, and last a
base held in 8 or 4 bits. The first that fits is taken; options that were given are never changed.

Smaller packs do not always take less: a step of several holds the sums of its gradients while the
later ones run, in fp32. So every choice is tried with a step in one pack as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from .checkpointing import why_not_selective
from .config import to_plain
from .options import AUTO
from .plan import Choice, Planner, Prediction

COMFORTABLE = 4096  # tokens that keep a GPU busy; below, checkpointing costs less than small packs
MOST_TOKENS = 16384  # nothing is gained beyond
UNBOUNDED = Choice(8192)  # what `auto` means where no memory was given: the options' old defaults
CHECKPOINTING = (False, "selective", True)
WORKSPACES = (256 * 2**20, 64 * 2**20, 16 * 2**20)
OPTIMIZERS = ("adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit")
PRECISIONS = ("bf16", "8bit", "4bit")


def choose(planner: Planner, memory: int | None) -> Prediction:
    """The prediction for the first choice within `memory` bytes; None: for the usual one.

    Raises `ConfigError` with the least that the run needs and what would fit; `DataError` where a
    single pair is what can't fit, naming its row.
    """
    options = options_of(planner)
    if memory is None:
        return planner.predict(_usual(planner, options))
    tried: list[Prediction] = []
    for precision in options["base_precision"]:
        for optim in options["optim"]:
            start = Choice(1, optim=optim, base_precision=precision)
            if planner.least_static(start) > memory:
                continue
            for choice, floor in _exact_sacrifices(planner, start, options):
                found = _largest_packs(planner, choice, floor, memory, tried)
                if found is not None:
                    return found
    from .plan_advice import impossible

    tried = [*least_candidates(planner, options), *tried]
    raise impossible(planner, min(tried, key=lambda one: one.total), memory)


def options_of(planner: Planner) -> dict[str, list]:
    """Each option's values in the order of sacrifice: a given one has but itself."""
    args, job = planner.job.args, planner.job
    checkpointing = list(CHECKPOINTING)
    if why_not_selective(job.spec.config, job.attention) is not None:
        checkpointing.remove("selective")
    elif args.compile != "off":  # compiled layers hide attention's output: see save_memory
        checkpointing.remove("selective")
    ladders = {
        "gradient_checkpointing": checkpointing,
        "activation_offloading": [False, True] if job.device.cuda else [False],
        "optim": list(OPTIMIZERS) if job.device.cuda else list(OPTIMIZERS[:1]),
        "logps_workspace_bytes": list(WORKSPACES),
    }
    given = to_plain(args)
    options: dict[str, list] = {
        name: values if given[name] == AUTO else [given[name]] for name, values in ladders.items()
    }
    options["base_precision"] = (
        list(PRECISIONS) if job.base_precision == AUTO else [job.base_precision]
    )
    return options


def _usual(planner: Planner, options: dict[str, list]) -> Choice:
    def usual(name: str):
        value = getattr(UNBOUNDED, name)
        return value if value in options[name] else options[name][0]

    tokens = planner.job.args.max_tokens_per_pack
    if tokens == AUTO:
        tokens = max(UNBOUNDED.max_tokens_per_pack, _fewest_tokens(planner))
    return Choice(tokens, **{name: usual(name) for name in options})


def _fewest_tokens(planner: Planner) -> int:
    """The smallest packs that a run can have: its longest pair's, or one that holds a step."""
    if planner.job.args.optimizer_in_backward:  # which takes no step of several packs
        return planner.heaviest_step
    return planner.longest[1]


def least_candidates(planner: Planner, options: dict[str, list]) -> Iterator[Prediction]:
    """What may take least: the last value of each option, in the smallest packs or in one."""
    last = Choice(1, **{name: values[-1] for name, values in options.items()})
    given = planner.job.args.max_tokens_per_pack
    lengths = {_fewest_tokens(planner), planner.heaviest_step} if given == AUTO else {given}
    for tokens in sorted(lengths):
        yield planner.predict(replace(last, max_tokens_per_pack=tokens))


def _exact_sacrifices(
    planner: Planner, start: Choice, options: dict[str, list]
) -> Iterator[tuple[Choice, int]]:
    """(choice without its packs, least tokens a pack) in the order of sacrifice."""
    longest = _fewest_tokens(planner)
    comfortable = max(longest, min(COMFORTABLE, planner.heaviest_step))
    workspaces = options["logps_workspace_bytes"]
    offloads = options["activation_offloading"]
    choice = replace(start, activation_offloading=offloads[0], logps_workspace_bytes=workspaces[0])
    for how in options["gradient_checkpointing"]:
        choice = replace(choice, gradient_checkpointing=how)
        yield choice, comfortable
    if len(offloads) > 1:
        choice = replace(choice, activation_offloading=offloads[-1])
        yield choice, comfortable
    for workspace in workspaces:
        yield replace(choice, logps_workspace_bytes=workspace), longest


def _largest_packs(
    planner: Planner, choice: Choice, floor: int, memory: int, tried: list[Prediction]
) -> Prediction | None:
    """The prediction with the largest packs from `floor` tokens on that fits, if any does; else
    that of a step in one pack, if it fits. Whatever is predicted joins `tried`.

    Memory grows nearly in proportion to a pack's tokens, so a few straight lines find it.
    """

    def at(tokens: int) -> Prediction:
        tried.append(planner.predict(replace(choice, max_tokens_per_pack=tokens)))
        return tried[-1]

    given = planner.job.args.max_tokens_per_pack
    if given != AUTO:
        prediction = at(given)
        return prediction if prediction.total <= memory else None
    whole = planner.heaviest_step
    low, high = floor, max(floor, min(whole, MOST_TOKENS))
    best = at(low)
    if best.total > memory:
        if low >= whole or best.total - planner.most_saved_by_one_pack(choice) > memory:
            return None
        one = at(whole)
        return one if one.total <= memory else None
    above = at(high)
    if above.total <= memory:
        return above
    for _ in range(5):
        if high - low <= max(low // 16, 64):
            break
        slope = max(above.total - best.total, 1) / (high - low)
        tokens = low + int(0.98 * (memory - best.total) / slope)
        tokens = min(max(tokens // 64 * 64, low + 1), high - 1)
        middle = at(tokens)
        if middle.total <= memory:
            low, best = tokens, middle
        else:
            high, above = tokens, middle
    return best


def describe(choice: Choice) -> str:
    """The choice in the words of a config file."""
    shown: dict[bool | str, str] = {False: "none", True: "full", "selective": "selective"}
    parts = [
        f"max_tokens_per_pack {choice.max_tokens_per_pack}",
        f"gradient_checkpointing {shown[choice.gradient_checkpointing]}",
        f"activation_offloading {str(choice.activation_offloading).lower()}",
        f"optim {choice.optim}",
    ]
    if choice.base_precision is not None:
        parts.append(f"base_precision {choice.base_precision}")
    parts.append(f"logps_workspace_bytes {choice.logps_workspace_bytes}")
    return ", ".join(parts)
