"""Recipes in YAML: fastalign's own, and mergekit's examples with their models' names replaced by small local ones."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from fastalign import soup
from fastalign._base.errors import UserError
from fastalign.cli.main import app

F64 = torch.float64
LAYERS = 5
NAMES = [
    "model.embed_tokens.weight",
    *(f"model.layers.{i}.{part}.weight" for i in range(LAYERS) for part in ("self_attn.q_proj", "mlp.up_proj", "norm")),
    "lm_head.weight",
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    base = {name: torch.randn(20, 30, dtype=F64) for name in NAMES}
    for i, one in enumerate("ABCD"):
        save_file(
            {name: x + 0.2 * bool(i) * torch.randn_like(x) for name, x in base.items()}, root / f"{one}.safetensors"
        )
    return root


def run(models, tmp_path, text, out="out"):
    """A recipe with {A} ... {D} for the models' paths, merged."""
    for one in "ABCD":
        text = text.replace("{" + one + "}", str(models / f"{one}.safetensors"))
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    soup.merge(**soup.read_recipe(path), out=tmp_path / out, show_progress=False)
    return load_file(tmp_path / out / "model.safetensors")


def tensors(models, which="ABCD"):
    return [load_file(models / f"{one}.safetensors") for one in which]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# mergekit's examples/gradient-slerp.yml, linear.yml, bio-merge.yml and ties.yml.
GRADIENT_SLERP = """
slices:
  - sources:
      - model: "{A}"
        layer_range: [0, 5]
      - model: "{B}"
        layer_range: [0, 5]
merge_method: slerp
base_model: "{A}"
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5 # fallback for rest of tensors
dtype: float64
"""
LINEAR = """
models:
  - model: "{A}"
    parameters:
      weight: 1.0
  - model: "{B}"
    parameters:
      weight: 0.3
  - model: "{C}"
    parameters:
      weight: 0.5
merge_method: linear
dtype: float64
"""
BIO_MERGE = """
models:
  - model: "{B}"
    parameters:
      density: 0.5
      weight: 0.5
  - model: "{C}"
    parameters:
      density: 0.5
      weight: 0.5
merge_method: ties
base_model: "{A}"
parameters:
  normalize: false
  int8_mask: true
dtype: float64
"""
TIES = """
models:
  - model: "{B}"
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: "{C}"
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1] # weight gradient
  - model: "{D}"
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: "{A}"
parameters:
  normalize: true
  int8_mask: true
dtype: float64
"""


def between(values, layer):
    place = layer / (LAYERS - 1) * (len(values) - 1)
    low = min(int(place), len(values) - 2)
    return (1 - (place - low)) * values[low] + (place - low) * values[low + 1]  # the last bit decides int(density * n)


def layer_of(name):
    return int(name.split(".")[2]) if ".layers." in name else 0  # outside of layers, the first value


def test_gradients_of_slerp(models, tmp_path):
    result = run(models, tmp_path, GRADIENT_SLERP)
    a, b = tensors(models, "AB")
    for name in NAMES:
        lines = {"self_attn": [0, 0.5, 0.3, 0.7, 1], "mlp": [1, 0.5, 0.7, 0.3, 0]}
        values = next((line for part, line in lines.items() if part in name), [0.5, 0.5])
        t = between(values, layer_of(name))
        x, y = a[name], b[name]
        theta = torch.acos((x * y).sum() / x.norm() / y.norm())
        close(result[name], (torch.sin((1 - t) * theta) * x + torch.sin(t * theta) * y) / torch.sin(theta))


def test_linear_divides_by_the_sum(models, tmp_path):
    result = run(models, tmp_path, LINEAR)
    a, b, c = tensors(models, "ABC")
    for name in NAMES:
        close(result[name], (a[name] + 0.3 * b[name] + 0.5 * c[name]) / 1.8)


def test_ties_with_and_without_division(models, tmp_path):
    result = run(models, tmp_path, BIO_MERGE)
    wanted = soup.merge(
        [models / "B.safetensors", models / "C.safetensors"],
        [0.5, 0.5],
        tmp_path / "same",
        method="ties",
        base=models / "A.safetensors",
        parameters={"density": 0.5, "normalize": False},
        show_progress=False,
    )
    same = load_file(wanted.out / "model.safetensors")
    assert all(torch.equal(result[name], same[name]) for name in NAMES)

    result = run(models, tmp_path, TIES, "gradients")
    base, *others = tensors(models)
    for name in NAMES:
        layer = layer_of(name)
        density = [between([1, 0.7, 0.1], layer), 0.5, 0.33]
        weights = [1.0, between([0, 0.3, 0.7, 1], layer), 0.5 if "mlp" in name else 0.0]
        weighted = []
        for one, share, weight in zip(others, density, weights, strict=True):
            delta = one[name] - base[name]
            kept = max(1, int(share * delta.numel()))
            least = delta.abs().flatten().sort(descending=True).values[kept - 1]
            weighted.append(weight * delta * (delta.abs() >= least))
        sign = torch.where(sum(weighted) >= 0, 1.0, -1.0)
        agree = [(x.sign() == sign).double() for x in weighted]
        taken = sum(w * x for w, x in zip(weights, agree, strict=True))
        merged = sum(x * y for x, y in zip(weighted, agree, strict=True)) / torch.where(taken == 0, 1.0, taken)
        close(result[name], base[name] + merged)


@pytest.mark.parametrize(
    ("method", "extra", "same"),
    [
        ("task_arithmetic", "", {"parameters": {"lambda": 0.7}}),
        ("dare_linear", "density: 0.5", {"parameters": {"lambda": 0.7, "density": 0.5, "rescale": "l1"}}),
        (
            "dare_ties",
            "density: 0.5, rescale: false",
            {"parameters": {"lambda": 0.7, "density": 0.5, "rescale": "none"}},
        ),
        ("della", "density: 0.5", {"parameters": {"lambda": 0.7, "density": 0.5, "epsilon": 0.15, "rescale": "l1"}}),
        ("breadcrumbs", "density: 0.8, gamma: 0.05", {"parameters": {"lambda": 0.7, "density": 0.8, "gamma": 0.05}}),
    ],
)
def test_what_mergekit_leaves_out_it_takes_as_such(models, tmp_path, method, extra, same):
    head = f'merge_method: {method}\nbase_model: "{{A}}"\nmodels:\n  - model: "{{A}}"\n'
    each = "".join(
        f'  - {{{{model: "{{{one}}}", parameters: {{{{weight: 0.5}}}}}}}}\n'.replace("{{", "{").replace("}}", "}")
        for one in "BC"
    )
    shared = f"parameters: {{lambda: 0.7, {extra}}}\n"
    result = run(models, tmp_path, head + each + shared)
    paths = [models / f"{one}.safetensors" for one in "BC"]
    done = soup.merge(
        paths, [0.5, 0.5], tmp_path / "same", method=method, base=models / "A.safetensors", show_progress=False, **same
    )
    wanted = load_file(done.out / "model.safetensors")
    assert all(torch.equal(result[name], wanted[name]) for name in NAMES)


def test_parameters_of_other_methods_are_passed_over(models, tmp_path):
    listed = (
        'models: [{model: "{B}", parameters: {density: 0.5}}, {model: "{C}"}]\n'
        "parameters: {normalize: true, int8_mask: true}\n"
    )
    result = run(models, tmp_path, 'name: mine\nmerge_method: model_stock\nbase_model: "{A}"\n' + listed)
    done = soup.merge(
        [models / "B.safetensors", models / "C.safetensors"],
        None,
        tmp_path / "same",
        method="model_stock",
        base=models / "A.safetensors",
        parameters={"floor": 1e-6},
        show_progress=False,
    )
    assert all(torch.equal(result[name], x) for name, x in load_file(done.out / "model.safetensors").items())


def test_means_on_the_sphere(models, tmp_path):
    listed = "models: [" + ", ".join(f'{{model: "{{{one}}}"}}' for one in "BCD") + "]\n"
    paths = [models / f"{one}.safetensors" for one in "BCD"]
    cases = {
        "merge_method: karcher\nparameters: {max_iter: 20, tol: 1e-7}\n": {
            "method": "karcher",
            "parameters": {"max_iter": 20, "tol": 1e-7},
        },
        'merge_method: model_stock\nbase_model: "{A}"\n': {"method": "model_stock", "base": models / "A.safetensors"},
        "merge_method: multislerp\nparameters: {weight: 0.4}\n": {"method": "multislerp"},
    }
    for i, (text, options) in enumerate(cases.items()):
        result = run(models, tmp_path, listed + text, f"out{i}")
        done = soup.merge(paths, None, tmp_path / f"same{i}", show_progress=False, **options)
        for name, wanted in load_file(done.out / "model.safetensors").items():
            close(result[name], wanted)


def test_the_own_form(models, tmp_path):
    text = """
method: ties
base: "{A}"
models:
  - {model: "{B}", weight: 1.0, density: {"*mlp*": [0.2, 0.8], "*": 0.5}}
  - {model: "{C}", weight: [0, 1], density: 0.3}
parameters: {lambda: 0.5, normalize: false}
dtype: float32
"""
    actual = run(models, tmp_path, text)
    same = soup.merge(
        [models / "B.safetensors", models / "C.safetensors"],
        [1.0, {"*": [0, 1]}],
        tmp_path / "same",
        method="ties",
        base=models / "A.safetensors",
        dtype="float32",
        show_progress=False,
        parameters={"density": [{"*mlp*": [0.2, 0.8], "*": 0.5}, 0.3], "lambda": 0.5, "normalize": False},
    )
    wanted = load_file(same.out / "model.safetensors")
    assert all(torch.equal(actual[name], wanted[name]) and actual[name].dtype == torch.float32 for name in NAMES)
    path = tmp_path / "recipe.yaml"
    path.write_text(f"models: [{models}/A.safetensors, {models}/B.safetensors]\ngrid: 3\n")
    result = CliRunner().invoke(
        app, ["soup", "--recipe", str(path), "--out", str(tmp_path / "grid"), "--dtype", "bf16"]
    )
    assert result.exit_code == 0, result.output
    middle = load_file(tmp_path / "grid" / "1" / "model.safetensors")
    a, b = tensors(models, "AB")
    assert all(torch.equal(middle[name], ((a[name] + b[name]) / 2).bfloat16()) for name in NAMES)
    result = CliRunner().invoke(app, ["soup", "x", "--recipe", str(path), "--out", str(tmp_path / "no")])
    assert result.exit_code == 1 and "leave out the models" in result.output


def test_names_of_earlier_versions_are_read(tmp_path):
    path = tmp_path / "recipe.yaml"
    for former, now in (("companion: b", {"sidecar_from": "b"}), ("tokenizer: companion", {"tokenizer": "sidecar"})):
        path.write_text(f"models: [a, b]\nweights: [0.5, 0.5]\n{former}\n")
        read = soup.read_recipe(path)
        assert now.items() <= read.items() and "companion" not in {*read, *map(str, read.values())}


MISTAKES = [
    ("models: [", "not YAML"),
    ("", "must be a mapping of names to values, got NoneType"),
    ("models: [a]\n---\nmodels: [b]", "contains 2 recipes"),
    ("- 1", "must be a mapping of names to values, got list"),
    ("!!python/object/apply:os.system [ls]", "not YAML"),
    ("models: []", "models must be a list of 1 to 1000 entries"),
    ("models: [a]\nweight: [1]", "a recipe may have 'base', 'chat_template', 'dtype', 'force',"),
    ("models: [a]\nnull: 1",
     "'models', 'normalize', 'pad_to_multiple_of', 'parameters', 'sidecar_from', 'tokenizer', 'weights', got None"),
    ("models: [{path: a}]", "model 0 may have 'density', 'epsilon', 'gamma', 'model', 'weight', got 'path'"),
    ("models: [{model: a, weight: 1}, {model: b}]", "model 1 has no weight, others have one"),
    ("models: [{model: a, weight: 1}]\ngrid: 3", "weights must be given once"),
    ("models: [a]\nmethod: [ties]", "method must be text"),
    ("models: [a]\nforce: 1", "force must be true or false"),
    ("merge_method: ramplus_tl\nmodels: [{model: a}]", "merge_method must be one of passthrough, linear,"),
    ("merge_method: linear\nmodels: [{model: a}]", "weight of a is missing, and linear needs it"),
    ("merge_method: linear\nmodels: [{model: a, parameters: {wieght: 1}}]", "'wieght' is no parameter of linear"),
    ("merge_method: linear\nmodels: [{model: a, parameters: {weight: x}}]", "weight of a must be a number, got 'x'"),
    ("merge_method: linear\nmodels: [{model: a, parameters: {weight: [{pattern: b, value: 1}]}}]", "got 'pattern'"),
    ("merge_method: linear\nmodels: [{model: a, parameters: {weight: .inf}}]", "weight of a must be finite"),
    ("merge_method: linear\nmodels: [{model: a}]\nslices: [{sources: []}]", "either models or slices"),
    ("merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}]", "t is missing, and slerp needs it"),
    ("merge_method: slerp\nmodels: [{model: a}, {model: b}]", "slerp takes two models, one of them the base_model"),
    ("merge_method: slerp\nslices: [{sources: [{model: a, layer_range: [0, 4]}, {model: b, layer_range: [1, 6]}]}]",
     "layer_range must have as many layers"),
    ("merge_method: slerp\nslices: [{sources: [{model: a, layer_range: 3}]}]",
     "layer_range of model 0 must be two whole"),
    ("merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [0, 1]}]}, "
     "{sources: [{model: a, layer_range: [0, 1]}, {model: b, layer_range: [0, 1]}]}]", "as many sources as the first"),
    ("merge_method: linear\nslices: [{sources: [{model: a, layer_range: [2, 4], "
     "parameters: {weight: [{filter: layers.3, value: 1}, {value: 0}]}}]}]", "filters with a layer's number"),
    ("merge_method: linear\nslices: [{sources: [{model: a, layer_range: [0, 1], parameters: {weight: 1}}], "
     "parameters: {normalize: true}}, {sources: [{model: a, layer_range: [0, 1], parameters: {weight: 1}}], "
     "parameters: {normalize: false}}]", "normalize must be the same in all slices"),
    ("merge_method: passthrough\nmodels: [{model: a}, {model: b}]", "passthrough takes one model"),
    ("merge_method: karcher\nmodels: [{model: a}]\ntokenizer: {source: a, tokens: {x: {source: b}}}", "got 'tokens'"),
    ("models: [[{model: a, layers: [2]}]]", "model 0: layers must be two whole numbers"),
    ("merge_method: karcher\nmodels: [{model: a+b}]", "adapters (+) and revisions (@) are not read here"),
    ("merge_method: karcher\nmodels: [{model: a}]\nparameters: {max_iter: x}", "max_iter must be a whole number"),
    ("merge_method: karcher\nmodels: [{model: a}]\nchat_template: [auto]", "chat_template must be text"),
    ("merge_method: ties\nbase_model: a\nmodels: [{model: b}]\nparameters: {normalize: [1]}", "weight of b is missing"),
    ("merge_method: karcher\nmodels: [{model: a}, {model: a}]", "a model may occur only once"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "part"), MISTAKES)
def test_a_mistake_is_one_line_that_names_it(tmp_path, text, part):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        soup.merge(**soup.read_recipe(path), out=tmp_path / "out")
    assert str(caught.value).startswith(f"{path}: ") and part in str(caught.value) and "\n" not in str(caught.value)


def test_large_and_missing_recipes(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        soup.read_recipe(tmp_path / "none.yaml")
    (tmp_path / "large.yaml").write_text("#" * 1_000_001)
    with pytest.raises(UserError, match="at most 1,000,000 bytes"):
        soup.read_recipe(tmp_path / "large.yaml")


NUMBERS = {
    "true": (True, 1),
    "1": (True, 1),
    "1.0": (True, 1),
    "'1'": (True, 1),
    "0": (False, 0),
    "0.0": (False, 0),
    "false": (False, 0),
    "5.0": (True, 5),
    "2": (True, 2),
}


@pytest.mark.parametrize("written", NUMBERS)
def test_mergekits_flags_and_counts_may_be_numbers(written, tmp_path):
    """Its parameters are all numbers, and what it writes itself has true as 1.0 and 5 as 5.0."""
    flag, count = NUMBERS[written]

    def read(text):
        path = tmp_path / "recipe.yml"
        path.write_text(text)
        return soup.read_recipe(path)

    two, each = (
        "models: [{model: b}, {model: c}]",
        "models: [{model: b, parameters: {weight: 1}}, {model: c, parameters: {weight: 1}}]",
    )
    base = "base_model: a"
    assert read(f"merge_method: linear\n{each}\nparameters: {{normalize: {written}}}")["normalize"] is flag
    assert (
        read(f"merge_method: model_stock\n{base}\n{two}\nparameters: {{filter_wise: {written}}}")["parameters"][
            "filter_wise"
        ]
        is flag
    )
    assert read(f"merge_method: karcher\n{two}\nparameters: {{max_iter: {written}}}")["parameters"]["max_iter"] == count
    result = read(f"merge_method: multislerp\n{each}\nparameters: {{normalize_weights: {written}}}")
    assert result["parameters"]["normalize_weights"] is flag
    result = read(
        "merge_method: ties\n"
        f"{base}\n"
        f"{each}\n"
        f"parameters: {{normalize: {written}, rescale: {written}, int8_mask: {written}}}"
    )
    assert (result["parameters"]["normalize"], result["parameters"]["rescale"]) == (flag, "l1" if flag else "none")
    result = read(f"merge_method: linear\nmodels: [{{model: b, parameters: {{weight: {written}}}}}]")
    assert result["weights"][0].constant == count


def test_mergekits_layer_ranges_may_be_numbers_with_a_point(tmp_path):
    (tmp_path / "r.yml").write_text(
        "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [0.0, 2.0]}]}]"
    )
    assert soup.read_recipe(tmp_path / "r.yml")["models"] == [[("a", 0, 2)]]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("normalize: maybe", "normalize must be true or false, or a number, for all"),
        ("normalize: .nan", "got nan"),
        ("normalize: [1, 0]", "for all tensors"),
        ("normalize: [{filter: mlp, value: 1}]", "for all tensors"),
    ],
)
def test_what_is_neither_flag_nor_number(body, message, tmp_path):
    recipe = f"merge_method: linear\nmodels: [{{model: b, parameters: {{weight: 1}}}}]\nparameters: {{{body}}}"
    (tmp_path / "r.yml").write_text(recipe)
    with pytest.raises(UserError) as caught:
        soup.read_recipe(tmp_path / "r.yml")
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("count", ["5.5", ".inf", "many"])
def test_a_count_is_whole(count, tmp_path):
    (tmp_path / "r.yml").write_text(f"merge_method: karcher\nmodels: [{{model: a}}]\nparameters: {{max_iter: {count}}}")
    with pytest.raises(UserError, match="max_iter must be a whole number"):
        soup.read_recipe(tmp_path / "r.yml")
