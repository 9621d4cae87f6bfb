"""What GRPOTrainer refuses, each in one line that names the argument, before anything is drawn."""

import datasets
import pytest
import transformers
from grpo_setup import completions_of, prompts, trainer
from refusals import assert_one_line
from tiny import tiny_causal_lm, tiny_folder, tiny_tokenizer

from fastalign.train import GRPOConfig, GRPOTrainer

NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny_folder(tmp_path_factory.mktemp("model"), scale=3.0))


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("num_iterations", 0, "an integer, at least 1, got 0"),
        ("num_iterations", 1.5, "an integer, at least 1, got 1.5"),
        ("per_device_train_batch_size", 0, "an integer, at least 1, got 0"),
        ("per_device_eval_batch_size", 0, "an integer, at least 1, got 0"),
        ("gradient_accumulation_steps", 0, "an integer, at least 1, got 0"),
        ("steps_per_generation", 0, "an integer, at least 1, got 0"),
        ("generation_batch_size", "8", "an integer, at least 1, got '8'"),
        ("num_generations", 0, "an integer, at least 2, got 0"),
        ("num_generations", "4", "an integer, at least 2, got '4'"),
        ("num_generations_eval", 0, "an integer, at least 1, got 0"),
        ("max_completion_length", None, "an integer, at least 1, got None"),
        ("max_packed_tokens", 0, "an integer, at least 1, got 0"),
        ("max_packed_tokens", True, "an integer, at least 1, got True"),
        ("ref_model_sync_steps", 0, "an integer, at least 1, got 0"),
        ("beta", -0.1, "a finite number, at least 0, got -0.1"),
        ("beta", NAN, "a finite number, at least 0, got nan"),
        ("beta", "0.1", "a finite number, at least 0, got '0.1'"),
        ("temperature", 0, "a positive finite number, got 0"),
        ("epsilon", -1, "a positive finite number, got -1"),
        ("epsilon_high", NAN, "a positive finite number, got nan"),
        ("delta", "big", "a positive finite number, got 'big'"),
        ("sapo_temperature_pos", 0, "a positive finite number, got 0"),
        ("vespo_k_neg", None, "a finite number, got None"),
        ("entropy_coef", INF, "a finite number, got inf"),
        ("off_policy_mask_threshold", [1], "a finite number, got list"),
        ("ref_model_mixup_alpha", 2, "a number in [0, 1], got 2"),
        ("reward_weights", 1.0, "a list of finite numbers, got 1.0"),
        ("reward_weights", [1.0, NAN], "a list of finite numbers, got list"),
        ("mask_truncated_completions", "no", "True or False, got 'no'"),
        ("share_prompt", None, "True or False, got None"),
        ("chat_template_kwargs", [1], "a dictionary, got list"),
        ("generation_kwargs", 3, "a dictionary, got 3"),
        ("loss_type", "gspo", "one of grpo, bnpo, dapo, dr_grpo, luspo, cispo, sapo, vespo, got 'gspo'"),
        ("importance_sampling_level", None, "one of token, sequence, got None"),
        ("scale_rewards", "all", "one of group, batch, none, got 'all'"),
        ("advantage", 3, "one of "),
    ],
)
def test_values_of_options(folder, tmp_path, option, value, says):
    assert_one_line(lambda: trainer(GRPOTrainer, folder, tmp_path, **{option: value}), f"{option} must be {says}")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"delta": 1.1}, "delta must be above 1 + epsilon_high = 1.2, got 1.1"),
        ({"sync_ref_model": True}, "sync_ref_model needs a reference: beta must not be 0"),
        ({"reward_weights": [1.0]}, "reward_weights must have one number per reward, 2, got 1"),
        ({"importance_correction": True}, "importance_correction needs a rollout_func"),
        (
            {"importance_correction": True, "vllm_importance_sampling_mode": "all"},
            "vllm_importance_sampling_mode must be one of token_truncate, ",
        ),
        ({"use_vllm": True}, "use_vllm=True is not supported"),
        ({"generation_kwargs": {"do_sample": False}}, "generation_kwargs may have temperature, top_k, top_p, min_p, "),
        ({"generation_kwargs": {"top_p": 2}}, "top_p must lie in (0, 1], got 2"),
        ({"num_generations": 3}, "generation_batch_size (8) must be divisible by num_generations (3)"),
    ],
    ids=str,
)
def test_options_that_need_others(folder, tmp_path, options, says):
    more = {"rollout_func": completions_of} if "vllm_importance_sampling_mode" in options else {}
    assert_one_line(lambda: trainer(GRPOTrainer, folder, tmp_path, more=more, **options), says)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"model": 3}, "model must be a causal language model, or the name or folder of one, got 3"),
        ({"model": "classifier"}, "model must be a causal language model, or the name or folder of one, got Llama"),
        ({"args": transformers.TrainingArguments}, "args must be a GRPOConfig, got TrainingArguments"),
        ({"callbacks": [3]}, "callbacks must be a list of TrainerCallback, got list"),
        ({"callbacks": print}, "callbacks must be a list of TrainerCallback, got builtin_function_or_method"),
        ({"optimizers": None}, "optimizers must be a pair, an optimizer and its scheduler or None, got None"),
        ({"optimizers": (3, None)}, "optimizers must be a pair, an optimizer and its scheduler or None, got tuple"),
        ({"peft_config": {"r": 4}}, "peft_config must be a peft.PeftConfig such as LoraConfig, got dict"),
        ({"rollout_func": "vllm"}, "rollout_func must be a function of prompts and trainer, got 'vllm'"),
        ({"processing_class": "gpt2"}, "processing_class must be a tokenizer, got str"),
        ({"processing_class": None}, "processing_class must be given for a model that was not loaded by name"),
        ({"tools": [print]}, "tools is not supported"),
        ({"reward_funcs": None}, "reward_funcs must name at least one reward, got none"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_arguments_of_a_wrong_type(tmp_path, given, says):
    tokenizer, out = tiny_tokenizer(), str(tmp_path)
    options = {"use_cpu": True, "bf16": False, "report_to": []}
    arguments = {"model": tiny_causal_lm(tokenizer), "reward_funcs": [len], "processing_class": tokenizer}
    arguments |= {"args": GRPOConfig(out, **options), "train_dataset": datasets.Dataset.from_list(prompts())} | given
    if given.get("model") == "classifier":
        config = transformers.LlamaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
        arguments["model"] = transformers.LlamaForSequenceClassification(config)
    if "args" in given:
        arguments["args"] = given["args"](out, use_cpu=True, report_to=[])
    assert_one_line(lambda: GRPOTrainer(**arguments), says)


ROWS = prompts()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (None, "train_dataset must be a data set with a column prompt, got None"),
        (3, "train_dataset must be a data set with a column prompt, got 3"),
        (datasets.DatasetDict(a=datasets.Dataset.from_list(ROWS)), "train_dataset must be one data set, got a dict"),
        ({"train": ROWS, "test": ROWS}, "train_dataset must be one data set, got a dictionary of train, test"),
        ([], "train_dataset must have at least one prompt, got none"),
        (ROWS[:1], "train_dataset must have at least generation_batch_size / num_generations = 2 prompts, got 1"),
        (["a", "b"], "train_dataset must have rows with a column prompt, got rows of str"),
        ([{"text": "a"}], "train_dataset must have a column prompt, got text"),
        ([{"prompt": "a"}, {"text": "a"}], "train_dataset row 1: prompt must be text or a list of messages, got None"),
        ([{"prompt": "a"}, {"prompt": 3}], "train_dataset row 1: prompt must be text or a list of messages, got 3"),
        ([{"prompt": "a"}, {"prompt": ""}], "train_dataset row 1: prompt must have at least one token, got ''"),
        ([{"prompt": []}], "train_dataset row 0: prompt: must be a list of at least one message, got []"),
        ([{"prompt": [{"text": "a"}]}], "train_dataset row 0: prompt: message 0 must have a role and a content"),
        (
            [{"prompt": [{"role": "user", "content": "a"}]}],
            "train_dataset row 0: prompt is of messages, which need a chat template: the tokenizer has none",
        ),
        (
            [{"prompt": "a"}, {"prompt": [{"role": "user", "content": "a"}]}],
            "train_dataset row 1: prompt must be text where others are, messages where others are, got both",
        ),
        ([{"prompt": "a " * 300}], "train_dataset row 0: a prompt is too long: "),
        *(
            ([{"prompt": "a", name: 1}], f"train_dataset must have no column {name}")
            for name in ("prompts", "completions", "trainer_state", "log_extra", "log_metric")
        ),
    ],
    ids=lambda x: x[:48] if isinstance(x, str) else "",
)
def test_data(folder, tmp_path, data, says):
    def train():
        trainer(GRPOTrainer, folder, tmp_path, more={"train_dataset": data}).train()

    assert_one_line(train, says)


def result(**changes):
    """A rollout_func with other results than it should have; None: without this one."""

    def rollout(prompts, trainer):
        given = completions_of(prompts, trainer) | changes
        return {name: x for name, x in given.items() if x is not None}

    return rollout


@pytest.mark.slow_matrix
@pytest.mark.parametrize(
    ("rollout_func", "says"),
    [
        (lambda prompts, trainer: 3, "rollout_func must return a dictionary of prompt_ids, completion_ids, logprobs"),
        (result(logprobs=None), "rollout_func must return prompt_ids, completion_ids, logprobs, lacks logprobs"),
        (result(logprobs=[[0.0]]), "rollout_func must return one logprobs entry per prompt given, 8, got 1"),
        (result(completion_ids=[[5]] * 8), "rollout_func must return a logprobs entry per completion token, 1 for"),
        (result(completion_ids=[[]] * 8), "rollout_func must return prompts and completions of at least one token"),
        (result(completion_ids=[5] * 8), "rollout_func must return lists of token ids, got 5 in completion_ids[0]"),
        (result(completion_ids=[[0.5]] * 8), "rollout_func must return lists of token ids, got list in completion"),
        (result(prompt_ids=[[5], [7000]] * 4), "rollout_func must return ids of the model's vocabulary, 0 to "),
        (result(prompt_ids=[[5], [-1]] * 4), "rollout_func must return ids of the model's vocabulary, 0 to "),
        (result(completions=["a"] * 8), "rollout_func's result must have no column completions"),
    ],
    ids=lambda x: x[20:60] if isinstance(x, str) else "",
)
def test_results_of_a_rollout_func(folder, tmp_path, rollout_func, says):
    assert_one_line(trainer(GRPOTrainer, folder, tmp_path, more={"rollout_func": rollout_func}).train, says)


def test_what_only_loading_reads_has_no_effect_on_a_loaded_model(folder, tmp_path):
    loading = {"model_init_kwargs": {"dtype": "float32"}, "more": {"quantization_config": object()}}
    with pytest.warns(UserWarning) as caught:
        trainer(GRPOTrainer, folder, tmp_path, **loading)
    said = [str(warning.message) for warning in caught]
    for name in ("quantization_config", "model_init_kwargs"):
        assert f"{name} has no effect on the model: it is already loaded" in said
