"""PPO-ptx's gamma, and the documentation quotes the result files."""

import importlib
import json
import math
from pathlib import Path

import ptx_gamma
import pytest
from common.results import read_runs
from ptx_gamma import in_token_means
from setups.ptx_gamma import plain_words

ROOT = Path(__file__).parents[2]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


class TestPtxGamma:
    def test_runs_what_is_missing_and_draws(self, small_model, tmp_path, capsys, monkeypatch):
        prompts, text, path = (tmp_path / name for name in ("prompts.jsonl", "text.jsonl", "found.json"))
        prompts.write_text("".join(json.dumps({"prompt": f"a w{index % 35} b"}) + "\n" for index in range(44)))
        text.write_text(json.dumps({"text": "a b c d e f"}) + "\n" + json.dumps({"text": "g h i"}) + "\n")
        words = f"--model {small_model} --prompts {prompts} --text {text} --value_layers 1 --iterations 1 --held_out 4"
        common = [*words.split(), "--output", str(path), "--reductions", "mean/mean", "sum/sum"]
        ptx_gamma.main([*common, "--gammas", "0", "2", "--seeds", "0"])
        first = json.loads(path.read_text())["runs"][0]["points"]
        monkeypatch.setattr(ptx_gamma, "train", lambda *_: pytest.fail("an arm that is done was trained again"))
        ptx_gamma.main([*common, "--gammas", "0", "2", "--seeds", "0"])
        (run,) = json.loads(path.read_text())["runs"]
        assert run["points"] == first and len(first) == 4
        assert all(math.isfinite(value) for point in first for value in point["measured"].values())
        ratios = {(point["reductions"], point["gamma"]): point["logged"].get("grad_norm_ratio_ptx") for point in first}
        assert ratios["mean/mean", 0.0] is None and ratios["mean/mean", 2.0] > 0
        # The first iteration's policy and episodes are the same: sums weigh a text of 31 predicted tokens as much
        # more as it is longer than an answer.
        starts = {
            point["reductions"]: point["curve"]["grad_norm_ratio_ptx"][0] for point in first if point["gamma"] == 2.0
        }
        assert 31 / 16 - 0.1 < starts["sum/sum"] / starts["mean/mean"] <= 31
        ptx_gamma.main(["--output", str(path), "--draw"])
        assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        assert "| sequence sums | whitened | 0.002 | 2 |" in capsys.readouterr().out

    def test_gamma_in_token_means(self):
        """With sums a text of 65 tokens has 64 terms, and an answer of 16 tokens 16."""
        run = {"start": {"mean_length": 16.0}, "settings": {"ptx_max_length": 65}}
        found = [
            in_token_means({"gamma": 2.0, "reductions": name}, run)
            for name in ("mean/mean", "sum/sum", "sum/mean", "mean/sum")
        ]
        assert found == [2.0, 8.0, 0.125, 128.0]

    def test_a_reward_for_short_words(self):
        assert plain_words(["I am 24, hi!", "", [{"role": "assistant", "content": "four"}]]) == [-5 / 3, -12.0, -4.0]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_documentation_quotes_the_result_files(path):
    """The table of every result file stands in docs/benchmarks.md as the script prints it, and its picture exists."""
    names = ("reward_model", "overfitting", "ptx_gamma", "ppo_learning", "ppo_memory", "ppo", "log_probs")
    name = next(name for name in names if path.stem.startswith(name))
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert importlib.import_module(name).table(read_runs(path)) in page
    assert f"results/{path.with_suffix('.png').name}" in page
    assert path.with_suffix(".png").is_file()
