"""Reward model and overfitting: what is not equal is not timed, and both arms see the same pairs."""

import argparse
import json
import math

import overfitting
import pytest
import reward_model
import torch
from common.memory import BenchmarkError, PeakMemory
from setups import reward_model as contenders
from setups.overfitting import as_pairs, file_sides


class TestRewardModel:
    @pytest.fixture(autouse=True)
    def _no_probe(self, monkeypatch):
        """Memory, which takes processes of their own, is not measured."""
        seconds = {2: 3.0, 3: 1.0, 6: 2.0}
        monkeypatch.setattr(
            reward_model, "probe", lambda setup, case, name, size: {"seconds": seconds[size], "peak_mib": 8.0 * size}
        )

    @pytest.fixture
    def setup(self, small_model):
        return contenders.Setup(small_model, "full", "float32", cuda=False, threads=1)

    def test_measures_equal_contenders_into_json_chart_and_table(self, small_model, tmp_path, capsys):
        path = tmp_path / "found.json"
        words = f"--model {small_model} --completions 3 --lengths 7:3 --prompts 2 --micro_batches 2 3 4 --rounds 2"
        reward_model.main([*words.split(), "--output", str(path)])
        (run,) = json.loads(path.read_text())["runs"]
        assert {"torch", "trl", "instructgpt_hf"} <= run["versions"].keys() and run["machine"]["threads"] >= 1
        (case,) = run["cases"]
        assert case["pairs"] == 6 and case["tokens"] == 2 * (7 + 3 * 3)
        assert case["trl_micro_batch"] == 3, "the fastest of those that divide the pairs"
        assert [item["pairs"] for item in case["trl_micro_batches"]] == [3, 2]
        # Every pair is two sequences of 10 tokens; no row is padded.
        assert case["tokens_computed"] == {"trl": 120, "per_completion": 60, "shared_prefix": 32}
        for name in ("per_completion", "shared_prefix"):
            assert 0 <= case["equality"]["measured"][name]["gradient"] < 1e-4
            slow, fast = case["seconds"]["trl"], case["seconds"][name]
            assert len(fast["all"]) == 2
            assert case["times_faster"][name]["min"] == pytest.approx(min(slow["all"]) / min(fast["all"]), rel=1e-3)
        reward_model.main(["--output", str(path), "--draw"])
        assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        assert "| 3 | 7:3 | 2 |" in capsys.readouterr().out

    def test_nothing_is_timed_if_one_side_is_wrong(self, setup, monkeypatch):
        right = contenders.pairs

        def one_pair_swapped(rows):
            first, *others = right(rows)
            return [{"chosen_ids": first["rejected_ids"], "rejected_ids": first["chosen_ids"]}, *others]

        monkeypatch.setattr(contenders, "pairs", one_pair_swapped)
        monkeypatch.setattr(reward_model, "interleave", lambda *_: pytest.fail("timed"))
        with pytest.raises(BenchmarkError, match="do not compute the same thing"):
            reward_model.run_case(setup, contenders.Case(3, 7, 3, 2), [2], rounds=1, steps=1)

    @pytest.mark.parametrize(
        ("loss", "gradients", "message"),
        [
            (0.71, {"a": [3.0], "b": [4.0]}, "same thing"),
            (0.7, {"a": [3.0], "b": [4.1]}, "same thing"),
            (0.7, {"a": [3.0], "b": [math.nan]}, "same thing"),
            (0.7, {"a": [3.0]}, "different parameters"),
        ],
    )
    def test_comparison_sees(self, loss, gradients, message):
        vectors = lambda values: {name: torch.tensor(item) for name, item in values.items()}  # noqa: E731
        reference = (0.7, vectors({"a": [3.0], "b": [4.0]}))
        with pytest.raises(BenchmarkError, match=message):
            reward_model.compare(reference, (loss, vectors(gradients)), 1e-3)
        # |(0, 0.1)| / |(3, 4)|
        found = reward_model.compare(reference, (0.7, vectors({"a": [3.0], "b": [4.1]})), 0.1)
        assert found["gradient"] == pytest.approx(0.02, rel=1e-5) and found["loss"] == 0

    def test_memory_is_above_what_the_process_held(self):
        memory = PeakMemory(cuda=False)
        memory.start()
        block = torch.ones(64 * 2**20)  # 256 MiB, much more than the system takes back meanwhile
        del block
        assert 128 < memory.peak_mib() < 300

    def test_a_probe_prints_one_line(self, setup, capsys):
        request = {"setup": vars(setup), "case": {"completions": 2, "prompt": 3, "completion": 2, "prompts": 1}}
        reward_model.answer_probe(json.dumps({**request, "name": "shared_prefix", "micro_batch": 1}))
        found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
        assert found["seconds"] > 0 and math.isfinite(found["peak_mib"])

    def test_what_needs_a_gpu_is_skipped_and_says_so(self, monkeypatch, tmp_path, capsys):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        reward_model.main(["--model", "random-1b", "--train", "qlora", "--output", str(tmp_path / "none.json")])
        assert "needs a GPU" in capsys.readouterr().out
        assert not list(tmp_path.glob("none*"))


RANKED = {"prompt_ids": [5], "completion_ids": [[6, 1], [7, 1], [8, 1]], "ranks": [2, 1, 2]}


class TestOverfitting:
    def test_pairs_are_the_strict_ones_better_first(self):
        found = as_pairs([RANKED])
        assert [row["completion_ids"] for row in found] == [[[7, 1], [6, 1]], [[7, 1], [8, 1]]]
        assert all(row["ranks"] == [1, 2] and row["prompt_ids"] == [5] for row in found)

    def test_accuracy_over_all_pairs(self):
        """Three pairs of the first prompt: right, right, equal scores; two of the second, both wrong."""
        found = argparse.Namespace(
            predictions=[[3.0, 1.0, 1.0], [0.0, 0.0, 5.0]], label_ids=[[1, 2, 3], [1, 1, 2]], inputs=None
        )
        assert overfitting.accuracy(found) == {"accuracy": 2.5 / 5}

    def test_a_prompt_is_on_one_side_only(self, tmp_path):
        rows = [{"prompt": f"p{index % 7}", "completions": [f"a{index}", "b"], "ranks": [1, 2]} for index in range(21)]
        path = tmp_path / "rankings.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        train, test = file_sides(path)
        assert len(train) + len(test) == 21 and len(test) == 3
        assert not set(train["prompt"]) & set(test["prompt"])

    def test_end_of_a_pass(self):
        losses = [0.7, 0.5, 0.6, 0.4, 0.9]
        points = [
            {"pass": place / 2, "held_out_loss": loss, "held_out_accuracy": 0.6, "training_loss": 0.3}
            for place, loss in enumerate(losses)
        ]
        first, second = (overfitting.at_pass(points, number) for number in (1, 2))
        assert (first["held_out_loss"], first["gap"], first["rise"]) == pytest.approx((0.6, 0.3, 0.1))
        assert (second["held_out_loss"], second["gap"], second["rise"]) == pytest.approx((0.9, 0.6, 0.5))

    def test_summary_pairs_the_arms_by_seed(self):
        """Differences 0.1 and 0.3: mean 0.2, and Student's t for two runs, 12.706 x 0.1."""

        def curve(arm, seed, loss):
            point = {"pass": 1.0, "held_out_loss": loss, "held_out_accuracy": 0.5, "training_loss": 0.5}
            return {"arm": arm, "seed": seed, "learning_rate": 0.1, "points": [point]}

        curves = [curve("rankings", 0, 0.5), curve("pairs", 0, 0.6), curve("rankings", 1, 0.9), curve("pairs", 1, 1.2)]
        (entry,) = overfitting.summarise([*curves, curve("rankings", 2, 9.0)], passes=1)
        assert entry["seeds"] == [0, 1]
        found = entry["pairs_minus_rankings"]["held_out_loss"]
        assert (found["mean"], found["high"]) == pytest.approx((0.2, 0.2 + 1.2706), rel=1e-4)

    def test_runs_both_arms_on_a_file(self, small_model, tmp_path, capsys):
        rows = [
            {"prompt": word, "completions": [f"{word} {other}" for other in "klmn"], "ranks": [2, 1, 3, 4]}
            for word in "abcdefghij"
        ]
        data, path = tmp_path / "rankings.jsonl", tmp_path / "found.json"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        words = f"--dataset {data} --model {small_model} --layers 1 --prompts 2 --points 2 --seeds 0 1"
        overfitting.main([*words.split(), "--learning_rates", "0.001", "--output", str(path)])
        (run,) = json.loads(path.read_text())["runs"]
        assert run["data"]["train_prompts"] == 8 and run["data"]["train_pairs"] == 48
        assert run["settings"]["pairs_per_step"] == 12
        assert len(run["curves"]) == 4
        for curve in run["curves"]:
            assert [point["pass"] for point in curve["points"]] == [0, 0.5, 1, 1.5, 2]
            assert [point["step"] for point in curve["points"]] == [0, 2, 4, 6, 8]
            assert all(math.isfinite(point["held_out_loss"]) for point in curve["points"])
        starts = {(curve["seed"], curve["points"][0]["held_out_loss"]) for curve in run["curves"]}
        assert len(starts) == 2, "both arms start from the same model and head, every seed from another head"
        ends = {curve["arm"]: curve["points"][-1]["held_out_loss"] for curve in run["curves"] if curve["seed"] == 0}
        assert ends["rankings"] != ends["pairs"]
        more = words.replace("--seeds 0 1", "--seeds 1 2").split()
        overfitting.main([*more, "--learning_rates", "0.001", "--output", str(path)])
        (run,) = json.loads(path.read_text())["runs"]
        assert sorted(curve["seed"] for curve in run["curves"]) == [0, 0, 1, 1, 2, 2], "other seeds stay"
        assert run["summary"][0]["seeds"] == [0, 1, 2]
        overfitting.main(["--output", str(path), "--draw"])
        assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        assert "| held out loss |" in capsys.readouterr().out
