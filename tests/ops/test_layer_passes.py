"""The passes of a layer in Triton's interpreter, against their definitions in float64."""

import pytest
import torch
import torch.nn.functional as F

from fastalign.ops import layer_passes

ROWS = 3
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def normal(*shape, dtype):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def close(result, expected, dtype):
    eps = torch.finfo(dtype).eps
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), expected.double(), rtol=max(1e-5, 2 * eps), atol=max(1e-6, eps / 8))


@DTYPES
@pytest.mark.parametrize("width", [1, 40])
@pytest.mark.parametrize("lay", [lambda x: x, lambda x: x.t().contiguous().t()])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms(width, lay, offset, dtype):
    x = lay(normal(ROWS, width, dtype=dtype) * torch.tensor([[1.0], [1e-3], [30.0]]).to(dtype))
    residual, weight = normal(ROWS, 2 * width, dtype=dtype)[:, :width], normal(width, dtype=dtype)
    of = weight.double() + offset
    close(layer_passes.norm(x, weight, 1e-5, offset), F.rms_norm(x.double(), (width,), of, 1e-5), dtype)
    y, total = layer_passes.add_norm(x, residual, weight, 1e-5, offset)
    close(total, x.double() + residual.double(), dtype)
    close(y, F.rms_norm(total.double(), (width,), of, 1e-5), dtype)


@DTYPES
@pytest.mark.parametrize(
    ("heads", "kv", "d", "dv", "normed", "offset"),
    [(3, 1, 8, 8, True, 0.0), (2, 2, 8, 8, True, 1.0), (2, 2, 20, 7, False, 0.0)],
)
def test_rotations_go_to_their_places(heads, kv, d, dv, normed, offset, dtype):
    qkv = normal(ROWS, heads * d + kv * (d + dv), dtype=dtype)
    q, k, v = qkv.split([heads * d, kv * d, kv * dv], 1)
    q, k, v = q.unflatten(1, (heads, d)), k.unflatten(1, (kv, d)), v.unflatten(1, (kv, dv))
    cos, sin = normal(2, ROWS, d, dtype=dtype)
    keys, values = normal(ROWS + 2, kv, 6, d, dtype=dtype), normal(ROWS + 2, kv, 6, dv, dtype=dtype)
    caches, lengths = [keys.double(), values.double()], torch.tensor([4, 0, 5])

    norms = [(weight, eps) if normed else (None, 0.0) for weight, eps in ((cos[0] + 1, 1e-5), (sin[0] - 1, 0.1))]

    def turned(x, weight, eps):
        x = F.rms_norm(x.double(), (d,), weight.double() + offset, eps) if normed else x.double()
        a, b = x.chunk(2, -1)
        return x * cos.double()[:, None] + torch.cat([-b, a], -1) * sin.double()[:, None]

    caches[0][range(ROWS), :, lengths], caches[1][range(ROWS), :, lengths] = turned(k, *norms[1]), v.double()
    turn = layer_passes.Turn(cos, sin, norms, offset)
    close(layer_passes.rotate(q, k, v, turn, keys, values, lengths), turned(q, *norms[0]), dtype)
    close(keys, caches[0], dtype)
    close(values, caches[1], dtype)


@DTYPES
def test_gates(dtype):
    g, u = 30 * normal(ROWS, 700, dtype=dtype), normal(ROWS, 1400, dtype=dtype)[:, ::2]
    close(layer_passes.gate(g, u), F.silu(g.double()) * u.double(), dtype)
    expected = F.gelu(g.double(), approximate="tanh") * u.double()
    close(layer_passes.gate(g, u, gelu=True), expected, dtype)
