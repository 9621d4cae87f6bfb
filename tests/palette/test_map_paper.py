import json
import sys

import numpy as np
import pytest
from fastalign.bench import map_paper
from test_palette import samples

from fastalign.palette import solve


def test_best_of_kl_and_its_inverse():
    np.testing.assert_allclose(
        [map_paper.best_of_kl(n) for n in (4, 16, 64, 256, 1024)], [0.64, 1.84, 3.17, 4.55, 5.93], atol=6e-3
    )
    assert [map_paper.samples_for(map_paper.best_of_kl(n)) for n in (2, 3, 16, 1000)] == [2, 3, 16, 1000]
    assert map_paper.samples_for(map_paper.best_of_kl(16) + 1e-9) == 17 and map_paper.samples_for(0.0) == 1


def test_reach_stops_where_the_kl_is_used_up():
    rewards = samples(400, 3).astype(np.float32)
    mean = rewards.mean(axis=0, dtype=float)
    palette = mean + 1.2 * rewards.std(axis=0)
    t = map_paper.reach(rewards, palette, 4, 1.0)
    assert 0.1 < t < 1
    assert solve(rewards, mean + t * (palette - mean)).kl == pytest.approx(map_paper.best_of_kl(4), abs=1e-3)
    assert map_paper.reach(rewards, mean + 0.05, 1024, 1.0) == 1.0


def test_the_command(tmp_path, monkeypatch, capsys):
    data = tmp_path / "rewards.npz"
    np.savez(
        data,
        values=np.array(["humor", "helpful", "harmless"]),
        tiny=samples(60, 3).astype(np.float32),
        tiny_prompt=np.arange(60),
    )
    monkeypatch.setattr(map_paper, "QUANTILES", (50, 99))
    monkeypatch.setattr(map_paper, "BUDGET_SECONDS", 0.1)
    monkeypatch.setattr(sys, "argv", ["map_paper", "--data", str(data), "--out", str(tmp_path / "results")])
    map_paper.main()
    rows = json.loads((tmp_path / "results" / "map_paper.json").read_text())["models"]["tiny"]
    assert rows["50"]["feasible"] and rows["50"]["lp_slack"] > 0 and len(rows["50"]["lambda"]) == 3
    assert not rows["99"]["feasible"] and rows["99"]["lp_slack"] < 0 < rows["99"]["scaling"] < 1
    assert rows["50"]["peers"]["L-BFGS-B"]["residual"] < 1e-5
    written = (tmp_path / "MAP_PAPER.md").read_text()
    for name in ("front", "region", "ess"):
        assert (tmp_path / "results" / f"map_paper_tiny_{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "| tiny | HHH-50 | yes |" in written and "| tiny | HHH-99 | out of reach |" in written
    assert "tiny HHH-99: infeasible" in capsys.readouterr().out
