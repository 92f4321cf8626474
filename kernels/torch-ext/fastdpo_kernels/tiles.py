"""How `linear_logps_triton` divides its work: tiles by architecture, chunks by size and workspace.

A `Gemm` is one row of a table; a `Variant` adds what else can be chosen; a `Plan` is a variant
fitted to a `Problem` and its workspace, by a roofline. What runs fastest is for `tuning.py` to
measure. No kernel is known here.
"""

import functools
import itertools
import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Gemm:
    """A tile of the exponential GEMM: rows of hidden x columns of the vocabulary x depth.

    `loads`: "pointer"; "descriptor" (TMA); "persistent" (TMA, one program per multiprocessor).
    `group`: row blocks that programs in flight span, so that they share operands in L2.
    """

    block_n: int
    block_v: int
    block_k: int
    warps: int
    stages: int
    group: int = 16
    loads: str = "pointer"


@dataclass(frozen=True)
class Variant:
    """`library`: a library GEMM writes fp32 products and the epilogue is a kernel of its own.
    `share`: part of the workspace that E may take. `split`: whether the second GEMM may sum parts
    of the vocabulary apart, where its output has too few tiles for the device."""

    gemm: Gemm
    library: bool = False
    share: float = 1.0
    split: bool = True


@dataclass(frozen=True)
class Plan:
    """A variant with its chunk of tokens (`rows`) and of the vocabulary (`cols`).

    `splits`: the parts of a chunk that the second GEMM sums apart. `block`: rows of dW whose
    vectors exist at once, all of them or some chunks."""

    variant: Variant
    rows: int
    cols: int
    splits: int
    block: int
    bytes: int  # of the buffer that a call works in
    beside: int  # ... and of what it holds beside that and its results: vectors, E


@dataclass(frozen=True)
class Device:
    """`flops` (16-bit, dense) and `bandwidth` per second are the vendor's; only ratios matter."""

    name: str
    arch: str
    sms: int
    flops: float
    bandwidth: float


# The first row of each table is the default. Kinds: "half" 16-bit operands; "rich" the same with a
# bias or a softcap in the epilogue; "stats" with all statistics (these two take more registers, so
# they get smaller tiles); "float32" multiplied as fp32. Rows with descriptors are passed over where
# operands are not aligned to 16 bytes: every table has a "pointer" row. From sm_90 on the first of
# those does not spill at sizes that divide by nothing either, whose masks take registers.
_AMPERE = {
    "half": (
        Gemm(128, 128, 32, 8, 4),
        Gemm(128, 256, 32, 8, 3),
        Gemm(128, 128, 32, 4, 4),  # needs a stack frame under Triton 3.7
    ),
    "rich": (Gemm(128, 128, 32, 8, 4), Gemm(64, 128, 32, 4, 4)),
    "stats": (Gemm(64, 64, 64, 8, 3),),
    "float32": (Gemm(64, 64, 32, 4, 3), Gemm(128, 64, 16, 8, 3)),
}
_HOPPER = {
    "half": (
        Gemm(128, 256, 64, 8, 3, loads="persistent"),
        Gemm(128, 256, 64, 8, 4, loads="descriptor"),
        Gemm(128, 128, 64, 4, 3, loads="descriptor"),
        Gemm(128, 64, 32, 8, 4),
        Gemm(128, 128, 32, 8, 4),
    ),
    "rich": (
        Gemm(128, 128, 64, 8, 3, loads="descriptor"),
        Gemm(128, 128, 64, 8, 3, loads="persistent"),
        Gemm(128, 64, 64, 8, 3),  # by pointers 128 columns need a stack frame under some Tritons
    ),
    "stats": (Gemm(128, 64, 64, 8, 3, loads="descriptor"), Gemm(64, 64, 64, 8, 3)),
    "float32": _AMPERE["float32"],
}
_BLACKWELL = _HOPPER | {
    "half": (  # the persistent loop beside tcgen05's accumulator needs a stack frame at this tile
        Gemm(128, 256, 64, 8, 4, loads="descriptor"),
        Gemm(128, 128, 64, 8, 3, loads="persistent"),
        Gemm(128, 128, 64, 4, 3, loads="descriptor"),
        Gemm(128, 64, 32, 8, 4),
        Gemm(128, 128, 32, 8, 4),
    ),
}
TABLES: dict[str, dict[str, tuple[Gemm, ...]]] = {
    "sm80": _AMPERE,
    "sm86": _AMPERE,
    "sm90": _HOPPER,
    "sm100": _BLACKWELL,
    "sm120": _AMPERE
    | {  # 128 x 128 with a softcap needs a stack frame there
        "rich": (Gemm(64, 128, 32, 4, 4), Gemm(128, 128, 32, 8, 4)),
    },
    "interpreter": {
        kind: (Gemm(32, 64, 32, 4, 2), Gemm(32, 64, 32, 4, 2, loads="persistent"))
        for kind in ("half", "rich", "stats", "float32")
    },
}

# Where a library GEMM does the products: what the epilogue's kernel takes at a time (of the rows it
# takes fewer; 16 is what chunks of rows are aligned to).
LIBRARY = Gemm(16, 1024, 0, 4, 1)

# flops per multiprocessor and second, bytes per second
_SPEEDS = {
    "sm80": (2.9e12, 1.8e12),
    "sm86": (1.2e12, 0.9e12),
    "sm90": (6.5e12, 3.8e12),
    "sm100": (14e12, 7.5e12),
    "sm120": (2.6e12, 1.6e12),
}
_LAUNCH = 6e-6  # seconds between two kernels
_BLOCK_LAUNCHES = 24  # of what a block of dW's rows needs for its vectors and target rows


@functools.cache
def describe(index: int | None) -> Device:
    """The CUDA device with this index, or (None) Triton's interpreter."""
    if index is None:
        return Device("interpreter", "interpreter", 4, 1e9, 1e9)
    properties = torch.cuda.get_device_properties(index)
    major, minor = properties.major, properties.minor
    arch = {8: "sm80" if minor == 0 else "sm86", 9: "sm90", 10: "sm100"}.get(major, "sm120")
    flops, bandwidth = _SPEEDS[arch]
    sms = properties.multi_processor_count
    return Device(properties.name, arch, sms, flops * sms, bandwidth)


@dataclass(frozen=True)
class Problem:
    """What is to be done, as far as the division of work depends on it.

    `work` is "sums" (log-probs alone), "hidden" (with d hidden) or "weight" (dW and the bias's
    gradient, in the backward pass). `float32`: the operands' dtype, else 16-bit. `*_copy`: bytes
    per row or column of operands that are converted chunk by chunk. `kept`: E stays from the
    forward pass ("weight": is there already). `direct`: dW needs no fp32 accumulator as long as all
    rows are in one chunk. `rich`: bias or softcap. `fields`: partial results per row and tile.
    `d_trained`: columns of dW, those of an adapter where there is one, 0 where the bias alone is
    trained.
    """

    work: str
    n: int
    d: int
    d_trained: int
    v: int
    float32: bool
    rich: bool
    fields: int
    row_copy: int
    col_copy: int
    kept: bool
    direct: bool
    aligned: bool
    workspace: int

    @property
    def kind(self) -> str:
        if self.float32:
            return "float32"
        return "stats" if self.fields > 1 else "rich" if self.rich else "half"

    @property
    def e_bytes(self) -> int:
        return 4 if self.float32 else 2


def kept_bytes(problem: Problem) -> int:
    """Bytes of E over the whole vocabulary."""
    return problem.n * round_up(problem.v, 8) * problem.e_bytes


def table(problem: Problem, device: Device) -> tuple[Gemm, ...]:
    """The tiles that may serve, the default first."""
    rows = TABLES[device.arch][problem.kind]
    described = problem.aligned and not problem.float32
    return tuple(row for row in rows if described or row.loads == "pointer")


def default_variant(problem: Problem, device: Device) -> Variant:
    """What is used where nothing was measured.

    fp32 takes the library's GEMM: Triton's IEEE fp32 dot uses no tensor core and pipelines poorly.
    """
    if problem.float32 and device.arch != "interpreter":
        return Variant(LIBRARY, library=True)
    return Variant(table(problem, device)[0])


MOST_SPLITS = 8


def _splits(problem: Problem, device: Device, rows: int) -> int:
    """Parts that give every multiprocessor an output tile of 128 x 256 in the second GEMM."""
    if problem.work != "hidden":
        return 1
    tiles = math.ceil(rows / 128) * math.ceil(problem.d / 256)
    return max(1, min(MOST_SPLITS, device.sms // tiles))


# Bytes for each row of a block: its target and factor, and torch.sort's work on targets.
_VECTORS = 64


def _blocks(problem: Problem, rows: int) -> tuple[int, ...]:
    """Rows of dW that may have their vectors at once, the better first: all if those take little
    of the workspace, else whole chunks of `rows`; one chunk at least."""
    if problem.work != "weight":
        return (rows,)
    most = problem.workspace // 4 // _VECTORS
    better = problem.n if problem.n <= most else most // rows * rows
    return (max(better, rows), rows)


class TooSmall(ValueError):
    """No chunks of `problem` fit its workspace; those of `least` bytes would."""

    def __init__(self, problem: Problem, least: int):
        self.least = least
        super().__init__(
            f"linear_logps: workspace_bytes={problem.workspace} is too small for N={problem.n}, "
            f"D={problem.d}, V={problem.v}: the smallest chunks take {least} bytes; raise "
            "workspace_bytes to that"
        )


@functools.lru_cache(maxsize=4096)
def plan(problem: Problem, variant: Variant, device: Device) -> Plan:
    """Fits the variant: the chunks that cost least by a roofline, within the workspace.

    Raises TooSmall if not even the smallest chunks fit.
    """
    best: tuple[float, Plan] | None = None
    least = None
    kept = kept_bytes(problem) if problem.kept else 0
    block_v = variant.gemm.block_v
    # What writes no tile's sums may take part of a tile.
    least_cols = min(block_v, 128) if problem.work == "weight" else block_v
    for rows in _steps(problem.n, variant.gemm.block_n, 16):
        for cols in _steps(problem.v, block_v, least_cols):
            if variant.share < 1 and cols > block_v:
                if rows * cols * problem.e_bytes > variant.share * problem.workspace:
                    continue
            for splits in {1, _splits(problem, device, rows) if variant.split else 1}:
                size = footprint(problem, variant, rows, cols, splits)
                for block in _blocks(problem, rows):
                    beside = kept + (_VECTORS * block if problem.work == "weight" else 0)
                    least = beside + size if least is None else min(least, beside + size)
                    if beside + size > problem.workspace:
                        continue
                    cost = roofline(problem, variant, device, rows, cols, splits)
                    if block < problem.n and problem.work == "weight":
                        apart = math.ceil(problem.v / cols) * math.ceil(problem.n / block)
                        cost += apart * _BLOCK_LAUNCHES * _LAUNCH
                    if best is None or cost < best[0]:
                        fitted = Plan(variant, rows, cols, splits, block, size, beside)
                        best = (cost, fitted)
                    break
    if best is None:
        assert least is not None
        raise TooSmall(problem, least)
    return best[1]


def footprint(problem: Problem, variant: Variant, rows: int, cols: int, splits: int) -> int:
    """Bytes of the buffer that chunks of `rows` x `cols` work in."""
    n_tiles = math.ceil(problem.v / variant.gemm.block_v)
    wide = round_up(cols, 8)
    size = rows * problem.row_copy + cols * problem.col_copy
    size += 16 * 256  # each buffer starts on a boundary of 256 bytes
    if problem.work == "weight":
        if rows < problem.n or not problem.direct:
            size += cols * problem.d_trained * 4
        size += rows * problem.d_trained * problem.e_bytes  # the operand
        if problem.kept:
            return size
    else:
        size += rows * 32  # six vectors of 4 bytes, and a copy of targets
        # At least what the exact kernels need of the same memory.
        size += rows * 4 * max(problem.fields * n_tiles, 5 * min(16, n_tiles))
        if problem.work == "hidden":
            size += rows * problem.d * 4 * splits
    if variant.library:
        size += rows * wide * 4
        in_place = problem.float32 or problem.work == "sums"
        size += 0 if in_place or problem.kept else rows * wide * problem.e_bytes
    elif problem.work != "sums" and not problem.kept:
        size += rows * wide * problem.e_bytes
    return size


def roofline(
    problem: Problem, variant: Variant, device: Device, rows: int, cols: int, splits: int
) -> float:
    """Seconds, roughly: what chunking costs in idle multiprocessors, repeated reads, launches."""
    chunks = math.ceil(problem.n / rows) * math.ceil(problem.v / cols)
    width = 4 if problem.float32 else 2
    library = ((128, 256, 1.0), (128, 128, 0.9), (64, 128, 0.75))  # tiles and how well they run
    own = ((variant.gemm.block_n, variant.gemm.block_v, 1.0),)

    def gemm(shapes, m: int, n: int, k: int, out_bytes: float, splits: int = 1) -> float:
        """Whole waves of tiles, and the bytes of operands and result; the two overlap in part."""
        flops = math.inf
        for tile_m, tile_n, rate in shapes:
            waves = math.ceil(-(-m // tile_m) * -(-n // tile_n) * splits / device.sms)
            flops = min(flops, waves * device.sms * 2 * tile_m * tile_n * k / splits / rate)
        moved = width * (m * k + n * k) + out_bytes
        return math.hypot(flops / device.flops, moved / device.bandwidth)

    cells = rows * cols
    seconds, launches = 0.0, 2
    if variant.library:
        seconds += gemm(library, rows, cols, problem.d, 4 * cells)
        seconds += (4 + width) * cells / device.bandwidth
        launches += 1
    elif not (problem.work == "weight" and problem.kept):
        stored = 0 if problem.work == "sums" else width * cells
        seconds += gemm(own, rows, cols, problem.d, stored)
    if problem.work == "hidden":
        again = 8 if cols < problem.v else 4  # accumulating reads what was there
        seconds += gemm(library, rows, problem.d, cols, again * rows * problem.d * splits, splits)
    elif problem.work == "weight":
        seconds += gemm(library, cols, problem.d_trained, rows, 4 * cols * problem.d_trained)
        seconds += 2 * width * rows * problem.d_trained / device.bandwidth  # the operand's copy
    return chunks * (seconds + launches * _LAUNCH)


# Even parts that a dimension is tried in; more only by doubling.
_PARTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48)


def _steps(size: int, block: int, least: int) -> list[int]:
    """Chunk sizes worth a look, the largest first: the whole, and even parts of it rounded up to
    whole blocks."""
    steps = {size}
    for count in itertools.chain(_PARTS, (64 << i for i in itertools.count())):
        part = round_up(math.ceil(size / count), block)
        if part < size:
            steps.add(part)
        if part <= block:
            break
    small = block
    while small // 2 >= least:  # below one block only where memory forces it
        small //= 2
        if small < size:
            steps.add(small)
    return sorted(steps, reverse=True)


def round_up(size: int, block: int) -> int:
    return -(-size // block) * block
