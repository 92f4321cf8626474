"""What is shipped, what is pinned, and which way imports go."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from fnmatch import fnmatch
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "kernels" / "torch-ext" / "fastdpo_kernels"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_no_package_named_kernels():
    """It would shadow Hugging Face's `kernels`, which transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "kernels" / "torch-ext" / "__init__.py").exists()


# ---- directions of imports --------------------------------------------------------------------


def imports(path: Path, *, lazy: bool) -> set[str]:
    """Absolute names of the modules that `path` imports; `lazy`: also inside functions. What
    stands under `if TYPE_CHECKING` is not imported."""
    package = ".".join(path.relative_to(ROOT).with_suffix("").parts[:-1])
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not lazy:
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            found.update(f"{module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


def test_kernels_need_torch_and_triton_only():
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    for path in KERNELS.rglob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            else:
                continue
            assert {name.split(".")[0] for name in names} <= allowed, path.name


def test_fastdpo_has_no_import_circles():
    modules = {f"fastdpo.{path.stem}": path for path in (ROOT / "fastdpo").glob("*.py")}
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        parents = {".".join(found.split(".")[:2]) for found in imports(path, lazy=False)}
        graph[name] = parents & modules.keys() - {name}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert order.index("fastdpo.errors") < order.index("fastdpo.trainer")


def test_the_core_never_imports_the_edge():
    for path in (ROOT / "fastdpo").glob("*.py"):
        names = imports(path, lazy=True)
        edge = [n for n in names if n.startswith(("fastdpo.integrations", "tests", "benchmarks"))]
        assert not edge, f"{path.name} imports {edge}"
        peers = {"trl", "liger_kernel"}.intersection(n.split(".")[0] for n in names)
        if path.name == "body.py":  # takes liger's layers, in the function that was asked to
            assert "liger_kernel" not in {n.split(".")[0] for n in imports(path, lazy=False)}
            peers -= {"liger_kernel"}
        assert not peers, path.name


def test_the_readmes_tree_names_every_module():
    tree = (ROOT / "README.md").read_text().split("## Where things are")[1].split("```")[1]
    patterns = re.findall(r"[\w*]+\.py", tree)
    modules = {path.name for path in (ROOT / "fastdpo").glob("[!_]*.py")}
    named = {name for name in modules for pattern in patterns if fnmatch(name, pattern)}
    assert modules == named


def test_light_modules_import_nothing_heavy():
    """The options' files and what they need answer a misspelt option before torch is imported."""
    allowed = {"fastdpo", "yaml", *sys.stdlib_module_names}
    light = (
        *("errors", "options", "option_names", "unsupported", "script_arguments", "model_config"),
        *("training_options", "training_checks", "loss_specs", "config_files", "data_formats"),
        *("help", "cli"),
    )
    for name in light:
        found = imports(ROOT / "fastdpo" / f"{name}.py", lazy=False)
        assert {module.split(".")[0] for module in found} <= allowed, name


# ---- pins -------------------------------------------------------------------------------------


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = {}
    for line in lines:
        if line and not line.startswith("#"):
            assert re.fullmatch(r"[\w.-]+==[\w.]+", line), f"{line}: not an exact, public version"
            name, version = line.split("==")
            found[canonical(name)] = version
    return found


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_everything_that_make_installs_is_pinned():
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [
        *PROJECT["project"]["dependencies"],
        *PROJECT["build-system"]["requires"],
        *extras["test"],
        *extras["lint"],
    ]
    names = {canonical(re.split(r"[\s\[><=!;]", requirement)[0]) for requirement in wanted}
    missing = names - pins().keys()
    assert not missing
    assert pins()["torch"] == "2.13.0"
    # What torch 2.13.0 requires for its CUDA build on Linux.
    assert pins()["triton"] == "3.7.1"


def test_make_targets():
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test", "lint", "soak", "bench", "gpu-check"):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    dry = subprocess.run(
        ["make", "-n", "gpu-check"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "benchmarks.gpu_check" in dry.stdout and "venv" not in dry.stdout


# ---- the wheel --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    builder = pytest.importorskip("hatchling.builders.wheel", reason="hatchling builds the wheel")
    folder = tmp_path_factory.mktemp("wheel")
    builder.WheelBuilder(str(ROOT)).build(directory=str(folder)).__next__()
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_holds_both_packages_and_their_data(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    for folder, top in ((ROOT / "fastdpo", ROOT), (KERNELS, KERNELS.parent)):
        command = ["git", "ls-files", "--", str(folder)]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            tracked = done.stdout.split()
        except FileNotFoundError:  # a machine without git
            tracked = []
        files = [ROOT / name for name in tracked] or [
            path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts
        ]
        missing = {str(path.relative_to(top)) for path in files if path.exists()} - held
        assert not missing
    assert "fastdpo/recipes/hh.yaml" in held
    assert not [name for name in held if name.startswith(("tests", "benchmarks", "kernels"))]


def test_wheel_works_elsewhere(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        (metadata,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        assert f"Version: {version()}" in archive.read(metadata).decode()
        (entry,) = (n for n in archive.namelist() if n.endswith("entry_points.txt"))
        assert "fastdpo = fastdpo.cli:main" in archive.read(entry).decode()
    code = (
        "import fastdpo, fastdpo_kernels, sys; from fastdpo.config_files import recipes;"
        "from fastdpo import cli; print(fastdpo.__file__, fastdpo_kernels.__file__, recipes());"
        "cli.parse_arguments(['recipe:hh'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": "", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(str(tmp_path / "site")) == 2 and "'hh'" in done.stdout


def version() -> str:
    import fastdpo

    return fastdpo.__version__
