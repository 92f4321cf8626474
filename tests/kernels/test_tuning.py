"""How the Triton `linear_logps` divides its work: bytes, operations, launches, and the choice."""

import dataclasses
import itertools
import json
import logging

import pytest
import torch
from triton.runtime.errors import OutOfResources

from fastdpo_kernels import linear_logps_triton_job, tiles, tuning
from fastdpo_kernels.impls import adapter_parts
from fastdpo_kernels.linear_logps_triton_math import Logits
from fastdpo_kernels.tiles import Device, Gemm, Problem, Variant

H200 = Device("H200", "sm90", 132, 6.5e12 * 132, 3.8e12)
A100 = Device("A100", "sm80", 108, 2.9e12 * 108, 1.8e12)
MIB = 2**20


def problem(**changes) -> Problem:
    plain = Problem(
        work="hidden", n=4096, d=4096, d_trained=4096, v=128256, float32=False, rich=False,
        fields=1, row_copy=0, col_copy=0, kept=False, direct=True, aligned=True,
        workspace=256 * MIB,
    )  # fmt: skip
    changes.setdefault("d_trained", changes.get("d", plain.d))
    return dataclasses.replace(plain, **changes)


def planned(task: Problem, device: Device = H200, variant: Variant | None = None):
    variant = variant or tiles.default_variant(task, device)
    return tiles.plan(task, variant, device)


SHAPES = [(896, 151936), (2048, 128256), (4096, 128256), (2304, 262144), (4097, 50257), (64, 33)]


@pytest.mark.parametrize("workspace", [16 * MIB, 256 * MIB])
@pytest.mark.parametrize("work", ["sums", "hidden", "weight"])
def test_every_plan_fits_its_workspace(work, workspace):
    for n, (d, v), fields, float32 in itertools.product(
        (1, 127, 512, 4096, 32768), SHAPES, (1, 6), (False, True)
    ):
        if work == "weight" and fields > 1:
            continue
        for library, split in itertools.product((False, True), (False, True)):
            task = problem(
                work=work, n=n, d=d, v=v, fields=fields, float32=float32, workspace=workspace
            )
            gemm = tiles.table(task, H200)[0]
            plan = planned(task, variant=Variant(gemm, library=library, split=split))
            assert split or plan.splits == 1
            assert plan.bytes + plan.beside <= workspace
            assert plan.rows <= n and plan.cols <= v
            # chunks start where pointers stay aligned and tiles begin
            assert plan.rows == n or plan.rows % 16 == 0
            part = 128 if work == "weight" else gemm.block_v
            assert plan.cols == v or plan.cols % min(part, gemm.block_v) == 0


@pytest.mark.parametrize("work", ["sums", "hidden", "weight"])
def test_sixteen_mebibytes_serve_any_number_of_rows(work):
    """What each row needs exists for some rows at a time: nothing planned grows with N."""
    for n, (d, v) in itertools.product((2**20, 2**24, 2**31 - 1), SHAPES):
        for float32, fields in ((False, 1), (True, 1), (False, 6 if work != "weight" else 1)):
            task = problem(
                work=work, n=n, d=d, v=v, float32=float32, fields=fields, direct=False,
                workspace=16 * MIB,
            )  # fmt: skip
            plan = planned(task)
            assert plan.bytes + plan.beside <= 16 * MIB
            assert plan.rows <= plan.block < n
            assert plan.block % plan.rows == 0
            if work != "weight":
                assert plan.beside == 0 and plan.block == plan.rows


def test_few_rows_of_dw_are_one_block():
    """Their target rows are then added once, after all chunks."""
    for n, workspace in ((32768, 256 * MIB), (2**20, 256 * MIB), (65536, 16 * MIB)):
        assert planned(problem(work="weight", n=n, workspace=workspace)).block == n
    assert planned(problem(work="weight", n=2**20 + 1)).block < 2**20


@pytest.mark.parametrize("work", ["sums", "hidden", "weight"])
def test_what_a_refusal_asks_for_is_enough(work):
    for n in (100, 10**6):
        with pytest.raises(ValueError, match=r"take (\d+) bytes") as refused:
            planned(problem(work=work, n=n, workspace=20_000))
        least = int(str(refused.value).split("take ")[1].split()[0])
        plan = planned(problem(work=work, n=n, workspace=least))
        assert plan.bytes + plan.beside == least
        with pytest.raises(ValueError, match=f"workspace_bytes={least - 1} .*take {least} bytes"):
            planned(problem(work=work, n=n, workspace=least - 1))


def overhead(task: Problem) -> float:
    """The plan's roofline over that of two bare GEMMs."""
    plan = planned(task)
    seconds = tiles.roofline(task, plan.variant, H200, plan.rows, plan.cols, plan.splits)
    return seconds / (4 * task.n * task.d * task.v / H200.flops)


@pytest.mark.parametrize("n", [4096, 32768])
@pytest.mark.parametrize(("d", "v"), SHAPES[:4])
def test_the_default_workspace_costs_little(n, d, v):
    """What chunks of 256 MiB add, by the roofline, leaves room below the bars (1.15 times two bare
    GEMMs at D = 4096, 1.35 at smaller D), and is little more than without a bound."""
    task = problem(n=n, d=d, v=v)
    assert overhead(task) < (1.08 if d == 4096 else 1.2)
    assert overhead(task) < 1.08 * overhead(dataclasses.replace(task, workspace=2**40))


def test_sixteen_mebibytes_still_make_progress():
    assert overhead(problem(workspace=16 * MIB)) < 2


def test_kept_exponentials_count_as_workspace():
    task = problem(kept=True, workspace=256 * MIB)
    with pytest.raises(ValueError, match="workspace_bytes=268435456 .* take"):
        planned(task)
    room = tiles.kept_bytes(task) + 256 * MIB
    plan = planned(dataclasses.replace(task, workspace=room))
    assert tiles.kept_bytes(task) == 2 * 4096 * 128256
    assert plan.bytes + tiles.kept_bytes(task) <= room
    assert plan.cols == 128256  # E is there already: nothing to chunk for


def test_few_rows_split_the_second_gemm():
    assert planned(problem(n=512, d=896)).splits >= 2
    assert planned(problem(n=32768)).splits == 1
    assert planned(problem(n=512, d=896, work="sums")).splits == 1
    gain = dataclasses.replace(problem(n=512, d=896))
    whole = planned(gain, variant=Variant(tiles.table(gain, H200)[0], split=False))
    split = planned(gain)
    costs = [
        tiles.roofline(gain, p.variant, H200, p.rows, p.cols, p.splits) for p in (whole, split)
    ]
    assert costs[1] < 0.8 * costs[0]


def test_tables_by_operands():
    assert tiles.default_variant(problem(), H200).gemm.loads == "persistent"
    assert tiles.default_variant(problem(aligned=False), H200).gemm.loads == "pointer"
    assert tiles.default_variant(problem(), A100).gemm.loads == "pointer"
    assert tiles.default_variant(problem(float32=True), H200).library
    for arch, tables in tiles.TABLES.items():
        assert tables.keys() == {"half", "rich", "stats", "float32"}, arch
        assert all(any(g.loads == "pointer" for g in rows) for rows in tables.values()), arch


def test_a_workspace_too_small_names_both_numbers():
    with pytest.raises(ValueError, match=r"workspace_bytes=100000 .*take \d+ bytes; raise"):
        planned(problem(workspace=100_000))


def test_plans_are_quick_to_make():
    """Packs differ in N from step to step; a plan must not cost what a kernel does."""
    import time

    task = problem()
    started = time.process_time()
    for n in range(2000, 2050):
        planned(dataclasses.replace(task, n=n))
    assert (time.process_time() - started) / 50 < 0.02


# ---- the measured choice, with a clock and a cache of the test's own


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTDPO_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuning, "_chosen", {})
    return tmp_path


def timer(monkeypatch, seconds):
    """Replaces timing: `seconds(variant)` is what a variant takes; returns what was timed."""
    timed = []

    def fake(task, variant, device, run):
        timed.append(variant)
        return seconds(variant)

    monkeypatch.setattr(tuning, "_time", fake)
    return timed


def test_the_fastest_is_chosen_once_and_kept(fresh, monkeypatch):
    second = tiles.table(problem(), H200)[1]
    timed = timer(monkeypatch, lambda v: 1.0 if v.gemm == second and v.share == 0.5 else 2.0)
    best = tuning.choose(problem(), H200, lambda plan: None, measure=True).variant
    # tiles first, each with the whole workspace; then the share, on the best of them
    assert best.gemm != second or best.share == 0.5
    count = len(timed)
    assert count >= 5 and timed[0] == tiles.default_variant(problem(), H200)
    tuning.choose(problem(n=4000), H200, lambda plan: None, measure=True)
    assert len(timed) == count, "the same bucket of N is not measured again"
    monkeypatch.setattr(tuning, "_chosen", {})
    assert tuning.choose(problem(), H200, lambda plan: None, measure=True).variant == best
    assert len(timed) == count, "another process reads the choice"
    tuning.choose(problem(n=16), H200, lambda plan: None, measure=True)
    assert len(timed) == count, "too little to gain"
    tuning.choose(problem(n=512), H200, lambda plan: None, measure=True)
    assert len(timed) > count, "another bucket is measured"


def test_without_measuring_the_first_row_is_taken(fresh, monkeypatch):
    timed = timer(monkeypatch, lambda v: 1.0)
    plan = tuning.choose(problem(), H200, lambda plan: None, measure=False)
    assert plan.variant == tiles.default_variant(problem(), H200)
    assert not timed and not list(fresh.iterdir())


def test_deterministic_runs_do_not_measure():
    torch.use_deterministic_algorithms(True)
    try:
        assert not tuning.measurable(torch.device("cuda"))
    finally:
        torch.use_deterministic_algorithms(False)
    assert not tuning.measurable(torch.device("cpu"))


def test_measuring_stops_after_its_budget(fresh, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(tuning.time, "monotonic", lambda: clock[0])

    def slow(variant):
        clock[0] += 2.0  # a compilation
        return 1.0

    timed = timer(monkeypatch, slow)
    tuning.choose(problem(), H200, lambda plan: None, measure=True)
    assert len(timed) == 1, "a second one would have gone past the budget"
    (file,) = (fresh / "tuning").glob("*.json")
    assert not json.loads(file.read_text())["complete"]
    monkeypatch.setattr(tuning, "_chosen", {})
    tuning.choose(problem(), H200, lambda plan: None, measure=True)
    assert len(timed) > 1, "the next process goes on"


@pytest.mark.parametrize("error", [RuntimeError("CUDA"), OutOfResources(3, 2, "shared memory")])
def test_a_variant_that_cannot_run_is_passed_over(fresh, caplog, error):
    def run(plan):
        raise error

    with caplog.at_level(logging.INFO, "fastdpo_kernels"):
        seconds = tuning._time(problem(), tiles.default_variant(problem(), H200), H200, run)
    assert seconds == float("inf")
    assert "cannot run here" in caplog.text


@pytest.mark.parametrize("damage", ["", "{", '{"key": 1}'])
def test_a_damaged_file_is_measured_again(fresh, monkeypatch, damage, caplog):
    timed = timer(monkeypatch, lambda v: 1.0)
    tuning.choose(problem(), H200, lambda plan: None, measure=True)
    (file,) = (fresh / "tuning").glob("*.json")
    file.write_text(damage)
    monkeypatch.setattr(tuning, "_chosen", {})
    before = len(timed)
    tuning.choose(problem(), H200, lambda plan: None, measure=True)
    assert len(timed) > before


def test_a_folder_that_cannot_be_written_is_no_error(monkeypatch, tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("FASTDPO_CACHE_DIR", str(blocked))
    monkeypatch.setattr(tuning, "_chosen", {})
    timer(monkeypatch, lambda v: 1.0)
    tuning.choose(problem(), H200, lambda plan: None, measure=True)
    assert "cannot keep the tuning choice" in caplog.text


def test_a_choice_that_does_not_fit_falls_back(fresh, monkeypatch):
    """Measured at one N of a bucket; at another the same variant may not fit."""
    hungry = Variant(Gemm(128, 128, 32, 4, 4), library=True)
    monkeypatch.setattr(tuning, "_measure", lambda *args: hungry)
    monkeypatch.setattr(tiles, "plan", refuse(tiles.plan, hungry))
    task = problem()
    plan = tuning.choose(task, H200, lambda plan: None, measure=True)
    assert plan.variant == tiles.default_variant(task, H200)


def refuse(inner, variant):
    def plan(task, asked, device):
        if asked == variant:
            raise ValueError("too small")
        return inner(task, asked, device)

    return plan


def test_one_correction_of_a_small_workspace_is_enough():
    """What the error names is room for both passes, and one byte less is not."""
    larger = set()
    for d, v, rank, stats, dtype in itertools.product(
        (4, 64), (7, 700), (None, 3), ((), ("entropy",)), (torch.float32, torch.float16)
    ):
        width = d + adapter_parts(dtype) * (rank or 0)
        hidden, weight = torch.empty(100, width, dtype=dtype), torch.empty(v, d)
        adapter = None if rank is None else torch.empty(v, rank)
        job = linear_logps_triton_job.Job(
            hidden, dtype, linear_logps_triton_job.matrix_of(weight, adapter, dtype),
            Logits.of(None, None, 1.0, 1.0), stats, need_hidden_grad=True, need_weight_grad=True,
            trained=True, kept=False, device=H200,
        )  # fmt: skip
        needs = {}
        for work, each in (("hidden", job), ("weight", dataclasses.replace(job, stats=()))):
            with pytest.raises(tiles.TooSmall) as refused:
                linear_logps_triton_job.default_plan(each, work, 1)
            needs[work] = refused.value.least
        larger.add(max(needs, key=lambda work: needs[work]))
        most = max(needs.values())
        for workspace in (1, min(needs.values()), most - 1):
            with pytest.raises(ValueError, match=f"={workspace} is too small .* take {most} bytes"):
                linear_logps_triton_job.check_room(job, "hidden", workspace)
        linear_logps_triton_job.check_room(job, "hidden", most)
        frozen = dataclasses.replace(job, trained=False)
        linear_logps_triton_job.check_room(frozen, "hidden", needs["hidden"])
    assert larger == {"hidden", "weight"}
