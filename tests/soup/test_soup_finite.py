"""Numbers that are not finite, in what a merge reads and in what it writes, are counted and reported; with strict they
are an error."""

import json
import warnings

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from fastalign import backend, soup
from fastalign._base.errors import UserError
from fastalign.cli.main import app

TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=["native", "torch"], autouse=True)
def way(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(backend, "native_runs", lambda: False)
    return request.param


def files(folder, dtype, bad, size=70_000):
    """Two models of three tensors; bad: {(model, tensor, element): value}."""
    for i in range(2):
        torch.manual_seed(i)
        tensors = {f"w{j}": torch.randn(size, dtype=torch.float64) for j in range(3)}
        for (model, name, place), value in bad.items():
            if model == i:
                tensors[name][place] = value
        save_file({name: x.to(dtype) for name, x in tensors.items()}, folder / f"{i}.safetensors")
    return [folder / "0.safetensors", folder / "1.safetensors"]


def merged(*arguments, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = soup.merge(*arguments, show_progress=False, **options)
    lines = [str(one.message) for one in caught if issubclass(one.category, UserWarning)]
    assert lines == ([f"{result.out}: {result.not_finite}"] if result.not_finite else [])
    record = json.loads((result.out / "soup.json").read_text())
    return result, record.get("not_finite")


@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
@pytest.mark.parametrize("options", [{}, {"method": "ties"}, {"method": "slerp"}], ids=["linear", "ties", "slerp"])
def test_what_is_not_finite_in_an_input(dtype, options, tmp_path):
    bad = {(1, "w0", 69_999): NAN, (1, "w2", 5): NAN, (0, "w2", 66_000): NAN}
    if dtype != torch.float8_e4m3fn:  # which has no infinity
        bad |= {(1, "w1", 3): -INF}
    models = files(tmp_path, dtype, bad)
    weights = [0.5, 0.5]
    if options.get("method") == "ties":
        options = options | {"base": models[0]}
    result, record = merged(models, weights, tmp_path / "out", **options)
    named = {str(models[0]): [1, "w2"], str(models[1]): [len(bad) - 1, "w0"]}
    assert {name: kept for name, kept in record["inputs"].items()} | {} == named or options.get("base")
    assert record["inputs"][str(models[1])] == named[str(models[1])] and not record["outputs"]
    assert f"{len(bad) - 1} numbers of {models[1]} are NaN or infinite (first in w0)" in result.not_finite
    with pytest.raises(UserError, match=r"^strict: .* are NaN or infinite") as caught:
        soup.merge(models, weights, tmp_path / "strict", strict=True, show_progress=False, **options)
    assert "\n" not in str(caught.value) and not (tmp_path / "strict").exists()
    with pytest.raises(UserError, match=r"^strict: "):  # what an earlier run counted is known when it is gone on with
        soup.merge(models, weights, tmp_path / "strict", strict=True, show_progress=False, **options)
    with pytest.raises(UserError, match=r"^strict: "):
        soup.merge(models, weights, tmp_path / "out", strict=True, show_progress=False, **options)


@pytest.mark.slow_matrix
@pytest.mark.parametrize(
    ("out_type", "most", "beyond"),
    [
        ("float16", 65504.0, 65520.0),
        ("float8_e5m2", 57344.0, 61440.0),
        ("float8_e4m3fn", 464.0, 464.1),
        ("float32", 3.4e38, 3.5e38),
        ("bfloat16", 3.38e38, 3.4e38),
    ],
)
@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties"])
def test_what_the_outputs_type_cannot_hold(out_type, most, beyond, method, tmp_path):
    models = files(tmp_path, torch.float64, {(1, "w1", 9): most, (1, "w2", 66_000): -most})
    options = {} if method == "linear" else {"base": models[0]}
    given, weights = (models, [0, 1]) if method == "linear" else (models[1:], [1])
    if method == "linear":
        _, record = merged(given, weights, tmp_path / "held", dtype=out_type)
        assert record is None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(warnings, "warn", lambda *_, **__: pytest.fail("warned"))
            soup.merge(given, weights, tmp_path / "strictly", dtype=out_type, strict=True, show_progress=False)
    models = files(
        tmp_path,
        torch.float64,
        {(1, "w1", 9): beyond, (1, "w2", 66_000): -beyond, (0, "w1", 9): 0, (0, "w2", 66_000): 0},
    )
    result, record = merged(given, weights, tmp_path / "out", dtype=out_type, method=method, **options)
    assert record == {"inputs": {}, "outputs": {"": [2, "w1"]}}
    assert result.not_finite == "2 numbers of the output are beyond its type's range (first in w1)"
    with pytest.raises(UserError, match=r"^strict: 2 numbers of the output are beyond its type's range"):
        soup.merge(
            given,
            weights,
            tmp_path / "strict",
            dtype=out_type,
            method=method,
            strict=True,
            show_progress=False,
            **options,
        )


def test_many_outputs_and_shards(tmp_path):
    models = files(tmp_path, torch.float32, {(0, "w2", 7): 1e30})
    result, record = merged(models, [[0.5, 0.5], [0, 1]], tmp_path / "out", dtype="float16", max_shard_size="150kB")
    assert record == {"inputs": {}, "outputs": {"0": [1, "w2"]}}
    assert result.not_finite == "1 numbers of the output 0 are beyond its type's range (first in w2)"


def test_an_adapter_merged_onto_its_base(tmp_path):
    from fastalign.soup.lora.made import write_adapter

    base = {"a.weight": torch.full((4, 4), 60_000.0).half(), "b.weight": torch.ones(4, 4).half()}
    base["b.weight"][0, 0] = NAN
    save_file(base, tmp_path / "base.safetensors")
    factors = {name: (torch.full((1, 4), 100.0), torch.full((4, 1), 100.0), False) for name in ("a", "b")}
    write_adapter(tmp_path / "adapter", factors, {}, {})
    result = soup.apply_adapters(
        tmp_path / "base.safetensors", [tmp_path / "adapter"], [1.0], tmp_path / "out", show_progress=False
    )
    record = json.loads((tmp_path / "out" / "soup.json").read_text())["not_finite"]
    assert record == {
        "inputs": {str(tmp_path / "base.safetensors"): [1, "b.weight"]},
        "outputs": {"": [16, "a.weight"]},
    }
    assert result.not_finite


def test_by_command(tmp_path):
    models = files(tmp_path, torch.float32, {(0, "w2", 7): NAN})
    requested = ["soup", *map(str, models), "--weights", "0.5,0.5", "--out"]
    run = CliRunner().invoke(app, [*requested, str(tmp_path / "out")])
    assert (
        run.exit_code == 0
        and run.stderr.endswith("are NaN or infinite (first in w2)\n")
        and run.stderr.count("\n") == 1
    )
    run = CliRunner().invoke(app, [*requested, str(tmp_path / "strict"), "--strict"])
    assert (
        run.exit_code == 1
        and run.stderr.startswith("fastalign: strict: 1 numbers of ")
        and not (tmp_path / "strict").exists()
    )


@pytest.mark.parametrize("strict", [False, True], ids=["warned", "strict"])
@pytest.mark.parametrize("which", ["inputs", "outputs"])
@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
def test_in_memory_as_from_file_to_file(dtype, which, strict, tmp_path):
    """mix and interpolate count what merge counts, and with strict leave the model as it was."""
    most = 400.0 if dtype == torch.float8_e4m3fn else torch.finfo(dtype).max / 2
    bad = {
        "inputs": {(1, "w0", 69): NAN, (0, "w2", 6): NAN, (1, "w2", 7): NAN},
        "outputs": {(0, "w1", 3): most, (1, "w1", 3): most, (0, "w1", 4): -most, (1, "w1", 4): -most},
    }[which]
    models, rows = files(tmp_path, dtype, bad, size=100), [[2.0, 3.0], [0.5, 0.5]]
    made, record = merged(models, rows, tmp_path / "out", normalize=False)
    counts = {"inputs": {str(models[0]): [1, "w2"], str(models[1]): [2, "w0"]}, "outputs": {"0": [2, "w1"]}}
    assert record == {"inputs": {}, "outputs": {}, which: counts[which]}

    def parts(message):
        return sorted(message.split("; "))

    def by(call, message):
        if strict:
            with pytest.raises(UserError) as caught:
                call(strict=True)
            assert parts(str(caught.value).removeprefix("strict: ")) == parts(message)
            return None
        with pytest.warns(UserWarning) as caught:
            result = call()
        assert [parts(str(one.message)) for one in caught] == [parts(message)] and caught[0].filename == __file__
        return result

    several = by(lambda **more: soup.mix(models, rows, normalize=False, **more), made.not_finite)
    one = made.not_finite.replace("the output 0 are", "the output are")
    live = torch.nn.ParameterDict({f"w{i}": torch.nn.Parameter(torch.zeros(100).to(dtype), False) for i in range(3)})
    by(lambda **more: soup.interpolate(live, models, rows[0], normalize=False, **more), one)
    for name, x in live.items():
        wanted = torch.zeros(100) if strict else several[0][name].float()
        assert torch.equal(x.float().nan_to_num(), wanted.nan_to_num())


def test_in_memory_finite_numbers_are_not_counted(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        soup.mix(files(tmp_path, torch.float32, {}, size=10), [0.5, 0.5], strict=True)
