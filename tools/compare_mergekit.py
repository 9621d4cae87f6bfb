"""The same recipes through fastalign and through mergekit 0.1.5: do the merged models agree, tensor by tensor?

    FASTALIGN_MERGEKIT_PYTHON=.../python python tools/compare_mergekit.py [--examples FOLDER] [--store FILE]

Runs its own recipes, which use the features that both have, and every *.yml in FOLDER, such as the examples in
mergekit's repository, with small random models in place of the named ones. Each runs with its stored type and in
float32, where rounding hides nothing. --store saves mergekit's results of the own recipes, two numbers per layer, for
tests/soup/test_mergekit.py, which compares fastalign with them without mergekit.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

LAYERS, TOKENS, ROWS = 4, 48, 56  # of the own recipes' models; rows of embeddings, some beyond the tokens
NAMES = "ABCDE"  # of the models; E has two tokens more
DRIVER = """
import json, sys, traceback, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
for recipe, out in json.load(open(sys.argv[1])):
    try:
        run_merge(MergeConfiguration.model_validate(recipe), out, MergeOptions(quiet=True, write_model_card=False))
    except Exception as error:
        print(json.dumps([out, f"{type(error).__name__}: {error}"]))
"""


def _sources(names: str, first: int, last: int, **parameters) -> list[dict]:
    return [
        {"model": name, "layer_range": [first, last], **({"parameters": parameters} if parameters else {})}
        for name in names
    ]


def _models(names: str, **parameters) -> list[dict]:
    return [{"model": name, **({"parameters": parameters} if parameters else {})} for name in names]


def _task(method: str, **parameters) -> dict:
    models = [{"model": "B", "parameters": {"weight": 0.7}}, {"model": "C", "parameters": {"weight": [0.2, 1.0]}}]
    return {"merge_method": method, "base_model": "A", "models": models, "parameters": parameters}


LINE = [{"filter": "self_attn", "value": [0, 0.5, 0.3, 1]}, {"filter": "mlp", "value": [1, 0.7, 0]}, {"value": 0.5}]
TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
RECIPES: dict[str, dict] = {
    "linear": {"merge_method": "linear", "models": [{"model": "A", "parameters": {"weight": [1, 0.2]}},
        *_models("BC", weight=0.4)]},
    "linear, not normalised, onto a base": {"merge_method": "linear", "base_model": "D", "models": _models("AB"),
                                            "parameters": {"weight": 0.4, "normalize": False}},
    "linear of some layers": {"merge_method": "linear", "slices": [{"sources": [*_sources("A", 1, 3, weight=1),
        *_sources("B", 2, 4, weight=3)]}]},
    "slerp with lines": {"merge_method": "slerp", "base_model": "A", "models": _models("BA"),
                         "parameters": {"t": LINE}},
    "slerp of two slices": {"merge_method": "slerp", "base_model": "A", "slices": [
        {"sources": _sources("AB", 0, 3), "parameters": {"t": LINE}},
        {"sources": [*_sources("C", 0, 3), *_sources("A", 1, 4)], "parameters": {"t": [0.2, 0.8]}},
    ]},
    "passthrough": {"merge_method": "passthrough", "slices": [{"sources": _sources("A", 0, 3)},
        {"sources": _sources("B", 1, 4)}]},
    "passthrough, a layer twice, scaled": {"merge_method": "passthrough", "slices": [
        {"sources": _sources("A", 0, 2)},
        {"sources": _sources("A", 1, 2, scale=[{"filter": "o_proj", "value": 0}, {"filter": "down_proj", "value": 0},
                                               {"value": 1}])},
        {"sources": _sources("A", 2, 4)},
    ]},
    "task arithmetic": _task("task_arithmetic", **{"lambda": 0.6}),
    "ties": _task("ties", density=[0.9, 0.3]),
    "ties of two slices": {"merge_method": "ties", "base_model": "A", "parameters": {"density": 0.5}, "slices": [
        {"sources": [*_sources("A", 0, 2), *_sources("B", 0, 2, weight=1), *_sources("C", 1, 3, weight=[0.3, 1])]},
        {"sources": [*_sources("D", 0, 3, weight=0.5), *_sources("B", 1, 4, weight=[1, 0.1]), *_sources("A", 1, 4)]},
    ]},
    "dare_linear, nothing dropped": _task("dare_linear", density=1),
    "dare_ties, nothing dropped": _task("dare_ties", density=1),
    "breadcrumbs": _task("breadcrumbs", density=0.7, gamma=0.1),
    "breadcrumbs_ties": _task("breadcrumbs_ties", density=0.7, gamma=0.1),
    "karcher": {"merge_method": "karcher", "models": _models("ABC"), "parameters": {"max_iter": 20, "tol": 1e-6}},
    "multislerp": {"merge_method": "multislerp", "models": [*_models("AB", weight=1), *_models("C", weight=0.3)]},
    "multislerp onto a base": {"merge_method": "multislerp", "base_model": "A", "models": _models("BCD", weight=0.5)},
    "model_stock": {"merge_method": "model_stock", "base_model": "A", "models": _models("BCD")},
    "model_stock, filter-wise": {"merge_method": "model_stock", "base_model": "A", "models": _models("BCD"),
                                 "parameters": {"filter_wise": True}},
    "tokenizer: union": {"merge_method": "linear", "models": _models("AB", weight=0.5),
                         "tokenizer": {"source": "union"}},
    "tokenizer_source: base": {"merge_method": "ties", "base_model": "A", "tokenizer_source": "base",
                               "models": _models("BC", weight=1, density=0.5)},
    "tokenizer_source: a model": {"merge_method": "slerp", "base_model": "A", "tokenizer_source": "B",
                                  "models": _models("AB"), "parameters": {"t": 0.5}},
    "tokenizer_source: base, of fewer tokens": {"merge_method": "ties", "base_model": "A", "tokenizer_source": "base",
        "models": _models("BE", weight=1, density=0.5)},
    "tokenizer: a model's, of fewer tokens": {"merge_method": "linear", "models": _models("EB", weight=0.5),
        "tokenizer": {"source": "B"}},
    "chat_template: auto": {"merge_method": "karcher", "models": _models("ABC"), "chat_template": "auto"},
    "chat_template: its text": {"merge_method": "linear", "models": _models("AB", weight=0.5),
                                "tokenizer_source": "union", "chat_template": TEMPLATE},
}  # fmt: skip


def make_model(folder: Path, number: int, *, layers: int = LAYERS, more: int = 0) -> Path:
    """A small Llama in float32 and a tokenizer of words: model 0's weights, and the others' close to them. The same on
    every machine."""
    from safetensors.numpy import save_file

    hidden, inner = 16, 24
    shapes = {
        "model.embed_tokens.weight": (ROWS + more, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (ROWS + more, hidden),
    }
    parts = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden, hidden),
        "self_attn.v_proj": (hidden, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    shapes |= {f"model.layers.{i}.{part}.weight": shape for i in range(layers) for part, shape in parts.items()}

    def draw(seed: int) -> dict[str, np.ndarray]:
        numbers = np.random.default_rng(seed)
        return {name: numbers.standard_normal(shape) for name, shape in shapes.items()}

    tensors, moves = draw(0), draw(1000 + number)
    if number:
        tensors = {name: x + 0.3 * moves[name] for name, x in tensors.items()}
    folder.mkdir(parents=True)
    save_file(
        {name: x.astype(np.float32) for name, x in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": ROWS + more,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    words = {"<unk>": 0, **{f"w{i}": i for i in range(1, TOKENS)}}
    tokens = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"},
    }
    words |= {f"new{i}": TOKENS + i for i in range(more)}
    (folder / "tokenizer.json").write_text(json.dumps(tokens))
    template = f"{{{{ messages[0]['content'] }}}} {number // 2}"  # one for two models
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def named(recipe: dict, paths: dict[str, str], dtype: str | None = None) -> dict:
    """The recipe with its models' names replaced by paths, and another dtype."""

    def replaced(value):
        if isinstance(value, dict):
            return {
                key: paths.get(kept, kept)
                if key in ("model", "base_model", "tokenizer_source", "source") and isinstance(kept, str)
                else replaced(kept)
                for key, kept in value.items()
            }
        return [replaced(one) for one in value] if isinstance(value, list) else value

    result = replaced(copy.deepcopy(recipe))
    if dtype is not None:
        result["dtype"] = dtype
        result.pop("out_dtype", None)
    return result


def names_in(recipe: dict) -> list[str]:
    """The models named in a recipe, the base first."""
    listed = [recipe.get("base_model"), *(one["model"] for one in recipe.get("models", ()))]
    listed += [one["model"] for part in recipe.get("slices", ()) for one in part["sources"]]
    return list(dict.fromkeys(filter(None, listed)))


def ours(recipe: dict, out: Path) -> str | None:
    """fastalign's merge, or its error."""
    import yaml

    from fastalign import soup
    from fastalign._base.errors import UserError

    path = out.with_suffix(".yml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(recipe))
    try:
        soup.merge(**soup.read_recipe(path), out=out, show_progress=False)
    except UserError as error:
        return str(error).removeprefix(f"{path}: ")
    return None


def theirs(jobs: list[tuple[dict, Path]], scratch: Path) -> dict[str, str]:
    """mergekit's merges, in one process; the errors by folder."""
    (scratch / "jobs.json").write_text(json.dumps([[recipe, str(out)] for recipe, out in jobs]))
    (scratch / "driver.py").write_text(DRIVER)
    command = [os.environ["FASTALIGN_MERGEKIT_PYTHON"], str(scratch / "driver.py"), str(scratch / "jobs.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise SystemExit(f"mergekit does not run:\n{done.stderr[-3000:]}")
    return dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))


def load(folder: Path) -> dict:
    from safetensors.torch import load_file

    result = {}
    for path in sorted(folder.glob("*.safetensors")):
        result |= load_file(path)
    return result


def digest(folder: Path) -> dict[str, list[float]]:
    """Two sums over each layer and over the other tensors, in fixed directions: Σ x cos and Σ x sin of the elements'
    positions."""
    from fastalign.soup.stacks import layer_of

    groups: dict[str, list] = {}
    for name, tensor in sorted(load(folder).items()):
        layer = layer_of(name)
        groups.setdefault(f"layer {layer.number}" if layer else "outside", []).append(tensor.double().flatten().numpy())
    result = {}
    for group, flats in groups.items():
        flat = np.concatenate(flats)
        places = np.arange(len(flat)) * 0.7
        result[group] = [round(float(flat @ np.cos(places)), 4), round(float(flat @ np.sin(places)), 4)]
    return result


def about(folder: Path) -> dict:
    """What must be equal besides the weights: sizes, type, tokens, chat template."""
    from transformers import AutoTokenizer

    config = json.loads((folder / "config.json").read_text())
    result = {key: config.get(key) for key in ("num_hidden_layers", "vocab_size")}
    result["dtype"] = config.get("dtype", config.get("torch_dtype"))
    if (folder / "tokenizer.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        result |= {"tokens": tokenizer.get_vocab(), "template": tokenizer.chat_template}
    return result


def difference(a: Path, b: Path) -> str:
    """How two merged models differ, in a few words; "" if they do not."""
    import torch

    x, y = load(a), load(b)
    if x.keys() != y.keys():
        return f"tensors: {sorted(x.keys() ^ y.keys())[:3]}"
    for name in x:
        if x[name].shape != y[name].shape or x[name].dtype != y[name].dtype:
            return f"{name}: {x[name].dtype} {list(x[name].shape)} and {y[name].dtype} {list(y[name].shape)}"
    mine, other = about(a), about(b)
    wrong = [key for key in mine if mine[key] != other.get(key)]
    if wrong:
        return f"{wrong[0]}: {str(mine[wrong[0]])[:40]} and {str(other.get(wrong[0]))[:40]}"
    far, count, worst = 0, 0, 0.0
    for name in x:
        eps = torch.finfo(x[name].dtype).eps
        scale = x[name].double().abs().clamp(min=float(x[name].double().std()) if x[name].numel() > 1 else 1e-6)
        ulps = (x[name].double() - y[name].double()).abs() / scale / eps
        far, count, worst = far + int((ulps > 32).sum()), count + ulps.numel(), max(worst, float(ulps.max()))
    if worst == 0:
        return ""
    return f"{worst:.2g} ulp at most" if far == 0 else f"{far} of {count:,} elements differ by more than 32 ulp"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=Path, help="a folder of recipes, *.yml")
    parser.add_argument("--store", type=Path, help="keep mergekit's values of the own recipes here")
    given = parser.parse_args()
    if "FASTALIGN_MERGEKIT_PYTHON" not in os.environ:
        raise SystemExit("FASTALIGN_MERGEKIT_PYTHON must name the Python of an environment with mergekit 0.1.5")
    import yaml

    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        small = {name: str(make_model(scratch / name, i, more=2 * (name == "E"))) for i, name in enumerate(NAMES)}
        deep = [str(make_model(scratch / f"deep{i}", i, layers=40)) for i in range(4)]
        jobs: list[tuple[str, str, dict]] = []
        for name, recipe in RECIPES.items():
            jobs.append((name, "float32", named(recipe, small, "float32")))
        for path in sorted(given.examples.glob("*.yml")) if given.examples else ():
            recipe = yaml.safe_load(path.read_text())
            paths = dict(zip(names_in(recipe), deep, strict=False))
            jobs.append((path.name, recipe.get("dtype", "as it is"), named(recipe, paths)))
            jobs.append((path.name, "float32", named(recipe, paths, "float32")))
        outs = [(scratch / "ours" / str(i), scratch / "theirs" / str(i)) for i in range(len(jobs))]
        errors = theirs([(recipe, b) for (_, _, recipe), (_, b) in zip(jobs, outs, strict=True)], scratch)
        disagree, stored = 0, {}
        for (name, dtype, recipe), (a, b) in zip(jobs, outs, strict=True):
            refused = ours(recipe, a)
            if str(b) in errors:
                message = f"mergekit fails ({errors[str(b)][:60]}), fastalign " + (
                    f"refuses ({refused[:60]})" if refused else "does not"
                )
            elif refused is not None:
                message = f"refused: {refused[:150]}"
            else:
                what = difference(a, b)
                disagree += dtype == "float32" and bool(what) and not what.endswith("at most")
                message = (
                    f"agreed, {what or 'bit for bit'}" if not what or what.endswith("at most") else f"differs: {what}"
                )
            if name in RECIPES and str(b) not in errors:
                stored[name] = digest(b)
            print(f"{name:36} {dtype:9} {message}", flush=True)
            for out in (a, b):
                shutil.rmtree(out, ignore_errors=True)
        if given.store:
            text = ",\n".join(f"{json.dumps(name)}: {json.dumps(result)}" for name, result in stored.items())
            given.store.write_text("{\n" + text + "\n}\n")
    return 1 if disagree else 0


if __name__ == "__main__":
    sys.exit(main())
