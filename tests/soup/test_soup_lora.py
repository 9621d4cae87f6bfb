"""LoRA adapters: mixed exactly, compressed, merged onto their base and taken out of full models, as peft has them."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_causal_lm, tiny_folder, tiny_tokenizer
from typer.testing import CliRunner

from fastalign import soup
from fastalign._base.errors import UserError
from fastalign.cli.main import app
from fastalign.soup.lora import CONFIG, WEIGHTS, open_adapter

IDS = torch.tensor([[5, 17, 200, 9, 31, 7]])
SETTINGS = [
    dict(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"down_proj": 2},
        alpha_pattern={"0.mlp.down_proj": 3},
    ),
    dict(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"], use_rslora=True),
    dict(r=2, lora_alpha=2, target_modules=["v_proj", "lm_head"]),
]
RHO = [0.7, -0.4, 1.5]


def adapter(base, path, seed, **settings):
    """An adapter with random factors, written by peft."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **settings))
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.2)
    model.save_pretrained(path, save_embedding_layers=settings.pop("save", "auto"))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("base") / "base", scale=1.0)


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return [adapter(base, root / f"a{i}", i, **settings) for i, settings in enumerate(SETTINGS)]


def plain(base):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base)


def merged(base, path, **options):
    """The base's weights with one adapter merged by peft."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, **options)
    return PeftModel.from_pretrained(model, path).merge_and_unload()


def summed(base, adapters, rho):
    """base + Σ ρ (merged_i - base), in float64."""
    before = plain(base).state_dict()
    parts = [merged(base, path).state_dict() for path in adapters]
    return {
        name: x.double() + sum(w * (one[name].double() - x.double()) for w, one in zip(rho, parts, strict=True))
        for name, x in before.items()
    }


def load(folder):
    return {name: x for path in folder.glob("*.safetensors") for name, x in load_file(path).items()}


def test_a_soup_of_adapters_is_the_sum_of_their_updates(base, adapters, tmp_path):
    from peft import PeftModel

    (made,) = soup.merge_adapters(adapters, RHO, tmp_path / "out")
    assert made.ranks == (2, 7) and made.kept == 1.0 and made.modules == 7
    wanted = summed(base, adapters, RHO)
    result = merged(base, tmp_path / "out").state_dict()
    for name, x in wanted.items():
        torch.testing.assert_close(result[name].double(), x, rtol=1e-5, atol=1e-6)
    model = plain(base).double()
    model.load_state_dict(wanted)
    with torch.no_grad():
        direct = PeftModel.from_pretrained(plain(base), tmp_path / "out")(IDS).logits
        torch.testing.assert_close(direct.double(), model(IDS).logits, rtol=1e-4, atol=1e-5)
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert config["task_type"] == "CAUSAL_LM" and config["base_model_name_or_path"] == str(base)
    recorded = json.loads(open_adapter(tmp_path / "out").file.metadata["fastalign"])
    assert recorded["weights"] == RHO and [one["name"] for one in recorded["adapters"]] == ["a0", "a1", "a2"]


def test_many_soups_and_what_weighs_nothing_is_left_out(base, adapters, tmp_path):
    rows = [[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]]
    made = soup.merge_adapters(adapters, rows, tmp_path / "out")
    assert [one.out.name for one in made] == ["0", "1"]
    alone = open_adapter(tmp_path / "out" / "0")
    assert set(alone.factors) == set(open_adapter(adapters[0]).factors)
    theirs, ours = merged(base, adapters[0]).state_dict(), merged(base, tmp_path / "out" / "0").state_dict()
    for name, x in theirs.items():
        torch.testing.assert_close(ours[name], x, rtol=1e-5, atol=1e-6)
    same = soup.merge_adapters([adapters[1]] * 2, [0.5, 0.5], tmp_path / "same")[0]
    assert json.loads((same.out / CONFIG).read_text())["target_modules"] == ["q_proj", "v_proj"]


def test_compressed_it_is_the_best_of_its_rank(base, adapters, tmp_path):
    (made,) = soup.merge_adapters(adapters[:2], [1.0, 0.6], tmp_path / "out", rank=3)
    assert made.ranks == (2, 3)
    before, wanted = plain(base).state_dict(), summed(base, adapters[:2], [1.0, 0.6])
    result = merged(base, tmp_path / "out").state_dict()
    kept = total = 0.0
    shares = {}
    for name, x in wanted.items():
        delta = x - before[name].double()
        if not delta.abs().max() > 1e-6:
            continue
        u, s, v = torch.linalg.svd(delta)
        best = (u[:, :3] * s[:3]) @ v[:3]
        torch.testing.assert_close(result[name].double() - before[name].double(), best, rtol=1e-4, atol=2e-5)
        shares[name.removesuffix(".weight")] = float(s[:3].square().sum() / s.square().sum())
        kept, total = kept + float(s[:3].square().sum()), total + float(s.square().sum())
    assert made.kept == pytest.approx(kept / total, rel=1e-4) and 0.5 < made.kept < 1
    assert made.worst[0] == min(shares, key=shares.get) and made.worst[1] == pytest.approx(
        min(shares.values()), rel=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_onto_the_base_it_is_what_peft_makes(base, adapters, tmp_path, dtype):
    soup.merge([base], [1.0], tmp_path / "base", dtype=dtype, max_shard_size="60kB")
    result = soup.apply_adapters(tmp_path / "base", adapters[:1], [1.0], tmp_path / "one", memory_limit="200kB")
    theirs, ours = merged(tmp_path / "base", adapters[0], dtype=dtype).state_dict(), load(tmp_path / "one")
    assert theirs.keys() == ours.keys() and result.models == 1
    before, factors = load(tmp_path / "base"), open_adapter(adapters[0]).factors
    for name, x in theirs.items():
        assert ours[name].dtype == dtype
        of = factors.get(name.removesuffix(".weight"))
        terms = before[name].double().abs() + (0 if of is None else of.scale * (of.b.abs() @ of.a.abs()).double())
        exact = before[name].double() + (0 if of is None else of.scale * (of.b.double() @ of.a.double()))
        off, theirs_off = (ours[name].double() - exact).abs(), (x.double() - exact).abs()
        ulp = torch.finfo(dtype).eps
        assert (off <= 0.51 * ulp * exact.abs() + 1e-3 * ulp * terms).all() and off.mean() <= theirs_off.mean(), name
        assert ((ours[name].double() - x.double()).abs() <= (2 if dtype == torch.float32 else 1) * ulp * terms).all(), (
            name
        )
    assert sum(not torch.equal(x, before[name]) for name, x in ours.items()) == len(factors)
    several = soup.apply_adapters(tmp_path / "base", adapters, [RHO, [0, 0, 0]], tmp_path / "more", dtype="float32")
    wanted, nothing = summed(tmp_path / "base", adapters, RHO), load(tmp_path / "base")
    for name, x in load(several.out / "0").items():
        torch.testing.assert_close(x.double(), wanted[name], rtol=3e-5 if dtype == torch.float32 else 1e-2, atol=5e-3)
    assert all(torch.equal(x, nothing[name].float()) for name, x in load(several.out / "1").items())
    plain(several.out / "0")
    assert soup.apply_adapters(tmp_path / "base", adapters[:1], [1.0], tmp_path / "one").read_bytes == 0


def test_embeddings_whole_modules_and_biases(tmp_path):
    import transformers

    config = transformers.Qwen2Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(config).save_pretrained(tmp_path / "base")
    base = tmp_path / "base"
    settings = dict(r=2, target_modules=["embed_tokens", "q_proj"], modules_to_save=["lm_head"], bias="lora_only")
    pair = [adapter(base, tmp_path / f"a{i}", i, **settings) for i in range(2)]
    one = soup.apply_adapters(base, pair[:1], [1.0], tmp_path / "one").out
    theirs = merged(base, pair[0]).state_dict()
    for name, x in load(one).items():
        torch.testing.assert_close(x, theirs[name], rtol=1e-6, atol=1e-6)
    assert not torch.equal(theirs["lm_head.weight"], load(base)["lm_head.weight"])
    wanted = summed(base, pair, [0.3, 0.7])
    both = load(soup.apply_adapters(base, pair, [0.3, 0.7], tmp_path / "both").out)
    mixed = merged(base, soup.merge_adapters(pair, [0.3, 0.7], tmp_path / "mixed")[0].out).state_dict()
    for name, x in wanted.items():
        torch.testing.assert_close(both[name].double(), x, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(mixed[name].double(), x, rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match=r"is stored whole .* the weights sum to 1; give base"):
        soup.merge_adapters(pair, [0.3, 0.3], tmp_path / "no")


def test_transposed_weights_of_gpt2(tmp_path):
    base = tiny_folder(tmp_path / "base", kind="gpt2", scale=1.0)
    made = adapter(base, tmp_path / "a", 0, r=2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    theirs = merged(base, made).state_dict()
    ours = load(soup.apply_adapters(base, [made], [1.0], tmp_path / "one").out)
    for name, x in ours.items():
        torch.testing.assert_close(x, theirs[name], rtol=1e-6, atol=1e-6)
    again = merged(base, soup.merge_adapters([made], [1.0], tmp_path / "again")[0].out).state_dict()
    torch.testing.assert_close(again, theirs, rtol=1e-5, atol=1e-6)
    soup.extract_adapter(tmp_path / "one", base, tmp_path / "out", rank=2)
    back = merged(base, tmp_path / "out").state_dict()
    for name, x in theirs.items():
        torch.testing.assert_close(back[name], x, rtol=1e-4, atol=1e-5)


def test_an_adapter_out_of_two_models(base, adapters, tmp_path):
    from peft import PeftModel

    tuned = soup.apply_adapters(base, adapters[:2], [1.0, 1.0], tmp_path / "tuned").out
    result = soup.extract_adapter(tuned, base, tmp_path / "out", rank=7)
    assert result.left_out == [] and result.made.kept > 1 - 1e-6 and result.kept_of_all == result.made.kept
    with torch.no_grad():
        ours = PeftModel.from_pretrained(plain(base), tmp_path / "out")(IDS).logits
        torch.testing.assert_close(ours, plain(tuned)(IDS).logits, rtol=1e-4, atol=1e-4)
    wanted = {name: x - plain(base).state_dict()[name] for name, x in plain(tuned).state_dict().items()}
    less = soup.extract_adapter(tuned, base, tmp_path / "less", energy=0.8)
    assert 0.8 <= less.made.kept < 1 and less.made.worst[1] >= 0.8 - 1e-6
    for module, of in open_adapter(tmp_path / "less").factors.items():
        s = torch.linalg.svdvals(wanted[f"{module}.weight"].double()).square()
        least = int((s.cumsum(0) < 0.8 * s.sum()).sum()) + 1
        assert len(of.a) == least
    only = soup.extract_adapter(tuned, base, tmp_path / "only", rank=2, targets=["v_proj"])
    assert only.made.modules == 2 and len(only.left_out) == 4 and only.kept_of_all < 0.6


def test_a_large_difference_is_found_by_a_random_subspace(tmp_path):
    torch.manual_seed(0)
    old = {"a.weight": torch.randn(700, 600)}
    low = torch.randn(700, 20) @ torch.randn(20, 600)
    new = {"a.weight": old["a.weight"] + low + 0.3 * torch.randn(700, 600)}
    for name, tensors in (("old", old), ("new", new)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    result = soup.extract_adapter(tmp_path / "new.safetensors", tmp_path / "old.safetensors", tmp_path / "out", rank=20)
    s = torch.linalg.svdvals((new["a.weight"] - old["a.weight"]).double()).square()
    best = float(s[:20].sum() / s.sum())
    assert best - 1e-4 < result.made.kept <= best + 1e-6
    of = open_adapter(tmp_path / "out").factors["a"]
    rest = (new["a.weight"] - old["a.weight"] - of.b @ of.a).double().square().sum() / s.sum()
    assert float(rest) == pytest.approx(1 - result.made.kept, rel=1e-3)
    less = soup.extract_adapter(
        tmp_path / "new.safetensors", tmp_path / "old.safetensors", tmp_path / "less", energy=0.5
    )
    assert less.made.ranks == (int((s.cumsum(0) < 0.5 * s.sum()).sum()) + 1,) * 2


def changed(path, folder, drop=(), **config):
    shutil.copytree(path, folder)
    kept = json.loads((folder / CONFIG).read_text()) | config
    (folder / CONFIG).write_text(json.dumps(kept))
    return folder


def test_what_cannot_be_mixed_is_refused_with_one_line(base, adapters, tmp_path):
    a = adapters[0]

    def refused(part, *others, call=soup.merge_adapters, weights=None, error=UserError, **options):
        with pytest.raises(error) as caught:
            call([*others], weights or [0.5] * len(others), tmp_path / "out", **options)
        assert part in str(caught.value) and "\n" not in str(caught.value), caught.value
        assert not (tmp_path / "out").exists()

    refused("averaging A and B separately adds cross terms", a, a, call=soup.merge)
    refused("use_dora is set", changed(a, tmp_path / "dora", use_dora=True))
    refused("changed the base model's weights", changed(a, tmp_path / "pissa", init_lora_weights="pissa_niter_4"))
    refused("must be of peft_type LORA, got 'IA3'", changed(a, tmp_path / "ia3", peft_type="IA3"))
    refused("down_proj must have rank 4", changed(a, tmp_path / "rank", rank_pattern={}))
    refused("not a regular expression", changed(a, tmp_path / "pattern", alpha_pattern={"(": 1}))
    refused("lora_alpha of", changed(a, tmp_path / "alpha", lora_alpha="many", alpha_pattern={}))
    refused("must be of one base model", a, changed(a, tmp_path / "base", base_model_name_or_path="other"))
    refused("not a LoRA adapter", base, error=FileNotFoundError)
    pickled = changed(a, tmp_path / "pickled")
    (pickled / WEIGHTS).rename(pickled / "adapter_model.bin")
    refused("is a pickle, which is not loaded", pickled, error=FileNotFoundError)
    half = changed(a, tmp_path / "half")
    save_file(dict(list(load_file(a / WEIGHTS).items())[1:]), half / WEIGHTS)
    refused("must have one factor A and one B", half)
    cut = changed(a, tmp_path / "cut")
    (cut / WEIGHTS).write_bytes((a / WEIGHTS).read_bytes()[:-1])
    refused("not a valid safetensors file", cut)
    refused("weights must not all be 0", a, weights=[0.0])
    refused("rank must be a whole number", a, rank=0)

    def onto(others, weights, out, of=base):
        return soup.apply_adapters(of, others, weights, out)

    other = tiny_folder(tmp_path / "gpt2", kind="gpt2")
    refused("is it the adapter's base model?", a, call=lambda *x: onto(*x, of=other))
    tied = tmp_path / "tied"
    model = tiny_causal_lm(tiny_tokenizer(), dtype=torch.float32)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tied)
    refused("ties to its other embedding", adapters[2], call=lambda *x: onto(*x, of=tied))
    for options, part in (
        ({}, "give rank, or energy"),
        ({"rank": 0}, "rank must be"),
        ({"energy": 1.5}, "energy must be above 0"),
        ({"rank": 2, "targets": ["nose"]}, "targets must be linear layers of the model (down_proj"),
        ({"rank": 2}, "are equal in all 14 targeted modules"),
    ):
        with pytest.raises(UserError, match=None) as caught:
            soup.extract_adapter(base, base, tmp_path / "out", **options)
        assert part in str(caught.value)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "x").write_text("kept")
    with pytest.raises(UserError, match="contains no adapter made by fastalign"):
        soup.merge_adapters([a], [1.0], tmp_path / "there")
    assert (tmp_path / "there" / "x").read_text() == "kept"


def command(*arguments):
    result = CliRunner().invoke(app, ["soup", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_the_command(base, adapters, tmp_path):
    pair = adapters[:2]
    code, stdout, err = command(*pair, "--weights", "0.5,0.5", "--rank", 3, "--out", tmp_path / "soup")
    assert code == 0 and "of the update" in stdout and open_adapter(tmp_path / "soup"), err
    code, stdout, err = command(*pair, "--grid", 3, "--base", base, "--out", tmp_path / "full")
    assert code == 0 and "3 models" in stdout and len(list((tmp_path / "full").glob("*/model.safetensors"))) == 3, err
    code, stdout, err = command(
        tmp_path / "full" / "1", "--extract", "--base", base, "--rank", 4, "--out", tmp_path / "back"
    )
    assert code == 0 and "kept" in stdout and open_adapter(tmp_path / "back"), err
    for arguments, part in (
        (
            [*pair, "--weights", "1,1", "--method", "slerp"],
            "adapters can be mixed only with --method linear, got slerp",
        ),
        (
            [*pair, "--weights", "1,1", "--base", base, "--method", "slerp"],
            "adapters can be mixed only with --method linear",
        ),
        ([*pair, "--weights", "1,1", "--dry-run"], "--dry-run is for merges that write whole models"),
        ([base, "--extract", "--rank", 4], "--extract takes one model, and --base"),
        ([base, base, "--weights", "0.5,0.5", "--rank", 4], "--rank is for output adapters"),
        ([*pair, base, "--weights", "1,1,1"], "not a LoRA adapter"),
    ):
        code, _, err = command(*arguments, "--out", tmp_path / "no")
        assert code == 1 and part in err and err.count("\n") == 1, err


@pytest.mark.parametrize("job", ["mix", "grid", "extract"])
def test_the_same_command_reuses_its_adapters_and_another_is_refused(base, adapters, tmp_path, job):
    pair, out = [shutil.copytree(one, tmp_path / one.name) for one in adapters[:2]], tmp_path / "out"
    if job == "extract":
        assert command(*pair, "--weights", "1,1", "--base", base, "--out", tmp_path / "tuned")[0] == 0
        pair, given = [tmp_path / "tuned"], ["--extract", "--base", base, "--rank", 2]
    else:
        given = [*(["--weights", "0.3,0.7"] if job == "mix" else ["--grid", 3]), "--rank", 2]
    first = command(*pair, *given, "--json", "--out", out)
    assert first[0] == 0, first[2]
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    again = command(*pair, *given, "--json", "--out", out)
    assert again[:2] == first[:2] and "already there" in again[2]
    shutil.copytree(out, tmp_path / "moved")
    assert command(*pair, *given, "--out", tmp_path / "moved")[0] == 0  # the record has no path

    def refused(part, *changed, models=pair):
        code, _, err = command(*models, *given, *changed, "--out", out)
        assert code == 1 and part in err and "--overwrite" in err and err.count("\n") == 1, err

    refused("made with rank=2, not 3", "--rank", 3)
    refused("made with dtype=", "--dtype", "float16")
    if job != "extract":
        refused("made of other inputs", models=pair[::-1])
        was = (pair[0] / WEIGHTS).read_bytes()
        save_file({name: x + 1 for name, x in load_file(pair[0] / WEIGHTS).items()}, pair[0] / WEIGHTS)
        refused("made of other inputs")
        (pair[0] / WEIGHTS).write_bytes(was)
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    (folder,) = {path.parent for path in stamps if path.name == WEIGHTS and path.parent.name in ("out", "1")}
    (folder / CONFIG).write_text("{}")
    refused("was changed since it was made")
    (folder / WEIGHTS).write_bytes(b"")
    refused("was changed since it was made")
    code, _, err = command(*pair, *given, "--out", out, "--overwrite")
    assert code == 0 and open_adapter(folder), err


@pytest.mark.parametrize("where", [".", "a0", "a0/new"])
def test_adapters_that_are_inputs_are_kept(base, adapters, tmp_path, where):
    pair = [tmp_path / "a0", tmp_path / "a1"]
    for one, source in zip(pair, adapters, strict=False):
        assert soup.merge_adapters([source], [1.0], one)
    code, _, err = command(*pair, "--weights", "1,1", "--out", tmp_path / where, "--overwrite")
    assert code == 1 and "an input" in err and err.count("\n") == 1, err
    assert all(open_adapter(one) for one in pair)
