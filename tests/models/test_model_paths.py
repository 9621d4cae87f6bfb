"""Causal models of transformers on every path, beside their own plain logits; all of them by `python
tools/model_sweep.py`."""

import pytest
from causal_models import model_types
from model_paths import CHECKS, sweep
from tiny import tiny_folder
from turns import by_the_day
from typer.testing import CliRunner

from fastalign.cli.main import app

# Each of another kind, and each once wrong: fused projections, masks, sinks, latent attention, states, heads, two
# calls a layer. A third of them a day.
OFTEN = (
    "gpt2", "gpt_neox", "phi3", "doge", "phimoe", "gpt_oss", "deepseek_v3", "mamba", "qwen3_5_text",
    "modernbert-decoder", "recurrent_gemma", "stablelm", "diffllama", "rwkv", "xlstm",
)  # fmt: skip
PARTS = 16  # a part of the others runs in turn, a day each


def in_turn() -> list[str]:
    return [*by_the_day(OFTEN, 3), *by_the_day([name for name in model_types() if name not in OFTEN], PARTS)]


@pytest.mark.parametrize("model_type", in_turn())
def test_every_path_is_right_or_refused_in_one_line(model_type):
    result = sweep(model_type)
    if "not built" in result:
        assert model_type not in OFTEN, result
        pytest.skip(result["not built"])
    assert {check: result[check] for check in CHECKS if not result[check].startswith(("right", "refused"))} == {}


@pytest.mark.parametrize(
    "kind, message",
    [
        (
            "llama",
            ["LlamaForCausalLM", "on the shared-prompt engine", "fused head", "packed, each prompt processed once"],
        )
    ],
)
def test_info_tells_which_path_each_part_takes(tmp_path, kind, message):
    folder = tiny_folder(tmp_path / "m", kind=kind)
    result = CliRunner().invoke(app, ["info", "--model", str(folder)])
    assert result.exit_code == 0 and all(words in result.output for words in message), result.output
