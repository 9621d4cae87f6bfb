"""Safetensors files as they are and as they must not be: what breaks the format is refused with one line, never
read."""

import json
import random
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from fastalign._base.errors import UserError
from fastalign.soup import open_checkpoint
from fastalign.soup.checkpoint import INDEX, MAX_HEADER, lay_out, read_header

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import fuzz_soup


def good(path):
    tensors = {
        "a.weight": torch.randn(3, 5),
        "b": torch.randn(7).half(),
        "ids": torch.arange(4),
        "none": torch.empty(0, 4),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    return tensors


def write(path, header, body=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)
    return path


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def refused(path, part):
    with pytest.raises(UserError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert part in message and "\n" not in message and len(message) < 600, message


def test_a_file_is_read_as_safetensors_reads_it(tmp_path):
    path = tmp_path / "m.safetensors"
    tensors = good(path)
    result = read_header(path)
    assert result.metadata == {"format": "pt"} and set(result.tensors) == set(tensors)
    data = path.read_bytes()
    for name, tensor in tensors.items():
        where = result.tensors[name]
        assert where.shape == tuple(tensor.shape) and where.numel == tensor.numel()
        kept = data[where.offset : where.offset + where.nbytes]
        assert kept == tensor.numpy().tobytes()


BROKEN = {
    "nested": (b'{"a":' + b"[" * 200_000, "nested too deeply"),
    "duplicate": (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{}}', "'a' twice"),
    "duplicate inside": (b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', "'dtype' twice"),
    "no object": (b"[1, 2]", "does not begin with '{'"),
    "not JSON": (b'{"a": nope}', "not JSON"),
    "not UTF-8": (b'{"\xff": 1}', "not JSON in UTF-8"),
    "half a character": (b'{"\\ud800": {}}', "not JSON in UTF-8"),
    "NaN": (b'{"a": NaN}', "holds NaN"),
    "long number": (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
    "metadata": ({"__metadata__": {"x": 1}, "a": entry()}, "__metadata__ must map strings to strings"),
    "no entry": ({"a": 1}, "must have dtype, shape and data_offsets"),
    "more": ({"a": entry() | {"x": 1}}, "and nothing else"),
    "dtype": ({"a": entry(dtype="F31")}, "has dtype 'F31'"),
    "dtype no string": ({"a": entry(dtype=[1])}, "has dtype [1]"),
    "negative": ({"a": entry(shape=[-1])}, "has shape [-1]"),
    "fraction": ({"a": entry(shape=[1.0])}, "has shape [1.0]"),
    "bool": ({"a": entry(shape=[True])}, "has shape [True]"),
    "dimensions": ({"a": entry(shape=[1] * 65)}, "at most 64 counts"),
    "one offset": ({"a": entry(offsets=[0])}, "two byte positions"),
    "backwards": ({"a": entry(offsets=[4, 0])}, "lies at bytes 4 to 0"),
    "beyond": ({"a": entry(shape=[2**40], offsets=[0, 2**42])}, "of 4"),
    "absurd": ({"a": entry(shape=[2**62, 2**62, 2**62])}, "takes"),
    "wrong length": ({"a": entry(shape=[2])}, "takes 8 bytes as F32 of shape [2], has 4"),
    "gap": ({"a": entry("U8", [1], [0, 1]), "b": entry("U8", [2], [2, 4])}, "'b' leaves a gap after 'a'"),
    "overlap": ({"a": entry("U8", [3], [0, 3]), "b": entry("U8", [2], [2, 4])}, "'b' overlaps 'a'"),
    "late": ({"a": entry("U8", [3], [1, 4])}, "leaves a gap after the header"),
    "trailing": ({"a": entry("U8", [3], [0, 3])}, "1 bytes follow"),
    "empty": ({}, "4 bytes follow"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_breaks_the_rules_is_named(tmp_path, case):
    header, part = BROKEN[case]
    refused(write(tmp_path / "m.safetensors", header, b"\0" * 4), part)


def test_lengths_of_the_header(tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"1234")
    refused(path, "has 4 bytes")
    refused(write(path, {}, length=2**63), "the format allows 100,000,000")
    refused(write(path, {}, length=MAX_HEADER), "the file has 2")
    refused(write(path, {}), "contains no tensors")
    with pytest.raises(FileNotFoundError):
        open_checkpoint(tmp_path / "absent.safetensors")


def test_ten_thousand_mutated_headers(tmp_path):
    """Each is refused with a line or reads as something whose every byte lies in the file; what safetensors refuses
    is refused."""
    data, draw = fuzz_soup.good(), random.Random(0)
    valid = refusals = 0
    for number in range(10_000):
        kept = fuzz_soup.mutated(data, draw)
        mutated = tmp_path / f"{number}.safetensors"
        mutated.write_bytes(kept)
        try:
            result = open_checkpoint(mutated)
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 900
            refusals += 1
        else:
            assert all(8 <= result[name].offset <= len(kept) - result[name].nbytes for name in result)
            with safe_open(mutated, "pt") as theirs:
                assert set(theirs.keys()) == set(result)
            valid += 1
        mutated.unlink()
    assert valid > 1000 and refusals > 5000


def test_mutated_files_are_merged_or_refused(tmp_path):
    """A few of what `python tools/fuzz_soup.py` does ten thousand times under AddressSanitizer."""
    result = fuzz_soup.fuzz(400, 1, tmp_path)
    assert (
        result["merged"] > 20 and result["refused later"] > 5 and result["refused"] > 200 and result.total() == 400
    ), result


def sharded(folder):
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, folder / "x-1.safetensors")
    save_file({"c": torch.ones(4)}, folder / "x-2.safetensors")
    index = {
        "metadata": {"total_size": 36},
        "weight_map": {"a": "x-1.safetensors", "b": "x-1.safetensors", "c": "x-2.safetensors"},
    }
    (folder / INDEX).write_text(json.dumps(index))
    return index["weight_map"]


def test_an_index_must_agree_with_its_files(tmp_path):
    kept = sharded(tmp_path)
    result = open_checkpoint(tmp_path)
    assert list(result) == ["a", "b", "c"] and result.nbytes == 36

    def with_map(change):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": change}))
        return tmp_path

    refused(with_map(kept | {"d": "x-2.safetensors"}), "names 'd', which no file holds")
    refused(with_map({name: file for name, file in kept.items() if name != "b"}), "lacks 'b', which a file holds")
    refused(with_map(kept | {"c": "x-1.safetensors"} | {"b": "x-2.safetensors"}), "looks for 'b' in x-2.safetensors")
    refused(with_map({}), "weight_map must map")
    refused(with_map([1]), "weight_map must map")
    for escape in (
        "../x-1.safetensors",
        "/x-1.safetensors",
        "a/../x-1.safetensors",
        "x-1.bin",
        "..",
        "..\\x.safetensors",
    ):
        refused(with_map(kept | {"c": escape}), "is not the name of a *.safetensors file beside it")
    with pytest.raises(FileNotFoundError, match="x-3"):
        open_checkpoint(with_map(kept | {"c": "x-3.safetensors"}))
    save_file({"c": torch.ones(4), "a": torch.ones(2)}, tmp_path / "x-2.safetensors")
    refused(with_map(kept), "tensor 'a' is in x-1.safetensors and x-2.safetensors")
    good(tmp_path / "model.safetensors")
    assert set(open_checkpoint(tmp_path)) == {"a.weight", "b", "ids", "none"}
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / INDEX).unlink()
    refused(tmp_path, "has 2 *.safetensors files and no index")


def test_layouts_fill_shards_and_align_tensors():
    tensors = [("a", "F16", (3,)), ("b", "F64", (2,)), ("c", "U8", (5,)), ("big", "F32", (100,)), ("d", "F32", (2,))]
    shards = lay_out(tensors, 32)
    assert [list(shard.tensors) for shard in shards] == [["b", "a", "c"], ["big"], ["d"]]
    assert shards[0].file == "model-00001-of-00003.safetensors"
    for shard in shards:
        header = shard.header({"format": "pt", "x": "é"})
        assert len(header) % 8 == 0
        for name, dtype, _ in tensors:
            if name in shard.tensors:
                assert shard.tensors[name].offset % {"F16": 2, "F64": 8, "U8": 1, "F32": 4}[dtype] == 0
    assert [shard.file for shard in lay_out(tensors, 10**9)] == ["model.safetensors"]


@pytest.mark.parametrize(
    "before", [b"", b" ", b"\n", b"\t\r\n  ", b"\x0b", b"\x0c", b"\0", b"\xef\xbb\xbf", b"\xc2\xa0"]
)
@pytest.mark.parametrize("after", [b"", b" \n\t\r", b"\0", b"\x0c", b"{}"])
def test_white_space_about_the_header_is_as_the_library_has_it(before, after, tmp_path):
    header = before + json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode() + after
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    try:
        load_file(path)
        taken = True
    except SafetensorError:
        taken = False
    if taken:
        assert read_header(path).tensors["w"].shape == (4,)
    else:
        with pytest.raises(UserError, match="not a valid safetensors file"):
            read_header(path)
