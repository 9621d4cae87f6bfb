"""Memory is passed to the native extension in one way only, and never in a form that it would misread."""

from pathlib import Path

import numpy as np
import pytest
import torch

import fastalign
from fastalign import backend
from fastalign.ops.buffers import buffer, rows

PACKAGE = Path(fastalign.__file__).parent
# memory.py asks whether two tensors are one and the same.
ADDRESSES = {"ops/buffers.py", "soup/memory.py"}


def test_addresses_leave_python_in_one_place():
    kernels = PACKAGE.parent / "kernels"
    sources = [*PACKAGE.rglob("*.py"), *kernels.rglob("*.py")]
    result = {str(path.relative_to(PACKAGE)) for path in sources if "data_ptr" in path.read_text()}
    assert result == ADDRESSES
    assert not [path for path in sources if ".ctypes" in path.read_text() or "__array_interface__" in path.read_text()]


X = torch.arange(24.0).reshape(2, 3, 4)


@pytest.mark.parametrize(
    "x", [X[:, :2], X.transpose(0, 1), X[0, 0].expand(5, 4), torch.complex(X, X).conj().imag[:1, :1, :1], X.to("meta")]
)
def test_a_layout_that_is_not_as_it_looks_is_refused(x):
    with pytest.raises(RuntimeError, match="contiguous CPU tensors"):
        buffer(x)


def test_a_contiguous_slice_is_its_own_memory():
    assert buffer(X[1]) == (X.data_ptr() + 12 * 4, 12, "float32")
    assert buffer(torch.empty(0, dtype=torch.bool))[1:] == (0, "bool")
    assert buffer(None) is None


@pytest.mark.parametrize("x", [X[:, :2], X.transpose(0, 1), X.flip(0), X[..., ::2], X[:, :1].expand(2, 3, 4)])
def test_rows_are_walked_as_the_tensor_is(x):
    (address, dtype, count, inner, outer, step, width), kept = rows(x)
    flat = torch.tensor([])
    offset = (address - kept.untyped_storage().data_ptr()) // 4
    flat = kept.as_strided((kept.untyped_storage().nbytes() // 4,), (1,), 0)
    result = [flat[offset + r // inner * outer + r % inner * step :][:width] for r in range(count)]
    assert dtype == "float32" and torch.equal(torch.stack(result), x.reshape(-1, width))


def floats(*shape):
    return torch.zeros(shape)


def integers(*values):
    return torch.tensor(values, dtype=torch.int64)


# A right call of each kernel that takes buffers: its name, its buffers, and what follows them.
LOGITS, LABELS, HEADS = torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64), torch.zeros(2, 3, 4)
ROWS = (LOGITS, HEADS)  # what is handed over as `rows`
CALLS = {
    "token_logprobs_forward": ([*map(floats, [3] * 3), None, None, None, None, LOGITS, LABELS], (-100, 1.0, 0.0, 1)),
    "token_logratios_forward": ([*map(floats, [3] * 5), LOGITS, LOGITS, LABELS], (-100, 1.0, 1)),
    "token_logprobs_backward": ([floats(3, 5), floats(3), None, floats(3), floats(3), None, LOGITS, LABELS],
                                (-100, 1.0, 0.0, 1)),
    "first_bad_label": ([LABELS], (5, -100)),
    "sample_tokens": ([integers(0, 0, 0), floats(3), LOGITS], (1.0, 0, 1.0, 0.0, 0, 0, None, 1, 1)),
    "rms_norm": ([floats(3, 4), floats(3), floats(3, 4), floats(4)], (3, 4, 1e-6, 0.0, 1)),
    "rms_norm_backward": ([floats(3, 4), floats(2, 4), floats(3, 4), floats(3, 4), floats(3), floats(4)],
                          (3, 4, 0.0, 2)),
    "silu_gate": ([floats(3, 5), LOGITS, LOGITS], (1,)),
    "silu_gate_backward": ([*map(floats, [7] * 5)], (7, 1)),
    "rotate": ([floats(2, 3, 4), HEADS, floats(2, 4), floats(2, 4)], (2, 3, False, 1)),
    "gae": ([floats(3, 5), floats(3, 5), LOGITS, LOGITS, torch.ones(3, 5, dtype=torch.bool)], (1.0, 1.0, 1)),
    "resample": ([integers(0, 0, 0), LOGITS], (1, 0, None, 0, 1)),
}  # fmt: skip
needs_engine = pytest.mark.skipif(backend.native is None, reason="the native extension is not built")


def call(name, tensors):
    described = [rows(x)[0] if any(x is y for y in ROWS) else buffer(x) for x in tensors]
    return getattr(backend.native, name)(*described, *CALLS[name][1])


@needs_engine
@pytest.mark.parametrize("name", CALLS)
def test_a_kernel_takes_buffers_of_its_sizes_and_types_alone(name):
    tensors, _ = CALLS[name]
    call(name, tensors)
    for i, x in enumerate(tensors):
        if x is None or any(x is y for y in ROWS):
            continue
        sizes = [] if name == "first_bad_label" else [x.reshape(-1)[:-1]]
        sizes += [] if name == "first_bad_label" else [torch.cat((x.reshape(-1), x.reshape(-1)[:1]))]
        for wrong in (*sizes, x.to(torch.int32)):
            with pytest.raises(RuntimeError, match="called wrongly"):
                call(name, [*tensors[:i], wrong, *tensors[i + 1 :]])


def attend(**changed):
    """Two rows of two prompts, kv = 2 heads of 2 queries, d = 6, dv = 3."""
    own = {
        "out": floats(2, 4, 3),
        "keys": floats(2, 2, 8, 6),
        "values": floats(2, 2, 8, 3),
        "query": floats(2, 4, 6),
        "key": floats(2, 2, 6),
        "value": floats(2, 2, 3),
        "prompts": [(floats(2, 6, 5), floats(2, 5, 3), 5, 1), (floats(2, 6, 1), floats(2, 1, 3), 1, 1)],
        "order": integers(1, 0),
        "lengths": integers(2, 7),
    }
    it = own | changed
    prompts = [(buffer(keys), buffer(values), *sizes) for keys, values, *sizes in it["prompts"]]
    views = [rows(it[name])[0] for name in ("query", "key", "value")]
    backend.native.shared_attention(
        *(buffer(it[name]) for name in ("out", "keys", "values")),
        *(*views, prompts, buffer(it["order"]), buffer(it["lengths"])),
        *(2, 2, 8, 0, 1.0, 0.0, 1),
    )


@needs_engine
@pytest.mark.parametrize(
    "wrong",
    [
        {"order": integers(1, 2)},
        {"order": integers(1, -1)},
        {"order": integers(1)},
        {"lengths": integers(2, 8)},
        {"lengths": integers(-1, 7)},
        {"lengths": integers(2)},
        {"out": floats(2, 4, 4)},
        {"out": floats(2, 4, 3).to(torch.bfloat16)},
        {"keys": floats(1, 2, 8, 6)},
        {"values": floats(2, 2, 7, 3)},
        {"query": floats(2, 4, 5)},
        {"query": floats(2, 4, 6).double()},
        {"key": floats(2, 2, 6).half()},
        {"value": floats(2, 1, 3)},
        {"prompts": [(floats(2, 6, 5), floats(2, 5, 3), 5, 1)]},
        {"prompts": [(floats(2, 6, 5), floats(2, 5, 3), 5, 3), (floats(2, 6, 5), floats(2, 5, 3), 5, -1)]},
        {"prompts": [(floats(2, 6, 5), floats(2, 5, 3), 6, 2)]},
    ],
)
def test_attention_takes_buffers_of_its_sizes_and_stays_within_the_cache(wrong):
    attend()
    with pytest.raises(RuntimeError, match="called wrongly"):
        attend(**wrong)


@needs_engine
def test_a_soup_takes_buffers_of_one_size():
    out, short, x = floats(9), floats(8), floats(9)
    backend.native.soup_memory([buffer(out)], [buffer(x)], [1.0], 1)
    for outs, ins, weights in (
        ([short], [x], 1),
        ([out], [short], 1),
        ([out], [x], 2),
        ([out], [x.int()], 1),
        ([out, short], [x], 2),
        ([out], [x] * 129, 129),
    ):
        with pytest.raises(RuntimeError, match="called wrongly"):
            backend.native.soup_memory([*map(buffer, outs)], [*map(buffer, ins)], [1.0] * weights, 1)


@needs_engine
@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: x.astype(">f8"),
        lambda x: np.zeros(len(x), dtype=[("pad", "u1"), ("x", "f8")])["x"],
        lambda x: np.zeros(2 * len(x))[::2],
        lambda x: np.zeros(len(x) + 1),
        lambda x: x.astype(np.float32),
    ],
)
def test_arrays_of_another_layout_are_refused(spoil):
    rewards, m = np.random.default_rng(0).normal(size=(20, 3)), 3
    description = (rewards, np.zeros(m), None, None, None, 0)
    result = [np.empty(n) for n in (3 + m + m * m, m, m, 1, m, 1, 1, m)] + [
        np.empty(1, dtype=bool),
        np.empty(1, dtype=np.int64),
    ]
    palette, sign = np.full(m, -0.1), np.ones(m)
    assert backend.native.map_newton((*result,), description, (palette, sign, None, None, None), 1e-8, np.inf, 1) == 2
    for i in range(2):
        given = [palette, sign, None, None, None]
        given[i] = spoil(given[i])
        with pytest.raises(RuntimeError, match="called wrongly"):
            backend.native.map_newton((*result,), description, (*given,), 1e-8, np.inf, 1)
    for wrong in (
        rewards.astype(">f8"),
        rewards.T,
        rewards[:, ::2],
        np.zeros((20, 3), dtype=[("a", "u1"), ("x", "f8")])["x"],
    ):
        with pytest.raises((RuntimeError, TypeError)):
            backend.native.map_statistics(np.empty((1, 15)), (wrong, None, None, None, None, 0), np.zeros((1, m)), 1)
