"""The lean LoRA forward: PEFT's numbers and gradients, without its copies and its passes."""

import copy
import json
from collections import Counter
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import bench_lora
from fastdpo import DPOConfig, DPOTrainer
from fastdpo.body import compile_layers, compiled_graphs
from fastdpo.checkpointing import checkpoint_activations
from fastdpo.errors import ModelError
from fastdpo.logps import prepare_packed_forward
from fastdpo.lora import use_lean_lora
from fastdpo.offload import OffloadActivations
from fastdpo.packing import build_pack

from .families import by_name
from .tiny import tiny_llama, tiny_pairs

N_IN, N_OUT, R, T = 24, 40, 4, 17
MANY = 200  # tokens, so that activations are larger than weights


class Block(nn.Module):
    """Three projections of one input and one of their sum, under transformers' names."""

    def __init__(self, bias: bool = False):
        super().__init__()
        self.q_proj = nn.Linear(N_IN, N_OUT, bias=bias)
        self.k_proj = nn.Linear(N_IN, N_OUT // 2, bias=bias)
        self.v_proj = nn.Linear(N_IN, N_OUT // 2, bias=bias)
        self.o_proj = nn.Linear(N_OUT, N_IN, bias=bias)

    def forward(self, x):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.o_proj((q * torch.cat([k, v], -1)).tanh())


def block(dtype: torch.dtype = torch.float64, bias: bool = False, **options: Any) -> Any:
    """A PEFT model of a `Block`, its adapters random."""
    torch.manual_seed(0)
    given = {"r": R, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    model = get_peft_model(Block(bias).to(dtype), LoraConfig(**{**given, **options}))  # type: ignore[arg-type]
    randomize(model)
    return model


def randomize(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            with torch.no_grad():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def lean(model: Any) -> Any:
    model = copy.deepcopy(model)
    use_lean_lora(model)
    return copy.deepcopy(model)  # a copy calls itself, not what it was copied from


def outputs(model: Any, x: torch.Tensor, bf16: bool = False) -> dict[str, torch.Tensor]:
    """The output, and the gradient of everything that has one."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        y = model(x)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad, **grads}


def an_input(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(2, T, N_IN, generator=torch.Generator().manual_seed(2)).to(dtype)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        # fp64's 1e-16, times sums of up to 40 products in another order.
        torch.testing.assert_close(
            found[name], value, rtol=0, atol=1e-13 * float(value.abs().max()), msg=name
        )


# ---- the same numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": True},
        {"use_rslora": True, "r": 7},
        {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"v_proj": 40}},
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["v_proj"]},
    ],
    ids=["all", "biases", "rslora", "ranks", "q and v", "v"],
)
def test_outputs_and_gradients_are_pefts(options) -> None:
    options = dict(options)
    model = block(bias=options.pop("bias", False), **options)
    found = outputs(lean(model), an_input())
    assert_same(found, outputs(model, an_input()))
    assert any("lora_A" in name for name in found)
    again = outputs(lean(model), an_input())
    assert all(torch.equal(again[name], value) for name, value in found.items())


def test_frozen_factors_and_inputs_get_no_gradient() -> None:
    model = block()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    found = outputs(lean(model), an_input())
    assert_same(found, outputs(model, an_input()))
    assert not any("lora_A" in name for name in found)
    with FlopCounterMode(display=False) as whole:
        outputs(lean(model), an_input())
    with FlopCounterMode(display=False) as less:
        x = an_input()  # a first layer's: nobody wants its gradient
        lean(model)(x).sum().backward()
    n = 2 * T
    into_qkv = N_OUT + N_OUT // 2 * 2
    assert whole.get_total_flops() - less.get_total_flops() == 2 * n * N_IN * (into_qkv + 3 * R)


FAMILIES = ("Llama 3", "Qwen2, Qwen2.5", "Phi-3, Phi-4", "GPT-2", "OPT", "Qwen2-MoE", "Gemma 2")


@pytest.mark.parametrize("name", FAMILIES)
def test_families_train_alike(name: str) -> None:
    """Also GPT-2's transposed weights, which stay with their own product."""
    model: Any = get_peft_model(
        by_name(name).build(torch.float64),
        LoraConfig(task_type="CAUSAL_LM", r=R, target_modules="all-linear"),
    )
    randomize(model)
    pack = build_pack(tiny_pairs(4, vocab_size=80), range(4), mode="shared")
    results = []
    for one in (copy.deepcopy(model), lean(model)):
        base = one.get_base_model()
        prepare_packed_forward(base)
        results.append(gradients(one.train(), pack))
    for found, expected in zip(results[1], results[0], strict=True):
        # fp64; where norms compute in fp32, a last bit of theirs may turn over.
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-8 * float(expected.abs().max()))


def gradients(model: Any, pack, saving=None) -> list[torch.Tensor]:
    model.zero_grad()
    if saving is None:
        logps = model(pack=pack).token_logps
    else:
        with saving:
            logps = model(pack=pack).token_logps
    (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
    return [logps.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


def llama(**options: Any) -> Any:
    model: Any = get_peft_model(
        tiny_llama(vocab_size=64, **options),
        LoraConfig(task_type="CAUSAL_LM", r=R, target_modules="all-linear"),
    )
    randomize(model)
    prepare_packed_forward(model.get_base_model())
    return model.train()


def test_recomputed_and_offloaded_activations_give_the_same_bits() -> None:
    pack = build_pack(tiny_pairs(4, vocab_size=64, pairs_per_prompt=2), range(4), mode="shared")
    expected = gradients(lean(llama()), pack)
    for how in (True, "selective"):
        model = lean(llama())
        checkpoint_activations(model, how, {})
        assert all(map(torch.equal, gradients(model, pack), expected)), how
        waiting = [m._fastdpo_siblings for m in model.modules() if hasattr(m, "_fastdpo_siblings")]
        assert not any(siblings.outputs or siblings.x is not None for siblings in waiting)
    model = lean(llama())
    offload = OffloadActivations(model, least_bytes=0)
    assert all(map(torch.equal, gradients(model, pack, offload), expected))
    assert offload.host_bytes > 0


def test_compiled_layers_agree_and_share_their_graphs(monkeypatch) -> None:
    monkeypatch.setattr("fastdpo.body._BACKEND", "aot_eager")
    torch._dynamo.reset()
    model = lean(llama(num_hidden_layers=3, dtype=torch.float64))
    pack = build_pack(tiny_pairs(4, vocab_size=64), range(4), mode="shared", lengths=(256,))
    expected = gradients(model, pack)
    compile_layers(model.get_base_model())
    before = compiled_graphs()
    for found, value in zip(gradients(model, pack), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=0, atol=1e-6 * float(value.abs().max()))
    first = compiled_graphs() - before
    gradients(model, pack)
    assert compiled_graphs() - before == first  # by all layers, and again
    torch._dynamo.reset()


def test_under_autocast_it_is_as_exact_as_peft() -> None:
    """bf16 products of fp32 weights: errors against the same block in fp64, summed in squares."""
    model = block(torch.float32)
    exact = outputs(copy.deepcopy(model).double(), an_input())
    theirs, ours = (outputs(one, an_input(torch.float32), True) for one in (model, lean(model)))
    for name, value in exact.items():
        assert ours[name].dtype == theirs[name].dtype
        # Fewer roundings of the same size; the factor is for chance in sums of 100 and more.
        error = float((ours[name].double() - value).norm())
        assert error <= 1.2 * float((theirs[name].double() - value).norm()), name
    frozen = copy.deepcopy(model).to(torch.bfloat16)  # no autocast: PEFT computes in fp32 here
    for name, parameter in frozen.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
    found = outputs(lean(frozen), an_input(torch.bfloat16))
    assert found["y"].dtype == torch.bfloat16
    assert all(v.dtype == torch.float32 for n, v in found.items() if ".lora_" in n)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_it_is_as_exact_as_peft_and_repeatable() -> None:
    """bf16 weights and activations under autocast, fp32 adapters: as runs have them."""
    torch.manual_seed(0)
    model = block(torch.bfloat16).cuda()
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
    x = torch.randn(4096, N_IN, device="cuda", dtype=torch.bfloat16)
    # At random: of a smooth gradient all rows of dB err alike, and their error is a draw or four.
    weights = torch.randn(4096, N_IN, device="cuda")

    def run(one: Any, x: torch.Tensor, bf16: bool) -> dict[str, torch.Tensor]:
        one.zero_grad()
        x = x.clone().requires_grad_()
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            y = one(x)
        (y * weights).sum().backward()
        grads = {n: p.grad.clone() for n, p in one.named_parameters() if p.grad is not None}
        assert x.grad is not None
        return {"y": y.detach(), "x": x.grad, **grads}

    ours = lean(model)
    exact = run(copy.deepcopy(model).double(), x.double(), False)
    theirs, found, again = run(model, x, True), run(ours, x, True), run(ours, x, True)
    for name, value in exact.items():
        assert found[name].dtype == theirs[name].dtype and torch.equal(found[name], again[name])
        error = float((found[name].double() - value).norm())
        assert error <= 1.2 * float((theirs[name].double() - value).norm()), name


# ---- what it costs -------------------------------------------------------------------------------


class CountOperations(TorchDispatchMode):
    """How many operations of at least `least` elements make or fill a tensor; views are free."""

    def __init__(self, least: int):
        super().__init__()
        self.least = least
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.numel() >= self.least and not func.is_view:
            self.names[str(func._overloadpacket)] += 1
        return out


def cost(model: nn.Module, bf16: bool = False) -> tuple[int, int, int]:
    """(FLOPs of products, bytes kept for the backward pass, operations over activations)."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    alive: list[torch.Tensor] = []
    count = CountOperations(least=MANY * N_OUT // 2)
    with FlopCounterMode(display=False) as flops, count:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            x = torch.ones(1, MANY, N_IN, requires_grad=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                y = model(x)
        y.sum().backward()
    return flops.get_total_flops(), sum(kept.values()), count.names.total()


def test_what_is_computed_kept_and_launched_is_the_least() -> None:
    """First in fp32, where no cast stands between."""
    frozen = Block()
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    model = block(torch.float32)
    base, peft, ours = cost(frozen), cost(model), cost(lean(model))
    n = MANY
    sizes = [(N_IN, N_OUT), *2 * [(N_IN, N_OUT // 2)], (N_OUT, N_IN)]
    # Three products with A and three with B, forward and backward: no more than there must be.
    assert ours[0] - base[0] == sum(6 * n * R * (a + b) for a, b in sizes) == peft[0] - base[0]
    # x of q, k, v once, that of o, and [T, R] of each layer. PEFT keeps x A^T too, and no more in
    # fp32; under autocast a copy of x for every layer.
    assert ours[1] - base[1] <= 4 * (n * (N_IN + N_OUT + 4 * R)) + 4 * R * sum(map(sum, sizes))
    assert ours[1] <= peft[1] + 4 * 3 * R * N_IN  # A of q, k and v, side by side
    # PEFT multiplies by B, scales and adds; here s B goes in where the base's product comes out.
    assert ours[2] <= base[2] < peft[2]
    base, peft, ours = (cost(one, True) for one in (frozen, model, lean(model)))
    assert ours[1] - base[1] <= 2 * (n * (N_IN + N_OUT + 4 * R)) + 4 * R * sum(map(sum, sizes))
    assert ours[1] < 0.8 * peft[1]  # which keeps a cast x for each of q, k and v
    assert ours[2] <= base[2] < peft[2]


# ---- what is left to PEFT ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"use_dora": True}, "of type DoraLinearVariant"),
        ({"lora_dropout": 0.1}, "with dropout"),
        ({"lora_bias": True}, "with a bias"),
    ],
)
def test_other_adapters_are_left_to_peft_by_name(options, reason, caplog) -> None:
    model = block(**options).eval()
    with caplog.at_level("INFO", "fastdpo.lora"):
        ours = lean(model)
    assert f"PEFT's own forward for 4 layers, {reason}" in caplog.text
    found, expected = outputs(ours, an_input()), outputs(model, an_input())
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("where", ["base_layer", "lora_A", "lora_B", "lora_dropout"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_that_come_late_are_called(where: str, kind: str, caplog) -> None:
    """On any module inside a layer, between two passes; its siblings stay lean."""
    model = block()
    ours, x = lean(model), an_input()
    ours(x)
    calls: list[str] = []
    handles = []
    for name, one in (("ours", ours), ("theirs", model)):
        layer = one.get_base_model().k_proj
        inside = layer.base_layer if where == "base_layer" else getattr(layer, where)["default"]

        def hook(module, given, *rest, name=name):  # changes what passes, so that it must be seen
            calls.append(name)
            changed = rest[-1] if kind in ("forward", "full_backward") and rest else given
            if kind == "full_backward":
                changed = given  # of (module, grad_input, grad_output)
            return tuple(2 * t for t in changed) if isinstance(changed, tuple) else 2 * changed

        handles.append(getattr(inside, f"register_{kind}_hook")(hook))
    with caplog.at_level("WARNING", "fastdpo.lora"):
        found, expected = outputs(ours, x), outputs(model, x)
        outputs(ours, x)
    assert_same(found, expected)
    assert calls.count("ours") == 2 * calls.count("theirs") > 0
    (record,) = caplog.records
    assert "PEFT's own forward from here on for base_model.model.k_proj, with h" in record.message
    family = ours.get_base_model().q_proj._fastdpo_siblings
    assert len(family.layers) == 3 and not family.outputs
    for handle in handles:
        handle.remove()
    assert_same(outputs(ours, x), outputs(model, x))


def test_embeddings_and_trained_layers_are_left_to_peft_by_name(caplog) -> None:
    options: Any = {"target_modules": ["embed_tokens", "q_proj", "k_proj"], "r": R}
    model = get_peft_model(tiny_llama(), LoraConfig(**options))
    trained = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj.base_layer")
    trained.requires_grad_(True)
    with caplog.at_level("INFO", "fastdpo.lora"):
        assert use_lean_lora(model) == 3
    assert "1 layers, which are lora.Embedding" in caplog.text
    assert "1 layers, whose base is trained" in caplog.text


def test_adapters_off_merged_or_several_are_pefts_affair() -> None:
    model = block()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "o_proj"]))
    randomize(model)
    ours, x = lean(model), an_input()
    for one in (model, ours):
        one.set_adapter("other")
    assert_same(outputs(ours, x), outputs(model, x))  # of q and o alone
    with model.disable_adapter(), ours.disable_adapter():
        assert torch.equal(ours(x), model(x))
    for one in (model, ours):
        one.base_model.set_adapter(["default", "other"])
    assert_same(outputs(ours, x), outputs(model, x))
    for one in (model, ours):
        one.base_model.set_adapter("default")
        one.merge_adapter()
    assert torch.equal(ours(x), model(x))
    for one in (model, ours):
        one.unmerge_adapter()
    assert_same(outputs(ours, x), outputs(model, x))
    merged, theirs = ours.merge_and_unload(), model.merge_and_unload()
    assert torch.equal(merged(x), theirs(x)) and type(merged.q_proj) is nn.Linear


def test_layers_with_inputs_of_their_own_come_apart(caplog) -> None:
    model = block()
    plain = Block.forward

    def apart(self, x):  # v is called for one in two, and k sees another tensor
        q, k, v = self.q_proj(x), self.k_proj(x + 0), self.v_proj(x + 0)
        return self.o_proj((q * torch.cat([k, v], -1)).tanh())

    ours = lean(model)
    expected = outputs(model, an_input())
    try:
        Block.forward = apart
        with caplog.at_level("INFO", "fastdpo.lora"):
            for _ in range(3):
                assert_same(outputs(ours, an_input()), expected)
    finally:
        Block.forward = plain
    assert "layers do not share their input" in caplog.text
    layer = ours.get_base_model().v_proj
    assert len(layer._fastdpo_siblings.layers) == 1 and layer._fastdpo_siblings.x is None


def test_a_pass_cut_short_leaves_nothing_behind() -> None:
    """As where memory runs out between two siblings: the next pass takes none of its numbers."""
    model = lean(block())
    base, x = model.get_base_model(), an_input()
    with torch.no_grad():
        base.q_proj(x)
        x.mul_(2)
        expected = lean(block())(an_input() * 2)
        torch.testing.assert_close(model(x.clone()), expected, rtol=0, atol=1e-13)
    assert base.q_proj._fastdpo_siblings.x is None
    assert len(base.q_proj._fastdpo_siblings.layers) == 3


def test_what_waits_is_of_its_own_moment_only() -> None:
    """Between two siblings: x written to, another adapter, a graph wanted, a copy made."""
    model = block()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "k_proj"]))
    randomize(model)
    ours = lean(model)
    theirs, base = model.get_base_model(), ours.get_base_model()
    x, close = an_input(), {"rtol": 0, "atol": 1e-13}
    with torch.no_grad():
        base.q_proj(x)
        x.mul_(2)
        torch.testing.assert_close(base.k_proj(x), theirs.k_proj(x), **close)
        base.q_proj(x)
        for one in (model, ours):
            one.set_adapter("other")
        torch.testing.assert_close(base.k_proj(x), theirs.k_proj(x), **close)
        base.q_proj(x)
        with model.disable_adapter(), ours.disable_adapter():
            assert torch.equal(base.k_proj(x), theirs.k_proj(x))
    fresh = lean(model).get_base_model()
    with torch.no_grad():
        fresh.q_proj(x)
    assert fresh.k_proj(x).requires_grad
    waiting = lean(model).get_base_model()
    waiting.q_proj(x)
    assert waiting.q_proj._fastdpo_siblings.x is x  # whose outputs have a graph
    assert copy.deepcopy(waiting).q_proj._fastdpo_siblings.x is None


def test_a_pickled_model_computes_the_same(tmp_path) -> None:
    """Under PEFT's own forward, until it is made lean again."""
    ours, x = lean(llama()), torch.arange(8)[None]
    torch.save(ours, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    expected = ours(input_ids=x).logits
    # fp32 at 2 layers: some roundings of sums of 32 products.
    torch.testing.assert_close(again(input_ids=x).logits, expected, rtol=1e-5, atol=1e-5)
    assert use_lean_lora(again) == use_lean_lora(ours)


def test_a_forward_that_another_package_replaced_stays(caplog) -> None:
    model: Any = block()
    layer = model.get_base_model().q_proj
    layer.forward = lambda x: type(layer).forward(layer, x) + 1
    with caplog.at_level("INFO", "fastdpo.lora"):
        assert use_lean_lora(model) == 3
        assert use_lean_lora(model) == 3
    assert "PEFT's own forward for 1 layers, whose forward was replaced" in caplog.text
    assert not hasattr(layer, "_fastdpo_siblings")


# ---- in a run ------------------------------------------------------------------------------------


def test_a_run_is_the_same_run_with_and_without(tmp_path) -> None:
    runs, files = [], []
    for on in (True, False):
        args = DPOConfig(
            output_dir=str(tmp_path / str(on)),
            lean_lora=on,
            learning_rate=1e-2,
            max_steps=3,
            per_device_train_batch_size=4,
            max_tokens_per_pack=256,
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        peft_config = LoraConfig(task_type="CAUSAL_LM", r=R, target_modules="all-linear")
        made = DPOTrainer(
            tiny_llama(),
            args=args,
            train_dataset=tiny_pairs(12, pairs_per_prompt=2),
            peft_config=peft_config,
        )
        made.train()
        runs.append([log["loss"] for log in made.state.log_history if "grad_norm" in log])
        files.append([(n, p.shape, p.dtype) for n, p in made.model.named_parameters()])
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)  # fp32, three steps of Adam
    assert runs[0][-1] != runs[0][0] and files[0] == files[1]


def test_the_benchmark_counts_the_same(tmp_path) -> None:
    path = tmp_path / "lora.json"
    assert bench_lora.main(["--smoke", "--rounds", "1", "--output", str(path)]) == 0
    rows = {row["implementation"]: row for row in json.loads(path.read_text())["rows"]}
    frozen, peft, ours = (rows[name] for name in ("frozen", "peft", "fastdpo"))
    assert ours["differs"] < 1e-5  # fp32, two layers
    assert frozen["gflops"] < ours["gflops"] == peft["gflops"]
    assert ours["operations"] - frozen["operations"] < 0.1 * (
        peft["operations"] - frozen["operations"]
    )
    assert all(row["x frozen"] > 0 for row in rows.values())


@pytest.mark.parametrize("ready", [False, True])
def test_a_router_that_is_a_linear_layer_is_refused_by_name(tmp_path, ready) -> None:
    """Llama 4's returns a tuple. Without it, the family trains."""
    model, pairs = by_name("Llama 4").build(), tiny_pairs(4, vocab_size=80)
    kwargs: dict[str, Any] = {"use_cpu": True, "save_strategy": "no", "router_aux_loss_coef": 0}
    options = DPOConfig(output_dir=str(tmp_path / "run"), max_steps=1, **kwargs)
    lora_config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    given: dict[str, Any] = {"model": model, "peft_config": lora_config}
    if ready:
        given = {"model": get_peft_model(model, lora_config)}
    with pytest.raises(ModelError, match=r"takes in model\.layers\.0\.\S*router, a Llama4Router"):
        DPOTrainer(args=options, train_dataset=pairs, **given)
    lora_config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"])
    model = by_name("Llama 4").build()
    DPOTrainer(model, args=options, train_dataset=pairs, peft_config=lora_config).train()
