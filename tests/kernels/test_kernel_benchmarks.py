"""The kernel benchmarks run, resume, keep to their time, and measure what they say they do.

What they measure on a real machine is in benchmarks/results; no speed is asserted here.
"""

import json

import pytest
import torch

from benchmarks import bench_linear_logps, bench_preference_loss, harness, peers_kernels
from benchmarks.bench_linear_logps import Bench, Case
from benchmarks.peers_kernels import IMPLEMENTATIONS, Absent


@pytest.fixture(autouse=True)
def one_commit(monkeypatch):
    monkeypatch.setattr(harness, "commit", lambda: "abc")  # the checkout may move while tests run


@pytest.fixture
def no_trl(monkeypatch):
    """Importing it takes longer than all the rest."""

    def absent(outputs=()):
        raise Absent("is left out of this test")

    monkeypatch.setattr(peers_kernels, "_trl", absent)


@pytest.mark.parametrize("program", [bench_linear_logps, bench_preference_loss])
def test_a_run_writes_json_and_png_and_resumes(program, tmp_path, capsys, no_trl):
    path = tmp_path / "rows.json"
    arguments = ["--smoke", "--repeats", "1", "--output", str(path)]
    assert program.main(arguments) == 0
    document = json.loads(path.read_text())
    rows = document["rows"]
    assert rows and document["environment"]["device"]["name"]
    assert path.with_suffix(".png").stat().st_size > 1000
    assert rows[0]["case"] in capsys.readouterr().out

    for row in rows:
        row["repeats"] = "kept"
    path.write_text(json.dumps(document))
    assert program.main([*arguments, "--resume"]) == 0
    again = json.loads(path.read_text())["rows"]
    assert [row["key"] for row in again] == [row["key"] for row in rows]
    assert all(row["repeats"] == "kept" for row in again), "measured again"


@pytest.mark.parametrize("program", [bench_linear_logps, bench_preference_loss])
def test_no_time_measures_nothing(program, tmp_path, capsys):
    path = tmp_path / "rows.json"
    assert program.main(["--smoke", "--seconds", "0", "--output", str(path)]) == 0
    document = json.loads(path.read_text())
    assert not document["rows"] and all("out of time" in line for line in document["left_out"])
    assert "left out" in capsys.readouterr().out


def test_what_decides_the_bars_comes_first():
    rows = list(bench_linear_logps.rows(torch.device("cuda"), smoke=False))
    first = rows[:3]
    assert {case for case, _ in first} == {Case(4096, 4096, 128256, "frozen")}
    assert [which.name for _, which in first] == ["fastdpo", "gemms", "trl"]
    central = [i for i, (case, which) in enumerate(rows) if case.n == 4096]
    others = [i for i, (case, which) in enumerate(rows) if case.n != 4096]
    assert max(central[:24]) < min(others)
    every = {(case, which.name) for case, which in rows}
    sizes = {(n, d, v) for n in (512, 4096, 32768) for d, v in bench_linear_logps.GPU_HEADS}
    assert {(c.n, c.d, c.v) for c, _ in every} == sizes
    assert {name for _, name in every} == set(peers_kernels.NAMES)


@pytest.mark.parametrize("mode", ["frozen", "trained"])
def test_implementations_agree_with_the_truth_on_peaked_logits(mode, no_trl):
    case = Case(40, 64, 300, mode)
    bench = Bench(case, torch.device("cpu"))
    assert bench.logps.max() > -0.01 and bench.logps.min() < -5, "from certain to surprising"
    for which in IMPLEMENTATIONS:
        if mode not in which.modes:
            continue
        try:
            row = bench.measure(case, which, 1)
        except Absent:
            continue
        assert row["milliseconds"] > 0
        if which.name == "gemms":
            continue
        assert row["response_error"] < 1e-4 and row["grad_error"] < 1e-5, which.name


def test_absent_peers_say_why(monkeypatch):
    with pytest.raises(Absent, match="GPU only"):
        peers_kernels.find("liger", torch.device("cpu"), 1, 1)
    monkeypatch.setattr(peers_kernels.importlib.util, "find_spec", lambda name: None)
    for name in ("trl", "liger", "cce", "quack"):
        with pytest.raises(Absent, match="not installed"):
            peers_kernels.find(name, torch.device("cuda"), 1, 1)


def test_ratios_are_of_one_case():
    rows = [
        {"key": "a fastdpo", "case": "a", "implementation": "fastdpo", "milliseconds": 2.0},
        {"key": "a gemms", "case": "a", "implementation": "gemms", "milliseconds": 1.0},
        {"key": "a trl", "case": "a", "implementation": "trl", "milliseconds": 5.0},
        {"key": "b fastdpo", "case": "b", "implementation": "fastdpo", "milliseconds": 3.0},
    ]
    for name, milliseconds in (("fastdpo statistics", 3.0), ("trl statistics", 9.0)):
        row = {"key": f"a {name}", "case": "a", "implementation": name}
        rows.append(row | {"milliseconds": milliseconds})
    ours, _, _, statistics, _, alone = bench_linear_logps.summaries(rows)
    assert (ours["x_gemms"], ours["x_trl"]) == (2.0, 2.5)
    assert (statistics["x_gemms"], statistics["x_trl"]) == (3.0, 3.0)  # TRL's with statistics
    assert alone["x_gemms"] is None and alone["x_trl"] is None
