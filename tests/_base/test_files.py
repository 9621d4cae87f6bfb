"""Files are written whole or not at all, and only files are written over; what a model is by content."""

import errno
import json
import os
import resource
import shutil
import socket
import stat

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from fastalign import soup
from fastalign._base import fingerprint
from fastalign._base.errors import UserError
from fastalign._base.files import atomic_write, write_json
from fastalign.cli.main import app
from fastalign.decode import Candidates
from fastalign.jobs import align as pipeline
from tests.tiny import tiny_folder


def fifo(path):
    os.mkfifo(path)


def local_socket(path):
    with socket.socket(socket.AF_UNIX) as caught:
        caught.bind(os.path.relpath(path))


def device(path):
    try:
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("needs root")


def folder(path):
    path.mkdir()
    (path / "inside").write_text("precious")


def link_to_folder(path):
    folder(path.with_name("real"))
    path.symlink_to(path.with_name("real"))


@pytest.mark.parametrize("make", [fifo, local_socket, device, folder, link_to_folder])
def test_what_is_no_file_is_not_written_over(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # sockets' names are short
    path = tmp_path / "out"
    make(path)
    before = os.lstat(path)
    with pytest.raises(UserError, match=f"^{path}: must be a file or absent, it is a ") as caught:
        write_json(path, {})
    assert "\n" not in str(caught.value) and os.lstat(path) == before and not list(tmp_path.glob(".*"))


def test_an_empty_folder_is_no_file_either(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="it is a folder"):
        write_json(tmp_path / "out", {})
    with atomic_write(tmp_path / "out") as beside:  # a folder may become it
        beside.mkdir()
        (beside / "a").write_text("a")
    assert (tmp_path / "out" / "a").is_file()


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_stays_and_what_it_leads_to_is_written(exists, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    real, link, second = tmp_path / "elsewhere" / "real.json", tmp_path / "link.json", tmp_path / "second.json"
    if exists:
        real.write_text("old")
    link.symlink_to("elsewhere/real.json")
    second.symlink_to(link)
    write_json(second, {"new": 1})
    assert second.is_symlink() and link.is_symlink() and json.loads(real.read_text()) == {"new": 1}
    assert {path.name for path in tmp_path.rglob("*")} == {"elsewhere", "real.json", "link.json", "second.json"}


@pytest.mark.parametrize("mode", [0o600, 0o664, 0o755, 0o444])
def test_a_files_permissions_stay(mode, tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    path.chmod(mode)
    write_json(path, {})
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_disk_that_takes_no_more_is_reported_with_the_files_name(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    path = tmp_path / "a.json"
    path.write_text("old")
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            write_json(path, {"a": "x" * 100_000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(path))
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_an_error_about_another_file_keeps_its_name(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, atomic_write(tmp_path / "a") as beside:
        beside.write_bytes((tmp_path / "other").read_bytes())
    assert caught.value.filename == str(tmp_path / "other")


# ---- what lies in a model's folder ----


def model(folder, **files):
    folder.mkdir(parents=True)
    save_file({"w": torch.ones(4)}, folder / "model.safetensors")
    for name, text in {"config.json": '{"model_type": "llama"}', **files}.items():
        (folder / name).write_text(text)
    return folder


def merge_of(*models, **options):
    return soup.merge(models, [1 / len(models)] * len(models), models[0].parent / "out", show_progress=False, **options)


@pytest.mark.parametrize("make", [fifo, device, local_socket])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
)
def test_what_is_no_file_in_a_models_folder_is_not_opened(make, name, tmp_path, monkeypatch):
    """A FIFO would wait for ever, a device may never end: refused in one line, or, where the file may be missing, not
    taken."""
    monkeypatch.chdir(tmp_path)
    one = model(tmp_path / "m")
    (one / name).unlink(missing_ok=True)
    make(one / name)
    if name == "model.safetensors":
        for given in (one, one / name):
            with pytest.raises((UserError, OSError)) as caught:
                soup.merge([given], [1.0], tmp_path / "out", show_progress=False)
            assert "\n" not in str(caught.value) and str(one) in str(caught.value)
    else:
        merge_of(one)
        assert not (tmp_path / "out" / name).exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json"])
def test_a_link_out_of_the_folder_is_not_copied(name, tmp_path):
    one = model(tmp_path / "m")
    (tmp_path / "secret").write_text("{}")
    (one / name).unlink(missing_ok=True)
    (one / name).symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match=f"{name}: links to .*secret, outside its folder"):
        merge_of(one)
    assert not (tmp_path / "out").exists()
    (one / name).unlink()
    (one / "inside").write_text("{}")
    (one / name).symlink_to("inside")
    merge_of(one)
    assert (tmp_path / "out" / name).read_text().startswith("{") and not (tmp_path / "out" / name).is_symlink()


def test_snapshots_of_the_hubs_cache_link_to_their_blobs(tmp_path):
    home = tmp_path / "models--some--model"
    one = model(home / "snapshots" / "c0ffee")
    (home / "blobs").mkdir()
    for i, path in enumerate(sorted(one.iterdir())):
        path.rename(home / "blobs" / str(i))
        path.symlink_to(f"../../blobs/{i}")
    soup.merge([one], [1.0], tmp_path / "out", show_progress=False)
    assert (tmp_path / "out" / "config.json").is_file()
    (one / "config.json").unlink()
    (tmp_path / "secret").write_text("{}")
    (one / "config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="outside its folder"):
        soup.merge([one], [1.0], tmp_path / "again", show_progress=False)


def test_json_that_is_nested_deeply_is_one_line(tmp_path):
    one = model(tmp_path / "m", **{"config.json": '{"a":' * 100_000 + "1" + "}" * 100_000})
    with pytest.raises(UserError, match=r"config.json: nested too deep to be read as JSON") as caught:
        merge_of(one)
    assert "\n" not in str(caught.value)


def test_escape_sequences_of_names_are_shown_written_out(tmp_path):
    evil = "\x1b]0;title\x07\x1b[2J\u202e"
    one, two = model(tmp_path / "m"), tmp_path / f"n{evil}"
    shutil.copytree(one, two)
    save_file({"w": torch.ones(4), f"x{evil}": torch.ones(2)}, two / "model.safetensors")
    for others in (["--weights", "0.5,0.5"], ["--weights", "1,nan"]):
        done = CliRunner().invoke(app, ["soup", str(one), str(two), *others, "--out", str(tmp_path / "out")])
        assert done.exit_code == 1 and all(c.isprintable() or c == "\n" for c in done.output), repr(done.output)
    done = CliRunner().invoke(app, ["soup", str(two), "--weights", "1", "--dry-run", "--out", str(tmp_path / "out")])
    assert done.exit_code == 0 and r"\x1b]0;title\x07" in done.output
    assert all(c.isprintable() or c == "\n" for c in done.output)
    assert "\x1b" not in str(UserError(f"{evil} is no name")) and str(UserError("ρ ≤ é")) == "ρ ≤ é"


# ---- what a model is by content ----


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    tiny_folder(root / "a")
    tiny_folder(root / "b", seed=5)
    return root


def test_a_models_content_is_its_weights_configuration_and_tokenizer(models, tmp_path):
    here = tmp_path / "m"
    shutil.copytree(models / "a", here)
    was = fingerprint.of_model(here)
    assert was == fingerprint.of_model(models / "a") == fingerprint.of_model(f"vllm:{here}")
    (here / "README.md").write_text("of no weight")
    assert fingerprint.of_model(here) == was
    for name in ("config.json", "tokenizer.json", "model.safetensors", "generation_config.json", "chat_template.jinja"):
        before = (here / name).read_bytes() if (here / name).is_file() else None
        (here / name).write_bytes((before or b"{}")[:-2] + b" \n")
        assert fingerprint.of_model(here) != was, name
        (here / name).unlink() if before is None else (here / name).write_bytes(before)
    assert fingerprint.of_model(here) == was


def test_large_weights_count_by_a_part_that_no_tensor_escapes(tmp_path):
    """Any of 12 tensors changed as a whole, in a file too large to be read whole."""
    tensors = {f"w{i}": torch.randn(200_000) for i in range(12)}
    save_file(tensors, tmp_path / "a.safetensors")
    was = fingerprint.of_weights(tmp_path / "a.safetensors")
    for name in tensors:
        save_file(tensors | {name: tensors[name] + 1}, tmp_path / "b.safetensors")
        assert fingerprint.of_weights(tmp_path / "b.safetensors") != was


def test_an_adapters_base_counts(models, tmp_path):
    shutil.copytree(models / "a", tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "base")}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    was = fingerprint.of_model(tmp_path / "adapter")
    shutil.copy(models / "b" / "model.safetensors", tmp_path / "base")
    assert fingerprint.of_model(tmp_path / "adapter") != was


def test_a_model_of_the_hub_is_its_name_and_commit(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--some--model" / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text("c0ffee")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert fingerprint.of_model("some/other") == "some/other@"
    assert fingerprint.of_model("http://host:80/v1#some/model") == "http://host:80/v1#some/model@"
    import huggingface_hub

    result = huggingface_hub.try_to_load_from_cache("some/model", "config.json", cache_dir=tmp_path)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: result)
    assert fingerprint.of_model("some/model") == "some/model@c0ffee"


# ---- the work folder of `sample` ----

OPTIONS = {"n": 4, "max_new_tokens": 8, "seed": 0}
PROMPTS = [f"the cat {i}" for i in range(16)]


def interrupted(model, out, monkeypatch, **options):
    """A run that stops after some batches; its work folder."""
    to_parquet = Candidates.to_parquet
    left = iter(range(3))

    def stop(self, path):
        to_parquet(self, path)
        if next(left) == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Candidates, "to_parquet", stop)
        with pytest.raises(KeyboardInterrupt):
            pipeline.sample(str(model), PROMPTS, out, **OPTIONS, **options)
    return out.with_name(out.name + ".parts")


def test_parts_of_another_model_under_the_same_path_are_refused(models, tmp_path, monkeypatch):
    here, out = tmp_path / "m", tmp_path / "out.parquet"
    shutil.copytree(models / "a", here)
    parts = interrupted(here, out, monkeypatch)
    assert list(parts.glob("part-*"))
    shutil.copy(models / "b" / "model.safetensors", here)
    with pytest.raises(UserError, match=f"^{parts} was made with a model or reward whose files have changed since"):
        pipeline.sample(str(here), PROMPTS, out, resume=True, **OPTIONS)
    moved = here.rename(tmp_path / "moved")  # the same model in another place is the same model
    shutil.copy(models / "a" / "model.safetensors", moved)
    result = pipeline.sample(str(moved), PROMPTS, out, resume=True, **OPTIONS)
    assert result.texts == pipeline.sample(str(models / "a"), PROMPTS, tmp_path / "new.parquet", **OPTIONS).texts
    assert not parts.exists()
    shutil.copy(models / "b" / "model.safetensors", moved)
    with pytest.raises(UserError, match="files have changed"):  # finished, and of the other one
        pipeline.sample(str(moved), PROMPTS, out, resume=True, **OPTIONS)


def test_only_our_parts_are_removed_and_a_changed_one_is_drawn_again(models, tmp_path, monkeypatch):
    out = tmp_path / "out.parquet"
    parts = interrupted(models / "a", out, monkeypatch)
    (parts / "mine.txt").write_text("precious")
    (parts / "part-mine.parquet").write_text("precious")
    first = min(parts.glob("part-0*"))
    first.write_bytes(first.read_bytes()[:-1] + b"?")
    result = pipeline.sample(str(models / "a"), PROMPTS, out, resume=True, **OPTIONS)
    assert result.texts == pipeline.sample(str(models / "a"), PROMPTS, tmp_path / "new.parquet", **OPTIONS).texts
    assert {path.name for path in parts.iterdir()} == {"mine.txt", "part-mine.parquet"}
    with pytest.raises(UserError, match="is not fastalign's: move it"):
        pipeline.sample(str(models / "a"), PROMPTS, out, overwrite=True, **OPTIONS)


def test_two_runs_into_one_output_and_an_output_that_is_a_folder(models, tmp_path, monkeypatch):
    out = tmp_path / "out.parquet"

    class Sampler:
        def iter_batches(self, *_, **__):
            with pytest.raises(UserError, match=f"^{out}: another run is writing it$"):
                pipeline.sample(str(models / "a"), PROMPTS, out, **OPTIONS)
            raise KeyboardInterrupt

    model = pipeline.Model(str(models / "a"))
    model.sampler = Sampler()
    with pytest.raises(KeyboardInterrupt):
        pipeline.sample(model, PROMPTS, out, **OPTIONS)
    assert not list(tmp_path.iterdir())  # nothing was made, nothing stays
    out.mkdir()
    model.sampler = None
    with pytest.raises(UserError, match="must be a file or absent, it is a folder"):
        pipeline.sample(model, PROMPTS, out, **OPTIONS)


def test_every_step_looks_at_its_output_before_it_works(tmp_path):
    """None of the inputs is there: an output that is a folder is told first."""
    (tmp_path / "out").mkdir()
    none, out = tmp_path / "none", tmp_path / "out"
    for step in (
        lambda: pipeline.score(none, ["positive"], out),
        lambda: pipeline.solve_palette(none, out, quantile=0.5),
        lambda: pipeline.select(none, none, out, seed=0),
        lambda: pipeline.evaluate_grid(none, "x=1", out),
        lambda: pipeline.evaluate(none, none, none, out),
    ):
        with pytest.raises(UserError, match="must be a file or absent, it is a folder"):
            step()
