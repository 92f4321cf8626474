"""Compiles the Triton kernels ahead of time, without a GPU, and prints what each one takes.

    python -m tests.kernels.aot [--arch sm80 sm90 sm100] [--scope quick|all]

One JSON line per kernel: registers, stack frame, shared memory, and which instructions are in it.
Run it without TRITON_INTERPRET, which replaces the compiler. `test_aot.py` runs it.
"""

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastdpo_kernels import linear_logps_triton_dw as dw
from fastdpo_kernels import linear_logps_triton_exact as exact
from fastdpo_kernels import linear_logps_triton_gemm as gemm
from fastdpo_kernels import linear_logps_triton_math as math
from fastdpo_kernels import linear_logps_triton_rows as rows
from fastdpo_kernels import preference_loss_triton as preference
from fastdpo_kernels import tiles

# Shared memory that one program may have, in bytes.
SHARED_LIMIT = {"sm80": 166912, "sm86": 101376, "sm90": 232448, "sm100": 232448, "sm120": 101376}

POINTERS = {
    "targets_ptr": "*i64",
    "order_ptr": "*i64",
    "pairs_ptr": "*i64",
    "target_ptr": "*i32",
    "sorted_ptr": "*i32",
    "flag_ptr": "*i32",
    "any_flag_ptr": "*i32",
    "cu_ptr": "*i32",
    "top1_ptr": "*i8",
}
OPERANDS = ("hidden_ptr", "weight_ptr", "adapter_ptr", "bias_ptr", "dw_ptr", "grad_ptr")
TYPES = {"bf16": tl.bfloat16, "fp32": tl.float32}
FLOATS = ("logit_scale", "cap", "slope", "beta", "label_smoothing")
ALIGNED = (  # multiples of 16
    "D", "d_weight", "stride_hidden", "stride_weight", "stride_adapter", "stride_e",
    "stride_product",
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A kernel with its constants. `default`: the first row of its table, so it must not spill."""

    label: str
    kernel: Any
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3
    dtype: str = "bf16"
    default: bool = True
    registers: int | None = None  # at most, where the launcher says so
    aligned: bool = True  # sizes and strides are multiples of 16


# With a bias or not, a softcap or not: what each kind of table serves.
EPILOGUES = {
    "half": [(False, False)],
    "rich": [(True, True), (True, False), (False, True)],
    "stats": [(True, True), (False, False)],
    "float32": [(True, True), (False, False)],
}


def gemm_entries(arch: str, scope: str) -> Iterator[Entry]:
    """Every row of the tables, with each thing the epilogue can be asked for.

    quick: of each table its default row and the one for operands that are not aligned, with the
    epilogue that takes the most registers.
    """
    for kind, table in tiles.TABLES[arch].items():
        unaligned = next(row for row in table if row.loads == "pointer")
        for row in table:
            default = row in (table[0], unaligned)
            for use in ("store", "sums", "scaled"):
                if kind == "stats" and use == "scaled":
                    continue  # statistics belong to the forward pass
                for has_bias, softcap in EPILOGUES[kind]:
                    entry = gemm_entry(kind, row, use, has_bias, softcap, default)
                    main = kind == "half" and row == table[0]
                    heavy = use == "store" and (has_bias, softcap) == EPILOGUES[kind][0]
                    if scope == "all" or main or (heavy and default):
                        yield entry
                    if scope == "all" and row == unaligned:
                        odd = entry.constants | {"EVEN_K": False}
                        label = entry.label + " odd"
                        yield replace(
                            entry, label=label, constants=odd, aligned=False, registers=255
                        )


def gemm_entry(
    kind: str, row: tiles.Gemm, use: str, has_bias: bool, softcap: bool, default: bool
) -> Entry:
    dtype = "fp32" if kind == "float32" else "bf16"
    constants: dict[str, Any] = {
        "BLOCK_N": row.block_n,
        "BLOCK_V": row.block_v,
        "BLOCK_K": row.block_k,
        "SOFTCAP": softcap,
        "STATS": kind == "stats",
    }
    described = row.loads != "pointer"
    if described:
        constants |= {"E_DTYPE": tl.bfloat16, "PERSISTENT": row.loads == "persistent"}
    else:
        constants |= {"EVEN_K": True}
    if not has_bias:
        constants["bias_ptr"] = None
    constants["partial_ptr" if use == "scaled" else "row_scale_ptr"] = None
    if use == "sums":
        constants["e_desc" if described else "e_ptr"] = None
    kernel = gemm._exp_gemm_descriptor_kernel if described else gemm._exp_gemm_kernel
    label = f"{kind} {use}{' bias' if has_bias else ''}{' softcap' if softcap else ''} {row.loads}"
    label += f" {row.block_n}x{row.block_v}x{row.block_k}"
    return Entry(label, kernel, constants, row.warps, row.stages, dtype, default)


def small_entries(scope: str) -> Iterator[Entry]:
    """The kernels without a table."""
    for dtype, full in itertools.product(("bf16", "fp32"), (True, False)):
        if full or scope == "all":  # fp32 computes E again this way by default
            yield Entry(
                f"epilogue alone scaled {dtype}{' full' if full else ''}", gemm._exp_tile_kernel,
                {"BLOCK_N": gemm.TILE_ROWS, "BLOCK_V": tiles.LIBRARY.block_v, "STATS": False}
                | {"partial_ptr": None, "SOFTCAP": full} | ({} if full else {"bias_ptr": None}),
                gemm.TILE_WARPS, dtype=dtype,
            )  # fmt: skip
        if scope == "quick" and (dtype == "fp32" or not full):
            continue
        no_bias = {} if full else {"bias_ptr": None}
        no_adapter = {} if full else {"adapter_ptr": None}
        stats = ("entropy_ptr", "mean_ptr", "top1_ptr", "squares_ptr")
        no_stats = {} if full else dict.fromkeys(stats)
        flags = {"SOFTCAP": full}
        tag = f" {dtype}{' full' if full else ''}"
        yield Entry(
            "epilogue alone" + tag, gemm._exp_tile_kernel,
            {"BLOCK_N": gemm.TILE_ROWS, "BLOCK_V": tiles.LIBRARY.block_v, "STATS": full}
            | {"row_scale_ptr": None} | flags | no_bias, gemm.TILE_WARPS, dtype=dtype,
        )  # fmt: skip
        yield Entry(
            "target logits" + tag, rows._target_logits_kernel,
            {"BLOCK_N": 4, "BLOCK_K": 512} | flags | no_bias | no_adapter, dtype=dtype,
        )  # fmt: skip
        yield Entry(
            "row sums" + tag, rows._row_sums_kernel,
            {"BLOCK_N": 32, "BLOCK_T": 64, "STATS": full} | no_stats,
        )  # fmt: skip
        yield Entry(
            "hidden grad" + tag, rows._hidden_grad_kernel,
            {"BLOCK_N": 8, "BLOCK_K": rows.GRAD_WIDTH[full], "FACTORED": full}
            | flags | no_adapter, dtype=dtype,
        )  # fmt: skip
        yield Entry(
            "dW operand" + tag, dw._dw_operand_kernel,
            {"BLOCK_N": 4, "BLOCK_K": 512, "ROUNDED": TYPES[dtype], "PARTS": 1 + full}
            | ({} if full else {"factor_ptr": None}), dtype=dtype,
        )  # fmt: skip
        yield Entry(
            "dW target rows" + tag, dw._target_rows_kernel,
            {"BLOCK_R": 8, "BLOCK_K": 512, "ROUNDED": TYPES[dtype], "PARTS": 1 + full}
            | ({} if full else {"db_ptr": None}), dtype=dtype,
        )  # fmt: skip
        if full:
            yield Entry(
                f"bias target rows {dtype}", dw._target_rows_kernel,
                {"BLOCK_R": 8, "BLOCK_K": 16, "ROUNDED": TYPES[dtype], "dw_ptr": None},
                dtype=dtype,
            )  # fmt: skip
        yield Entry(
            "column sums" + tag, dw._column_sums_kernel,
            {"BLOCK_R": 64, "BLOCK_V": 64, "ADD": full}
            | ({} if full else {"factor_ptr": None}), dtype=dtype,
        )  # fmt: skip
        width = 4 if dtype == "fp32" else 2
        blocks = exact.BLOCKS[width] | flags | no_bias | no_adapter
        options: dict[str, Any] = {
            "warps": exact.OPTIONS["num_warps"],
            "stages": exact.OPTIONS["num_stages"],
            "registers": exact.OPTIONS["maxnreg"],
        }
        yield Entry("exact sums" + tag, exact._exact_sums_kernel, blocks, dtype=dtype, **options)
        more = {
            "BLOCK_D": exact.BLOCK_D[width],
            "BLOCK_S": exact.MOST_SPLITS,
            "STATS": full,
            "FACTORED": full,
        }
        more |= blocks | no_stats | ({} if full else {"e_ptr": None})
        yield Entry("exact rows" + tag, exact._exact_rows_kernel, more, dtype=dtype, **options)
    for loss in preference.LOSSES:
        yield Entry(
            f"preference loss {loss}", preference._preference_loss_kernel,
            {"LOSS": preference.LOSSES[loss], "BLOCK": preference.BLOCK, "ref_logps_ptr": None},
            dtype="fp32",
        )  # fmt: skip


def signature(entry: Entry) -> dict[str, str]:
    """Types of the kernel's arguments, by name."""
    e_dtype = "fp32" if entry.dtype == "fp32" else "bf16"
    blocks = entry.constants
    types = {}
    for name in entry.kernel.arg_names:
        if name in blocks:
            types[name] = "constexpr"
        elif name.endswith("_desc"):
            second = "BLOCK_V" if name == "e_desc" else "BLOCK_K"
            first = "BLOCK_V" if name == "weight_desc" else "BLOCK_N"
            types[name] = f"tensordesc<bf16[{blocks[first]}, {blocks[second]}]>"
        elif name in POINTERS:
            types[name] = POINTERS[name]
        elif name in OPERANDS or (name == "out_ptr" and "hidden_ptr" in entry.kernel.arg_names):
            types[name] = f"*{entry.dtype}"
        elif name == "e_ptr":
            types[name] = f"*{e_dtype}"
        elif name.endswith("_ptr"):
            types[name] = "*fp32"
        elif name in FLOATS:
            types[name] = "fp32"
        else:
            types[name] = "i64" if name.startswith("stride") else "i32"
    return types


def compile_entry(entry: Entry, arch: str) -> dict[str, Any]:
    types = signature(entry)
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(entry.kernel.arg_names)
        if entry.aligned
        and (types[name].startswith("*") or (name in ALIGNED and name not in entry.constants))
    }
    source = ASTSource(entry.kernel, types, entry.constants, aligned)
    started = time.monotonic()
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", int(arch.removeprefix("sm")), 32),
        options={
            "num_warps": entry.warps,
            "num_stages": entry.stages,
            "maxnreg": entry.registers,
            **math.FUSE,
        },
    )
    registers, stack = resources(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    return {
        "arch": arch,
        "label": entry.label,
        "warps": entry.warps,
        "stages": entry.stages,
        "default": entry.default,
        "registers": registers,
        "stack": stack,
        "shared": compiled.metadata.shared,
        "shared_limit": SHARED_LIMIT[arch],
        "instructions": [
            name
            for name, mark in (
                ("wgmma", "wgmma.mma_async"),
                ("tcgen05", "tcgen05.mma"),
                ("mma", "mma.sync"),
                ("tma", "cp.async.bulk.tensor"),
            )
            if mark in ptx
        ],
        "seconds": round(time.monotonic() - started, 1),
    }


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread, and bytes of stack frame, by the bundled cuobjdump."""
    tool = Path(str(triton.__file__)).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise ValueError(f"cuobjdump said nothing about registers: {text}")
    return int(found[1]), int(found[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", nargs="+", default=["sm80", "sm90", "sm100"])
    parser.add_argument("--scope", choices=("quick", "all"), default="quick")
    options = parser.parse_args()
    for arch in options.arch:
        small = small_entries(options.scope) if options.scope == "all" or arch == "sm90" else ()
        for entry in (*gemm_entries(arch, options.scope), *small):
            print(json.dumps(compile_entry(entry, arch)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
