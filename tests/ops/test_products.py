"""Matrix products by every provider: the numbers of float64, and which provider is chosen."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_causal_lm, tiny_tokenizer

from fastalign._base.errors import UserError
from fastalign.models.compiled_layers import CompiledLayers
from fastalign.ops import products

ABSENT = pytest.mark.skipif(not products.available(), reason="torch without oneDNN")
HERE = [dtype for dtype in products.DTYPES if products.available(dtype)]
PROVIDERS = ["torch", pytest.param("onednn", marks=ABSENT)]
SHAPES = [(1, 1, 1), (1, 7, 5), (3, 16, 33), (17, 64, 48), (130, 96, 257)]  # rows, width of x, of the result
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.fixture(params=PROVIDERS)
def provider(request, monkeypatch):
    """Forced, for products of every size."""
    monkeypatch.setenv("FASTALIGN_PRODUCTS", request.param)
    monkeypatch.setattr(products, "SMALL", 0)
    return request.param


@pytest.fixture
def called(monkeypatch):
    """What oneDNN was called for."""
    for dtype in products.DTYPES:
        products.available(dtype)  # which tries it
    calls, run = [], products._onednn
    monkeypatch.setattr(products, "_onednn", lambda *args: calls.append(args[0].shape) or run(*args))
    return calls


def assert_near(result, exact, size):
    """size: the sum of the absolute values of the terms."""
    error = (result.double() - exact).abs()
    assert result.shape == exact.shape and (error <= TOLERANCE[result.dtype] * size + 1e-30).all()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_product_is_right(provider, shape, dtype):
    rows, k, n = shape
    x, dy, w, b = (torch.randn(size).to(dtype) for size in ((rows, k), (rows, n), (n, k), (n,)))
    exact, size = [x.double(), dy.double(), w.double(), b.double()], [t.double().abs() for t in (x, dy, w, b)]
    assert_near(products.linear(x, w, b), exact[0] @ exact[2].T + exact[3], size[0] @ size[2].T + size[3])
    assert_near(products.linear(x, w), exact[0] @ exact[2].T, size[0] @ size[2].T)
    assert_near(products.grad_input(dy, w), exact[1] @ exact[2], size[1] @ size[2])
    assert_near(products.grad_weight(dy, x), exact[1].T @ exact[0], size[1].T @ size[0])


@pytest.mark.parametrize("dtype", HERE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_packed_weight(shape, dtype, monkeypatch):
    monkeypatch.setenv("FASTALIGN_PRODUCTS", "onednn")
    rows, k, n = shape
    x, w, b = (torch.randn(size).to(dtype) for size in ((rows, k), (n, k), (n,)))
    packed = products.pack(w, 64)
    exact, size = x.double() @ w.double().T, x.double().abs() @ w.double().abs().T
    assert_near(products.packed_linear(x, packed), exact, size)
    assert_near(products.packed_linear(x, packed, b), exact + b.double(), size + b.double().abs())
    assert products.pack(w, 1) is None and products.pack(w.half(), 64) is None
    monkeypatch.setenv("FASTALIGN_PRODUCTS", "torch")
    assert products.pack(w, 64) is None


@pytest.mark.parametrize("dtype", products.DTYPES, ids=str)
def test_any_strides_and_leading_dimensions(provider, dtype):
    wide = torch.randn(4, 6, 80).to(dtype)
    w = torch.randn(40, 96).to(dtype)
    for x, weight in (
        (wide[..., ::2], w[:, :40]),
        (wide.transpose(0, 1)[..., :40], w[:, ::2][:, :40]),
        (wide[:, :, 3:43], w[:, :40].t().contiguous().t()),
        (wide[0, 0, :40], w[:, :40]),
        (wide[:0, :, :40], w[:, :40]),
        (wide[..., :40], w[:0, :40]),
    ):
        result = products.linear(x, weight)
        torch.testing.assert_close(result, F.linear(x, weight), rtol=2e-2, atol=2e-5 if dtype == torch.float32 else 0.1)
        if result.numel():
            dy = result if result.ndim > 1 else result[None]
            torch.testing.assert_close(products.grad_input(dy, weight), dy @ weight, rtol=2e-2, atol=0.1)
            expected = dy.reshape(-1, 40).t() @ x.reshape(-1, 40)
            torch.testing.assert_close(products.grad_weight(dy, x), expected, rtol=2e-2, atol=0.3)


@pytest.mark.parametrize(
    "wanted", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
)
def test_its_derivatives_are_those_of_torch(provider, wanted):
    inputs = [torch.randn(size) for size in ((2, 5, 48), (32, 48), (32,))]
    grads = []
    for function in (products.linear, F.linear):
        leaves = [t.clone().requires_grad_(want) for t, want in zip(inputs, wanted, strict=True)]
        (function(*leaves) * torch.linspace(-1, 1, 32)).sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for ours, theirs in zip(*grads, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_small_products_other_dtypes_and_autocast_are_torchs(called, monkeypatch):
    monkeypatch.setenv("FASTALIGN_PRODUCTS", "onednn")
    x, w = torch.randn(64, 256), torch.randn(512, 256)
    products.linear(x, w)
    monkeypatch.setattr(products, "SMALL", 0)
    products.linear(x.half(), w.half())
    products.linear(x.double(), w.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert products.linear(x, w).dtype == torch.bfloat16
    assert not called
    if products.available():
        products.linear(x, w)
        assert len(called) == 1


def test_a_dtype_that_onednn_lacks_here_is_torchs(monkeypatch):
    """bfloat16 on many processors with AVX2 alone."""
    run = products._onednn

    def lacks(x, *args):
        if x.dtype == torch.bfloat16:
            raise RuntimeError("could not create a primitive descriptor")
        return run(x, *args)

    products.available.cache_clear()
    monkeypatch.setattr(products, "_onednn", lacks)
    monkeypatch.setattr(products, "SMALL", 0)
    try:
        for choice in ("onednn", "auto"):
            monkeypatch.setenv("FASTALIGN_PRODUCTS", choice)
            x, w = torch.randn(64, 32).bfloat16(), torch.randn(16, 32).bfloat16()
            assert torch.equal(products.linear(x, w), F.linear(x, w))
            assert not products.quicker(torch.bfloat16) and products.pack(w, 64) is None
            assert products.choice(torch.bfloat16) == "torch"
    finally:
        products.available.cache_clear()


@ABSENT
def test_info_on_a_processor_with_avx2_alone():
    told = {}
    for isa in ("AVX2", "DEFAULT"):
        env = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa}
        command = [sys.executable, "-m", "fastalign", "info", "--json"]
        made = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        told[isa] = set(json.loads(made.stdout)["products"])
    assert told["AVX2"] == {"float32"} <= told["DEFAULT"]


def test_a_provider_that_is_none_is_refused(monkeypatch):
    monkeypatch.setenv("FASTALIGN_PRODUCTS", "mkl")
    with pytest.raises(
        UserError, match=r"FASTALIGN_PRODUCTS must be auto, torch or onednn, or some of linear 1, .*got 'mkl'"
    ):
        products.forced()


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """Nothing is measured yet; the measurements that are made."""
    made = []

    def measured(kind, rows, dtype):
        made.append((kind, rows, dtype))
        return {"torch": 100.0, "onednn": 200.0 if kind == "linear" else 104.0}

    monkeypatch.setenv("FASTALIGN_CACHE", str(tmp_path))
    monkeypatch.setenv("FASTALIGN_PRODUCTS", "auto")
    monkeypatch.setattr(products, "_measured", measured)
    monkeypatch.setattr(products, "available", lambda dtype: True)
    forget()
    yield made
    forget()


def forget():
    products._rates.cache_clear()
    products._faster.cache_clear()


def test_the_choice_is_measured_once_on_a_machine(fresh, tmp_path):
    assert products.chosen("linear", 300, torch.float32) == "onednn"
    assert products.chosen("grad_weight", 300, torch.float32) == "torch"  # 4 % is no gain
    assert products.chosen("linear", 100_000, torch.float32) == "onednn" and len(fresh) == 2
    assert products.chosen("linear", 20, torch.float32) == "onednn" and fresh[-1] == ("linear", 16, torch.float32)
    forget()  # another process
    assert products.chosen("linear", 300, torch.float32) == "onednn" and len(fresh) == 3
    (file,) = (tmp_path / "products").glob("*.json")
    for bad in ("", "[]", '{"linear 256 float32": 3}', '{"linear 256 float32": {"torch": "1", "onednn": 2.0}}'):
        forget()
        file.write_text(bad)
        count = len(fresh)
        assert products.chosen("linear", 300, torch.float32) == "onednn" and len(fresh) == count + 1
        assert json.loads(file.read_text()) == {"linear 256 float32": {"torch": 100.0, "onednn": 200.0}}


def test_a_run_can_repeat_the_choice_of_another(fresh, monkeypatch):
    assert (
        products.choice(torch.float32) == "linear 1,linear 16,linear 256" and products.choice(torch.float64) == "torch"
    )
    count = len(fresh)
    for value in ("linear 256,packed 16", "torch", "onednn"):
        monkeypatch.setenv("FASTALIGN_PRODUCTS", value)
        assert products.choice(torch.float32) == value
        assert (products.chosen("linear", 1000, torch.float32) == "onednn") == (value != "torch")
        assert (products.chosen("linear", 20, torch.float32) == "onednn") == (value == "onednn")
    assert len(fresh) == count


def test_without_a_folder_it_is_measured_by_each_process(fresh, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTALIGN_CACHE", str(tmp_path / "file"))
    assert products.chosen("linear", 300, torch.float32) == "onednn" and len(fresh) == 1


def test_the_measurement_itself():
    rates = products._measured("grad_weight", 16, torch.float32)
    assert {*rates} == {*products.PROVIDERS} and all(0 < rate < 1e6 for rate in rates.values())


def test_a_models_linear_layers_take_part(provider, called):
    model = tiny_causal_lm(tiny_tokenizer(), dtype=torch.float32).train()
    ids = torch.arange(24).view(2, 12)
    expected = model(ids).logits
    weights = torch.randn(expected.shape)
    theirs = torch.autograd.grad((expected * weights).sum(), list(model.parameters()))
    assert not called
    with CompiledLayers.of(model):
        result = model(ids).logits
        ours = torch.autograd.grad((result * weights).sum(), list(model.parameters()))
    assert bool(called) == (provider == "onednn")
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))
    assert not any("forward" in vars(module) for module in model.modules())
    assert os.environ["FASTALIGN_PRODUCTS"] == provider


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_products_that_are_added_or_written_in_place(provider, dtype):
    x, dy, w = (torch.randn(size).to(dtype) for size in ((70, 40), (70, 90), (90, 40)))
    before = [torch.randn(size).to(dtype) for size in ((70, 90), (70, 40), (90, 40))]
    out, to_input, to_weight = (t.clone() for t in before)
    assert products.linear_into(out, x, w) is out
    torch.testing.assert_close(products.linear_into(torch.empty_like(out), x, w, kept=False), out)
    products.add_grad_input(to_input, dy, w)
    products.add_grad_weight(to_weight, dy, x)
    fresh = torch.full_like(to_weight, float("nan"))
    products.add_grad_weight(fresh, dy, x, beta=0)
    for result, expected in (
        (out, x @ w.T),
        (to_input, before[1] + dy @ w),
        (to_weight, before[2] + dy.T @ x),
        (fresh, dy.T @ x),
    ):
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
