"""Chooses what was left on `auto`, so that the run fits the memory it is given.

The order of sacrifice: first what changes no result (smaller packs down to a comfortable size,
selective and then full checkpointing, activations on the host, packs down to the longest pair, a
smaller workspace for the log-probs), then what does: 8-bit and paged optimizer states, and last a
base held in 8 or 4 bits. The first that fits is taken; options that were given are never changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from .config import to_plain
from .errors import ConfigError, DataError
from .plan import Choice, Planner, Prediction, state_bytes
from .plan_device import show_bytes

AUTO = "auto"
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
    options = _options(planner)
    if memory is None:
        return planner.predict(_usual(planner, options))
    for precision in options["base_precision"]:
        for optim in options["optim"]:
            start = Choice(1, optim=optim, base_precision=precision)
            if planner.least_static(start) > memory:
                continue
            for choice, floor in _exact_sacrifices(planner, start, options):
                found = _largest_packs(planner, choice, floor, memory)
                if found is not None:
                    return found
    raise _impossible(planner, options, memory)


def _options(planner: Planner) -> dict[str, list]:
    """Each option's values in the order of sacrifice: a given one has but itself."""
    args, job = planner.job.args, planner.job
    checkpointing = list(CHECKPOINTING)
    if getattr(job.spec.config.get_text_config(), "attn_logit_softcapping", None) is not None:
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
        tokens = max(UNBOUNDED.max_tokens_per_pack, planner.longest[1])
    return Choice(tokens, **{name: usual(name) for name in options})


def _exact_sacrifices(
    planner: Planner, start: Choice, options: dict[str, list]
) -> Iterator[tuple[Choice, int]]:
    """(choice without its packs, least tokens a pack) in the order of sacrifice."""
    longest = planner.longest[1]
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


def _largest_packs(planner: Planner, choice: Choice, floor: int, memory: int) -> Prediction | None:
    """The prediction with the largest packs from `floor` tokens on that fits, if any does.

    Memory grows nearly in proportion to a pack's tokens, so a few straight lines find it.
    """
    given = planner.job.args.max_tokens_per_pack
    if given != AUTO:
        prediction = planner.predict(replace(choice, max_tokens_per_pack=given))
        return prediction if prediction.total <= memory else None
    low, high = floor, max(floor, min(planner.heaviest_step, MOST_TOKENS))

    def at(tokens: int) -> Prediction:
        return planner.predict(replace(choice, max_tokens_per_pack=tokens))

    best = at(low)
    if best.total > memory:
        return None
    above = at(high)
    if above.total <= memory:
        return above
    for _ in range(5):
        if high - low <= max(low // 16, 64):
            break
        slope = max(above.total - best.total, 1) / (high - low)
        tokens = low + int(0.98 * (memory - best.total) / slope)
        tokens = min(max(tokens // 64 * 64, low + 1), high - 1)
        tried = at(tokens)
        if tried.total <= memory:
            low, best = tokens, tried
        else:
            high, above = tokens, tried
    return best


def _impossible(planner: Planner, options: dict[str, list], memory: int) -> ConfigError | DataError:
    """What to say where nothing fits: the least, and what would do."""
    row, longest = planner.longest
    given = planner.job.args.max_tokens_per_pack
    tokens = longest if given == AUTO else given
    least = planner.predict(Choice(tokens, **{name: of[-1] for name, of in options.items()}))
    static = planner.least_static(least.choice)
    wants = f"the least that this run takes is {show_bytes(least.total)} ({describe(least.choice)})"
    ways = []
    freed = _freed(planner, options, longest)
    if freed.total < least.total:
        fits = "fits" if freed.total <= memory else f"takes {show_bytes(freed.total)}"
        changed = [
            name for name in options if getattr(freed.choice, name) != getattr(least.choice, name)
        ]
        changed += ["max_tokens_per_pack"] if tokens > longest else []
        ways.append(f"with {', '.join(changed)} on auto it {fits}")
    if static < memory:
        per_token = _dynamic(least) / max(least.pack_tokens, 1)
        room = int((memory - static) / per_token)
        ways.append(f"pairs of up to about {room} tokens would fit: see max_length")
        if tokens == longest and planner.job.rows_are_real:
            return DataError(
                f"row {row}: its pair of {longest} tokens can't fit in {show_bytes(memory)}; "
                f"{wants}; {'; '.join(ways)}"
            )
    else:
        ways.append(f"weights and optimizer alone take {show_bytes(static)}")
    return ConfigError(f"'gpu_memory' {show_bytes(memory)}: {wants}; {'; '.join(ways)}")


def _dynamic(prediction: Prediction) -> int:
    fixed = ("weights", "adapters", "optimizer states", "reference")
    return sum(size for kind, size in prediction.memory.items() if kind not in fixed)


def _freed(planner: Planner, options: dict[str, list], longest: int) -> Prediction:
    """The least that the run would take with every option on `auto`."""
    job = planner.job
    choice = Choice(longest, True, True, OPTIMIZERS[-1], None, WORKSPACES[-1])
    if not job.device.cuda or state_bytes(options["optim"][-1], ((4096, 8192),))[0] == 0:
        choice = replace(choice, optim=options["optim"][-1])
    precision = options["base_precision"][-1]
    if precision is None and job.spec.peft_config is not None and job.spec.bits is None:
        precision = PRECISIONS[-1]
    return planner.predict(replace(choice, base_precision=precision))


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
