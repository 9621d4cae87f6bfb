"""The shared-prompt engine against a plain loop over the model: the same tokens, whatever joins and leaves."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from scipy.stats import chisquare
from small_models import MODELS, SMALL, WINDOWED, build
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastalign.backend import interpreted, use_backend
from fastalign.data.sampling import SamplingSettings
from fastalign.decode.shared_prompt import Prefix, SharedPromptEngine, _Step, draw, supports
from fastalign.decode.streams import stream_of
from fastalign.decode.token_loop import Job, TokenLoop
from fastalign.ops import sample_tokens

PROMPTS = {0: [5, 9, 11, 40, 7, 8, 21], 3: [3], 4: [60, 61, 62, 63, 64, 65, 66, 67, 68, 69, 70, 71, 72]}
N, LIMIT, END = 6, 9, set(range(3, 97, 5))


def stream(job):
    return torch.tensor([stream_of(*job)])


def by_hand(model, prompt, job, temperature=1.0):
    """The whole sequence through the model for every token."""
    ids, logprobs = [], []
    for step in range(LIMIT):
        logits = model(input_ids=torch.tensor([prompt + ids])).logits[:, -1]
        drawn = sample_tokens(logits, temperature=temperature, seed=1, offset=step, rows=stream(job))
        ids.append(int(drawn.ids))
        logprobs.append(float(drawn.log_probs))
        if ids[-1] in END:
            break
    return ids, logprobs


def by_engine(model, rows, counts=None, temperature=1.0):
    engine = SharedPromptEngine(model, rows)
    counts = counts or dict.fromkeys(PROMPTS, N)
    settings = SamplingSettings(N, LIMIT, temperature=temperature, seed=1)
    loop = TokenLoop(engine, settings, END, lambda job, ids: False)
    seen = []
    for _ in draw(loop, PROMPTS, (Job(p, c) for p, n in counts.items() for c in range(n)), counts):
        assert len(engine.jobs) <= rows
        seen.append(len(engine.jobs))
    assert not engine.jobs and not engine.prefixes
    return {job: (loop.ids[job], loop.log_probs[job]) for job in loop.ids}, seen


@pytest.mark.slow_matrix
@pytest.mark.parametrize("name", [*MODELS, *WINDOWED])
@torch.no_grad()
def test_the_same_tokens_as_a_plain_loop(name):
    model = build(name)
    assert supports(model)
    expected = {Job(p, c): by_hand(model, PROMPTS[p], Job(p, c)) for p in PROMPTS for c in range(N)}
    result, _ = by_engine(model, rows=5)
    for job, (ids, logprobs) in expected.items():
        assert result[job][0] == ids, job
        assert result[job][1] == pytest.approx(logprobs, abs=1e-4)
    assert max(len(logprobs) for _, logprobs in result.values()) > 1


@pytest.mark.parametrize("name", ["llama", "gemma2 (softcap)", *WINDOWED])
@pytest.mark.parametrize("tokens", [1, 8, 1024])
def test_prompts_that_run_together_do_not_see_each_other(name, tokens, monkeypatch):
    monkeypatch.setattr("fastalign.decode.shared_prompt.PREFILL", tokens)
    model = build(name)
    together, alone = SharedPromptEngine(model, 3), SharedPromptEngine(model, 3)
    together.prefill(PROMPTS)
    for prompt, ids in PROMPTS.items():
        alone.prefill({prompt: ids})
        result, expected = together.prefixes[prompt], alone.prefixes[prompt]
        assert result.length == len(ids)
        torch.testing.assert_close(result.hidden, expected.hidden)
        torch.testing.assert_close(result.keys, expected.keys)
        torch.testing.assert_close(result.values, expected.values)


@pytest.mark.parametrize("rows", [1, 2, 7, 64])
def test_rows_in_flight_change_nothing(rows):
    model = build("llama")
    whole, _ = by_engine(model, rows=18)
    result, seen = by_engine(model, rows=rows)
    assert {job: ids for job, (ids, _) in result.items()} == {job: ids for job, (ids, _) in whole.items()}
    assert max(seen) <= min(rows, 18) and len(seen) > 1


def test_a_place_is_taken_again_at_once():
    model = build("llama")
    result, seen = by_engine(model, rows=4)
    tokens = sum(len(ids) for ids, _ in result.values())
    assert len(seen) <= tokens / 4 * 1.6 + LIMIT  # a batch-by-batch run waits for the longest of each


def test_the_model_is_left_as_it_was():
    model = build("llama")
    before = model.config._attn_implementation
    ids = torch.tensor([PROMPTS[4]])
    logits = model(input_ids=ids).logits
    by_engine(model, rows=3)
    assert model.config._attn_implementation == before
    torch.testing.assert_close(model(input_ids=ids).logits, logits)


def test_first_tokens_follow_the_models_law():
    model = build("llama")
    prompt = PROMPTS[4]
    p = model(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1).detach()
    engine = SharedPromptEngine(model, 4000)
    engine.prefill({0: prompt})
    logits = engine.logits(engine.admit([Job(0, c) for c in range(4000)]))
    ids = sample_tokens(logits, seed=5).ids
    count = torch.bincount(ids, minlength=97).double()
    likely = p * 4000 >= 5
    observed = torch.cat((count[likely], count[~likely].sum()[None]))
    expected = torch.cat((p[likely], p[~likely].sum()[None])).double()
    assert chisquare(observed.numpy(), (expected / expected.sum() * 4000).numpy()).pvalue > 1e-3


def fused(q, k, v):
    """As GPT-2's and Phi-3's one projection hands them out: side by side in each row."""
    sizes = [x.shape[1] * x.shape[3] for x in (q, k, v)]
    row = torch.cat([x.flatten(1) for x in (q, k, v)], 1)
    return [
        y.view(len(y), 1, -1, x.shape[3]).transpose(1, 2) for x, y in zip((q, k, v), row.split(sizes, 1), strict=True)
    ]


def interleaved(q, k, v):
    """As GPT-NeoX's, head by head."""
    group = q.shape[1] // k.shape[1]
    q = q.unflatten(1, (-1, group)).flatten(2)  # a head's keys and values follow its queries
    heads = torch.cat([x.flatten(2) for x in (q, k, v)], 2)
    q, k, v = heads.split([x.shape[2] for x in (q, k.flatten(2), v.flatten(2))], 2)
    q = q.unflatten(2, (group, -1))
    return [q.flatten(1, 2).unsqueeze(2) if group > 1 else q, k.unsqueeze(2), v.unsqueeze(2)]


@pytest.mark.parametrize("lay", [lambda *x: x, fused, interleaved])
@pytest.mark.parametrize(
    ("heads", "kv", "d", "dv", "own", "window", "softcap"),
    [
        (9, 3, 64, 64, 30, None, None),
        (2, 2, 7, 7, 300, None, None),
        (4, 1, 20, 20, 1, None, 2.0),
        (4, 4, 24, 16, 40, 11, None),
        (6, 2, 5, 19, 3, 1, None),
        (100, 2, 80, 80, 5, 150, 30.0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_native_attention_equals_the_plain_one(heads, kv, d, dv, own, window, softcap, lay, dtype):
    torch.manual_seed(0)
    jobs = [Job(p, c) for p, c in ((0, 0), (7, 0), (0, 1), (7, 1), (7, 2))]  # rows of prompt 0 are no neighbours
    lengths = torch.tensor([own - 1, 0, own // 2, 0, own - 1])
    lengths_of = {0: 133, 7: 1}
    stored = {p: (torch.randn(kv, n, d).to(dtype), torch.randn(kv, n, dv).to(dtype)) for p, n in lengths_of.items()}
    q, k, v = (torch.randn(5, h, 1, size).to(dtype) for h, size in ((heads, d), (kv, d), (kv, dv)))
    q *= 30 if dtype == torch.float32 else 2
    laid = lay(q, k, v)
    assert all(map(torch.equal, laid, (q, k, v)))
    own_keys, own_values = torch.randn(5, kv, own + 3, d).to(dtype), torch.randn(5, kv, own + 3, dv).to(dtype)
    positions = lengths + torch.tensor([lengths_of[job.prompt] for job in jobs])
    result = []
    for name, wide in (("cpu", dtype), ("reference", torch.float64)):
        prefixes = {p: Prefix(n) for p, n in lengths_of.items()}
        for p, tensors in stored.items():
            prefixes[p].store(0, *(x.to(wide) for x in tensors))
        keys, values = ({0: x.to(wide, copy=True)} for x in (own_keys, own_values))
        engine = SimpleNamespace(jobs=jobs, prefixes=prefixes, rows=5, keys=keys, values=values, stack=None)
        with use_backend(name):
            step = _Step(engine, 5, own, lengths, positions)
            assert step.native == (name == "cpu")
            result.append((step.attend(0, *(x.to(wide) for x in laid), d**-0.5, window, softcap), keys[0], values[0]))
    (ours, *caches), (plain, *others) = result
    assert ours.shape == (5, heads, 1, dv)
    eps = torch.finfo(dtype).eps
    assert torch.allclose(ours.double(), plain, rtol=max(1e-5, 2 * eps), atol=max(5e-5, eps / 8))
    assert all(torch.equal(cache.double(), other) for cache, other in zip(caches, others, strict=True))


FUSED = {"GPTNeoX": SMALL, "Phi3": SMALL | {"num_key_value_heads": 2, "pad_token_id": 0}, "Persimmon": SMALL}


@pytest.mark.parametrize("family", FUSED)
@torch.no_grad()
def test_one_projection_of_queries_keys_and_values_in_float32(family):
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(
        getattr(transformers, f"{family}Config")(**FUSED[family])
    ).eval()
    for name, p in model.named_parameters():
        if p.ndim == 2:  # so large that attention is far from flat
            p.normal_(0, 0.7 if "emb" in name else 0.6 / p.shape[-1] ** 0.5)
    result, _ = by_engine(model, rows=5)
    for job, (ids, logprobs) in result.items():
        prompt = PROMPTS[job.prompt]
        logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        expected = logits.double().log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0]
        assert logprobs == pytest.approx(expected.tolist(), abs=1e-4)


class Launches(TorchDispatchMode):
    """Counts what would each be a kernel on a GPU: not views and allocations."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given, made = ({x.untyped_storage()._cdata for x in tensors(of)} for of in ((args, kwargs), result))
        empty = function.overloadpacket.__name__ in ("empty", "new_empty", "empty_like")
        self.count += function._schema.is_mutable or not (empty or made <= given)
        return result


def tensors(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize(
    ("family", "backend", "most", "budget"),
    [("Llama", "reference", 8, 75), ("Llama", "triton", 64, 20), ("Gemma2", "triton", 64, 23)],
)
@torch.no_grad()
def test_a_step_takes_as_many_launches_whatever_the_number_of_prompts(family, backend, most, budget):
    counts, layers = {}, 4
    sizes = SMALL | {"num_hidden_layers": layers, "num_key_value_heads": 2}
    config = getattr(transformers, f"{family}Config")(**sizes)
    device = "meta" if backend == "triton" else "cpu"
    with torch.device(device):
        model = getattr(transformers, f"{family}ForCausalLM")(config).bfloat16().eval()
    with use_backend(backend):
        for prompts, each in ((1, 64), (most, 64 // most)):
            engine = SharedPromptEngine(model, prompts * each)
            engine.prefill({p: list(range(3, 8 + p % 5)) for p in range(prompts)})
            engine.admit([Job(p, c) for c in range(each) for p in range(prompts)])
            for _ in range(2):  # the first lays the prompts together
                engine.place(0, torch.zeros(prompts * each, dtype=torch.int64, device=device))
                with Launches() as launches:
                    engine.step()
            counts[prompts, each] = launches.count
            engine.drop([1, 3])
            engine.step()  # nothing can be read from meta tensors: no step waits for the device
    assert len(set(counts.values())) == 1, counts
    assert 0 < counts[1, 64] <= budget * layers, counts


@pytest.mark.skipif(not interpreted(), reason="TRITON_INTERPRET=0")
@pytest.mark.parametrize("name", ["mistral (window)", "gemma2 (softcap)"])
def test_the_kernels_of_a_gpu_draw_the_same_tokens(name):
    model = build(name).float()
    counts = {0: 2, 3: 1, 4: 1}
    expected, _ = by_engine(model, 3, counts)
    with use_backend("triton"):
        result, _ = by_engine(model, 3, counts)
    assert result.keys() == expected.keys()
    for job, (ids, logprobs) in expected.items():
        assert result[job][0] == ids, job
        assert result[job][1] == pytest.approx(logprobs, abs=1e-4)
