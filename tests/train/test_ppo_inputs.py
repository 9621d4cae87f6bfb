"""What PPO is handed: checked in one line; data, statistics and logs."""

import numpy as np
import pytest
import torch
from ppo_setup import policy, rollouts, trainer
from tiny import tiny_causal_lm, tiny_tokenizer

from fastalign import UserError
from fastalign.train.ppo import PPOConfig, PPOTrainer
from fastalign.train.value_head import AutoModelForCausalLMWithValueHead


def change(index, value):
    def of(rows):
        rows = list(rows)
        rows[index] = value
        return rows

    return of


EMPTY = torch.tensor([], dtype=torch.int64)
STEPS = {
    "fewer queries": ("queries", lambda x: x[:3], "queries must have as many entries as batch_size, 4, got 3"),
    "fewer responses": ("responses", lambda x: x[:3], "responses must have as many entries as batch_size, 4, got 3"),
    "fewer scores": ("scores", lambda x: x[:2], "scores must have as many entries as batch_size, 4, got 2"),
    "empty response": ("responses", change(2, EMPTY), r"responses\[2\] must hold at least one token, got none"),
    "empty query": ("queries", change(0, EMPTY), r"queries\[0\] must hold at least one token, got none"),
    "stacked queries": ("queries", lambda x: torch.ones(4, 3), r"queries must be a list .* tensor of shape \(4, 3\)"),
    "text": ("responses", change(1, "yes"), r"responses\[1\] must be a tensor of token ids, got str"),
    "floats": ("queries", change(1, torch.ones(3)), r"queries\[1\] must be a tensor \(tokens,\) of ids, got \(3,\)"),
    "another vocabulary": ("responses", change(3, torch.tensor([5, 320])), r"token ids in \[0, 320\), got 320"),
    "vectors as scores": ("scores", change(1, torch.ones(2)), r"scores\[1\] must be a scalar, got .* \(2,\)"),
    "a matrix of scores": ("scores", lambda x: torch.ones(4, 1), r"scores must be a list of 4 scalars, got .*\(4, 1\)"),
    "names as scores": ("scores", change(0, "good"), r"scores\[0\] must be a scalar, got str"),
    "NaN": ("scores", change(3, torch.tensor(float("nan"))), r"scores must be finite, got nan at scores\[3\]"),
    "fewer masks": ("masks", lambda x: x[:3], "response_masks must have as many entries as batch_size, 4, got 3"),
    "long mask": (
        "masks",
        change(1, torch.ones(9)),
        r"response_masks\[1\] must have the shape of responses\[1\], \(1,\)",
    ),
    "empty mask": ("masks", change(1, torch.zeros(1)), r"response_masks\[1\] must keep at least one token, got none"),
}


@pytest.fixture(scope="module")
def run():
    return trainer()


@pytest.mark.parametrize("case", STEPS)
def test_a_bad_step_is_one_line_and_changes_nothing(case, run):
    queries, responses, scores = rollouts()
    given = {
        "queries": queries,
        "responses": responses,
        "scores": scores,
        "masks": [torch.ones(len(r)) for r in responses],
    }
    name, spoil, rule = STEPS[case]
    given[name] = spoil(given[name])
    before = {n: p.clone() for n, p in run.policy.named_parameters()}
    with pytest.raises(UserError, match=rule) as caught:
        run.step(*given.values())
    assert "\n" not in str(caught.value)
    assert all(torch.equal(p, before[n]) for n, p in run.policy.named_parameters()) and run.current_step == 0


CONFIGS = {
    "batch_size must be a multiple of mini_batch_size · gradient_accumulation_steps = 4 · 2 = 8, got 12": dict(
        batch_size=12, mini_batch_size=4, gradient_accumulation_steps=2
    ),
    "kl_penalty must be one of kl, abs, mse, full, got 'k1'": dict(kl_penalty="k1"),
    "batch_size must be an integer, at least 1, got 0": dict(batch_size=0),
    "ppo_epochs must be an integer": dict(ppo_epochs=0),
    "gamma must lie in": dict(gamma=1.5),
    "target must be positive": dict(target=0),
    "score_clip must be positive or None": dict(score_clip=-1.0),
    "learning_rate must be at least 0": dict(learning_rate=-1.0),
    "is_encoder_decoder must be False": dict(is_encoder_decoder=True),
    "push_to_hub_if_best_kwargs is not supported": dict(push_to_hub_if_best_kwargs={"repo_id": "x"}),
}


@pytest.mark.parametrize("rule", CONFIGS)
def test_a_bad_configuration_is_one_line(rule):
    with pytest.raises(UserError, match=rule):
        PPOConfig(**CONFIGS[rule])


def test_the_configuration_has_trls_names_and_defaults():
    config = PPOConfig()
    assert (config.learning_rate, config.batch_size, config.mini_batch_size, config.ppo_epochs) == (
        1.41e-5,
        128,
        128,
        4,
    )
    assert (config.init_kl_coef, config.target, config.horizon, config.adap_kl_ctrl) == (0.2, 6.0, 10000.0, True)
    assert (config.cliprange, config.cliprange_value, config.vf_coef, config.gamma, config.lam) == (
        0.2,
        0.2,
        0.1,
        1.0,
        0.95,
    )
    assert config.backward_batch_size == 128 and config.model_name == "gpt2"
    with pytest.warns(UserWarning, match="old name of mini_batch_size"):
        assert PPOConfig(forward_batch_size=64).mini_batch_size == 64
    with pytest.warns(UserWarning, match="use_score_norm has no effect"):
        PPOConfig(use_score_norm=True)
    flat = PPOConfig(tracker_kwargs={"wandb": 1}).to_dict()
    assert flat["tracker_kwargs/wandb"] == 1 and flat["steps"] == 20000


def test_the_configuration_is_read_from_a_command_line():
    from transformers import HfArgumentParser

    given = ["--learning_rate", "1e-3", "--batch_size", "8", "--mini_batch_size", "4", "--early_stopping", "true"]
    (config,) = HfArgumentParser(PPOConfig).parse_args_into_dataclasses([*given, "--adap_kl_ctrl", "False"])
    assert (config.learning_rate, config.batch_size, config.early_stopping, config.adap_kl_ctrl) == (
        1e-3,
        8,
        True,
        False,
    )


def build(model=None, ref=None, tokenizer=None, **more):
    tokenizer = tokenizer or tiny_tokenizer()
    return PPOTrainer(PPOConfig(batch_size=2, mini_batch_size=2), model or policy(), ref, tokenizer, **more)


def small_vocabulary():
    import transformers

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **sizes))


def no_tokens():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    return tokenizer


TRAINERS = {
    "model must be an AutoModelForCausalLMWithValueHead, got LlamaForCausalLM": lambda: build(
        tiny_causal_lm(tiny_tokenizer())
    ),
    "ref_model must be a causal model or None, got str": lambda: build(ref="gpt2"),
    "ref_model must have the model's vocabulary, got 64 and 320 entries": lambda: build(ref=small_vocabulary()),
    "tokenizer has 320 tokens, the model's embedding only 64": lambda: build(
        AutoModelForCausalLMWithValueHead(small_vocabulary())
    ),
    "tokenizer must have a pad token or an end token": lambda: build(tokenizer=no_tokens()),
    "lr_scheduler needs the optimizer that it steers": lambda: build(lr_scheduler=object()),
    "training_data_collator must be None": lambda: build(training_data_collator=lambda x: x),
    "dataset must have at least batch_size · processes = 2 · 1 rows, got 1": lambda: build(
        dataset=[{"input_ids": [3]}]
    ),
    "dataset must have a length and indices, got generator": lambda: build(dataset=(i for i in range(3))),
    "dataset must have a column 'input_ids' .from the tokenizer. or 'query', got text": lambda: build(
        dataset=texts("text")
    ),
    "log_with or accelerator_kwargs": lambda: PPOTrainer(
        PPOConfig(batch_size=2, mini_batch_size=2, accelerator_kwargs={"colour": 1}), policy(), None, tiny_tokenizer()
    ),
}


def texts(column, more=None):
    from datasets import Dataset

    return Dataset.from_dict({column: ["one", "two", "three", "four", "five"], **(more or {})})


@pytest.mark.parametrize("rule", TRAINERS)
def test_a_bad_trainer_is_one_line(rule):
    with pytest.raises((UserError, TypeError), match=rule) as caught:
        TRAINERS[rule]()
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_pad_token_pads_with_its_end_and_says_so():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    with pytest.warns(UserWarning, match="tokenizer has no pad token: its end token '</s>' pads"):
        run = build(tokenizer=tokenizer)
    queries, responses, scores = (x[:2] for x in rollouts())
    plain = build().step(queries, responses, scores)
    assert run.step(queries, responses, scores)["objective/entropy"] == plain["objective/entropy"]
    assert run.generate(queries, max_new_tokens=2, do_sample=True)


def test_the_reference_may_be_a_plain_model():
    queries, responses, scores = (x[:2] for x in rollouts())
    bare = build(ref=tiny_causal_lm(tiny_tokenizer(), seed=1)).step(queries, responses, scores)
    headed = build(ref=policy(seed=1)).step(queries, responses, scores)
    np.testing.assert_array_equal(bare["objective/ref_logprobs"], headed["objective/ref_logprobs"])


def test_the_statistics_have_trls_names():
    stats = trainer().step(*rollouts())
    named = """
        objective/kl objective/kl_dist objective/logprobs objective/ref_logprobs objective/kl_coef objective/entropy
        ppo/mean_non_score_reward ppo/mean_scores ppo/std_scores tokens/queries_len_mean tokens/queries_len_std
        tokens/queries_dist tokens/responses_len_mean tokens/responses_len_std tokens/responses_dist ppo/loss/policy
        ppo/loss/value ppo/loss/total ppo/policy/entropy ppo/policy/approxkl ppo/policy/policykl ppo/policy/clipfrac
        ppo/policy/advantages ppo/policy/advantages_mean ppo/policy/ratio ppo/returns/mean ppo/returns/var ppo/val/vpred
        ppo/val/error ppo/val/clipfrac ppo/val/mean ppo/val/var ppo/val/var_explained ppo/learning_rate
        time/ppo/forward_pass time/ppo/compute_rewards time/ppo/compute_advantages time/ppo/optimize_step
        time/ppo/calc_stats time/ppo/total""".split()
    assert set(stats) == set(named)
    arrays = {n for n in named if n.endswith("_dist") or n.endswith("logprobs")} | {
        "ppo/policy/advantages",
        "ppo/policy/ratio",
    }
    for name, value in stats.items():
        assert isinstance(value, np.ndarray if name in arrays else float), name
    _, responses, _ = rollouts()
    assert stats["tokens/responses_len_mean"] == np.mean([len(r) for r in responses])
    assert stats["objective/kl_dist"].shape == (4,) and stats["time/ppo/total"] > stats["time/ppo/optimize_step"] > 0


def rows(count=10):
    return [{"query": f"q{i}", "input_ids": torch.arange(3, 4 + i % 3)} for i in range(count)]


def queries(loader):
    return [batch["query"] for batch in loader]


def test_each_epoch_deals_every_row_once_in_another_order():
    run = trainer(dataset=rows(), batch_size=2, mini_batch_size=2)
    assert len(run.dataloader) == 5
    first, second = queries(run.dataloader), queries(run.dataloader)
    flat = lambda batches: [q for batch in batches for q in batch]  # noqa: E731
    assert sorted(flat(first)) == sorted(flat(second)) == sorted(f"q{i}" for i in range(10))
    assert first != second and queries(trainer(dataset=rows(), batch_size=2, mini_batch_size=2).dataloader) == first
    batch = next(iter(run.dataloader))
    assert isinstance(batch["input_ids"], list) and all(isinstance(x, torch.Tensor) for x in batch["input_ids"])
    assert queries(run.dataloader) != first  # one that was broken off is over


def test_the_loader_goes_on_where_it_stood():
    whole = trainer(dataset=rows(), batch_size=2, mini_batch_size=2).dataloader
    expected = [queries(whole) for _ in range(3)]
    part = trainer(dataset=rows(), batch_size=2, mini_batch_size=2).dataloader
    queries(part)
    begun = iter(part)
    assert [next(begun)["query"] for _ in range(3)] == expected[1][:3]
    again = trainer(dataset=rows(), batch_size=2, mini_batch_size=2).dataloader
    again.load_state_dict(part.state_dict())
    assert queries(again) == expected[1][3:] and queries(again) == expected[2]


def test_data_sets_lose_the_columns_that_nobody_takes():
    ids = [[3, 4], [5], [6, 7], [8], [9]]
    run = trainer(dataset=texts("query", {"input_ids": ids, "star": [1] * 5}), batch_size=2, mini_batch_size=2)
    batch = next(iter(run.dataloader))
    assert set(batch) == {"query", "input_ids"} and all(isinstance(x, torch.Tensor) for x in batch["input_ids"])
    run = trainer(dataset=texts("text"), batch_size=2, mini_batch_size=2, remove_unused_columns=False)
    assert set(next(iter(run.dataloader))) == {"text"}


def test_logs_reach_the_tracker():
    from accelerate.tracking import GeneralTracker

    class Notes(GeneralTracker):
        name, requires_logging_directory = "notes", False
        tracker = None

        def __init__(self):
            super().__init__()
            self.config, self.lines = None, []

        def store_init_configuration(self, values):
            self.config = values

        def log(self, values, step=None, **kwargs):
            self.lines.append((step, values))

    notes = Notes()
    run = trainer(log_with=notes)
    queries, responses, scores = rollouts()
    batch = {"query": ["a"] * 4, "response": ["b"] * 4}
    for _ in range(2):
        run.log_stats(run.step(queries, responses, scores), batch, scores)
    assert notes.config["batch_size"] == 4 and [step for step, _ in notes.lines] == [1, 2]
    logged = notes.lines[0][1]
    assert logged["env/reward_mean"] == pytest.approx(float(torch.stack(scores).mean()))
    assert {"objective/kl", "ppo/loss/total", "env/reward_std"} <= set(logged)
    assert all(isinstance(x, (int, float)) for x in logged.values())
    trainer().log_stats({}, {}, scores)  # no tracker: nothing to do


def test_saving_and_pushing(tmp_path, monkeypatch):
    import huggingface_hub
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = policy(dtype=torch.float32)
    run = trainer(model)
    run.save_pretrained(tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(3, 9)[None]
    torch.testing.assert_close(plain(ids).logits, model(ids)[0])
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 320
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="push_to_hub needs the hub"):
        run.push_to_hub("me/mine")
