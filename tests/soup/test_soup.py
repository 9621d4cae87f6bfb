"""Merges from file to file and in memory: exact, the same however they are cut, whole or not there at all."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_folder
from turns import on_its_day
from typer.testing import CliRunner

from fastalign import soup, use_backend
from fastalign._base.errors import UserError
from fastalign._base.work_folder import MARK
from fastalign.cli.main import app
from fastalign.soup.checkpoint import INDEX
from fastalign.soup.lora.made import write_adapter
from fastalign.soup.methods.settings import simplex_grid

RHO = [0.5, 0.3, 0.2]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return [tiny_folder(root / f"m{i}", seed=i, dtype=torch.bfloat16, chat=True) for i in range(3)]


def load(folder):
    result = {}
    for path in sorted(folder.glob("*.safetensors")):
        result.update(load_file(path))
    return result


def by_hand(models, weights, dtype=torch.bfloat16):
    kept = [load(model) for model in models]
    return {
        name: sum(w * one[name].float() for w, one in zip(weights, kept, strict=True)).to(dtype) for name in kept[0]
    }


def files(folder):
    """Every file's bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def close(found, wanted, ulps=1):
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert found[name].dtype == wanted[name].dtype
        eps = torch.finfo(wanted[name].dtype).eps
        assert (
            (found[name].double() - wanted[name].double()).abs() <= ulps * eps * wanted[name].double().abs() + 1e-7
        ).all(), name


def test_a_soup_is_the_weighted_sum_and_loads_with_its_tokenizer(models, tmp_path):
    from fastalign.models.loading import load_causal_lm

    out = tmp_path / "out"
    result = soup.merge(models, RHO, out)
    assert (result.models, result.resumed, result.read_bytes) == (1, 0, 3 * result.written_bytes)
    wanted = by_hand(models, RHO)
    close(load(out), wanted)
    model, tokenizer = load_causal_lm(out, dtype="auto")
    assert model.dtype == torch.float32 or model.dtype == torch.bfloat16
    manual, _ = load_causal_lm(models[0], dtype=torch.bfloat16)
    manual.load_state_dict(load(out))
    ids = torch.tensor([tokenizer("tell me a story").input_ids])
    with torch.no_grad():
        torch.testing.assert_close(model.double()(ids).logits, manual.double()(ids).logits)
    assert tokenizer.chat_template and (out / "generation_config.json").is_file()
    recorded = json.loads(soup.open_checkpoint(out).files[0].metadata["fastalign"])
    assert recorded["weights"] == RHO and [one["name"] for one in recorded["models"]] == ["m0", "m1", "m2"]
    assert str(tmp_path) not in json.dumps(recorded)


def test_many_soups_in_one_reading_equal_each_alone(models, tmp_path):
    rows = simplex_grid(3, 3)
    assert len(rows) == 6 and (rows.sum(1) == 1).all()
    result = soup.merge(models, rows, tmp_path / "all", max_shard_size="40kB")
    alone = soup.merge(models, rows[1], tmp_path / "alone")
    assert result.read_bytes == alone.read_bytes and result.written_bytes == 6 * alone.written_bytes
    for k, row in enumerate(rows):
        soup.merge(models, row, tmp_path / f"one{k}", max_shard_size="40kB")
        together, single = files(tmp_path / "all" / str(k)), files(tmp_path / f"one{k}")
        single.pop("soup.json")
        assert together == single
        assert sum(name.endswith(".safetensors") for name in together) == 3 and INDEX in together
    corner = load(tmp_path / "all" / "0")
    assert all(torch.equal(corner[name], tensor) for name, tensor in load(models[0]).items())


def test_shards_and_their_order_do_not_matter(models, tmp_path):
    from fastalign.models.loading import load_causal_lm

    first = soup.merge(models, RHO, tmp_path / "whole").out
    cut = [
        soup.merge([model], [1.0], tmp_path / f"cut{i}", max_shard_size=f"{20 + 15 * i}kB").out
        for i, model in enumerate(models)
    ]
    assert len({len(list(one.glob("*.safetensors"))) for one in cut}) > 1
    backwards = tmp_path / "backwards.safetensors"
    save_file(dict(sorted(load(models[2]).items(), reverse=True)), backwards)
    again = soup.merge([cut[0], cut[1], backwards], RHO, tmp_path / "again", max_shard_size="30kB").out
    a, b = load(first), load(again)
    assert all(torch.equal(a[name], b[name]) for name in a) and a.keys() == b.keys()
    load_causal_lm(again)


def test_types_are_mixed_and_chosen(tmp_path):
    torch.manual_seed(0)
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float64, torch.float8_e5m2]
    names = ["w", "v"]
    kept = [{name: torch.randn(33, 7).to(dtype) for name in names} for dtype in dtypes]
    for i, one in enumerate(kept):
        one["ids"], one["mask"] = torch.arange(5), torch.tensor([True, False])
        one["nothing"] = torch.empty(0, 3)
        save_file(one, tmp_path / f"{i}.safetensors")
    paths = [tmp_path / f"{i}.safetensors" for i in range(6)]
    weights = [0.3, 0.1, 0.2, 0.1, 0.2, 0.1]
    for dtype, wanted in (
        (None, torch.float32),
        ("bf16", torch.bfloat16),
        (torch.float64, torch.float64),
        ("float8_e4m3fn", torch.float8_e4m3fn),
    ):
        out = soup.merge(paths, weights, tmp_path / f"out-{dtype}", dtype=dtype).out
        result = load(out)
        assert torch.equal(result["ids"], kept[0]["ids"]) and torch.equal(result["mask"], kept[0]["mask"])
        for name in names:
            exact = sum(w * one[name].double() for w, one in zip(weights, kept, strict=True))
            assert result[name].dtype == wanted
            torch.testing.assert_close(
                result[name].double(),
                exact,
                rtol=torch.finfo(wanted).eps / 2,
                atol=1e-3 if wanted.itemsize == 1 else 1e-9,
            )
        assert result["nothing"].shape == (0, 3)
        with use_backend("reference"):
            again = soup.merge(paths, weights, tmp_path / f"torch-{dtype}", dtype=dtype).out
        rtol = 2 * torch.finfo(wanted).eps
        for name, tensor in load(again).items():
            torch.testing.assert_close(
                tensor.double(), result[name].double(), rtol=rtol, atol=2e-3 if wanted.itemsize == 1 else 1e-6
            )


def test_task_arithmetic_and_slerp(models, tmp_path):
    base, a, b = (load(model) for model in models)
    out = soup.merge(
        models[1:], [0.7, 0.6], tmp_path / "task", method="task_arithmetic", base=models[0], dtype="float32"
    ).out
    for name, result in load(out).items():
        wanted = (
            base[name].double()
            + 0.7 * (a[name].double() - base[name].double())
            + 0.6 * (b[name].double() - base[name].double())
        )
        torch.testing.assert_close(result.double(), wanted, rtol=1e-5, atol=1e-6)
    rows = [[0.75, 0.25], [0.5, 0.5]]
    soup.merge(models[1:], rows, tmp_path / "slerp", method="slerp", dtype="float32")
    for k, (_, t) in enumerate(rows):
        for name, result in load(tmp_path / "slerp" / str(k)).items():
            x, y = a[name].double(), b[name].double()
            theta = torch.acos((x * y).sum() / x.norm() / y.norm())
            wanted = (torch.sin((1 - t) * theta) * x + torch.sin(t * theta) * y) / torch.sin(theta)
            if torch.equal(x, y):
                wanted = x
            torch.testing.assert_close(result.double(), wanted, rtol=1e-5, atol=1e-6)


def test_in_memory_as_in_files(models, tmp_path):
    from fastalign.models.loading import load_causal_lm

    on_disk = load(soup.merge(models, RHO, tmp_path / "out").out)
    module, _ = load_causal_lm(models[1], dtype=torch.bfloat16)
    mixed = soup.mix([models[0], module, load(models[2])], RHO)
    assert mixed.keys() == on_disk.keys() and all(torch.equal(mixed[name], on_disk[name]) for name in mixed)
    several = soup.mix(models, [RHO, [1, 0, 0]])
    assert len(several) == 2 and all(torch.equal(several[0][name], on_disk[name]) for name in on_disk)
    live, _ = load_causal_lm(models[0], dtype=torch.bfloat16)
    places = {name: tensor.data_ptr() for name, tensor in live.state_dict().items()}
    for rho in ([1.0, 0.0, 0.0], RHO):
        assert soup.interpolate(live, [models[0], module, models[2]], rho) is live
    assert all(torch.equal(tensor, on_disk[name]) for name, tensor in live.state_dict().items())
    assert places == {name: tensor.data_ptr() for name, tensor in live.state_dict().items()}
    for same in (live, live.state_dict()):
        with pytest.raises(UserError, match="none of others may share its tensors"):
            soup.interpolate(live, [same, models[1]], [0.5, 0.5])
    with pytest.raises(UserError, match="has shape"):
        soup.interpolate(torch.nn.Linear(2, 3), [{"weight": torch.ones(3, 3), "bias": torch.ones(3)}], [1.0])
    with pytest.raises(UserError, match="bias is in model 0 and not in model 1"):
        soup.mix([torch.nn.Linear(2, 3), torch.nn.Linear(2, 3, bias=False)], [0.5, 0.5])


def test_tied_weights_stored_once_or_twice(tmp_path):
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    for i in range(2):
        torch.manual_seed(i)
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / f"m{i}")
    twice = load(tmp_path / "m1")
    assert "lm_head.weight" not in twice
    save_file(
        twice | {"lm_head.weight": twice["model.embed_tokens.weight"].clone()},
        tmp_path / "m1/model.safetensors",
        {"format": "pt"},
    )
    pair = [tmp_path / "m0", tmp_path / "m1"]
    for order in (pair, pair[::-1]):
        out = soup.merge(order, [0.5, 0.5], tmp_path / f"out-{order[0].name}").out
        close(
            load(out),
            {name: tensor for name, tensor in by_hand([tmp_path / "m0"] * 2, [1.0, 0.0], torch.float32).items()}
            | {name: (load(pair[0])[name] + load(pair[1])[name]) / 2 for name in load(pair[0])},
            ulps=4,
        )
    live = transformers.LlamaForCausalLM.from_pretrained(pair[0])
    soup.interpolate(live, pair, [0.5, 0.5])
    assert torch.equal(live.lm_head.weight, load(out)["model.embed_tokens.weight"])
    changed = twice | {"lm_head.weight": twice["model.embed_tokens.weight"] + 1}
    save_file(changed, tmp_path / "m1/model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lm_head.weight is in .*m1 and not in .*m0"):
        soup.merge(pair, [0.5, 0.5], tmp_path / "no")


def changed(model, folder, **tensors):
    """A copy of a model with tensors put in its place (None takes one out)."""
    shutil.copytree(model, folder)
    kept = {name: tensor for name, tensor in (load(model) | tensors).items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_what_does_not_fit_is_refused_before_a_byte_is_written(models, tmp_path):
    out = tmp_path / "out"

    def refused(others, part, weights=None, **options):
        with pytest.raises(UserError) as caught:
            soup.merge(others, weights or [0.5] * len(others), out, **options)
        assert part in str(caught.value) and "\n" not in str(caught.value), caught.value
        assert not out.exists() and not (tmp_path / ".out.soup").exists()

    a = models[0]
    norm = "model.norm.weight"
    refused([a, changed(a, tmp_path / "less", **{norm: None})], f"{norm} is in {a} and not in")
    refused([a, changed(a, tmp_path / "more", extra=torch.ones(2))], "extra is in")
    refused([a, changed(a, tmp_path / "shape", **{norm: torch.ones(31)})], "must have one shape in all models, is [32]")
    refused([a, changed(a, tmp_path / "kind", **{norm: torch.arange(32)})], "is BF16 in")
    i, j = (changed(a, tmp_path / f"int{k}", ids=torch.tensor([1, 2, k])) for k in (3, 4))
    refused([i, j], "ids (I64) must be equal in all models")
    refused([a, changed(a, tmp_path / "lora", **{"x.lora_A.weight": torch.ones(2)})], "a LoRA adapter")
    quantised = changed(a, tmp_path / "quantised")
    config = json.loads((a / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps(config | {"quantization_config": {}}))
    refused([a, quantised], "its weights are quantised")
    other = changed(models[1], tmp_path / "config")
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    refused([a, other], "rms_norm_eps must be the same in all models, is 1e-06 in")
    soup.merge([a, other], [0.5, 0.5], tmp_path / "forced", force=True)
    words = changed(models[1], tmp_path / "words")
    tokenizer = json.loads((a / "tokenizer.json").read_text())
    tokenizer["added_tokens"][0]["content"] = "<padding>"
    (words / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused([a, words], "differs between")
    tokenizer["added_tokens"][0]["content"] = "<pad>"
    tokenizer["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    (words / "tokenizer.json").write_text(json.dumps(tokenizer))
    soup.merge([a, words], [0.5, 0.5], tmp_path / "truncation")

    refused([a, a], "weights must have shape (2,) or (K, 2)", [1.0])
    refused([a, a], "weights must be finite", [float("nan"), 1])
    refused([a, a], "must sum to 1, got 0.9", [0.5, 0.4])
    refused([a, a], "cannot be normalised", [0.5, -0.5], normalize=True)
    refused([a, a], "method must be one of linear, task_arithmetic, slerp, ties,", method="tides")
    refused([a, a], "task_arithmetic needs base", method="task_arithmetic")
    refused([a, a], "linear takes no base", base=a)
    refused([a, a, a], "slerp takes 2 models, got 3", method="slerp")
    refused([a, a], "dtype must be one of", dtype="int8")
    refused([a, a], "memory_limit must be at least", memory_limit=100)
    refused([a] * 129, "at most 128 models")
    refused(str(a), "models must be a list", [1.0])
    refused([tmp_path], "has no config.json", [1.0])


def test_an_output_that_is_there_stays(models, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    soup.merge(models, RHO, out)
    before = files(out)
    again = soup.merge(models, RHO, out)
    assert again.read_bytes == 0 and files(out) == before
    with pytest.raises(UserError, match="exists, and is not this merge"):
        soup.merge(models, [0.2, 0.2, 0.6], out)
    with pytest.raises(UserError, match="is an input, and cannot be the output"):
        soup.merge(models, RHO, models[0])
    assert files(out) == before and not (tmp_path / ".out.soup").exists()


def test_flushing_left_to_the_system(models, tmp_path, monkeypatch):
    """The same bytes and no flush; what may be torn by a power cut is never taken for whole."""
    wanted = files(soup.merge(models, RHO, tmp_path / "flushed", max_shard_size="30kB").out)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: pytest.fail("flushed"))
        result = soup.merge(models, RHO, tmp_path / "out", max_shard_size="30kB", sync=False)
        assert {**wanted, "soup.json": ""} == {**files(result.out), "soup.json": ""}
        assert command(*models, "--weights", "1,0,0", "--no-sync", "--out", tmp_path / "by_command")[0] == 0
    with pytest.raises(UserError, match="is not this merge, finished and flushed"):
        soup.merge(models, RHO, tmp_path / "out", max_shard_size="30kB")

    def stop(*_):
        raise KeyboardInterrupt

    for first, then, resumes in ((True, True, True), (True, False, False), (False, True, False), (False, False, False)):
        out = tmp_path / f"{first}_{then}"
        with monkeypatch.context() as patch:
            patch.setattr("fastalign.soup.sidecar.Sidecar.copy", stop)
            with pytest.raises(KeyboardInterrupt):
                soup.merge(models, RHO, out, max_shard_size="30kB", sync=first)
        result = soup.merge(models, RHO, out, max_shard_size="30kB", sync=then)
        assert (result.resumed > 0) is resumes
        assert {**wanted, "soup.json": ""} == {**files(out), "soup.json": ""}


def test_little_memory_gives_the_same(models, tmp_path):
    a = soup.merge(models, RHO, tmp_path / "a").out
    b = soup.merge(models, RHO, tmp_path / "b", memory_limit="4kB").out
    assert files(a) == files(b)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system has no such call")
def test_much_output_leaves_no_pages_behind_and_little_does(models, tmp_path, monkeypatch):
    from fastalign.soup import outputs

    lines, advise = [], os.posix_fadvise
    monkeypatch.setattr(os, "posix_fadvise", lambda *what: (lines.append(what), advise(*what)))
    soup.merge(models, RHO, tmp_path / "little")
    assert not lines
    monkeypatch.setattr(outputs, "_KEPT", 0)
    soup.merge(models, RHO, tmp_path / "much")
    assert {what[3] for what in lines} == {os.POSIX_FADV_DONTNEED}
    little, much = files(tmp_path / "little"), files(tmp_path / "much")
    assert little.keys() == much.keys() and little["model.safetensors"] == much["model.safetensors"]


def test_a_body_begins_with_a_page_of_the_file(models, tmp_path):
    soup.merge(models, RHO, tmp_path / "out")
    data = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert (8 + int.from_bytes(data[:8], "little")) % 4096 == 0


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Two files of 12 MB, in many tensors."""
    root = tmp_path_factory.mktemp("large")
    paths = [root / f"{i}.safetensors" for i in range(2)]
    for i, path in enumerate(paths):
        torch.manual_seed(i)
        save_file({f"w{j}": torch.randn(25_000) for j in range(120)} | {"ids": torch.arange(9)}, path)
    return paths


@on_its_day("killed: soup")
def test_killed_at_any_moment_and_run_again_it_is_the_same():
    """`python tools/kill_soup.py` kills 200."""
    tool = Path(__file__).parents[2] / "tools" / "kill_soup.py"
    done = subprocess.run([sys.executable, tool, "--kills", "32"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    for seen in result.values():
        assert seen["killed"] == 8 and len(set(seen["shards"])) >= 2, seen
    assert sum(seen["finished"] for seen in result.values()) >= 2
    assert sum(seen["partial"] for seen in result.values()) >= 3


def stopped(models, out, monkeypatch, **options):
    """A merge that is interrupted once its shards are finished; the folder that it leaves."""

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fastalign.soup.sidecar.Sidecar.copy", stop)
        with pytest.raises(KeyboardInterrupt):
            soup.merge(models, options.pop("weights", [0.25, 0.75]), out, max_shard_size="4MB", **options)
    return out.with_name(f".{out.name}.soup")


def test_what_another_merge_left_is_not_taken_over(large, tmp_path, monkeypatch):
    out = tmp_path / "out"
    wanted = files(soup.merge(large, [0.25, 0.75], tmp_path / "whole", max_shard_size="4MB").out)
    beside = stopped(large, out, monkeypatch, weights=[0.5, 0.5])
    assert list(beside.glob("*.safetensors"))
    result = soup.merge(large, [0.25, 0.75], out, max_shard_size="4MB")
    assert result.resumed == 0 and files(out) == wanted and not beside.exists()


def test_a_finished_shard_is_known_again_by_its_bytes(large, tmp_path, monkeypatch):
    """One of the right size and header whose last byte is another is made anew; so is an output told from one that
    was changed."""
    out = tmp_path / "out"
    wanted = files(soup.merge(large, [0.25, 0.75], tmp_path / "whole", max_shard_size="4MB").out)

    def spoil(path, at):
        with open(path, "r+b") as file:
            file.seek(at, os.SEEK_END)
            byte = file.read(1)[0]
            file.seek(at, os.SEEK_END)
            file.write(bytes([byte ^ 1]))

    for at in (-1, -100_001):
        beside = stopped(large, out, monkeypatch)
        spoil(max(beside.glob("*.safetensors")), at)
        result = soup.merge(large, [0.25, 0.75], out, max_shard_size="4MB")
        assert result.resumed == len(list(out.glob("*.safetensors"))) - 1 and files(out) == wanted
        if at == -1:
            shutil.rmtree(out)
    spoil(max(out.glob("*.safetensors")), -1)
    with pytest.raises(UserError, match="exists, and is not this merge"):
        soup.merge(large, [0.25, 0.75], out, max_shard_size="4MB")


def test_inputs_are_known_by_their_bytes_and_not_by_where_they_lie(large, tmp_path, monkeypatch):
    """Others under the same path, of one size and time: begun anew. The same in another place: gone on with."""
    paths = [shutil.copy2(path, tmp_path / path.name) for path in large]
    out = tmp_path / "out"
    stopped(paths, out, monkeypatch)
    (tmp_path / "moved").mkdir()
    moved = [path.rename(tmp_path / "moved" / path.name) for path in paths]
    assert soup.merge(moved, [0.25, 0.75], out, max_shard_size="4MB").resumed > 0
    shutil.rmtree(out)
    stopped(moved, out, monkeypatch)
    times = moved[0].stat()
    shutil.copy(moved[1], moved[0])
    os.utime(moved[0], ns=(times.st_atime_ns, times.st_mtime_ns))
    assert soup.merge(moved, [0.25, 0.75], out, max_shard_size="4MB").resumed == 0


@pytest.mark.parametrize("way", ["folder", "link", "file", "link inside", "mark of another"])
def test_what_no_merge_made_stays(large, tmp_path, way):
    """A folder, link or file where a merge keeps its work is neither emptied nor followed; one line says so, before
    any work."""
    beside, home = tmp_path / ".out.soup", tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("precious")
    kept = home
    if way == "link":
        beside.symlink_to(home)
    elif way == "file":
        beside.write_text("precious")
    else:
        shutil.copytree(home, kept := beside)
    if way == "link inside":
        (beside / MARK).symlink_to(home / "thesis.txt")
    elif way == "mark of another":
        (beside / MARK).write_text('{"kind": "other"}\n')
    with pytest.raises(UserError, match="move it or choose another output") as caught:
        soup.merge(large, [0.5, 0.5], tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    assert (kept / "thesis.txt").read_text() == (home / "thesis.txt").read_text() == "precious"


def test_what_lies_among_a_merges_files_stays(large, tmp_path, monkeypatch):
    """A ledger that names files elsewhere removes nothing; a file that no merge made is told, not carried into the
    output."""
    out = tmp_path / "out"
    beside = stopped(large, out, monkeypatch)
    (tmp_path / "thesis.txt").write_text("precious")
    with open(beside / MARK, "a") as mark:
        mark.write(
            '{"file": "../thesis.txt"}\n{"file": "'
            + str(tmp_path / "thesis.txt")
            + '"}\n{"file": "a/../../thesis.txt"}\n'
        )
    (beside / "mine.txt").write_text("precious")
    for weights in ([0.25, 0.75], [0.5, 0.5]):
        with pytest.raises(UserError, match=r"mine.txt: is in the way of .* and was not made by a merge: move it away"):
            soup.merge(large, weights, out, max_shard_size="4MB")
    assert (tmp_path / "thesis.txt").read_text() == (beside / "mine.txt").read_text() == "precious"
    (beside / "mine.txt").unlink()
    soup.merge(large, [0.5, 0.5], out, max_shard_size="4MB")
    assert not (out / MARK).exists() and (tmp_path / "thesis.txt").exists()


def test_an_output_that_is_a_link_or_the_current_folder(large, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere" / "soup")
    soup.merge(large, [0.5, 0.5], tmp_path / "out")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "elsewhere" / "soup" / "model.safetensors").is_file()
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")
    for here in (".", "..", "", "../below"):
        code, _, stderr = command(*large, "--weights", "0.5,0.5", "--out", here)
        assert code == 1 and stderr.count("\n") == 1 and "out must be a new folder" in stderr, stderr


def test_two_merges_into_one_folder_do_not_meet(large, tmp_path):
    import fcntl

    beside = tmp_path / ".out.soup"
    beside.mkdir()
    kept = os.open(beside, os.O_RDONLY)
    fcntl.flock(kept, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another merge is writing it"):
        soup.merge(large, [0.5, 0.5], tmp_path / "out")
    os.close(kept)
    soup.merge(large, [0.5, 0.5], tmp_path / "out")


MEMORY = """
import sys
from fastalign import soup

def peak_kb():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))

small, large, adapter, out = sys.argv[1:]
soup.merge([small, small], [0.5, 0.5], out + "/small", show_progress=False)
soup.mix([small, small], [0.5, 0.5])
soup.apply_adapters(small, [adapter + "-small"], [0.5], out + "/small-lora", show_progress=False)
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark begins anew
before = peak_kb()
for method in ("linear", "slerp"):
    soup.merge([large, large], [0.5, 0.5], out + "/" + method, method=method, memory_limit="2MB", show_progress=False)
soup.apply_adapters(large, [adapter], [0.5], out + "/lora", memory_limit="2MB", show_progress=False)
print(peak_kb() - before)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's high-water mark")
def test_memory_does_not_grow_with_the_model(tmp_path):
    """One tensor of 48 MB: neither it nor a shard is ever held."""
    for name, rows in (("small", 10), ("large", 12_000)):
        save_file({"w.weight": torch.randn(1, 1000).repeat(rows, 1)}, tmp_path / f"{name}.safetensors")
        factors = {"w": (torch.ones(2, 1000), torch.ones(rows, 2), False)}
        write_adapter(tmp_path / ("adapter-small" if name == "small" else "adapter"), factors, {}, {})
    command = [sys.executable, "-c", MEMORY, *(tmp_path / f"{name}.safetensors" for name in ("small", "large"))]
    command += [tmp_path / "adapter", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 8_000


MANY = """
import resource, sys
from fastalign import soup
out, *models = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 400))
soup.merge(models, soup.simplex_grid(2, 101), out, show_progress=False)
try:
    soup.merge(models, soup.simplex_grid(2, 501), out + "2", show_progress=False)
except ValueError as error:
    print(error)
"""


def test_more_outputs_than_files_that_may_be_open(models, tmp_path):
    command = [sys.executable, "-c", MANY, tmp_path / "out", *models[:2]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("this merge has 503 files open at once, the system allows 400")
    middle = load(tmp_path / "out" / "50")
    close(middle, by_hand(models[:2], [0.5, 0.5]))
    assert not (tmp_path / "out2").exists()


FULL = """
import resource, sys
from fastalign import soup
from fastalign.soup import checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, 5_000_000))
try:
    soup.merge(sys.argv[2:], [0.5, 0.5], sys.argv[1], max_shard_size="4MB", show_progress=False)
    soup.merge(sys.argv[2:], [0.5, 0.5], sys.argv[1] + "2", max_shard_size="7MB", show_progress=False)
except OSError as error:
    print(error.errno, error.filename)
"""


def test_a_disk_that_takes_no_more(large, tmp_path, monkeypatch):
    """A file-size limit stands for the full disk: the error names the file, inputs and finished outputs stay whole."""
    before = [path.read_bytes() for path in large]
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(out), *map(str, large)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["27", str(tmp_path / ".out2.soup" / "model-00001-of-00002.safetensors.partial")]
    assert [path.read_bytes() for path in large] == before
    assert len(load(out)) == 121 and not (tmp_path / "out2").exists()
    assert not list(tmp_path.rglob("*.partial"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(UserError, match=r"needs 12.0 MB, the disk has 1 B free"):
        soup.merge(large, [0.5, 0.5], tmp_path / "out3")


NO_SPACE = """
import errno, shutil, subprocess, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from fastalign import soup
from fastalign.soup.lora.made import write_adapter

def files(folder):
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

disk = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=7500k", "none", disk], check=True)
for i in range(2):
    save_file({f"l{j}.weight": torch.randn(100, 100) for j in range(40)}, disk / f"{i}.safetensors")
write_adapter(disk / "adapter", {"l0": (torch.randn(2, 100), torch.randn(100, 2), False)}, {}, {})
wide = {f"l{j}": (torch.randn(100, 100), torch.randn(100, 100), False) for j in range(2)}
write_adapter(disk / "wide", wide, {}, {})
models = sorted(disk.glob("*.safetensors"))
soup.merge(models, [0.5, 0.5], disk / "done", show_progress=False)
kept = files(disk)
sys.modules["fastalign.soup.outputs"].Outputs.check_space = lambda _: None  # the disk fills after the check
for call in (
    lambda out: soup.merge(models, [[0.5, 0.5], [1, 0]], out, max_shard_size="500kB", show_progress=False),
    lambda out: soup.apply_adapters(
        models[0], [disk / "adapter"], [[1], [2]], out, max_shard_size="500kB", show_progress=False
    ),
    lambda out: soup.merge_adapters([disk / "wide"] * 2, [[1, 1]] * 12, out, show_progress=False),
):
    try:
        call(disk / "new")
    except OSError as error:
        assert error.errno == errno.ENOSPC and Path(error.filename).is_relative_to(disk), error
    assert not (disk / "new").exists() and not list(disk.rglob("*.partial"))
    now = files(disk)
    assert all(now[name] == data for name, data in kept.items())
    left = [name for name in now if name not in kept]
    assert all("/.new.soup/" in name for name in left), left
    if left:  # with room again the same call goes on
        shutil.rmtree(disk / "done")
        print("went on after", call(disk / "new").resumed)
        shutil.rmtree(disk / "new")
        soup.merge(models, [0.5, 0.5], disk / "done", show_progress=False)
"""


def test_a_disk_that_is_full(tmp_path):
    """A real one of 7.5 MB, in memory: inputs and finished outputs stay, nothing half-written has a name, and it goes
    on."""
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*namespace, "true"], capture_output=True).returncode:
        pytest.skip("needs a mount namespace")
    done = subprocess.run([*namespace, sys.executable, "-c", NO_SPACE, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)


def test_an_input_that_changes_or_ends_meanwhile(large, tmp_path):
    from fastalign.soup import plan

    paths = [shutil.copy(path, tmp_path / path.name) for path in large]
    made = plan.make(paths, [0.5, 0.5], tmp_path / "out")
    os.truncate(paths[1], 5_000_000)
    with pytest.raises(OSError, match="ended while it was read") as caught:
        soup.execute(made)
    assert caught.value.filename == str(paths[1])
    shutil.copy(large[1], paths[1])
    os.utime(paths[1], ns=(1, 1))
    with pytest.raises(UserError, match=r"1.safetensors: changed while it was read"):
        soup.execute(made)
    assert not (tmp_path / "out").exists() and not list((tmp_path / ".out.soup").glob("*.safetensors"))


def command(*arguments):
    result = CliRunner().invoke(app, ["soup", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_the_command(models, tmp_path):
    out = tmp_path / "out"
    code, stdout, err = command(*models, "--grid", 3, "--out", out, "--dry-run")
    assert code == 0 and "6 models by linear, 21 tensors" in stdout and "dry run" in stdout and not out.exists(), err
    code, stdout, err = command(*models, "--weights", "0.5,0.3,0.2", "--out", out)
    assert code == 0 and "GB/s" in stdout, err
    close(load(out), by_hand(models, RHO))
    assert "already there" in command(*models, "--weights", "0.5,0.3,0.2", "--out", out)[1]
    code, _, err = command(*models, "--weights", "5,3,2", "--normalize", "--dtype", "fp32", "--out", tmp_path / "b")
    assert code == 0 and load(tmp_path / "b")["lm_head.weight"].dtype == torch.float32, err
    assert json.loads((tmp_path / "b" / "config.json").read_text())["dtype"] == "float32"
    for arguments, part in (
        ([], "give --weights, one for each model, or --grid"),
        (["--weights", "a,b,c"], "weights must be numbers"),
        (["--weights", "1,0,0"], "exists, and is not this merge"),
        (["--grid", "1"], "grid must be at least 2"),
        (["--grid", "900"], "at most 10,000 are made"),
        (["--weights", "1,0,0", "--memory-limit", "lots"], "--memory-limit must be a size"),
    ):
        code, _, err = command(*models, *arguments, "--out", out)
        assert code == 1 and part in err and err.count("\n") == 1, err


def test_merges_of_files_do_without_torch(models, tmp_path):
    code = f"""
import sys
from fastalign.cli.main import main
models, out = {[str(model) for model in models]!r}, {str(tmp_path)!r}
for i, more in enumerate((["--weights", "0.5,0.3,0.2"], ["--method", "karcher", "--dtype", "float16"],
                          ["--method", "ties", "--base", models[0], "--weights", "1,1,1"])):
    sys.argv = ["fastalign", "soup", *models, *more, "--out", f"{{out}}/{{i}}"]
    try:
        main()
    except SystemExit as end:
        assert end.code == 0, end.code
print(*(name for name in ("torch", "transformers") if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "", done.stderr
    close(load(tmp_path / "0"), by_hand(models, RHO))
