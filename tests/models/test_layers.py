import copy
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_causal_lm
from turns import on_its_day

from fastalign import backend, use_backend
from fastalign.models.compiled_layers import (
    CompiledLayers,
    _GatedMLP,
    _RMSNorm,
    _Rotate,
    _SiluGate,
    gated,
    normed,
    rotated,
)

pytestmark = pytest.mark.skipif(backend.native is None, reason="the native extension is not built")
WIDTHS = [1, 3, 16, 17, 64, 100, 576]


def same(ours, definition, inputs, tolerance=2e-5):
    """Values and gradients of `ours` in float32 against `definition` in float64."""
    exact = [x.double().requires_grad_() for x in inputs]
    rounded = [x.clone().requires_grad_() for x in inputs]
    expected, result = definition(*exact), ours(*rounded)
    torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    out = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad(result, rounded, out.float()), torch.autograd.grad(expected, exact, out), strict=True
    ):
        size = float(b.abs().max()) if b.numel() else 0.0
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance * (1 + size))


def normals(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def rms(x, weight, eps, offset):
    return (offset + weight) * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [(0,), (1,), (5,), (2, 3)])
def test_norm(rows, width, offset):
    inputs = normals(*rows, width, scale=3.0), normals(width, seed=1)
    same(lambda x, w: _RMSNorm.apply(x, w, 1e-6, offset), lambda x, w: rms(x, w, 1e-6, offset), inputs)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-10, 1e15])
def test_norm_of_tiny_and_huge_rows(scale):
    x, weight = normals(4, 33, scale=scale), normals(33, seed=1)
    result = _RMSNorm.apply(x, weight, 1e-6, 0.0)
    torch.testing.assert_close(result.double(), rms(x.double(), weight.double(), 1e-6, 0.0), rtol=1e-5, atol=1e-30)


def test_norm_keeps_nan_in_its_row():
    x = normals(3, 40)
    x[1, 39] = float("nan")
    result = _RMSNorm.apply(x, torch.ones(40), 1e-6, 0.0)
    assert result[1].isnan().all() and not result[[0, 2]].isnan().any()


@pytest.mark.parametrize("shape", [(0,), (1,), (17,), (3, 100), (2, 5, 4097)])
def test_gate(shape):
    same(_SiluGate.apply, lambda g, u: F.silu(g) * u, (normals(*shape, scale=4.0), normals(*shape, seed=1)))


def test_gate_at_the_edges():
    g = torch.tensor([0.0, -0.0, 80.0, -80.0, 1e4, -1e4, 3e38, -3e38, float("inf"), float("nan"), 1e-40])
    u = torch.full_like(g, 2.0)
    torch.testing.assert_close(_SiluGate.apply(g, u), F.silu(g) * u, rtol=1e-6, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("shape", [(1, 4), (7, 4), (2, 3, 4)])
def test_mlp(shape):
    inputs = normals(*shape), normals(9, 4, seed=1), normals(9, 4, seed=2), normals(4, 9, seed=3)
    same(_GatedMLP.apply, lambda x, g, u, d: F.linear(F.silu(F.linear(x, g)) * F.linear(x, u), d), inputs)


def test_an_mlp_behind_a_norm_keeps_no_second_copy():
    model = model_of("llama")
    layer, x = model.model.layers[0], normals(1, 7, 32).requires_grad_()

    def run():
        x.grad = None
        model.zero_grad()
        out = layer.mlp(layer.post_attention_layernorm(x))
        out.sum().backward()
        return out, [
            x.grad.clone(),
            *(p.grad.clone() for p in (layer.mlp.gate_proj.weight, layer.mlp.down_proj.weight)),
        ]

    expected, kept = run(), []
    with CompiledLayers.of(model), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        result = run()
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    owned = {t.untyped_storage().data_ptr() for t in kept if t.shape[-1] == 32 and t.numel() == 7 * 32}
    assert owned == {x.untyped_storage().data_ptr()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 16, 33, 64])
def test_half_precision_is_rounded_once(dtype, width):
    x, u = (normals(5, width, seed=seed, scale=3.0).to(dtype) for seed in (0, 1))
    heads = normals(5, 3, 1, 2 * width, seed=2).to(dtype)
    cos, sin = normals(2, 5, 1, 2 * width, seed=3).to(dtype).unbind()
    a, b = heads.double().chunk(2, -1)
    turned = torch.cat((-b, a), -1)
    for result, truth in (
        (normed(x, u[0], 1e-6, 1.0)[0], rms(x.double(), u[0].double(), 1e-6, 1.0)),
        (gated(x, u), F.silu(x.double()) * u.double()),
        (rotated(heads, cos, sin), heads.double() * cos[:, None].double() + turned * sin[:, None].double()),
    ):
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), truth, rtol=0.51 * torch.finfo(dtype).eps, atol=2e-6)


@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (1, 3, 7, 6), (2, 2, 5, 64), (2, 1, 0, 8)])
def test_rotation(shape):
    batch, _, length, d = shape
    cos, sin = normals(2, batch, length, d, seed=4).unbind()

    def definition(x):
        a, b = x.chunk(2, -1)
        c, s = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
        return x * c + torch.cat((-b, a), -1) * s

    same(lambda x: _Rotate.apply(x, cos, sin), definition, (normals(*shape),))


@given(st.integers(1, 6), st.integers(1, 70), st.integers(0, 2**20))
def test_norm_and_gate_of_any_size(rows, width, seed):
    x, y = normals(rows, width, seed=seed), normals(rows, width, seed=seed + 1)
    same(lambda a, w: _RMSNorm.apply(a, w, 1e-5, 0.0), lambda a, w: rms(a, w, 1e-5, 0.0), (x, y[0]))
    same(_SiluGate.apply, lambda g, u: F.silu(g) * u, (x, y))


LEVELS = """
import torch
from fastalign.models.compiled_layers import _RMSNorm, _Rotate, _SiluGate
torch.manual_seed(4)
x, y, w = torch.randn(5, 77).requires_grad_(), torch.randn(5, 77).requires_grad_(), torch.randn(77).requires_grad_()
q, (cos, sin) = torch.randn(2, 3, 5, 22).requires_grad_(), torch.randn(2, 2, 5, 22)
found = _RMSNorm.apply(x, w, 1e-6, 0.0), _SiluGate.apply(x, y), _Rotate.apply(q, cos, sin)
gradients = torch.autograd.grad([out.sin().sum() for out in found], [x, y, w, q])
print(*(float((out * torch.arange(out.numel()).view(out.shape)).double().sum()) for out in (*found, *gradients)))
"""


@on_its_day("levels: layers and soups")
def test_every_level_gives_the_same_numbers():
    rows = []
    for isa in backend.native.available_isas():
        done = subprocess.run(
            [sys.executable, "-c", LEVELS],
            env=os.environ | {"FASTALIGN_ISA": isa},
            capture_output=True,
            text=True,
            check=True,
        )
        rows.append([float(x) for x in done.stdout.split()])
    assert len(rows[0]) == 7
    assert all(row == pytest.approx(rows[0], rel=1e-4) for row in rows)


# ---- whole models ----


def model_of(kind):
    import transformers

    common = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    if kind == "llama":
        config = transformers.LlamaConfig(**common)
    elif kind == "qwen3":
        config = transformers.Qwen3Config(**common)
    elif kind == "gemma2":
        config = transformers.Gemma2Config(**common)
    elif kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    else:
        config = transformers.OPTConfig(
            vocab_size=64,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=32,
        )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.add_(torch.rand_like(p))
    return model


# norms: two a layer and the last, Qwen3's two more for queries and keys, Gemma 2's four a layer; Gemma's gate is no
# silu
@pytest.mark.parametrize(("kind", "count"), [("llama", 7), ("qwen3", 11), ("gemma2", 9), ("gpt2", 0), ("opt", 0)])
def test_models_keep_their_outputs_and_gradients(kind, count):
    model = model_of(kind)
    ids = torch.arange(2, 22).view(2, 10)
    positions = torch.arange(10).expand(2, 10)
    layers = CompiledLayers.of(model)
    assert len(layers) == count and CompiledLayers.of(model) is layers

    def run():
        model.zero_grad()
        logits = model(ids, position_ids=positions).logits
        logits.log_softmax(-1)[..., 3].sum().backward()
        return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected, gradients = run()
    with layers:
        logits = model(ids, position_ids=positions).logits
        kinds = {type(node).__name__ for node in graph(logits.grad_fn)}
    assert kinds >= ({"_RMSNormBackward"} if count else set()) | (
        {"_GatedMLPBackward", "_RotateBackward"} if kind == "llama" else set()
    )
    assert logits.grad_fn is not None and not any("forward" in vars(m) for m in model.modules())
    with layers:
        result, ours = run()
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == ours.keys()
    for name in gradients:
        torch.testing.assert_close(ours[name], gradients[name], rtol=1e-3, atol=1e-4, msg=name)


def graph(node):
    seen, stack = set(), [node]
    while stack:
        top = stack.pop()
        if top is not None and top not in seen:
            seen.add(top)
            stack += [f for f, _ in top.next_functions]
    return seen


def test_the_model_is_left_as_it_was_after_an_error():
    model = model_of("llama")
    place = sys.modules[type(model).__module__]
    before = place.apply_rotary_pos_emb
    with pytest.raises(ZeroDivisionError), CompiledLayers.of(model):
        assert place.apply_rotary_pos_emb is not before
        assert sum("forward" in vars(m) for m in model.modules()) >= 7
        1 / 0  # noqa: B018
    assert place.apply_rotary_pos_emb is before
    assert not any("forward" in vars(m) for m in model.modules())


def test_a_forward_of_somebody_elses_stays():
    model = model_of("llama")
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: x * 0
    with CompiledLayers.of(model):
        assert mlp(torch.ones(1, 32)).abs().sum() == 0
    assert mlp(torch.ones(1, 32)).abs().sum() == 0


def test_hooks_inside_an_mlp_are_called():
    model, calls = model_of("llama"), []
    with CompiledLayers.of(model):
        model(torch.tensor([[3, 4]]))
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: calls.append(1))
    with CompiledLayers.of(model):
        model(torch.tensor([[3, 4]]))
    assert calls == [1]


@pytest.mark.parametrize("case", ["bfloat16", "autocast", "checkpointing", "reference"])
def test_what_the_engine_does_not_do_takes_the_models_own_path(case):
    model = model_of("llama").train()
    ids = torch.tensor([[3, 4, 5]])
    if case == "bfloat16":
        model = model.bfloat16()
    if case == "checkpointing":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    plain = copy.deepcopy(model)

    def run(m):
        with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
            loss = m(ids).logits.float().logsumexp(-1).sum()
        loss.backward()
        return loss.detach(), m.model.layers[0].mlp.up_proj.weight.grad

    expected = run(plain)
    with use_backend("reference") if case == "reference" else use_backend("auto"), CompiledLayers.of(model):
        result = run(model)
    assert torch.equal(result[0], expected[0]) and torch.equal(result[1], expected[1])


def test_adapters_in_an_mlp_have_their_say():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        model_of("llama"), peft.LoraConfig(target_modules=["up_proj", "down_proj", "q_proj"], init_lora_weights=False)
    )
    ids = torch.tensor([[3, 4, 5]])
    inner = model.get_base_model()
    expected = model(ids).logits
    expected.sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with CompiledLayers.of(inner):
        result = model(ids).logits
        assert "_SiluGateBackward" in {type(node).__name__ for node in graph(result.grad_fn)}
    result.sum().backward()
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    for name, p in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(p.grad, gradients[name], rtol=1e-3, atol=1e-4)


def test_double_precision_stays_exact():
    model = tiny_causal_lm(dtype=torch.float64)
    ids = torch.tensor([[3, 4, 5]])
    expected = model(ids).logits
    with CompiledLayers.of(model):
        assert torch.equal(model(ids).logits, expected)
