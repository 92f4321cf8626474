"""The benchmarks run, count right, and say where they ran: smoke tests on tiny models.

What they measure on a real machine is in benchmarks/results; no speed is asserted here.
"""

import dataclasses
import gzip
import json
import math
import shutil

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import (
    bench_scaling,
    bench_train_step,
    harness,
    hh,
    peers,
    train_cases,
    workloads,
)
from fastdpo.data import TokenizedPairs
from fastdpo.packing import build_pack
from tests.tiny import tiny_rows

CPU = torch.device("cpu")
ENVIRONMENT = {"commit": "a", "device": {}, "python": "3", "versions": {}}


# ---- harness ---------------------------------------------------------------------------------


def test_results_are_resumed_only_where_they_can_be_compared(tmp_path):
    path = tmp_path / "results.json"
    harness.Results(path, ENVIRONMENT).add("one", seconds=1.0)
    resumed = harness.Results(path, ENVIRONMENT, resume=True)
    assert resumed.has("one") and not resumed.has("two")
    resumed.add("two", seconds=2.0)
    assert [row["key"] for row in json.loads(path.read_text())["rows"]] == ["one", "two"]
    assert not harness.Results(path, ENVIRONMENT).has("one")  # without resume: afresh
    with pytest.raises(ValueError, match="commit 'a'.*'b'"):
        harness.Results(path, {**ENVIRONMENT, "commit": "b"}, resume=True)


def test_what_is_not_finite_ends_no_benchmark(tmp_path):
    path = tmp_path / "results.json"
    row = harness.Results(path, ENVIRONMENT).add("one", losses=[math.inf], last_loss=math.nan)
    assert json.loads(path.read_text())["rows"] == [
        {"key": "one", "losses": ["inf"], "last_loss": "nan"}
    ]
    (again,) = harness.Results(path, ENVIRONMENT, resume=True).rows
    assert math.isnan(again["last_loss"]) and math.isnan(row["last_loss"])


def test_the_environment_names_the_absent():
    facts = harness.environment(torch.device("cpu"), "command")
    assert facts["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert set(facts["absent"]).isdisjoint(facts["versions"])
    known = (harness.ROOT / ".git").exists() and shutil.which("git") is not None
    assert (facts["commit"] != "unknown") == known


def test_a_table_is_aligned():
    text = harness.table(["name", "value"], [["a", 1234.5], ["longer", None], ["b", 0.12345]])
    lines = text.splitlines()
    assert lines[0].split() == ["name", "value"]
    assert [line.split()[1] for line in lines[2:]] == ["1234", "-", "0.123"]


# ---- workloads -------------------------------------------------------------------------------


def test_synthetic_lengths_resemble_what_they_were_fitted_to():
    lengths = workloads.LENGTHS["hh"].draw(20000, max_length=10**6)
    logs = np.log(lengths)
    # Standard errors are below 0.01; the long tail adds ln 4 / 64 = 0.02 to each mean.
    np.testing.assert_allclose(logs.mean(0), [4.38, 3.29, 3.52], atol=0.04)
    assert 0.25 < np.corrcoef(logs[:, 1], logs[:, 2])[0, 1] < 0.36
    cut = workloads.LENGTHS["ultrafeedback"].draw(2000, max_length=512)
    assert (cut[:, :1] + cut[:, 1:]).max() <= 512 and cut.min() >= 1


def test_necessary_flops_are_those_of_the_products_that_run():
    """Against torch's own counter, on one sequence: prompt of 1, response of n, attention eager."""
    config, n = workloads.SHAPES["tiny"], 64
    model = workloads.random_model("tiny", torch.device("cpu"), torch.float32)
    model.set_attn_implementation("eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.arange(n)[None])
    lengths = np.array([[1, n, 1]])
    live, cached = (
        workloads.necessary_flops(config, lengths, lora=False, live_reference=live)
        for live in (True, False)
    )
    forward = live - cached
    # Eager attention computes the square, of which n^2 / 2 is necessary; ours counts 1 + 1/2 + n
    # entries more: the prompt by itself, and before both responses. The rejected token is one more
    # row of the head. Older transformers make the rotary angles by a product, which we don't count.
    counts = counter.get_flop_counts()
    rotary = sum(sum(c.values()) for name, c in counts.items() if name.endswith("rotary_emb"))
    width, layers = config.hidden_size, config.num_hidden_layers
    expected = forward + 4 * layers * width * (n**2 / 2 - n - 2)
    expected -= 2 * width * config.vocab_size
    assert counter.get_total_flops() - rotary == pytest.approx(expected, rel=1e-6)
    assert cached == pytest.approx(3 * forward)  # backward is twice forward
    lora = workloads.necessary_flops(config, lengths, lora=True, live_reference=False)
    assert 2 * forward < lora < 2.5 * forward  # no gradient of a frozen weight, but an adapter


@pytest.mark.parametrize("name", workloads.LENGTHS)
@pytest.mark.parametrize("shape", ["0.5B", "1B", "3B", "8B"])
def test_gathering_shared_prompts_is_a_small_part_of_a_step_by_its_bytes(shape, name):
    """Keys and values of real packs, at an H200's rates: 4.3 TB/s read and written, 788 TFLOP/s.

    The rest of the step is taken at the full rate of a matmul, so the share is the largest it can
    be; launches, which bytes know nothing of, are timed by the benchmark.
    """
    config, n_pairs = workloads.SHAPES[shape], 8 if name == "long" else 16
    lengths = workloads.LENGTHS[name].draw(n_pairs, 8192 if name == "long" else 2048)
    ids = [[[3] * n for n in column] for column in lengths.T.tolist()]
    pack = build_pack(TokenizedPairs.from_lists(*ids), range(n_pairs), mode="shared")
    assert pack.layout is not None
    gathered, source = len(pack.layout.kv.index), pack.layout.kv.n_source
    assert source < gathered < 2 * source
    # Policy, its recomputation and the reference read and write what is gathered; one backward
    # pass reads it and writes a row for each of the source's.
    rows = 3 * 2 * gathered + gathered + source
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    n_bytes = 2 * config.num_hidden_layers * 2 * config.num_key_value_heads * head_dim * rows
    flops = workloads.necessary_flops(config, lengths, lora=True, live_reference=True)
    gathering, step = n_bytes / 4.3e12, flops / 788e12
    assert gathering / (gathering + step) < 0.03  # the bar; 0.5 to 1.4 % of these


def test_every_pair_of_a_cpu_case_fits_a_pack():
    for case in train_cases.CPU_CASES:
        if case.lengths != "hh-text":
            bench = train_cases.Bench(case, CPU)
            # Without a GPU there is no plan, and `auto` is 8192.
            assert bench.lengths.sum(1).max() <= (case.max_tokens_per_pack or 8192), case.name


def test_a_random_head_is_peaked():
    model = workloads.random_model("tiny", torch.device("cpu"), torch.float32)
    with torch.no_grad():
        logits = model(input_ids=torch.arange(3, 67)[None]).logits[0]
    assert 0.5 * workloads.PEAKED_STD < float(logits.std()) < 2 * workloads.PEAKED_STD


# ---- HH --------------------------------------------------------------------------------------


def dialogues(n: int) -> list[dict[str, str]]:
    rows = []
    for row in tiny_rows(n):
        prompt = f"\n\nHuman: {row['prompt']}\n\nAssistant:"
        rows.append({side: prompt + row[side] for side in ("chosen", "rejected")})
    return rows


def test_no_held_out_question_is_trained_on():
    rows = dialogues(200)
    train, held_out = hh.split_by_prompt(rows)
    assert len(train) + len(held_out) == 200 and len(held_out) == 20
    asked = [{hh._opening(row) for row in part} for part in (train, held_out)]
    assert asked[0].isdisjoint(asked[1])
    assert hh.split_by_prompt(rows) == (train, held_out)


def test_bad_rows_are_left_out_of_explicit_rows():
    rows = dialogues(4)
    rows[1]["chosen"] = rows[1]["chosen"].split("Assistant:")[0] + "Assistant:"
    explicit = hh.explicit_rows(rows)
    assert len(explicit) == 3
    assert all(row["prompt"].endswith("Assistant:") for row in explicit)
    assert all(row["chosen"].startswith(" yes") for row in explicit)


def test_hh_prepares_data_and_a_model_and_prints_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(hh, "small_llama", lambda v, seed: bench_model(v))
    with gzip.open(tmp_path / hh.FILE, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in dialogues(150))
    out = tmp_path / "out"
    assert hh.main(["--data", str(tmp_path), "--output_dir", str(out), "--epochs", "2"]) == 0
    printed = capsys.readouterr().out
    assert f"fastdpo train {hh.RECIPE} --model_name_or_path {out / 'model'}" in printed
    lines = [(out / "data" / f"{name}.jsonl").read_text().count("\n") for name in ("train", "test")]
    assert lines[0] + lines[1] == 150 and lines[1] >= 10
    curve = printed.split("loss by epoch: ")[1].split(" (")[0].split(" -> ")
    assert float(curve[1]) < float(curve[0])
    assert (out / "model" / "tokenizer.json").is_file() and (harness.ROOT / hh.RECIPE).is_file()


def bench_model(vocab_size: int):
    from tests.tiny import tiny_llama

    return tiny_llama(vocab_size=vocab_size, eos_token_id=1)


def test_hh_says_which_file_is_missing(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        hh.main(["--data", str(tmp_path), "--output_dir", str(tmp_path / "out")])
    assert stopped.value.code == 2 and hh.FILE in capsys.readouterr().err


def test_the_small_llama_has_two_million_parameters():
    assert hh.small_llama().num_parameters() == pytest.approx(2e6, rel=0.01)
    tiny = workloads.SHAPES["tiny"].to_dict()
    ours = hh.small_llama().config.to_dict()
    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    assert [tiny[key] for key in same] == [ours[key] for key in same]


def test_chance_is_a_binomial_tail():
    assert hh.above_chance(0.5, 2) == 0.75 and hh.above_chance(1.0, 10) == 2**-10


# ---- whole trainers --------------------------------------------------------------------------


def test_the_training_benchmark_runs_and_its_trainers_do_the_same(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(harness, "commit", lambda: "0123456789ab")
    path = tmp_path / "smoke.json"
    assert bench_train_step.main(["--smoke", "--output", str(path)]) == 0
    document = json.loads(path.read_text())
    assert document["environment"]["command"].startswith("python -m benchmarks.bench_train_step")
    assert path.with_suffix(".png").stat().st_size > 1000
    rows = document["rows"]
    runs = {(row["case"], row["trainer"]): row for row in rows if "phases" not in row}
    absent = [t for t in peers.TRAINERS if peers.absent(t)] + ["unsloth"]  # no GPU here
    expected = {(c.name, t) for c in bench_train_step.SMOKE_CASES for t in c.trainers}
    assert set(runs) == {key for key in expected if key[1] not in absent}
    profiled = {(c, t) for c, t in expected if t in ("fastdpo", "trl")}
    assert {(r["case"], r["trainer"]) for r in rows if "phases" in r} == profiled & set(runs)
    missing = [key for key in expected if key[1] in absent]
    assert len(document["left_out"]) == len(missing) + len(profiled & set(missing))
    for (case, trainer), row in runs.items():
        assert row["pairs_per_second"] > 0 and 0 <= row["waste"] < 1, (case, trainer)
        # The same pairs from the same weights: fp32, a step or two, one loss.
        assert row["last_loss"] == pytest.approx(runs[case, "fastdpo"]["last_loss"], rel=1e-4)
    out = capsys.readouterr().out
    assert "pairs/s" in out and "times the least possible" in out
    assert "Unsloth needs a GPU" in out
    if "trl-best" not in absent:
        assert "trl-best without: padding-free batches" in out and "flash_attn not installed" in out
        assert runs["tiny-lora-hh", "trl-best"]["without"] == peers.without("trl-best", CPU)

    # Where the time went: all of it in known phases, LoRA's only where there is LoRA.
    for row in (row for row in rows if "phases" in row):
        spent = {phase: found["seconds"] for phase, found in row["phases"].items()}
        assert sum(spent.values()) == pytest.approx(row["wall_seconds"], rel=0.05)
        assert (spent["LoRA"] > 0) == ("lora" in row["case"])
        for phase in ("GEMMs", "attention", "norms", "log-probs and loss", "optimizer"):
            assert spent[phase] > 0, (row["case"], row["trainer"], phase)
        assert (spent["shared prompts"] > 0) == (row["trainer"] == "fastdpo")
    shares = document["shared_prompts"]
    assert [share["case"] for share in shares] == [c.name for c in bench_train_step.SMOKE_CASES]
    assert all(0 < share["share"] < 1 and share["of_timed"] > 0 for share in shares)
    assert out.count("sharing prompts takes") == len(shares) and "the bar is 3%" in out

    # Resumed with nothing left to do; and stopped for time before it began.
    assert bench_train_step.main(["--smoke", "--output", str(path), "--resume"]) == 0
    assert len(json.loads(path.read_text())["rows"]) == len(rows)
    late = tmp_path / "late.json"
    assert bench_train_step.main(["--smoke", "--output", str(late), "--seconds", "0"]) == 0
    assert json.loads(late.read_text())["rows"] == []


def test_other_layers_are_trained_with_where_asked_for(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(harness, "commit", lambda: "0123456789ab")
    bench = train_cases.Bench(bench_train_step.SMOKE_CASES[0], CPU)
    options = {"compile": "off", "cuda_graphs": False, "use_liger_kernel": False}
    plain = {name: peers._options(bench.job(), "unused") for name in train_cases.LAYERS}
    found = {name: peers.TRAINERS[name](bench.job(), plain[name])[1] for name in plain}
    for name, changed in (
        ("fastdpo-compiled", {"compile": "layers"}),
        ("fastdpo-liger", {"use_liger_kernel": True}),
        ("fastdpo-graphs", {"compile": "layers", "cuda_graphs": True}),
    ):
        assert {key: getattr(found[name], key) for key in options} == {**options, **changed}
    assert not found["fastdpo-graphs"].gradient_checkpointing
    path = tmp_path / "layers.json"
    arguments = ["--smoke", "--no-phases", "--output", str(path), "--only", "tiny-lora"]
    words = [*arguments, "--trainers", "fastdpo-liger", "fastdpo-graphs"]
    assert bench_train_step.main(words) == 0
    left_out = json.loads(path.read_text())["left_out"]
    assert left_out == [
        f"tiny-lora-hh/fastdpo-liger/0: {peers.layers_absent('fastdpo-liger', CPU, 'lora')}",
        "tiny-lora-hh/fastdpo-graphs/0: needs a GPU",
    ]
    qlora = dataclasses.replace(bench_train_step.SMOKE_CASES[0], tuning="qlora")
    monkeypatch.setattr(bench_train_step, "SMOKE_CASES", (qlora,))
    compiled = ["fastdpo-compiled", "fastdpo-graphs"]
    arguments = ["--smoke", "--no-phases", "--output", str(path), "--trainers", *compiled]
    assert bench_train_step.main(arguments) == 0
    left_out = json.loads(path.read_text())["left_out"]
    reason = "fastdpo doesn't compile quantized layers"
    assert left_out == [f"tiny-qlora-hh/{name}/0: {reason}" for name in compiled]


def test_hh_reports_a_run(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data/test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in dialogues(10)))
    evaluation = {"eval_rewards/margins": 0.1, "eval_logps/chosen": -9.0}
    logs = [{"loss": 0.7 - 0.01 * i, "step": i} for i in range(20)]
    logs += [{"eval_loss": 0.6, "eval_rewards/accuracies": 0.8, "step": 20, **evaluation}]
    (tmp_path / "run/metrics.jsonl").write_text("".join(json.dumps(log) + "\n" for log in logs))
    hh.report(tmp_path, "command")
    printed = capsys.readouterr().out
    assert "training loss: 0.6950 over the first tenth of the logs, 0.5150 over the last" in printed
    assert "held out: 8 of 10" in printed and "probability 0.05" in printed
    assert json.loads((tmp_path / "hh.json").read_text())["environment"]["command"] == "command"


def test_the_scaling_benchmark_sweeps_and_resumes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(harness, "commit", lambda: "0123456789ab")
    small, large = (bench_scaling.sweeps(cuda=cuda) for cuda in (False, True))
    monkeypatch.setattr(
        bench_scaling,
        "sweeps",
        lambda *, cuda: {
            sweep: [(size, dataclasses.replace(case, steps=1)) for size, case in cases[:2]]
            for sweep, cases in small.items()
        },
    )
    path = tmp_path / "scaling.json"
    assert bench_scaling.main(["--output", str(path), "--seconds", "0"]) == 0
    assert "left out, no time left" in capsys.readouterr().out
    assert len(json.loads(path.read_text())["left_out"]) == 6
    assert bench_scaling.main(["--output", str(path), "--resume"]) == 0
    document = json.loads(path.read_text())
    assert [row["sweep"] for row in document["rows"]] == [s for s in small for _ in range(2)]
    assert all(row["ms_per_pair"] > 0 for row in document["rows"])
    sizes = [row["size"] for row in document["rows"] if row["sweep"] == "parameters"]
    assert sizes == [pytest.approx(2e6, rel=0.02), pytest.approx(5e6, rel=0.1)]
    assert list(large) == list(small) and large["parameters"][-1][0] == pytest.approx(7.5e9, 0.01)
    assert path.with_suffix(".png").stat().st_size > 1000
