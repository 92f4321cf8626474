"""The plan: predicted peaks against measured ones, the order of sacrifice, and what a run does."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import Gemma2Config, GptOssConfig, LlamaConfig

from benchmarks.bench_memory import AllocatedPeak
from fastdpo import DPOConfig, DPOTrainer
from fastdpo.cli import main
from fastdpo.errors import ConfigError, DataError
from fastdpo.options import AUTO, parse_bytes
from fastdpo.packing import build_pack
from fastdpo.plan import Choice, Job, Planner, Prediction, state_bytes
from fastdpo.plan_choose import choose, options_of
from fastdpo.plan_device import Device, show_bytes
from fastdpo.plan_replay import StepMemory, StepSettings, TwinSpec, replay
from fastdpo.steps import Packer
from tests.tiny import tiny_llama, tiny_mistral, tiny_pairs, tiny_qwen3

# Six layers: enough for the replay's two smaller depths and the line through them.
SHAPE: Any = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 6,
    "head_dim": 16,
    "vocab_size": 800,
}
FAMILIES = {"llama": tiny_llama, "qwen3": tiny_qwen3, "mistral": tiny_mistral}
LORA: Any = {"r": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def some_pairs(n: int = 24):
    return tiny_pairs(
        n, vocab_size=800, prompt_lengths=(10, 60), response_lengths=(10, 60), pairs_per_prompt=2
    )


def config(tmp_path, **options) -> DPOConfig:
    base = {
        "output_dir": str(tmp_path / "run"),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "per_device_train_batch_size": 12,
        "max_steps": 2,
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "learning_rate": 1e-4,
    }
    return DPOConfig(**{**base, **options})


def beyond_weights(prediction: Prediction) -> int:
    """Bytes at the predicted peak that are not there when training begins."""
    kept = ("weights", "adapters", "reference")
    return sum(size for kind, size in prediction.memory.items() if kind not in kept)


def run_measured(tmp_path, model, lora: bool, **options: Any) -> tuple[DPOTrainer, int]:
    """A run of four steps, in two epochs, and its peak beyond weights."""
    watch = AllocatedPeak()
    trainer = DPOTrainer(
        model=model,
        args=config(
            tmp_path,
            **{"max_tokens_per_pack": 2000, "gpu_memory": "1TiB", "max_steps": 4, **options},
        ),
        train_dataset=some_pairs(),
        peft_config=LoraConfig(**LORA) if lora else None,
        callbacks=[watch],
    )
    trainer.train()
    return trainer, watch.bytes


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_predicted_peak_is_the_measured_one(tmp_path, family, lora, checkpointing):
    """Within 10 % over a whole run: beyond weights, which are exact, and so in total."""
    model = FAMILIES[family](**SHAPE)
    trainer, peak = run_measured(tmp_path, model, lora, gradient_checkpointing=checkpointing)
    assert trainer.run_plan is not None and trainer.optimizer is not None
    predicted = trainer.run_plan.prediction
    assert abs(beyond_weights(predicted) - peak) <= 0.1 * peak
    states = sum(
        value.nbytes
        for state in trainer.optimizer.state.values()
        for value in state.values()
        if value.dim()
    )
    assert predicted.memory["optimizer states"] in (states, 0)  # 0: the peak was in step 1


# ---- what is chosen ---------------------------------------------------------------------------


BYTES_PER_TOKEN = {False: 400_000, "selective": 150_000, True: 100_000}


@pytest.fixture
def law(monkeypatch):
    """In the place of the replay a law as simple as it can be, so that what is chosen can be
    told: bytes in proportion to tokens, by checkpointing, less under offload, and the workspace."""

    def replay(spec, pack, settings) -> StepMemory:
        size = pack.n_tokens * BYTES_PER_TOKEN[settings.checkpointing]
        size = int(size * (0.8 if settings.offload else 1.0))
        return StepMemory({"MLP": size, "log-probs": settings.workspace_bytes}, 0, 0, 0)

    monkeypatch.setattr("fastdpo.plan.replay", replay)


def planner_for(full: bool = False, **options: Any) -> Planner:
    """For a small Llama on an imagined GPU, LoRA unless `full`, all on auto but `options`."""
    auto = ("max_tokens_per_pack", "gradient_checkpointing", "activation_offloading", "optim")
    given: Any = {name: "auto" for name in (*auto, "logps_workspace_bytes")}
    given |= {"output_dir": "unused", "use_cpu": True, "per_device_train_batch_size": 12, **options}
    shape: Any = {**SHAPE, "hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 32000}
    pairs = tiny_pairs(48, vocab_size=800, prompt_lengths=(50, 900), response_lengths=(50, 900))
    job = Job(
        spec=TwinSpec(LlamaConfig(**shape), torch.bfloat16, None if full else LoraConfig(**LORA)),
        args=DPOConfig(**given),
        pairs=pairs,
        device=Device("a GPU", True, None, 1e14, 1e12),
        bf16=True,
        packer=Packer("shared", 1, torch.device("cpu")),
        base_precision=None if full else "auto",
    )
    return Planner(job)


def test_less_memory_takes_the_next_sacrifice(law):
    """Budgets from ample to scarce walk down the documented order, and each plan fits its own."""
    planner = planner_for()
    row, longest = planner.longest
    ample = choose(planner, 64 * 2**30)
    tokens = min(planner.heaviest_step, 16384)
    assert ample.choice == Choice(tokens, False, False, "adamw_torch_fused", "bf16")
    seen, room = [ample], ample.total
    message = ""
    while not message:
        room = int(0.97 * room)
        try:
            found = choose(planner, room)
        except (DataError, ConfigError) as error:
            message = str(error)
            break
        assert found.total <= room
        seen.append(found)

    def place(prediction: Prediction) -> tuple:
        """Where a choice stands in the order of sacrifice, packs aside."""
        choice = prediction.choice
        return (
            ("bf16", "8bit", "4bit").index(str(choice.base_precision)),
            ("adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit").index(choice.optim),
            -choice.logps_workspace_bytes,
            choice.activation_offloading,
            (False, "selective", True).index(choice.gradient_checkpointing),
        )

    places = [place(prediction) for prediction in seen]
    # A smaller base or smaller states make room again for what was given up before.
    assert places == sorted(places, key=lambda p: p[:2])
    for group in {p[:2] for p in places}:
        within = [p for p in places if p[:2] == group]
        assert within == sorted(within)
    assert {p[4] for p in places} == {0, 1, 2} and {p[3] for p in places} == {False, True}
    assert {p[0] for p in places} == {0, 1, 2}
    # Packs stay comfortable until nothing else that is exact is left.
    for prediction, (_, _, workspace, offload, how) in zip(seen, places, strict=True):
        if prediction.choice.max_tokens_per_pack < 4096:
            assert offload and how == 2, (prediction.choice, workspace)
    assert f"row {row}: its pair of {longest} tokens can't fit" in message


def test_what_was_given_is_never_changed(law):
    given = {
        "max_tokens_per_pack": 4000,
        "gradient_checkpointing": "none",
        "activation_offloading": False,
        "optim": "adamw_torch",
        "logps_workspace_bytes": 2**25,
    }
    planner = planner_for(full=True, **given)
    choice = choose(planner, 64 * 2**30).choice
    assert choice == Choice(4000, False, False, "adamw_torch", None, 2**25)
    with pytest.raises(ConfigError) as caught:
        choose(planner, int(1.9 * 2**30))
    message = str(caught.value)
    assert "the least that this run takes is" in message
    assert "gradient_checkpointing" in message and "on auto it fits" in message


@pytest.fixture
def light(law, monkeypatch):
    """A step's activations take less than the fp32 sums of gradients: 160e6 parameters, so 0.6 GiB
    of sums beside 0.3 GiB of gradients in bf16; a step of 16,000 tokens at most 0.3 GiB."""
    for how, size in BYTES_PER_TOKEN.items():
        monkeypatch.setitem(BYTES_PER_TOKEN, how, size // 20)


def test_a_step_in_one_pack_is_taken_where_several_would_take_more(light):
    planner = planner_for(full=True)
    whole = planner.heaviest_step
    assert whole > 4096  # several packs would be comfortable
    best = Choice(whole, "selective")
    one = planner.predict(best)
    assert one.n_packs == 1
    least = Choice(planner.longest[1], True, True, logps_workspace_bytes=2**24)
    assert planner.predict(least).total > one.total
    assert choose(planner, one.total).choice == best


def minimum_of(planner: Planner, memory: int) -> int:
    """What the error for a budget of `memory` says is the least."""
    with pytest.raises((ConfigError, DataError)) as caught:
        choose(planner, memory)
    text = str(caught.value).partition("the least that this run takes is ")[2]
    return parse_bytes(text.partition(" (")[0])


@pytest.mark.parametrize("laws", ["law", "light"])
@pytest.mark.parametrize("options", [{}, {"optimizer_in_backward": True, "max_grad_norm": 0}])
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_the_minimum_that_is_printed_is_enough_and_no_less_is(request, laws, options, full):
    request.getfixturevalue(laws)
    planner = planner_for(full, **options)
    minimum = minimum_of(planner, 2**20)
    found = choose(planner, minimum)
    assert found.total <= minimum
    if options:
        assert found.n_packs == 1  # training would refuse several
    assert minimum_of(planner, int(0.99 * minimum)) == minimum  # two digits behind the point


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_a_max_length_that_is_advised_fits(law, monkeypatch, full):
    """From a budget that hardly lacks to one that no length meets, of which none is then said."""
    for how, size in BYTES_PER_TOKEN.items():  # so that a whole model's step is least in one pack
        monkeypatch.setitem(BYTES_PER_TOKEN, how, size // 3 if full else size)
    planner = planner_for(full)
    minimum = minimum_of(planner, 2**20)
    advised = []
    for share in (0.99, 0.9, 0.8, 0.5):
        memory = int(share * minimum)
        with pytest.raises((ConfigError, DataError)) as caught:
            choose(planner, memory)
        found = re.search(r"with max_length (\d+) it fits", str(caught.value))
        advised.append(int(found[1]) if found else 0)
        if found:
            pairs = planner.job.pairs.cut(advised[-1])
            assert pairs.lengths[:, :2].sum(axis=1).max() == advised[-1]
            assert choose(Planner(replace(planner.job, pairs=pairs)), memory).total <= memory
    assert advised == sorted(advised, reverse=True)
    assert advised[0] > 100 and advised[-1] == 0


def test_where_no_length_helps_another_way_to_train_is_named(law):
    """Weights and gradients take 0.6 GiB: within 0.6 of that the weights alone do fit, but no
    gradient of them all."""
    planner = planner_for(full=True)
    static = planner.least_static(Choice(1, True, True, "paged_adamw_8bit"))
    memory = static - 2**24
    with pytest.raises(ConfigError, match="weights, gradients and optimizer alone take") as caught:
        choose(planner, memory)
    message = str(caught.value)
    assert "max_length" not in message and "with use_peft true and base_precision" in message
    words = message.partition("base_precision ")[2].split()[0]
    adapter = planner_for(logps_workspace_bytes=2**24)
    lora = replace(adapter.job, base_precision=AUTO)
    chosen = choose(Planner(lora), memory).choice
    assert ("bf16", "8bit", "4bit").index(str(chosen.base_precision)) <= (
        "bf16",
        "8bit",
        "4bit",
    ).index(words)


def test_an_impossible_budget_says_the_minimum_and_what_would_fit(law):
    planner = planner_for(full=True)
    least = Choice(planner.longest[1], True, True, "paged_adamw_8bit", None, 2**24)
    minimum = show_bytes(planner.predict(least).total, up=True)
    alone = "weights, gradients and optimizer alone take"
    with pytest.raises(ConfigError, match=alone) as caught:
        choose(planner, planner.least_static(least) // 2)
    assert f"the least that this run takes is {minimum}" in str(caught.value)
    # A little less than the minimum of adapters: the longest pair is what can't fit.
    planner = planner_for()
    least = replace(least, base_precision="4bit")
    with pytest.raises(DataError, match=rf"row {planner.longest[0]}: its pair of") as caught:
        choose(planner, planner.predict(least).total - 2**24)
    assert re.search(r"with max_length \d+ it fits", str(caught.value))


def test_selective_checkpointing_and_offload_lie_between_nothing_and_full():
    shape: Any = {**SHAPE, "num_hidden_layers": 3, "hidden_size": 256}
    packs = build_pack(some_pairs(), range(24), mode="shared")

    def peak(how: bool | str, offload: bool) -> int:
        settings = StepSettings(True, True, True, True, checkpointing=how, offload=offload)
        spec = TwinSpec(LlamaConfig(**shape), torch.bfloat16, LoraConfig(**LORA))
        return replay(spec, packs, settings).total

    assert peak(True, False) < peak("selective", False) < peak(False, False)
    assert peak(False, True) < peak(False, False)
    assert peak(True, True) <= peak(True, False)


@pytest.mark.parametrize(
    "config, attention, left_out",
    [
        (LlamaConfig(), "sdpa", False),
        (LlamaConfig(), "flex_attention", True),
        (GptOssConfig(), "sdpa", True),
        (Gemma2Config(), "sdpa", True),
        (Gemma2Config(), "flash_attention_2", False),
    ],
)
def test_no_plan_keeps_attention_that_a_run_would_refuse_to_keep(config, attention, left_out):
    planner = planner_for()
    spec = replace(planner.job.spec, config=config)
    planner.job = replace(planner.job, spec=spec, attention=attention)
    assert ("selective" not in options_of(planner)["gradient_checkpointing"]) == left_out


def test_states_are_as_large_as_the_optimizers_make_them():
    sizes = [(1_000_000, 4_000_000), (1000, 4000), (10_000, 20_000)]
    assert state_bytes("sgd", sizes) == (0, 0)
    assert state_bytes("adamw_torch_fused", sizes) == (2 * 4_024_000, 0)
    # Two bytes an element and two fp32 scales a block of 256; fp32 below 4096 elements.
    blocks = 2 * 4 * (3907 + 40)
    assert state_bytes("adamw_8bit", sizes) == (2 * 1_010_000 + blocks + 8 * 1000, 0)
    assert state_bytes("paged_adamw_8bit", sizes)[1] == 2_000_000 + 2 * 4 * 3907
    assert state_bytes("paged_adamw_32bit", sizes) == (8 * 11_000, 8_000_000)


@pytest.mark.parametrize("text", ["24", "24GiB", " 24 gib", "24GB", "512MiB", "1.5GiB"])
def test_sizes_are_read(text):
    sizes = {"24": 24, "24GB": 24 * 10**9, "512MiB": 2**29, "1.5GiB": 3 * 2**29}
    assert parse_bytes(text) == sizes.get(text, 24 * 2**30)


@pytest.mark.parametrize("text", ["", "GiB", "0GiB", "24 apples", "-1GiB"])
def test_sizes_that_are_none_are_refused(text):
    with pytest.raises(ConfigError, match="expects a size such as 24GiB"):
        parse_bytes(text)


def test_the_command_needs_no_weights_and_no_dataset(tmp_path, capsys):
    LlamaConfig(**SHAPE).save_pretrained(tmp_path / "model")
    words = ["plan", "--model_name_or_path", str(tmp_path / "model"), "--gpu", "L4"]
    words += ["--use_peft", "--base_precision", "auto", "--max_length", "128"]
    assert main([*words, "--gradient_checkpointing", "auto"]) == 0
    printed = capsys.readouterr().out
    for expected in ("weights", "adapters", "gradients", "optimizer states", "attention", "MLP"):
        assert expected in printed
    assert "fragmentation allowance" in printed and "time per step: at least" in printed
    assert "gradient_checkpointing: none  # chosen" in printed
    assert "base_precision: bf16  # chosen" in printed
    assert "longest pair: 253 tokens (assumed, at max_length)" in printed  # 1 + 2 * 126
    assert main([*words, "--gpu_memory", "300MiB"]) == 2
    assert "the least that this run takes is" in capsys.readouterr().err
    words = [word for word in words if word not in ("--gpu", "L4")]
    for memory, like in (("24GiB", "RTX 3090"), ("80GiB", "A100"), ("16GiB", "A10G")):
        assert main([*words, "--gpu_memory", memory]) == 0
        printed = capsys.readouterr().out
        assert f"on a GPU, taken to be as fast as the {like}, " in printed
        assert "time per step: at least" in printed
    assert main([*words, "--gpu_memory", "16GiB", "--flops", "1e12"]) == 0
    printed = capsys.readouterr().out
    assert "taken to be" not in printed and "time per step: at least" in printed
    if not torch.cuda.is_available():
        assert main(words) == 0
        printed = capsys.readouterr().out
        assert "on this CPU, no budget" in printed and "time per step: at least" in printed
    assert main(["plan", "--model_name_or_path", str(tmp_path / "model"), "--gpu", "H1000"]) == 2
    assert "did you mean 'H100'" in capsys.readouterr().err
