"""Every method from file to file against its definition on whole tensors in float64, and what they are asked for."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from fastalign import soup
from fastalign._base.errors import UserError
from fastalign.cli.main import app
from fastalign.soup import plan as plans
from fastalign.soup.methods.settings import Places, parse
from fastalign.soup.run import estimate, estimated

F64 = torch.float64
NAMES = [
    "embed.weight",
    *(f"model.layers.{i}.{part}.weight" for i in range(3) for part in ("attn", "mlp")),
    "head.weight",
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base and three models near it, as one file each, in float64 and in bfloat16."""
    root = tmp_path_factory.mktemp("soups")
    torch.manual_seed(0)
    base = {name: torch.randn(24, 40, dtype=F64) for name in NAMES}
    near = [{name: x + 0.3 * torch.randn_like(x) for name, x in base.items()} for _ in range(3)]
    for i, one in enumerate([base, *near]):
        save_file(one, root / f"{i}.safetensors")
        save_file({name: x.bfloat16() for name, x in one.items()}, root / f"half{i}.safetensors")
    return root


def paths(files, *which, half=False):
    return [files / f"{'half' if half else ''}{i}.safetensors" for i in which]


def tensors(files, *which, half=False):
    return [{name: x.double() for name, x in load_file(path).items()} for path in paths(files, *which, half=half)]


def made(files, out, weights, *, which=(1, 2, 3), base=True, half=False, **options):
    if base:
        options["base"] = paths(files, 0, half=half)[0]
    soup.merge(paths(files, *which, half=half), weights, out, show_progress=False, **options)
    return load_file(out / "model.safetensors")


def by_hand(files, name, weights, lam=1.0, normalize=False, elect=False, half=False, keep=None):
    """Task vectors of which `keep(delta, i)` says what stays, in float64 straight from the papers."""
    base, *models = [one[name] for one in tensors(files, 0, 1, 2, 3, half=half)]
    kept = [keep(model - base, i) for i, model in enumerate(models)]
    weighted = [w * x for w, x in zip(weights, kept, strict=True)]
    total = sum(weighted)
    if elect:
        agree = [(torch.sign(x) == torch.where(total >= 0, 1.0, -1.0)).double() for x in weighted]
        merged = sum(x * a for x, a in zip(weighted, agree, strict=True))
        taken = sum(w * a for w, a in zip(weights, agree, strict=True))
        merged = merged / torch.where(taken == 0, 1.0, taken) if normalize else merged
    else:
        merged = total / sum(weights) if normalize else total
    return base + lam * merged


def largest(density):
    def keep(delta, i):
        threshold = delta.abs().flatten().sort(descending=True).values[int(density * delta.numel()) - 1]
        return delta * (delta.abs() >= threshold)

    return keep


@pytest.mark.parametrize("half", [False, True])
def test_ties_trims_elects_and_merges(files, tmp_path, each_backend, half):
    weights = [0.7, 0.2, 0.5]
    options = {"method": "ties", "parameters": {"density": 0.25, "lambda": 0.8}, "half": half, "dtype": "float64"}
    result = made(files, tmp_path / "out", weights, **options)
    for name in NAMES:
        if half:  # its sizes are often equal; which of those stay is test_soup_tasks' to say
            assert (result[name] != tensors(files, 0, half=True)[0][name]).float().mean() > 0.25
            continue
        wanted = by_hand(files, name, weights, 0.8, True, True, keep=largest(0.25))
        torch.testing.assert_close(result[name], wanted, rtol=1e-13, atol=1e-13)
    everything = made(files, tmp_path / "all", weights, **(options | {"parameters": {"density": 1.0}}))
    for name in NAMES:
        wanted = by_hand(files, name, weights, 1, True, True, half=half, keep=lambda delta, i: delta)
        far = (everything[name] - wanted).abs() > (1e-5 if half else 1e-13)
        assert far.sum() <= (2 if half else 0)  # a total of nothing has either sign in float32


def test_breadcrumbs_drop_the_largest_and_the_smallest(files, tmp_path, each_backend):
    def keep(delta, i):
        order = delta.abs().flatten().sort().values
        low, high = order[order.numel() * 3 // 10], order[order.numel() * 9 // 10]
        return delta * ((delta.abs() >= low) & (delta.abs() < high))

    for method, elect in (("breadcrumbs", False), ("breadcrumbs_ties", True)):
        requested = {"density": 0.6, "gamma": 0.1}
        result = made(files, tmp_path / method, [0.3, 0.4, 0.5], method=method, parameters=requested)
        for name in NAMES:
            wanted = by_hand(files, name, [0.3, 0.4, 0.5], elect=elect, keep=keep)
            torch.testing.assert_close(result[name], wanted, rtol=1e-13, atol=1e-13)
    nothing = made(files, tmp_path / "none", [1, 1, 1], method="breadcrumbs", parameters={"density": 0})
    base = tensors(files, 0)[0]
    assert all(torch.equal(nothing[name], base[name]) for name in NAMES)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_what_goes_by_chance_is_the_same_however_it_is_cut_and_right_on_average(files, tmp_path, method):
    requested = {"density": 0.4, "seed": 3, **({"epsilon": 0.2} if method.startswith("della") else {})}
    options = {"method": method, "parameters": requested}
    result = made(files, tmp_path / "one", [0.5, 0.5, 0.5], **options)
    soup.merge(
        paths(files, 1, 2, 3),
        [[0.5] * 3, [0.1, 0.2, 0.3]],
        tmp_path / "cut",
        base=files / "0.safetensors",
        max_shard_size="20kB",
        memory_limit="1MB",
        show_progress=False,
        **options,
    )
    again = {}
    for path in (tmp_path / "cut" / "0").glob("*.safetensors"):
        again.update(load_file(path))
    assert all(torch.equal(result[name], again[name]) for name in NAMES)
    other = made(files, tmp_path / "other", [0.5, 0.5, 0.5], method=method, parameters=requested | {"seed": 4})
    assert not torch.equal(result[NAMES[0]], other[NAMES[0]])
    if method.endswith("linear"):  # the mean over many tensors is that of whole task vectors
        base, *models = tensors(files, 0, 1, 2, 3)
        for sums in ([result[name] - base[name] for name in NAMES],):
            made_of = torch.stack(sums)
            whole = torch.stack([sum(0.5 * (one[name] - base[name]) for one in models) for name in NAMES])
            slope = float((made_of * whole).sum() / (whole * whole).sum())
            assert slope == pytest.approx(1.0, abs=0.05)
        l1 = made(files, tmp_path / "l1", [1.0], which=(1,), method=method, parameters=requested | {"rescale": "l1"})
        for name in NAMES:
            size = (models[0][name] - base[name]).abs().sum()
            assert float((l1[name] - base[name]).abs().sum() / size) == pytest.approx(1.0, rel=1e-9)


def unit(x):
    return x / x.norm()


def test_karcher_is_where_the_pulls_of_all_models_cancel(files, tmp_path):
    weights = [0.5, 0.2, 0.3]
    requested = {"max_iter": 50, "tol": 1e-12}
    result = made(files, tmp_path / "out", weights, base=False, method="karcher", parameters=requested)
    models = tensors(files, 1, 2, 3)
    for name in NAMES:
        mean = unit(result[name])
        pull = 0
        for weight, one in zip(weights, models, strict=True):
            x = unit(one[name])
            angle = torch.acos((x * mean).sum())
            pull = pull + weight * unit(x - (x * mean).sum() * mean) * angle
        assert float(pull.norm()) < 1e-9
        length = sum(w * one[name].norm() for w, one in zip(weights, models, strict=True))
        torch.testing.assert_close(result[name].norm(), length, rtol=1e-10, atol=0)


@pytest.mark.parametrize("base", [False, True])
def test_multislerp_on_whole_tensors(files, tmp_path, base):
    weights = torch.tensor([0.5, 0.2, 0.4], dtype=F64)
    result = made(files, tmp_path / "out", weights.tolist(), base=base, method="multislerp")
    shares = weights / weights.sum()
    for name in NAMES:
        first, *models = [one[name].flatten() for one in tensors(files, 0, 1, 2, 3)]
        x = torch.stack(models) - (first if base else 0)
        directions = x / (x.norm(dim=1, keepdim=True) + 1e-8)
        mean = unit(shares @ directions)
        tangent = shares @ (directions - (directions @ mean)[:, None] * mean)
        angle = tangent.norm() + 1e-8
        wanted = (mean * torch.cos(angle) + tangent * torch.sin(angle) / angle) * (shares @ x.norm(dim=1))
        torch.testing.assert_close(result[name].flatten(), wanted + (first if base else 0), rtol=1e-9, atol=1e-10)


def test_a_model_that_is_the_base_pulls_nowhere(files, tmp_path):
    """Its task vector has no direction; the others' is taken, and lengths are averaged with its 0."""
    result = made(files, tmp_path / "out", [0.5, 0.5], which=(0, 1), method="multislerp", dtype="float32", half=True)
    base, model = tensors(files, 0, 1, half=True)
    for name in NAMES:
        torch.testing.assert_close(result[name].double(), (base[name] + model[name]) / 2, rtol=0, atol=1e-6)


def test_model_stock_goes_as_far_as_the_models_agree(files, tmp_path):
    result = made(files, tmp_path / "out", None, method="model_stock")
    for name in NAMES:
        base, *models = [one[name].flatten() for one in tensors(files, 0, 1, 2, 3)]
        deltas = [model - base for model in models]
        pairs = [(0, 1), (0, 2), (1, 2)]
        cosine = sum(torch.cosine_similarity(deltas[i], deltas[j], dim=0) for i, j in pairs) / 3
        t = 3 * cosine / (1 + 2 * cosine)
        torch.testing.assert_close(result[name].flatten(), t * sum(models) / 3 + (1 - t) * base, rtol=1e-9, atol=1e-9)
    same, share = np.full((2, 2), 4.0), soup.METHODS["model_stock"].share
    assert share(same, floor=0) == pytest.approx(1.0)
    assert share(np.diag([1.0, 2.0]), floor=0) == 0.0
    assert share(np.array([[1.0, -1.0], [-1.0, 1.0]]), floor=0) == 0.0  # no finite answer: the base
    assert share(1e-10 * same, floor=1e-6) < 0.01 < share(1e-10 * same, floor=0)


def test_warp_merges_task_vectors_on_great_circles(files, tmp_path):
    result = made(files, tmp_path / "out", None, method="warp", parameters={"eta": 0.5})

    def slerp(x, y, t):
        theta = torch.acos(torch.cosine_similarity(x, y, dim=0))
        return (torch.sin((1 - t) * theta) * x + torch.sin(t * theta) * y) / torch.sin(theta)

    for name in NAMES:
        base, *models = [one[name].flatten() for one in tensors(files, 0, 1, 2, 3)]
        a, b, c = (model - base for model in models)
        wanted = base + 0.5 * slerp(slerp(a, b, 0.5), c, 1 / 3)
        torch.testing.assert_close(result[name].flatten(), wanted, rtol=1e-9, atol=1e-9)


def test_a_moving_average_and_equal_weights(files, tmp_path):
    result = made(files, tmp_path / "ema", None, base=False, method="ema", parameters={"decay": 0.8})
    equal = made(files, tmp_path / "warm", None, base=False)
    for name in NAMES:
        a, b, c = (one[name] for one in tensors(files, 1, 2, 3))
        average = a
        for x in (b, c):
            average = 0.8 * average + 0.2 * x
        torch.testing.assert_close(result[name], average, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(equal[name], (a + b + c) / 3, rtol=1e-12, atol=1e-12)


def test_weights_and_parameters_by_name_and_by_layer(files, tmp_path):
    first = {"*.attn.*": [1.0, 0.0], "*.mlp.*": 0.25, "*": 0.5}
    result = made(files, tmp_path / "linear", [first, {"*": 0.5}], which=(1, 2), base=False, normalize=True)
    a, b = tensors(files, 1, 2)
    for name in NAMES:
        layer = int(name.split(".")[2]) if "layers" in name else None
        weight = 0.5 if layer is None else (1 - layer / 2 if "attn" in name else 0.25)
        wanted = (weight * a[name] + 0.5 * b[name]) / (weight + 0.5)
        torch.testing.assert_close(result[name], wanted, rtol=1e-12, atol=1e-12)
    requested = {"density": [{"*.layers.*": [0.0, 1.0], "*": 0.5}, 1.0], "lambda": {"head*": 0.0, "*": 1.0}}
    result = made(
        files, tmp_path / "ties", [1.0, 1.0], which=(1, 2), method="breadcrumbs", parameters=requested | {"gamma": 0.0}
    )
    base = tensors(files, 0)[0]
    assert torch.equal(result["head.weight"], base["head.weight"])
    name = "model.layers.0.mlp.weight"  # nothing of the first model
    torch.testing.assert_close(result[name], b[name], rtol=1e-12, atol=1e-12)
    name = "model.layers.2.mlp.weight"  # all of both
    torch.testing.assert_close(result[name], a[name] + b[name] - base[name], rtol=1e-12, atol=1e-12)
    places = Places(["e", "h.0.x", "h.4.x", "v.blocks.1.y", "v.blocks.0.y", "one.0.z"])
    assert [places[name] for name in ("e", "h.0.x", "h.4.x", "v.blocks.1.y", "one.0.z")] == [0, 0, 1, 1, 1]
    assert parse("x", {"*": [0, 1, 0]}).at("h.4.x", 0.75) == 0.5


def test_checkpoints_with_nothing_to_mix(tmp_path):
    for i in range(2):
        save_file({"ids": torch.arange(3)}, tmp_path / f"{i}.safetensors")
    pair = [tmp_path / "0.safetensors", tmp_path / "1.safetensors"]
    for i, options in enumerate([{"weights": [0.5, 0.5]}, {"weights": None, "method": "karcher"}]):
        soup.merge(pair, **options, out=tmp_path / f"out{i}", show_progress=False)
        assert torch.equal(load_file(tmp_path / f"out{i}" / "model.safetensors")["ids"], torch.arange(3))
    assert "nothing is mixed" in estimated(plans.make(pair, [0.5, 0.5], tmp_path / "dry"))


def test_what_is_asked_for_wrongly(files, tmp_path):
    def refused(part, weights, which=(1, 2, 3), **options):
        with pytest.raises(UserError) as caught:
            made(files, tmp_path / "no", weights, which=which, **options)
        assert part in str(caught.value) and "\n" not in str(caught.value), caught.value
        assert not (tmp_path / "no").exists()

    one = [1.0, 1.0, 1.0]
    refused("ties needs weights, one for each model", None, method="ties")
    refused("model_stock takes no weights", one, method="model_stock")
    refused("model_stock takes at least 2 models, got 1", None, which=(1,), method="model_stock")
    refused("dare_ties needs the parameter density", one, method="dare_ties")
    refused("density must be within [0, 1], got 1.5", one, method="ties", parameters={"density": 1.5})
    refused("density of model 1 must be a number, got 'x'", one, method="ties", parameters={"density": [1, "x", 1]})
    refused("density must be one for all or one for each of 3", one, method="ties", parameters={"density": [1]})
    refused("'densty' is no parameter of ties, which takes density,", one, method="ties", parameters={"densty": 1})
    refused("seed must be a whole number", one, method="dare_ties", parameters={"density": 0.5, "seed": -1})
    refused("rescale must be one of expected, l1, none", one, method="ties", parameters={"rescale": "l2"})
    refused("rescale must be l1 or none for ties", one, method="ties", parameters={"rescale": "expected"})
    refused("della needs density ± epsilon within (0, 1)", one, method="della", parameters={"density": 0.1})
    refused("normalize must be true or false, got 'yes'", one, method="ties", parameters={"normalize": "yes"})
    refused("none of its patterns matches embed.weight", [{"*.mlp.*": 1.0}, 1, 1], base=False, normalize=True)
    refused("lambda must be finite", one, method="ties", parameters={"lambda": float("inf")})
    refused("sidecar_from must be first, one of the models, or base", one, base=False, sidecar_from="base")
    args = [
        *map(str, paths(files, 1, 2)),
        "--method",
        "ties",
        "--weights",
        "1,1",
        "--base",
        str(files / "0.safetensors"),
    ]
    result = CliRunner().invoke(
        app, ["soup", *args, "--set", "density=0.5", "--set", "normalize=false", "--out", str(tmp_path / "cli")]
    )
    assert result.exit_code == 0, result.output
    same = made(
        files, tmp_path / "same", [1, 1], which=(1, 2), method="ties", parameters={"density": 0.5, "normalize": False}
    )
    actual = load_file(tmp_path / "cli" / "model.safetensors")
    assert all(torch.equal(actual[name], same[name]) for name in NAMES)
    result = CliRunner().invoke(app, ["soup", *args, "--set", "density", "--out", str(tmp_path / "no")])
    assert result.exit_code == 1 and "--set must be name=value" in result.output


def test_the_command_knows_every_method_and_its_parameters():
    shown = CliRunner(env={"COLUMNS": "2000"}).invoke(app, ["soup", "--help"]).output
    assert f"[{'|'.join(soup.METHODS)}]" in shown
    assert all(name in shown for one in soup.METHODS.values() for name in one.parameters)
    wrong = CliRunner(env={"COLUMNS": "2000"}).invoke(app, ["soup", "a", "b", "--method", "tie", "--out", "c"])
    assert wrong.exit_code == 2 and f"must be one of {', '.join(soup.METHODS)}, got 'tie'" in wrong.output


def test_a_dry_run_tells_the_time_and_leaves_nothing(files, tmp_path):
    for options in (
        ["--weights", "0.5,0.5"],
        ["--weights", "1,1", "--method", "ties", "--base", str(files / "0.safetensors")],
    ):
        args = [*map(str, paths(files, 1, 2)), *options, "--out", str(tmp_path / "soups" / "out"), "--dry-run"]
        result = CliRunner().invoke(app, ["soup", *args])
        assert result.exit_code == 0, result.output
        assert "time: about " in result.output and "dry run: nothing was written" in result.output
    assert not any(tmp_path.iterdir())
    plan = plans.make(paths(files, 1, 2), [[0.5, 0.5], [1.0, 0.0]], tmp_path / "out")
    actual = estimate(plan)
    assert actual.sample == 4 * 8 * 24 * 40  # the whole of one tensor: two inputs, two outputs
    assert actual.seconds > 0 and actual.rate == pytest.approx((plan.read_bytes + plan.written_bytes) / actual.seconds)
