"""The kernels package stays self-contained, relative, and named so as to shadow nothing.

Reads sources; what the ops compute is tested elsewhere.
"""

import ast
import importlib.util
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "kernels" / "torch-ext" / "fastdpo_kernels"
OPS = ("linear_logps", "preference_loss", "linear_dpo_loss")


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(name, whether relative) of every import in a file, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from ((name, node.level > 0) for name in names)


def test_no_package_called_kernels():
    """It would shadow Hugging Face's, which transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "kernels" / "torch-ext" / "__init__.py").exists()


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_files_import_torch_triton_the_standard_library_and_each_other(path):
    for name, relative in imports(path):
        top = name.split(".")[0]
        if relative:
            assert (PACKAGE / f"{top}.py").exists(), f"{path.name} imports .{name}"
        else:
            assert top in ("torch", "triton") or top in sys.stdlib_module_names, name


def test_directions():
    """An op's file sees impls, late, reference and its own parts, its implementations when it runs;
    ops do not see each other, `linear_dpo_loss` aside; an implementation never sees its op."""
    seen = {p.stem: {n for n, relative in imports(p) if relative} for p in PACKAGE.glob("*.py")}
    parts = {
        "linear_logps_call", "linear_logps_graph", "linear_logps_lora", "linear_logps_targets"
    }  # fmt: skip
    assert seen["linear_logps"] == {"impls", "late", "reference"} | parts
    assert seen["preference_loss"] == {"impls", "late", "reference", "preference_loss_check"}
    assert seen["preference_loss_check"] == {"checks", "impls", "late"}
    others = {"linear_logps_call", "linear_logps_targets"}
    assert seen["linear_logps_graph"] == {"impls", "late"} | others
    part_of = {"linear_logps_eager", "linear_logps_torch_gemm"}  # their is_tiny, ieee_matmul
    assert seen["linear_logps_call"] == {"checks", "impls"} | part_of
    assert seen["linear_logps_lora"] == {"impls"} | others
    assert seen["linear_logps_targets"] == {"late"}
    assert seen["linear_dpo_loss"] == {"linear_logps", "preference_loss"} | (
        parts - {"linear_logps_graph", "linear_logps_lora"}
    )
    assert (
        seen["reference"] == {"impls"} and seen["impls"] == seen["late"] == seen["checks"] == set()
    )
    for name, used in seen.items():
        if "_torch" in name or "_triton" in name or name in ("tiles", "tuning"):
            assert not used & {*OPS, "reference"}, f"{name} imports {used}"


def test_importing_it_loads_no_triton():
    """Kernels are loaded when they run: a CPU user never waits for a compiler."""
    lazily = [p.stem for p in PACKAGE.glob("*.py") if "_triton" in p.stem]
    parts = tuple(f"linear_logps_{part}" for part in ("call", "eager", "graph", "lora"))
    for stem in ("__init__", "checks", "impls", "late", "reference", *parts, *OPS):
        for name, _ in imports(PACKAGE / f"{stem}.py"):
            assert name.split(".")[0] != "triton" and name not in lazily


def test_it_loads_under_any_name():
    """As the kernel hub loads it: from a path, under a name of its own."""
    spec = importlib.util.spec_from_file_location(
        "another_name", PACKAGE / "__init__.py", submodule_search_locations=[str(PACKAGE)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["another_name"] = module
    try:
        spec.loader.exec_module(module)
        logps = module.linear_logps(torch.randn(3, 4), torch.randn(5, 4), torch.arange(3))
        assert logps.shape == (3,)
        assert module.linear_logps.__module__ == "another_name.linear_logps"
    finally:
        for name in [n for n in sys.modules if n.split(".")[0] == "another_name"]:
            del sys.modules[name]


def test_the_builder_finds_the_package_by_its_name():
    build = tomllib.loads((ROOT / "kernels" / "build.toml").read_text())
    assert build["general"]["name"].replace("-", "_") == PACKAGE.name
    assert build["torch-noarch"] == {"pyext": ["py"]}
