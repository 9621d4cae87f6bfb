"""An option has the name and the default of the parameter that it sets in Python; former names are still accepted."""

import inspect
from dataclasses import fields
from enum import Enum
from typing import get_type_hints

import pytest
import typer

from fastalign import backend, ops, soup
from fastalign.cli import bench, info, train
from fastalign.cli import main as cli
from fastalign.cli.main import app
from fastalign.data import hub, prompts
from fastalign.data.sampling import RequestOptions, SamplingSettings
from fastalign.decode import Sampler, tilted
from fastalign.jobs import align, demo, distill, grpo, pairs, pareto, ppo, preference, reward_bench, soup_front
from fastalign.jobs import settings as jobs
from fastalign.jobs.align import job as align_job
from fastalign.reference import RESAMPLE_METHODS
from fastalign.report import ui

FUNCTIONS = {
    "align": [align_job.align, jobs.AlignSettings, prompts.load],
    "demo": [demo.run],
    "sample": [align.sample, align.sample_more, Sampler.sample, Sampler.from_pretrained, prompts.load],
    "score": [align.score],
    "map": [align.solve_palette],
    "pareto": [pareto.write],
    "palette-ui": [ui.serve],
    "select": [align.select],
    "eval": [align.evaluate, align.evaluate_grid],
    "soup": [soup.merge, soup.merge_adapters, soup.apply_adapters, soup.extract_adapter],
    "soup-front": [soup_front.study, Sampler.sample, prompts.load],
    "bench": [bench.run],
    "info": [info.show_model],
    "rewards": [],
    "reward-bench": [reward_bench.reward_bench],
    "train distill": [distill.train_distill, jobs.DistillSettings, distill.read_rows],
    "train dpo": [preference.train_dpo, jobs.DPOSettings, preference.read_pairs],
    "train grpo": [grpo.train_grpo, jobs.GRPOSettings, hub.load_prompts],
    "train ppo": [ppo.train_ppo, jobs.PPOSettings, hub.load_prompts],
    "train reward": [preference.train_reward, jobs.RewardSettings, preference.read_pairs],
}
OTHER_NAMES = {  # repeatable options are singular, or set one value of a dictionary
    ("sample", "chat_template_arg"): "chat_template_kwargs",
    ("pareto", "palette"): "palettes",
    ("pareto", "quantile"): "quantiles",
    ("pareto", "soup"): "soups",
    ("palette-ui", "allowed_host"): "allowed_hosts",
    ("soup", "set_"): "parameters",
}
OTHER_DEFAULTS = {
    ("sample", "chat"): "on is 'auto'",
    ("train grpo", "prompts"): "a function has none",
    ("train ppo", "prompts"): "a function has none",
}
COMMAND_LINE_ONLY = {
    ("sample", "server"): "a part of the model's name: URL#model",
    ("sample", "pilot"): "another function: `decode.pilot`",
    ("map", "allow_infeasible"): "the exit code",
    ("rewards", "words"): "`rewards.available` lists them all",
    ("palette-ui", "scored"): "a function takes the session of it",
    ("palette-ui", "values"): "a function takes the session of them",
    ("palette-ui", "prompt_column"): "a function takes the session of it",
    ("palette-ui", "response_column"): "a function takes the session of it",
    ("soup", "recipe"): "another function: `soup.read_recipe`",
    ("soup", "grid"): "another function: `soup.simplex_grid`, whose result is `weights`",
    ("soup", "extract"): "another function: `soup.extract_adapter`",
    ("soup", "dry_run"): "another function: `soup.plan.make`",
    ("train grpo", "palette"): "a function takes the values and the λ in it",
    ("train ppo", "palette"): "a function takes the values and the λ in it",
    ("soup-front", "grid"): "another function: `soup.simplex_grid`, whose result is `rho`",
}
CHOSEN_FOR_THE_USER = {"n", "max_new_tokens", "seed", "out"}  # a function requires them


def commands(group=None, before=""):
    for name, one in (group or typer.main.get_group(app)).commands.items():
        yield from commands(one, f"{name} ") if hasattr(one, "commands") else [(before + name, one)]


COMMANDS = dict(commands())


def parameters(name):
    """(name, option as shown, default) of each parameter of a command."""
    shown = {one.name: one.opts[0] for one in COMMANDS[name].params}
    for one in inspect.signature(COMMANDS[name].callback).parameters.values():
        if one.name not in ("context", "as_json", "quiet"):
            default = one.default.value if isinstance(one.default, Enum) else one.default
            yield one.name, shown[one.name], default


def test_every_command_is_compared():
    assert FUNCTIONS.keys() == COMMANDS.keys()
    known = {(name, parameter) for name in COMMANDS for parameter, _, _ in parameters(name)}
    assert {*OTHER_NAMES, *OTHER_DEFAULTS, *COMMAND_LINE_ONLY} <= known


@pytest.mark.parametrize("command", FUNCTIONS)
def test_an_option_is_a_parameter_of_the_same_name_and_default(command):
    signatures = [inspect.signature(function).parameters for function in FUNCTIONS[command]]
    for name, shown, default in parameters(command):
        assert shown in (name, "-n", f"--{name.rstrip('_').replace('_', '-')}")
        if (command, name) in COMMAND_LINE_ONLY:
            continue
        target = OTHER_NAMES.get((command, name), name)
        targets = [one[target].default for one in signatures if target in one]
        assert targets, f"no function of {command} has {target}"
        for other in targets:
            if other is inspect.Parameter.empty:  # on the command line, another option may stand in for it
                same = default in (inspect.Parameter.empty, None) or name in CHOSEN_FOR_THE_USER
            else:
                same = default == (None if other == () else other)
            assert same or (command, name) in OTHER_DEFAULTS, f"{name} is {default!r}, in Python {other!r}"


@pytest.mark.parametrize("function", [Sampler.sample, ops.sample_tokens])
def test_sampling_options_have_one_default(function):
    taken = inspect.signature(function).parameters
    for field in fields(SamplingSettings):
        if field.name in taken and taken[field.name].default is not inspect.Parameter.empty:
            assert taken[field.name].default == field.default, field.name


def test_the_options_that_are_passed_on_are_those_of_sample():
    taken = inspect.signature(Sampler.sample).parameters.values()
    named = {one.name for one in taken if one.kind is inspect.Parameter.KEYWORD_ONLY}
    assert named == RequestOptions.__annotations__.keys()
    assert {one.name for one in taken if one.default is inspect.Parameter.empty} - {"self", "prompts", "template"} == (
        RequestOptions.__required_keys__
    )


@pytest.mark.parametrize("job", ["Align", "Distill", "DPO", "GRPO", "PPO", "Reward"])
def test_the_keywords_of_a_job_are_its_settings(job):
    keywords = get_type_hints(getattr(jobs, f"{job}Options"))
    assert keywords == {name: get_type_hints(getattr(jobs, f"{job}Settings"))[name] for name in keywords}
    assert keywords.keys() == {one.name for one in fields(getattr(jobs, f"{job}Settings"))}


FORMER = [
    ("sample", "--engine", "--backend"),
    ("pareto", "--lambdas", "--n-lam"),
    ("pareto", "--n-lambda", "--n-lam"),
    ("pareto", "--n_lambda", "--n-lam"),
    ("train ppo", "--kl-coef", "--init-kl-coef"),
    ("train ppo", "--data", "--prompts"),
    ("train ppo", "--data_name", "--prompts"),
    ("train ppo", "--kl_coef", "--init-kl-coef"),
    ("train ppo", "--mini_batch_size", "--mini-batch-size"),
    *(
        (f"train {kind}", former, today)
        for kind in ("dpo", "ppo", "reward")
        for former, today in (
            ("--model_name", "--model"),
            ("--save_path", "--out"),
            ("--lam_list", "--lam"),
            ("--nepoch", "--epochs"),
            ("--learning_rate", "--learning-rate"),
            ("--batch_size", "--batch-size"),
            ("--gradient_accumulation_steps", "--gradient-accumulation-steps"),
        )
    ),
    *((f"train {kind}", "--value_list", "--values") for kind in ("ppo", "reward")),
    *((f"train {kind}", "--data_name", "--data") for kind in ("dpo", "reward")),
]


def given(command, *words):
    with COMMANDS[command].make_context(command, [*words], resilient_parsing=True) as context:
        return context.params


@pytest.mark.parametrize(("command", "former", "today"), FORMER)
def test_a_former_name_is_accepted_and_not_shown(command, former, today):
    shown = {name for one in COMMANDS[command].params for name in (*one.opts, *one.secondary_opts)}
    assert today in shown and former not in shown
    value = "vllm" if today == "--backend" else "7"
    assert given(command, former, value) == given(command, today, value) != given(command)


CHOICES = [
    (cli.Method, {"resample", *RESAMPLE_METHODS} - {"multinomial"}),  # two names of one
    (cli.Drawing, ["whole", *tilted.KINDS]),
    (cli.Backend, [*backend.BACKENDS, "vllm"]),
    (train.How, pairs.METHODS),
]


@pytest.mark.parametrize(("choices", "known"), CHOICES)
def test_choices_are_those_of_python(choices, known):
    assert {one.value for one in choices} == set(known)


def test_the_former_engine_is_a_choice_of_backend():
    assert given("sample", "--engine", "fastalign") == given("sample", "--backend", "auto")


@pytest.mark.parametrize(
    ("command", "word", "name"), [("palette-ui", "--no_browser", "browser"), ("sample", "--no_chat", "chat")]
)
def test_a_negated_option_may_have_underscores(command, word, name):
    assert given(command, word)[name] is False and given(command)[name] is True
