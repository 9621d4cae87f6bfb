"""The kernel of soups against float64: every pair of storage types, every length, every special number."""

import itertools
import subprocess
import sys

import pytest
import torch
from turns import on_its_day

from fastalign import backend, reference
from fastalign.soup.checkpoint import FLOATS, in_torch
from fastalign.soup.steps import Segment
from fastalign.soup.stream import dots, mix_tensors

pytestmark = pytest.mark.skipif(backend.native is None, reason="the native extension is not built")

DTYPES = [in_torch(name) for name in FLOATS]
BYTES = [torch.float8_e4m3fn, torch.float8_e5m2]


def bits(x):
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.dtype.itemsize])


def every_number(dtype):
    """All patterns of eight or sixteen bits; of wider types, numbers of all sizes with the special ones."""
    if dtype.itemsize < 4:
        patterns = torch.arange(2 ** (8 * dtype.itemsize))
        return patterns.to(torch.uint8).view(dtype) if dtype.itemsize == 1 else patterns.to(torch.int16).view(dtype)
    torch.manual_seed(0)
    least, most = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    special = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), least, -least, least / 8, most, -most, 1e-45, 1.0]
    sizes = torch.randn(4000, dtype=torch.float64) * 2.0 ** torch.randint(-150, 130, (4000,)).double()
    return torch.cat([torch.tensor(special, dtype=torch.float64), sizes]).to(dtype)


def same(a, b):
    """Bit for bit, save what a NaN carries."""
    assert a.dtype == b.dtype and a.shape == b.shape
    a_nan, b_nan = a.double().isnan(), b.double().isnan()
    assert torch.equal(a_nan, b_nan)
    assert torch.equal(bits(a)[~a_nan], bits(b)[~b_nan])


@pytest.mark.parametrize(("source", "target"), itertools.product(DTYPES, DTYPES))
def test_a_lone_model_is_converted_as_ieee_says(source, target):
    x = every_number(source)
    (result,) = mix_tensors([x], [[1.0]], target)
    same(result, reference.weighted_sums([x], [[1.0]], target)[0])
    if source == target:
        same(result, x)
    if source != torch.float64:  # torch rounds a float64 twice on its way to fewer than 32 bits
        same(result, x.float().to(target))


@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16, *BYTES])
def test_what_lies_half_way_goes_to_even_and_float64_is_rounded_once(target):
    numbers = every_number(target).double()
    finite = numbers[numbers.isfinite()].sort().values.unique()
    half = (finite[1:] + finite[:-1]) / 2
    even = torch.where(bits(finite[1:].to(target)) & 1 == 0, finite[1:], finite[:-1])
    assert (even != 0).sum() > len(even) - 3
    nudge = half.abs() * 2.0**-50  # far below float32's last bit
    for x, wanted in ((half, even), (half + nudge, finite[1:]), (half - nudge, finite[:-1])):
        (result,) = mix_tensors([x], [[1.0]], target)
        assert torch.equal(result.double(), wanted)


@pytest.mark.parametrize("target", DTYPES)
def test_mixtures_of_types_and_odd_lengths_round_the_float64_sum(target):
    torch.manual_seed(1)
    rows = [[0.2, 0.3, 0.1, 0.15, 0.05, 0.2], [1.0, 0.0, 0.0, 0.0, 0.0, 0.0], [-0.5, 2.0, 0.25, 0.125, 1.0, -1.0]]
    for n in (1, 2, 7, 15, 63, 64, 65, 1363, 2731):
        tensors = [torch.randn(n, dtype=torch.float64).to(dtype) for dtype in DTYPES]
        for used in (tensors, tensors[1:], tensors[2:3]):
            weights = [row[: len(used)] for row in rows]
            exact = [sum(w * x.double() for w, x in zip(row, used, strict=True)) for row in weights]
            size = [sum(abs(w) * x.double().abs() for w, x in zip(row, used, strict=True)) for row in weights]
            added = torch.finfo(torch.float64 if torch.float64 in (target, used[0].dtype) else torch.float32).eps
            for result, truth, scale in zip(mix_tensors(used, weights, target), exact, size, strict=True):
                info = torch.finfo(target)
                stored = torch.maximum(truth.abs() * info.eps / 2, torch.tensor(info.smallest_normal * info.eps / 2))
                ok = (result.double() - truth).abs() <= stored * (1 + 1e-6) + scale * added * (len(used) + 1)
                assert ok.all(), (n, len(used), truth[~ok][:3], result[~ok][:3])


@pytest.mark.parametrize("types", [(torch.bfloat16, torch.float32), *((dtype, dtype) for dtype in DTYPES)])
def test_an_element_does_not_depend_on_where_it_stands_nor_on_the_other_soups(types):
    torch.manual_seed(2)
    x, y = (torch.randn(140_001).to(dtype) for dtype in types)
    rows = torch.rand(9, 2).tolist()
    whole = mix_tensors([x, y], rows, types[0])
    for k in (0, 4, 8):
        (alone,) = mix_tensors([x, y], [rows[k]], types[0])
        assert torch.equal(bits(alone), bits(whole[k]))
    for first, last in ((1, 140_001), (3, 70), (65_535, 65_537), (139_990, 139_991)):
        parts = mix_tensors([x[first:last], y[first:last]], rows[:2], types[0])
        assert all(torch.equal(bits(part), bits(of[first:last])) for part, of in zip(parts, whole[:2], strict=True))


def test_many_models_and_special_numbers():
    torch.manual_seed(3)
    tensors = [torch.randn(777).half() for _ in range(128)]
    (result,) = mix_tensors(tensors, [[1 / 128] * 128], torch.float32)
    torch.testing.assert_close(result.double(), torch.stack(tensors).double().mean(0), rtol=0, atol=1e-6)
    bad = torch.tensor([float("inf"), float("nan"), 1.0, -float("inf")])
    (result,) = mix_tensors([bad, torch.ones(4)], [[0.5, 0.5]], torch.bfloat16)
    assert result[0] == float("inf") and result[1].isnan() and result[2] == 1 and result[3] == -float("inf")


LEVELS = """
import torch
from fastalign.soup.steps import Segment
from fastalign.soup.stream import dots
from fastalign.soup.stream import mix_tensors
torch.manual_seed(0)
types = (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float32)
x = [torch.randn(3000).to(t) for t in types]
weights = [[0.1, 0.2, 0.3, 0.25, 0.15], [1, 0, 0, 0, -1]]
for dtype in (torch.float32, torch.float64):
    print(*(float(o.double().abs().sum()) for o in mix_tensors(x, weights, dtype)))
for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2):
    print(*(int(mix_tensors([y], [[1.0]], dtype)[0].view(torch.uint8).sum()) for y in x))
"""


@on_its_day("levels: layers and soups")
def test_every_level_gives_the_same_numbers(monkeypatch):
    rows = []
    for isa in backend.native.available_isas():
        monkeypatch.setenv("FASTALIGN_ISA", isa)
        done = subprocess.run([sys.executable, "-c", LEVELS], capture_output=True, text=True, check=True)
        rows.append([float(x) for x in done.stdout.split()])
    assert all(row == pytest.approx(rows[0], rel=1e-6) for row in rows)
    assert all(row[4:] == rows[0][4:] for row in rows)


def test_dot_products_of_all_types(tmp_path, each_backend):
    torch.manual_seed(4)
    for n in (1, 65, 70_003):
        tensors = [(torch.randn(n, dtype=torch.float64) + 0.5).to(dtype) for dtype in DTYPES]
        path = tmp_path / f"{n}"
        path.write_bytes(b"".join(bytes(bits(x).view(torch.uint8).numpy()) for x in tensors))
        offsets = torch.tensor([0, *(x.nbytes for x in tensors)]).cumsum(0).tolist()
        with open(path, "rb") as file:
            for used in (range(6), range(1, 6)):
                m = len(used)
                result = dots(
                    Segment(
                        n,
                        tuple(FLOATS[i] for i in used),
                        (file.fileno(),) * m,
                        tuple(offsets[i] for i in used),
                        (),
                        (),
                        [],
                    ),
                    threads=2,
                )
                rows = torch.stack([tensors[i].double() for i in used])
                torch.testing.assert_close(torch.from_numpy(result), rows @ rows.T, rtol=1e-6, atol=1e-6 * n)
