"""Compiled layers and liger's: the same numbers, few graphs, and what can't be is refused."""

import copy
import json
import sys
import types
from typing import Any

import pytest
import torch
from peft import LoraConfig

import fastdpo.body as body
from benchmarks import bench_body, harness
from fastdpo import DPOConfig, DPOTrainer
from fastdpo.body import (
    apply_liger,
    check_cuda_graphs,
    compile_layers,
    compiled_graphs,
    pack_lengths,
    wants_compile,
    wants_liger,
)
from fastdpo.errors import ConfigError, MissingPackageError, ModelError
from fastdpo.logps import prepare_packed_forward
from fastdpo.packing import build_pack
from fastdpo.policy import PackForward

from .families import by_name
from .test_keystone import mixed_pairs
from .tiny import tiny_llama, tiny_pairs


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Traced and differentiated ahead of time as for inductor, but run by eager kernels."""
    monkeypatch.setattr(body, "_BACKEND", "aot_eager")
    body._compiled_forward.cache_clear()
    torch._dynamo.reset()
    yield
    body._compiled_forward.cache_clear()
    torch._dynamo.reset()


def forward_and_gradients(model: Any, pack) -> list[torch.Tensor]:
    model.zero_grad()
    token_logps = model(pack=pack).token_logps
    (token_logps * torch.linspace(-1, 1, len(token_logps))).sum().backward()
    return [token_logps.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_give_the_same_numbers_from_few_graphs(checkpointing: bool) -> None:
    model: Any = tiny_llama(vocab_size=64, num_hidden_layers=3, dtype=torch.float64).train()
    plain = copy.deepcopy(model)
    for one in (model, plain):
        prepare_packed_forward(one)
        if checkpointing:
            one.gradient_checkpointing_enable({"use_reentrant": False})
    compile_layers(model)
    before, graphs = compiled_graphs(), []
    for seed in range(4):
        pairs = tiny_pairs(4, seed=seed, vocab_size=64, pairs_per_prompt=2)
        pack = build_pack(pairs, range(4), mode="shared", lengths=(128, 256))
        assert pack.n_tokens == 128
        found, expected = forward_and_gradients(model, pack), forward_and_gradients(plain, pack)
        for a, b in zip(found, expected, strict=True):
            # fp64, but norms compute in fp32: as in test_keystone.py.
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6 * float(b.abs().max()))
        graphs.append(compiled_graphs() - before)
    assert 0 < graphs[0] == graphs[3]  # one length: no pack compiles anew
    pack = build_pack(tiny_pairs(16, vocab_size=64), range(16), mode="shared", lengths=(128, 512))
    forward_and_gradients(model, pack)
    assert compiled_graphs() - before == 2 * graphs[0]  # another length: as many again


def test_padded_tails_change_nothing() -> None:
    model: Any = by_name("GPT-OSS").build()  # windows and sinks
    prepare_packed_forward(model)
    pairs = mixed_pairs()
    pack = build_pack(pairs, range(len(pairs)), mode="shared")
    padded = build_pack(pairs, range(len(pairs)), mode="shared", lengths=(64, 200, 300))
    assert pack.n_tokens < padded.n_tokens == 200 and padded.max_seqlen == pack.max_seqlen
    assert float(padded.multiplicity.sum()) == float(pack.multiplicity.sum())
    assert max(k - j for _, _, j, k in padded.layout.segments) == pack.layout.max_seqlen_k  # type: ignore[union-attr]
    with torch.no_grad():
        found, expected = model(pack=padded).token_logps, model(pack=pack).token_logps
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # fp32, other matmul shapes


def test_pack_lengths_are_few_and_hold_every_pack() -> None:
    assert pack_lengths(8192) == tuple(1024 * i for i in range(1, 9))
    assert pack_lengths(1000) == (128, 256, 384, 512, 640, 768, 896, 1000)
    assert pack_lengths(100) == (64, 100)


def config(tmp_path, **options) -> DPOConfig:
    given: dict[str, Any] = {
        "output_dir": str(tmp_path / "run"),
        "overwrite_output_dir": True,
        "learning_rate": 1e-2,
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "max_tokens_per_pack": 256,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return DPOConfig(**{**given, **options})


def test_a_compiled_run_is_the_same_run(tmp_path) -> None:
    pairs = tiny_pairs(12, pairs_per_prompt=2)
    runs = []
    for compile in ("off", "layers"):
        made = DPOTrainer(tiny_llama(), args=config(tmp_path, compile=compile), train_dataset=pairs)
        made.train()
        runs.append([log for log in made.state.log_history if "grad_norm" in log])
    for plain, compiled in zip(*runs, strict=True):
        assert compiled["loss"] == pytest.approx(plain["loss"], rel=1e-5)
        assert compiled["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-4)
        assert compiled["compiled_graphs"] > 0 and "compiled_graphs" not in plain
    assert runs[1][-1]["num_tokens"] % 64 == 0 != runs[0][-1]["num_tokens"] % 64


def test_what_cannot_be_compiled_is_refused_or_left(tmp_path, caplog) -> None:
    pairs = tiny_pairs(12)
    options = {"compile": "layers", "packing_mode": "padded"}
    with pytest.raises(ConfigError, match="'compile' is 'layers', but padded batches have a shape"):
        DPOTrainer(tiny_llama(), args=config(tmp_path, **options), train_dataset=pairs)
    with caplog.at_level("INFO", "fastdpo.body"):
        made = DPOTrainer(tiny_llama(), args=config(tmp_path, compile="auto"), train_dataset=pairs)
    assert not made.compiled and "layers: not compiled, it pays on a GPU" in caplog.text
    model = by_name("GPT-2").build()
    packed = prepare_packed_forward(model)
    args = config(tmp_path, compile="layers")
    with pytest.raises(ConfigError, match="'layers', but GPT2LMHeadModel has no list of layers"):
        wants_compile(model, packed, args, liger=False)
    assert not wants_compile(model, packed, config(tmp_path, compile="auto"), liger=False)
    with pytest.raises(ModelError, match="GPT2LMHeadModel has no list of layers.*compile: off"):
        compile_layers(model)


def test_a_call_without_a_pack_is_not_compiled() -> None:
    """Generating would compile every length."""
    model: Any = tiny_llama(vocab_size=64)
    prepare_packed_forward(model)
    compile_layers(model)
    before = compiled_graphs()
    assert (
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, min_new_tokens=3).numel() == 6
    )
    assert compiled_graphs() == before


def test_the_benchmark_measures_what_can_be_had_here(tmp_path, capsys, monkeypatch) -> None:
    """Also what of the layers a GPU alone can have, with stand-ins."""
    path = tmp_path / "body.json"
    arguments = ["--smoke", "--rounds", "1", "--output", str(path)]
    assert bench_body.main(arguments) == 0
    rows = {row["variant"]: row for row in json.loads(path.read_text())["rows"]}
    assert list(rows) == ["off", "layers"] and rows["off"]["x off"] == 1
    assert rows["off"]["graphs"] == 0 < rows["layers"]["graphs"]
    assert rows["layers"]["differs"] < 1e-5 and rows["layers"]["x off"] > 0  # fp32, four layers
    assert capsys.readouterr().out.count("left out, needs a GPU") == 1

    from transformers.models.llama import modeling_llama

    rope = modeling_llama.apply_rotary_pos_emb
    calls = {"liger": 0}

    def their_rope(*args, **kwargs):
        calls["liger"] += 1
        return rope(*args, **kwargs)

    def make(variant, lora, case, device):
        if made and made[-1] != "fp8":  # every variant is kept before the next is made
            assert made[-1] in [row["variant"] for row in json.loads(path.read_text())["rows"]]
        made.append(variant)
        if variant == "fp8":
            raise RuntimeError("CUDA error: an illegal memory access " + "with advice " * 40)
        model = plain("off", lora, case, device)
        if variant == "liger":
            modeling_llama.apply_rotary_pos_emb = their_rope
        return model

    made: list[str] = []
    plain = bench_body.make
    monkeypatch.setattr(bench_body, "absent", lambda *_: None)
    monkeypatch.setattr(bench_body, "make", make)
    assert bench_body.main(arguments) == harness.BROKEN
    assert made == ["off", "layers", "graphs", "fp8"]
    document = json.loads(path.read_text())
    assert [row["variant"] for row in document["rows"]] == made[:3]
    failed, rest = document["left_out"]
    assert failed.startswith("D=64 T=256 r=4 fp8: failed: RuntimeError: CUDA error")
    assert rest == "D=64 T=256 r=4 liger: not reached"

    assert bench_body.main([*arguments, "--resume"]) == 1  # fp8 is not tried again, and named
    assert made[4:] == ["off", "liger"]
    assert bench_body.NO_PEAK in capsys.readouterr().out
    document = json.loads(path.read_text())
    assert [row["variant"] for row in document["rows"]] == ["off", "layers", "graphs", "liger"]
    assert document["left_out"] == ["D=64 T=256 r=4 fp8: failed before"]
    # A first pass, two more, and a turn: in liger's alone, none of those of off between them.
    assert calls["liger"] == bench_body.N_LAYERS * (3 + bench_body.PASSES)
    assert modeling_llama.apply_rotary_pos_emb is rope

    monkeypatch.setitem(bench_body.SECONDS_NEEDED, "off", 0.0)
    assert bench_body.main([*arguments, "--seconds", "5"]) == 0
    document = json.loads(path.read_text())
    assert [row["variant"] for row in document["rows"]] == ["off"]
    assert [line.partition(": ")[2] for line in document["left_out"]] == ["no time left"] * 4
    monkeypatch.setitem(bench_body.SECONDS_NEEDED, "off", 9.0)
    assert bench_body.main([*arguments, "--seconds", "5"]) == 0
    document = json.loads(path.read_text())
    reasons = [line.partition(": ")[2] for line in document["left_out"]]
    assert document["rows"] == [] and reasons == ["no time left"] + ["not reached"] * 4


# ---- CUDA graphs ---------------------------------------------------------------------------------


class FakeGraphs:
    """In the place of torch.compile and its mark: what they were told, and nothing compiled."""

    def __init__(self, monkeypatch):
        self.calls: list[dict[str, Any]] = []
        self.marks = 0
        monkeypatch.setattr(torch, "compile", self.compile)
        monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", self.mark)

    def compile(self, function, **options):
        self.calls.append(options)
        return function

    def mark(self):
        self.marks += 1


def test_cuda_graphs_are_asked_for_marked_and_keep_no_gradient(monkeypatch) -> None:
    fake = FakeGraphs(monkeypatch)
    model: Any = tiny_llama(vocab_size=64).train()
    prepare_packed_forward(model)
    compile_layers(model)
    assert fake.calls.pop()["options"] is None
    compile_layers(model, cuda_graphs=True)
    (call,) = fake.calls
    assert call == {
        "backend": "aot_eager",
        "dynamic": False,
        "options": {"triton.cudagraphs": True},
    }
    assert "triton.cudagraphs" in torch._inductor.list_options()  # pyright: ignore
    pack = build_pack(tiny_pairs(4, vocab_size=64), range(4), mode="shared")
    forward = PackForward("cpu", False, cuda_graphs=True)
    layers = list(model.model.layers.parameters())  # whose gradients a graph's next run overwrites
    assert all(list(p._backward_hooks.values()) == [torch.clone] for p in layers)
    for n in (1, 2):
        forward(model, pack).sum().backward()
        assert fake.marks == n
    PackForward("cpu", False)(model, pack)
    assert fake.marks == 2  # unasked: nothing is marked


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "they need a GPU, and this is cpu, or leave cuda_graphs out"),
        (
            {"device": "cuda"},
            "they record compiled layers, and these are not compiled; set compile: lay",
        ),
        (
            {"device": "cuda", "compiled": True},
            "layers twice a pass; set gradient_checkpointing: n",
        ),
        (
            {
                "device": "cuda",
                "compiled": True,
                "gradient_checkpointing": "none",
                "activation_offloading": True,
            },
            "activation_offloading copies activations while graphs go on",
        ),
        (
            {
                "device": "cuda",
                "compiled": True,
                "gradient_checkpointing": "auto",
                "activation_offloading": "auto",
            },
            None,
        ),
    ],
)
def test_cuda_graphs_that_cannot_be_are_refused(tmp_path, monkeypatch, options, message) -> None:
    options = dict(options)
    device, compiled = options.pop("device", "cpu"), options.pop("compiled", False)
    args = config(tmp_path, cuda_graphs=True, **options)
    monkeypatch.setattr(type(args), "device", torch.device(device))
    if message is None:
        check_cuda_graphs(args, compiled)
        return
    with pytest.raises(ConfigError, match=message) as caught:
        check_cuda_graphs(args, compiled)
    assert "'cuda_graphs' can't be had" in str(caught.value)
    if device == "cpu":
        with pytest.raises(ConfigError, match="they need a GPU"):
            DPOTrainer(tiny_llama(), args=args, train_dataset=tiny_pairs(12))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("lora", [False, True])
def test_recorded_layers_give_the_numbers_of_eager_ones(tmp_path, monkeypatch, lora: bool) -> None:
    """Steps of two packs and more, so that gradients outlive the pass that made them; a reference
    beside them, and an evaluation between."""
    monkeypatch.setattr(body, "_BACKEND", "inductor")
    pairs = tiny_pairs(24, pairs_per_prompt=2)
    runs = []
    for options in ({"compile": "off"}, {"compile": "layers", "cuda_graphs": True}):
        given: Any = {
            **{"use_cpu": False, "bf16": False, "gradient_checkpointing": "none", "max_steps": 8},
            **{"max_tokens_per_pack": 128, "eval_strategy": "steps", "eval_steps": 4, **options},
        }
        made = DPOTrainer(
            tiny_llama(),
            args=config(tmp_path, **given),
            train_dataset=pairs,
            eval_dataset=pairs,
            peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
            if lora
            else None,
        )
        made.train()
        runs.append([log for log in made.state.log_history if "grad_norm" in log])
    for plain, recorded in zip(*runs, strict=True):
        # fp32 in other kernels; eight steps of Adam enlarge last bits.
        assert recorded["loss"] == pytest.approx(plain["loss"], rel=1e-3)
        assert recorded["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-2)


# ---- liger-kernel --------------------------------------------------------------------------------


def stand_in_liger(monkeypatch) -> list[dict]:
    """A liger-kernel that has llama alone; returns what its layers are applied to."""
    package = types.ModuleType("liger_kernel.transformers")
    patches = types.ModuleType("liger_kernel.transformers.monkey_patch")
    calls: list[dict] = []
    package._apply_liger_kernel_to_instance = lambda **kwargs: calls.append(kwargs)  # type: ignore[attr-defined]
    patches.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None}  # type: ignore[attr-defined]
    for name, module in (
        ("liger_kernel", types.ModuleType("liger_kernel")),
        ("liger_kernel.transformers", package),
        ("liger_kernel.transformers.monkey_patch", patches),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def test_ligers_layers_without_its_loss(monkeypatch) -> None:
    model: Any = tiny_llama()
    with pytest.raises(MissingPackageError, match="pip install liger-kernel"):
        apply_liger(model)
    calls = stand_in_liger(monkeypatch)
    with pytest.raises(ConfigError, match="its kernels need a GPU, this model is on cpu"):
        apply_liger(model)
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    apply_liger(model)
    assert calls == [{"model": model, "cross_entropy": False, "fused_linear_cross_entropy": False}]
    model.config.model_type = "rare"
    with pytest.raises(ModelError, match="no layers for 'rare'; use compile: layers"):
        apply_liger(model)


def test_auto_takes_ligers_layers_where_it_has_the_model_and_compiles_others(monkeypatch) -> None:
    model: Any = tiny_llama()
    packed = prepare_packed_forward(model)

    def chosen(compile: str, **options: Any) -> tuple[bool, bool]:
        args = DPOConfig(output_dir="unused", use_cpu=True, compile=compile, **options)
        monkeypatch.setattr(type(args), "device", torch.device("cuda"))
        liger = wants_liger(model, args)
        return liger, wants_compile(model, packed, args, liger)

    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    assert chosen("auto") == (False, True)  # the package isn't there
    stand_in_liger(monkeypatch)
    assert chosen("auto") == (True, False)
    assert chosen("off") == (False, False)
    assert chosen("off", use_liger_kernel=True) == (True, False)
    assert chosen("layers") == (False, True)
    assert chosen("auto", cuda_graphs=True) == (False, True)
    model.config.model_type = "rare"
    assert chosen("auto") == (False, True)
