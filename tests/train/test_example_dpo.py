"""examples/dpo.py at small size: it trains, measures and saves."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from tiny import tiny_folder

from fastalign.data import preferences

SCRIPT = Path(__file__).parents[2] / "examples" / "dpo.py"


@pytest.mark.parametrize("lora", [False, True])
def test_the_script_trains(tmp_path, lora, capsys):
    spec = importlib.util.spec_from_file_location("example_dpo", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    model = tiny_folder(tmp_path / "model", chat=lora, scale=2.0)
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in preferences.bundled(40, rule="length")))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        trainer = script.main([
            "--model_name_or_path", str(model), "--dataset_name", str(data), "--output_dir", str(tmp_path / "out"),
            "--learning_rate", "2e-3", "--max_steps", "8", *(["--use_peft", "--lora_r", "2"] if lora else []),
        ])  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3) and losses[-1] < losses[0]
    assert "held out: loss" in capsys.readouterr().out
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    assert (tmp_path / "out" / name).is_file()
