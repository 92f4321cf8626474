"""What a plan knows of a device: its memory, its rates, and how long a step takes at least.

Rates are the makers' figures for dense bf16 matrix products and for memory; a roofline over them
is a lower bound on time, not a promise.
"""

from __future__ import annotations

import math
import re
import time
from dataclasses import dataclass

import torch

from .errors import ConfigError, did_you_mean

GIB = 2**30
CUDA_CONTEXT = GIB // 2  # the context and the libraries' code
HOST_BYTES_PER_SECOND = 25e9  # PCIe 4.0 x16, as it is reached


@dataclass(frozen=True)
class Device:
    """memory: bytes, None if unknown. flops: bf16 products, per second; bandwidth: bytes per
    second; None if unknown."""

    name: str
    cuda: bool
    memory: int | None = None
    flops: float | None = None
    bandwidth: float | None = None


# name: memory in GiB as drivers report it, bf16 TFLOP/s without sparsity, memory in GB/s.
DEVICES = {
    "B200": (178.0, 2250, 8000),
    "H200": (139.8, 989, 4800),
    "H100 PCIe": (79.1, 756, 2000),
    "H100": (79.1, 989, 3350),
    "A100-40GB": (39.4, 312, 1555),
    "A100": (79.1, 312, 2039),
    "L40S": (44.4, 362, 864),
    "L4": (22.0, 121, 300),
    "A10G": (22.0, 70, 600),
    "A10": (22.0, 125, 600),
    "RTX 6000 Ada": (47.4, 364, 960),
    "RTX A6000": (47.4, 155, 768),
    "RTX 5090": (31.4, 209, 1792),
    "RTX 4090": (23.5, 165, 1008),
    "RTX 3090": (23.6, 71, 936),
}


def known_device(name: str) -> Device:
    """The device of the table called `name`. Raises `ConfigError` with the nearest name."""
    for known, (memory, teraflops, bandwidth) in DEVICES.items():
        if _plain(known) == _plain(name):
            return Device(known, True, int(memory * GIB), teraflops * 1e12, bandwidth * 1e9)
    raise ConfigError(
        f"'--gpu' {name!r} is not in the table{did_you_mean(name, DEVICES)}; it has "
        f"{', '.join(DEVICES)}; for another give --gpu_memory and --flops"
    )


def nearest_in_memory(memory: int) -> Device:
    """The device of the table whose memory is nearest to `memory` bytes; of equals the slowest."""
    distance = {name: abs(row[0] * GIB - memory) for name, row in DEVICES.items()}
    return known_device(min(DEVICES, key=lambda name: (distance[name], DEVICES[name][1])))


def cpu_flops() -> float:
    """fp32 operations per second of this machine's products, timed on one of a few milliseconds."""
    n = 512
    a = torch.ones(n, n)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - began)
    return 2 * n**3 / min(seconds)


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name.lower())


def present_device(device: torch.device) -> Device:
    """The machine at hand: for a GPU the memory that is free or ours, and the table's rates."""
    if device.type != "cuda":
        return Device("this CPU", False)
    properties = torch.cuda.get_device_properties(device)
    name = properties.name
    rates: tuple[float | None, float | None] = (None, None)
    for known, (_, teraflops, bandwidth) in DEVICES.items():
        if all(word in _plain(name) for word in map(_plain, known.split())):
            rates = (teraflops * 1e12, bandwidth * 1e9)
            break
    free, total = torch.cuda.mem_get_info(device)  # others may be on it
    ours = torch.cuda.memory_reserved(device) + CUDA_CONTEXT
    return Device(name, True, min(total, free + ours), *rates)


def show_bytes(size: int, up: bool = False) -> str:
    """Three digits or so, in GiB, MiB or KiB; up: never less than `size`, as a budget has to be."""
    for unit, factor in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor:
            if up:
                return f"{math.ceil(100 * size / factor) / 100:.2f} {unit}"
            return f"{size / factor:.2f} {unit}"
    return f"{size} B"


def step_seconds(
    device: Device, *, flops: float, bytes_moved: float, host_bytes: float
) -> float | None:
    """The least time a step can take: the longest of its products, its traffic with memory and,
    under offload, its traffic with the host. None without the device's rate."""
    if device.flops is None:
        return None
    times = [flops / device.flops, host_bytes / HOST_BYTES_PER_SECOND]
    if device.bandwidth is not None:
        times.append(bytes_moved / device.bandwidth)
    return max(times)
