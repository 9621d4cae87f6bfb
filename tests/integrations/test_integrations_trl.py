"""TRL's own trainers run on fastalign's head and give TRL's own numbers."""

import subprocess
import sys

import pytest
import torch
from tiny import tiny_causal_lm, tiny_folder, tiny_tokenizer
from turns import on_its_day

from fastalign import UserError, integrations
from fastalign import ops as fastalign_ops
from fastalign.integrations import trl as adapter

trl = pytest.importorskip("trl")
from trl.trainer import utils  # noqa: E402

NAMES = ("_ChunkedLogProbFunction", "_use_triton", "selective_log_softmax", "DTensor")
ORIGINALS = {name: getattr(utils, name) for name in NAMES}


@pytest.fixture
def installed():
    integrations.trl.install()
    yield
    integrations.trl.uninstall()


def test_install_and_uninstall_leave_no_trace():
    adapter.install()
    adapter.install()
    assert all(getattr(utils, name) is not original for name, original in ORIGINALS.items())
    adapter.uninstall()
    adapter.uninstall()
    assert all(getattr(utils, name) is original for name, original in ORIGINALS.items())


def test_models_that_trainers_prepare_are_sped_up_on_demand(monkeypatch):
    from fastalign.models import linear_layers
    from fastalign.ops import products

    if not products.available():
        pytest.skip("torch without oneDNN")
    monkeypatch.setenv("FASTALIGN_PRODUCTS", "onednn")
    monkeypatch.setattr(products, "SMALL", 0)
    head = utils.add_fused_lm_head
    losses, labels = [], torch.arange(3, 25).view(2, 11)
    for options in ({}, {"speed_up": True}):
        adapter.install(**options)  # the second time after the first
        model = tiny_causal_lm(tiny_tokenizer(), dtype=torch.float32)
        trl.trainer.dpo_trainer.add_fused_lm_head(model)
        assert linear_layers.replaces(model.model.layers[0].mlp.up_proj) == bool(options)
        output = model(input_ids=labels, labels=labels, fused_lm_head=True)
        (-output.log_probs.mean()).backward()
        losses.append([output.log_probs, model.model.layers[0].mlp.up_proj.weight.grad])
    adapter.uninstall()
    for theirs, ours in zip(*losses, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert utils.add_fused_lm_head is trl.trainer.dpo_trainer.add_fused_lm_head is head


def test_an_unknown_trl_is_refused(monkeypatch):
    class Other:
        @staticmethod
        def forward(ctx, hidden, weight, targets): ...

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Other)
    with pytest.raises(UserError, match=r"supports trl 1.13 to 1.16; in trl .* takes \(weight, targets\)"):
        adapter.install()
    monkeypatch.delattr(utils, "_ChunkedLogProbFunction")
    with pytest.raises(UserError, match=r"has no trl\.trainer\.utils\._ChunkedLogProbFunction"):
        adapter.install()
    assert utils.selective_log_softmax is ORIGINALS["selective_log_softmax"]


def test_the_seam_of_an_older_trl(monkeypatch):
    """TRL 1.13: no outputs, the entropy always; options of neither function; no test for Triton, no DTensor."""

    class Older(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx, last_hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping=None,
            logit_scale=1.0,
        ): ...  # fmt: skip

    for name in ("_use_triton", "DTensor"):
        monkeypatch.delattr(utils, name)
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Older)
    monkeypatch.setattr(utils, "selective_log_softmax", lambda logits, index: "TRL's own")
    monkeypatch.setattr(adapter.importlib.metadata, "version", lambda name: "1.13.0")
    adapter.install()
    try:
        hidden, weight, labels = torch.randn(5, 8), torch.randn(11, 8), torch.arange(5)
        log_probs, entropy = utils._ChunkedLogProbFunction.apply(hidden, weight, None, labels, 0.7, 256)
        p = (hidden @ weight.T / 0.7).log_softmax(-1)
        torch.testing.assert_close(log_probs, p.gather(1, labels[:, None]).squeeze(1))
        torch.testing.assert_close(entropy, -(p.exp() * p).sum(-1))
        assert utils.selective_log_softmax(p.half()[:, :0], torch.zeros(5, 2, dtype=torch.int64)) == "TRL's own"
    finally:
        adapter.uninstall()


def test_an_untried_trl_is_told(monkeypatch):
    monkeypatch.setattr(adapter.importlib.metadata, "version", lambda name: "1.99.0")
    with pytest.warns(UserWarning, match=r"trl 1.99.0 was not tried .* supports trl 1.13 to 1.16"):
        adapter.install()
    adapter.uninstall()


OPTIONS = [(), ("entropy",), ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")]


@pytest.mark.parametrize("outputs", OPTIONS, ids=len)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "all masked"])
def test_the_head_gives_trls_output_and_gradients(outputs, bias, masked):
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    ids = torch.randint(3, 300, (3, 11))
    labels = ids.clone()
    labels[:, :4] = -100
    labels[2] = -100
    if masked:
        labels[:] = -100
    result = {}
    for name in ("trl", "fastalign"):
        if name == "fastalign":
            adapter.install()
        try:
            model = tiny_causal_lm(tokenizer, dtype=torch.float32)
            if bias:
                model.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, model.lm_head.out_features))
            model.config.final_logit_softcapping = 9.0
            utils.add_fused_lm_head(model, temperature=0.8, outputs=("log_probs", *outputs))
            out = model(input_ids=ids, labels=labels, fused_lm_head=True)
            (out.loss + (0 if out.entropy is None else out.entropy.sum())).backward()
            result[name] = (out, {n: p.grad for n, p in model.named_parameters()})
        finally:
            adapter.uninstall()
    (theirs, their_grads), (ours, our_grads) = result["trl"], result["fastalign"]
    assert ours.keys() == theirs.keys()
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=2e-5, atol=2e-5, msg=key)
    for name, gradient in their_grads.items():
        if gradient is not None:
            torch.testing.assert_close(our_grads[name], gradient, rtol=2e-4, atol=2e-5, msg=name)


FAMILIES = {
    "Gemma2": {"head_dim": 8, "final_logit_softcapping": 2.0},
    "Cohere": {"logit_scale": 0.3},  # and a tied head
    "Granite": {"logits_scaling": 4.0},
    "Mixtral": {"num_local_experts": 2, "output_router_logits": True, "router_aux_loss_coef": 0.5},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_softcapped_scaled_and_mixture_models(family):
    import transformers

    torch.manual_seed(0)
    ids = torch.randint(3, 97, (3, 11))
    labels = ids.clone()
    labels[:, :4] = -100
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    common = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    common |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    config = getattr(transformers, f"{family}Config")(**common, **FAMILIES[family])
    result = {}
    for name in ("trl", "fastalign"):
        torch.manual_seed(1)
        model = getattr(transformers, f"{family}ForCausalLM")(config)
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(20)  # far from uniform, so that a missed scale or softcap shows
        if name == "fastalign":
            adapter.install()
        try:
            utils.add_fused_lm_head(model, outputs=("log_probs", "entropy"))
            out = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
            (out.loss + out.entropy.mean()).backward()
            result[name] = (out, {n: p.grad for n, p in model.named_parameters()})
        finally:
            adapter.uninstall()
    (theirs, their_grads), (ours, our_grads) = result["trl"], result["fastalign"]
    assert ours.keys() == theirs.keys()
    assert (family == "Mixtral") == (theirs.aux_loss is not None)
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=2e-5, atol=2e-5, msg=key)
    for name, gradient in their_grads.items():
        torch.testing.assert_close(our_grads[name], gradient, rtol=2e-4, atol=2e-5, msg=name)


def test_only_labelled_positions_are_projected(installed, monkeypatch):
    from fastalign import ops

    seen = []
    real = ops.linear_token_logprobs
    monkeypatch.setattr(
        ops, "linear_token_logprobs", lambda hidden, *a, **k: seen.append(len(hidden)) or real(hidden, *a, **k)
    )
    model = tiny_causal_lm(tiny_tokenizer(), dtype=torch.float32)
    utils.add_fused_lm_head(model)
    ids = torch.randint(3, 300, (2, 20))
    labels = ids.clone()
    labels[:, :15] = -100
    model(input_ids=ids, labels=labels, fused_lm_head=True)
    assert seen == [10]


def test_on_a_gpu_the_head_runs_where_it_takes_three_products():
    pytest.importorskip("triton")
    make = lambda *shape, dtype=torch.bfloat16: torch.empty(*shape, dtype=dtype, device="meta")  # noqa: E731
    hidden, weight, targets = make(1000, 64), make(5000, 64).requires_grad_(), make(1000, dtype=torch.int64)
    assert 0 < adapter.tile_bytes(hidden, weight, targets, None) - 1000 * 5000 * 2 < 500_000
    assert adapter.tile_bytes(hidden, weight, targets, 30.0) == 0
    assert adapter.tile_bytes(hidden, weight.detach(), targets, None) == 0
    assert adapter.tile_bytes(hidden.float(), weight, targets, None) == 0
    with pytest.raises(UserError, match="memory_budget must be a number of bytes"):
        adapter.install(memory_budget=-1)


def test_selective_log_softmax(installed):
    torch.manual_seed(0)
    logits, index = torch.randn(3, 5, 50), torch.randint(0, 50, (3, 5))
    original = ORIGINALS["selective_log_softmax"]
    for dtype in (torch.float32, torch.bfloat16):
        theirs, ours = (f(logits.to(dtype), index, 0.7) for f in (original, utils.selective_log_softmax))
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    mask = torch.tensor([[1, 1, 0, 0, 1]] * 3)
    torch.testing.assert_close(
        utils.selective_log_softmax(logits, index, row_mask=mask), original(logits, index, row_mask=mask)
    )
    several = torch.randint(0, 50, (3, 5, 4))
    torch.testing.assert_close(utils.selective_log_softmax(logits, several), original(logits, several))


SCRIPT = """
{install}
from datasets import Dataset
from transformers import AutoTokenizer
from trl import {trainer}Config, {trainer}Trainer
model, tokenizer = {model!r}, AutoTokenizer.from_pretrained({model!r})
words = "the quick brown fox jumps over a lazy dog near some quiet river bank".split()
text = lambda i, n: " ".join(words[(i * 7 + j * 3) % len(words)] for j in range(n))
{body}
trainer.train()
for row in trainer.state.log_history:
    if "loss" in row:
        print("LOSS", row["loss"])
"""
COMMON = (
    "report_to=[], max_steps=20, logging_steps=1, per_device_train_batch_size={size}, learning_rate=1e-3, "
    "use_cpu=True, bf16=False, gradient_checkpointing=False, output_dir={out!r}, save_strategy='no', seed=0, "
    "disable_tqdm=True"
)
BODIES = {
    "DPO": """
rows = [dict(prompt=text(i, 6), chosen=" " + text(i + 1, 5), rejected=" " + text(i + 2, 7)) for i in range(40)]
trainer = DPOTrainer(model, args=DPOConfig({common}), train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
""",
    "GRPO": """
rows = [dict(prompt=text(i, 6)) for i in range(40)]
reward = lambda completions, **_: [float(len(set(c))) / 10 for c in completions]
args = GRPOConfig({common}, num_generations=4, max_completion_length=8, beta=0.04, temperature=1.0)
rows = Dataset.from_list(rows)
trainer = GRPOTrainer(model, reward_funcs=reward, args=args, train_dataset=rows, processing_class=tokenizer)
""",
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=on_its_day(f"script: {name}")) for name in BODIES])
def test_a_trl_script_gives_the_same_loss_curve_but_for_the_install_line(name, tmp_path):
    curves, model = {}, str(tiny_folder(tmp_path / "model", scale=3.0))
    for install in ("", "import fastalign; fastalign.integrations.trl.install()"):
        common = COMMON.format(out=str(tmp_path / "out"), size=4)
        script = SCRIPT.format(model=model, install=install, trainer=name, body=BODIES[name].format(common=common))
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        curves[install] = [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("LOSS")]
    before, after = curves.values()
    assert len(before) == len(after) == 20 and len(set(before)) > 1
    assert after == pytest.approx(before, abs=1e-4)


def text(i, n):
    words = "the quick brown fox jumps over a lazy dog near some quiet river bank".split()
    return " ".join(words[(i * 7 + j * 3) % len(words)] for j in range(n))


# name -> (module of trl.experimental, class, options, whether it takes its log-probabilities from a seam of ours)
EXPERIMENTAL = {
    "CPO": ("cpo", "CPO", {}, True),
    "SimPO": ("cpo", "CPO", {"loss_type": "simpo", "cpo_alpha": 0.0}, True),
    "ORPO": ("orpo", "ORPO", {}, True),
    "OnlineDPO": ("online_dpo", "OnlineDPO", {"max_new_tokens": 6}, False),  # writes log_softmax in a method of its own
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", EXPERIMENTAL)
def test_the_experimental_trainers_give_the_same_losses(name, tmp_path, monkeypatch):
    import importlib

    from datasets import Dataset

    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    module, family, options, seam = EXPERIMENTAL[name]
    package = importlib.import_module(f"trl.experimental.{module}")
    config, trainer_class = getattr(package, f"{family}Config"), getattr(package, f"{family}Trainer")
    rows = [{"prompt": text(i, 6), "chosen": " " + text(i + 1, 5), "rejected": " " + text(i + 2, 7)} for i in range(8)]
    more = {}
    if name == "OnlineDPO":
        rows = [{"prompt": row["prompt"]} for row in rows]
        more["reward_funcs"] = lambda completions, **_: [float(len(set(c))) / 10 for c in completions]
    calls, real = [], fastalign_ops.token_logprobs
    monkeypatch.setattr(fastalign_ops, "token_logprobs", lambda *a, **k: calls.append(1) or real(*a, **k))
    curves = {False: [], True: []}
    for install, losses in curves.items():
        args = config(
            output_dir=str(tmp_path / name), max_steps=3, logging_steps=1, per_device_train_batch_size=2, seed=0,
            learning_rate=1e-3, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[],
            save_strategy="no", disable_tqdm=True, **options,
        )  # fmt: skip
        if install:
            adapter.install()
        try:
            tokenizer = tiny_tokenizer()
            model = tiny_causal_lm(tokenizer, dtype=torch.float32, scale=3.0)
            data = Dataset.from_list(rows)
            trainer = trainer_class(model, args=args, train_dataset=data, processing_class=tokenizer, **more)
            step = trainer.training_step  # what is logged is rounded
            trainer.training_step = lambda *a, step=step, losses=losses: losses.append(step(*a)) or losses[-1]
            trainer.train()
        finally:
            adapter.uninstall()
        assert bool(calls) == (install and seam)
    before, after = ([float(loss) for loss in losses] for losses in curves.values())
    assert len(before) == len(after) == 3 and len(set(before)) > 1
    assert after == pytest.approx(before, abs=1e-5)
