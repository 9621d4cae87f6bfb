"""NuSLERP, SCE, NearSwap, Arcee Fusion and RAM against their definitions in plain float64, by merge, by recipe and by
command."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from fastalign import backend, soup
from fastalign._base.errors import UserError
from fastalign.cli.main import app

SHAPES = {
    "a.weight": (24, 40),
    "norm.weight": (40,),
    "conv.weight": (6, 4, 5),
    "same.weight": (3, 4),
    "zero.weight": (3, 4),
    "empty": (0, 4),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base and three models near it, in float64; of one tensor all are equal, of another the models are zero."""
    root, draw = tmp_path_factory.mktemp("models"), np.random.default_rng(0)
    base = {name: draw.standard_normal(shape) for name, shape in SHAPES.items()}
    for i in range(4):
        kept = {name: x + (i > 0) * 0.3 * draw.standard_normal(x.shape) for name, x in base.items()}
        kept["same.weight"] = base["same.weight"]
        kept["zero.weight"] = 0 * base["zero.weight"] if i else base["zero.weight"]
        save_file({name: torch.from_numpy(x.copy()) for name, x in kept.items()}, root / f"{i}.safetensors")
    return [root / f"{i}.safetensors" for i in range(4)]


def loaded(path):
    return {name: x.double().numpy() for name, x in load_file(path).items()}


# ---- what they are, on one tensor: base, models, options ----


def slerp(a, b, t):
    """Of two vectors."""
    cosine = np.dot(a, b) / max(np.linalg.norm(a), 1e-7) / max(np.linalg.norm(b), 1e-7)
    angle = np.arccos(np.clip(cosine, -1, 1))
    if abs(np.sin(angle)) < 1e-8:
        return (1 - t) * a + t * b
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def nuslerp(base, models, weights=(0.3, 0.9), nuslerp_row_wise=False, nuslerp_flatten=True):
    a, b = models if base is None else [model - base for model in models]
    t = 0.5 if abs(sum(weights)) < 1e-6 else weights[1] / sum(weights)
    if nuslerp_flatten:
        made = slerp(a.ravel(), b.ravel(), t).reshape(a.shape)
    else:
        axis = 0 if nuslerp_row_wise else -1
        a, b = (np.swapaxes(x, axis, -1) for x in (a, b))
        made = np.array(
            [slerp(x, y, t) for x, y in zip(a.reshape(-1, a.shape[-1]), b.reshape(-1, a.shape[-1]), strict=True)]
        )
        made = np.swapaxes(made.reshape(a.shape), axis, -1)
    return made if base is None else base + made


def sce(base, models, select_topk=1.0):
    deltas = np.stack(models) - base
    if select_topk < 1:
        spread = deltas.var(axis=0).ravel()
        kept = np.zeros_like(spread)
        kept[np.argsort(-spread, kind="stable")[: int(np.count_nonzero(spread) * select_topk)]] = 1
        deltas = deltas * kept.reshape(base.shape)
    squares = np.array([(x**2).mean() for x in deltas])
    shares = squares / squares.sum() if squares.sum() >= 1e-6 else np.full(len(models), 1 / len(models))
    result = np.array(base)
    for place in np.ndindex(base.shape):
        column = deltas[(slice(None), *place)]
        agree = np.sign(column) == (1 if column.sum() >= 0 else -1)
        result[place] += (shares * agree * column).sum() / max((shares * agree).sum(), 1e-6)
    return result


def nearswap(base, models, t):
    share = np.clip(t / np.maximum(np.abs(models[0] - base), 1e-6), 0, 1)
    return share * models[0] + (1 - share) * base


def arcee_fusion(base, models):
    def softmax(x):
        e = np.exp(x - x.max(axis=-1, keepdims=True))
        return e / e.sum(axis=-1, keepdims=True) + 1e-8

    p, q = softmax(models[0]), softmax(base)
    importance = np.abs(models[0] - base) * (p * np.log(p / q)).sum(axis=-1, keepdims=True)
    ordered = np.sort(importance.ravel())
    low, middle, high = (ordered[int(share * (ordered.size - 1))] for share in (0.25, 0.5, 0.75))
    return np.where(importance >= middle + 1.5 * (high - low), models[0], base)


def ram(base, models, epsilon=1e-5):
    deltas = np.stack(models) - base
    moved = np.abs(deltas) > epsilon
    return base + (deltas * moved).sum(axis=0) / np.maximum(moved.sum(axis=0), 1)


CASES = {
    "nuslerp": (nuslerp, 2, False, {}),
    "nuslerp, task vectors": (nuslerp, 2, True, {}),
    "nuslerp, rows": (nuslerp, 2, False, {"nuslerp_flatten": False}),
    "nuslerp, rows of task vectors": (nuslerp, 2, True, {"nuslerp_flatten": False}),
    "nuslerp, columns": (nuslerp, 2, True, {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
    "sce": (sce, 3, True, {}),
    "sce, selected": (sce, 3, True, {"select_topk": 0.3}),
    "sce, nothing selected": (sce, 2, True, {"select_topk": 0.0}),
    "nearswap": (nearswap, 1, True, {"t": 0.1}),
    "nearswap, not at all": (nearswap, 1, True, {"t": 0.0}),
    "arcee_fusion": (arcee_fusion, 1, True, {}),
    "ram": (ram, 3, True, {}),
    "ram, epsilon": (ram, 3, True, {"epsilon": 0.2}),
}


@pytest.mark.slow_matrix
@pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])
@pytest.mark.parametrize("case", CASES)
def test_by_merge_by_recipe_and_by_command(case, native, files, tmp_path, monkeypatch):
    if not native:
        monkeypatch.setattr(backend, "native_runs", lambda: False)
    reference, m, with_base, options = CASES[case]
    method, base = case.partition(",")[0], files[0] if with_base else None
    weights = [0.3, 0.9] if method == "nuslerp" else None
    soup.merge(
        files[1 : 1 + m], weights, tmp_path / "out", method=method, base=base, parameters=options, show_progress=False
    )
    result, start, models = (
        loaded(tmp_path / "out" / "model.safetensors"),
        loaded(files[0]),
        [loaded(one) for one in files[1 : 1 + m]],
    )
    for name, shape in SHAPES.items():
        if not np.prod(shape):
            assert result[name].shape == shape
            continue
        wanted = reference(start[name] if with_base else None, [one[name] for one in models], **options)
        np.testing.assert_allclose(result[name], wanted, rtol=1e-9, atol=1e-12, err_msg=name)

    entries = [
        {"model": str(one), **({"parameters": {"weight": w}} if weights else {})}
        for one, w in zip(files[1 : 1 + m], weights or [0] * m, strict=True)
    ]
    recipe = {"merge_method": method, "models": entries, "parameters": {k: float(v) for k, v in options.items()}}
    recipe |= {"base_model": str(base)} if with_base else {}
    import yaml

    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    soup.merge(**soup.read_recipe(tmp_path / "recipe.yml"), out=tmp_path / "by_recipe", show_progress=False)
    requested = ["soup", *map(str, files[1 : 1 + m]), "--method", method, "--out", str(tmp_path / "by_command")]
    requested += ["--weights", "0.3,0.9"] if weights else []
    requested += ["--base", str(base)] if with_base else []
    requested += [x for name, value in options.items() for x in ("--set", f"{name}={str(value).lower()}")]
    done = CliRunner().invoke(app, [*requested, "--dry-run"])
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(app, requested)
    assert done.exit_code == 0, done.output
    for way in ("by_recipe", "by_command"):
        for name, x in loaded(tmp_path / way / "model.safetensors").items():
            np.testing.assert_array_equal(x, result[name], err_msg=f"{way}: {name}")


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("nuslerp", {"weights": None}, "nuslerp needs weights"),
        ("nearswap", {}, "nearswap needs the parameter t"),
        ("nearswap", {"parameters": {"t": -1}}, "t must be 0 or more"),
        ("sce", {"parameters": {"select_topk": 2}}, "select_topk must be within"),
        ("sce", {"parameters": {"select_topk": {"x*": 0.5}}}, "none of its patterns matches"),
        ("ram", {"base": None}, "ram needs base"),
        ("arcee_fusion", {"weights": [1.0]}, "takes no weights"),
    ],
)
def test_what_they_do_not_take(method, options, message, files, tmp_path):
    m = 2 if method in ("nuslerp", "sce", "ram") else 1
    given = {"base": files[0], "weights": None, "method": method, "show_progress": False} | options
    weights = given.pop("weights")
    with pytest.raises(UserError, match=message):
        soup.merge(files[1 : 1 + m], weights, tmp_path / "out", **given)
    for wrong in ({"nearswap": 2, "arcee_fusion": 2, "nuslerp": 3}.get(method),):
        if wrong:
            with pytest.raises(UserError, match="takes"):
                soup.merge(
                    files[1 : 1 + wrong], None, tmp_path / "out", method=method, base=files[0], show_progress=False
                )


def test_several_outputs_of_nuslerp(files, tmp_path):
    """Rows of weights: each output is what its row alone makes."""
    rows = [[0.5, 0.5], [1.0, 0.0]]
    options = {"method": "nuslerp", "parameters": {"nuslerp_flatten": False}, "show_progress": False}
    soup.merge(files[1:3], rows, tmp_path / "out", **options)
    for k, row in enumerate(rows):
        alone = soup.merge(files[1:3], row, tmp_path / f"alone{k}", **options).out
        result = loaded(tmp_path / "out" / str(k) / "model.safetensors")
        for name, x in loaded(alone / "model.safetensors").items():
            np.testing.assert_array_equal(result[name], x)
