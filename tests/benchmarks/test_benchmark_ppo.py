"""PPO: both sides compute the same, take turns, and their memory and learning are reported."""

import contextlib
import json
import math
import sys
from pathlib import Path

import ppo
import ppo_learning
import ppo_memory
import pytest
import torch
from common import models as random_models
from common.memory import BenchmarkError
from common.results import read_runs, write_run
from sides import models
from sides.equality import compare, stored
from sides.job import Job, set_biases
from sides.ours import Ours
from sides.running import SCRIPTS, peer_versions, running
from sides.side import plain_name

from instructgpt_hf.models.loading import load_policy, load_tokenizer


class TestPPO:
    @pytest.fixture
    def job(self, small_model, tmp_path):
        """Four prompts, two of them in a minibatch, for the small model."""
        folder = models.prepare(small_model, "full", "float32", tmp_path / "models")
        prompts = models.make_prompts(4, 2, 5, load_tokenizer(folder / "policy"), 64)
        sizes = dict(episodes=4, minibatch=2, micro_batch=1, completion=6, rollout_batch=2)
        shared = dict(train="full", dtype="float32", cuda=False, threads=1)
        return Job(folder=str(folder), prompts=prompts, biases={"0": -1e4}, **shared, **sizes)

    def test_prompts_spread_evenly_and_hold_no_special_token(self, tokenizer):
        prompts = models.make_prompts(5, 8, 16, tokenizer, 64)
        assert [len(prompt) for prompt in prompts] == [8, 10, 12, 14, 16]
        assert min(map(min, prompts)) > 2

    def test_expected_length_is_that_of_the_truncated_geometric_distribution(self):
        """With probability p of EOS at every token: (1 - (1-p)^T) / p."""
        chance, longest = 0.1, 20
        margins = torch.full((3, longest), math.log(1000.0))
        bias = math.log(1000.0) + math.log(chance / (1 - chance))
        mean = (1 - (1 - chance) ** longest) / chance
        assert models.expected_length(margins, bias) == pytest.approx(mean, rel=1e-6)
        assert models.bias_for_mean(margins, mean) == pytest.approx(bias, rel=1e-6)

    @pytest.mark.parametrize("mean", [None, 10.0])
    def test_bias_gives_the_lengths_asked_for(self, job, mean):
        """200 sampled answers of at most 30 tokens; 10 lies within 4 standard errors of their mean."""
        folder = Path(job.folder)
        tokenizer = load_tokenizer(folder / "policy")
        found = models.biases(folder, "float32", job.prompts, 30, mean)
        policy = set_biases(load_policy(folder / "policy", tokenizer), found)
        ids = torch.tensor([job.prompts[-1]] * 200)
        torch.manual_seed(0)
        answers = policy.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, max_new_tokens=30
        )[:, ids.shape[1] :]
        lengths = torch.tensor([answer.index(1) + 1 if 1 in answer else 30 for answer in answers.tolist()]).float()
        if mean is None:
            assert lengths.min() == 30
        else:
            assert abs(lengths.mean() - mean) < 4 * lengths.std() / 200**0.5

    def test_names_are_those_without_adapters(self):
        assert plain_name("policy.base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight") == (
            plain_name("policy.model.layers.0.mlp.up_proj.lora_A.default.weight")
        )
        assert plain_name("value_model.base_model.model.score.modules_to_save.default.weight") == (
            plain_name("value_model.score.modules_to_save.default.weight")
        )

    def test_this_side_records_what_is_compared(self, job, tmp_path):
        """Two steps on stored answers; a record equals itself, and not one of other answers."""
        tokenizer = load_tokenizer(Path(job.folder) / "policy")
        records = []
        for ends in (True, False):
            changed = stored(job.prompts, 6, ends, tokenizer, 64)
            lengths = [len(answer) for answer in changed["completions"]]
            assert (min(lengths), max(lengths)) == ((1, 6) if ends else (6, 6))
            assert [answer[-1] == 1 for answer in changed["completions"]] == [ends] * 3 + [False]
            record = str(tmp_path / f"{ends}.pt")
            one = Job(**{**vars(job), **changed, "record": record, "learning_rate": 0.1})
            Ours().check(one, str(tmp_path / "work"))
            records.append(torch.load(record))
        assert [len(record["steps"]) for record in records] == [2, 2]
        assert records[0]["scalars"]["kl"] != 0, "the policy must differ from its reference"
        differences = compare(records[0], records[0], whole=True)
        assert max(differences.values()) == 0
        assert {"logps", "reference", "returns", "value_loss", "policy_gradient_2"} <= differences.keys()
        with pytest.raises(BenchmarkError, match=r"same thing.*logps"):
            compare(*records, whole=True)

    def test_comparison_may_leave_out_the_value_model(self):
        def record(value):
            tensors = {"logps": torch.tensor([[3.0, 4.0]])}
            steps = [{"policy.a": torch.ones(2), "value_model.a": torch.tensor([value])}]
            return {
                "tensors": tensors,
                "scalars": {"kl": 1.0, "policy_loss": 1.0, "value_loss": value},
                "steps": steps,
            }

        assert "value_loss" not in compare(record(1.0), record(2.0), whole=False)
        with pytest.raises(BenchmarkError, match=r"value_loss 1\.0e\+00, value_model_gradient_1 1\.0e\+00"):
            compare(record(1.0), record(2.0), whole=True)
        other = record(1.0)
        other["steps"][0]["policy.b"] = torch.ones(1)
        with pytest.raises(BenchmarkError, match=r"different parameters: \['policy.b'\]"):
            compare(record(1.0), other, whole=True)

    @pytest.fixture
    def fake_sides(self, monkeypatch):
        """Sides that need no process: TRL takes 3 s and 900 MiB, this package 2 s and 400 MiB, 100 MiB are models."""
        turns = []

        class Fake:
            def __init__(self, name, job):
                self.name, self.job = name, job

            def iterate(self):
                turns.append(self.name)
                trl = self.name == "trl"
                seconds = (3.0 if trl else 2.0) + (self.job.rollout_batch == 1)
                peak = 900.0 if trl else 400.0
                return {"seconds": seconds, "processor_seconds": seconds, "peak_mib": peak, "mean_length": 5.0}

        @contextlib.contextmanager
        def running(name, python, job):
            yield Fake(name, job), {"held_mib": 100.0, "loading_mib": 150.0}

        monkeypatch.setattr(ppo, "running", running)
        return turns

    def test_sides_take_turns(self, fake_sides, job):
        found = ppo.measure_case({"trl": "a", "ours": "b"}, job, [ppo.sizes("1:2"), ppo.sizes("2:2")], rounds=2)
        assert fake_sides == ["trl", "trl"] + ["trl", "ours"] * 3
        assert [item["sizes"]["rollout_batch"] for item in found["peer_sizes"]] == [2, 1]
        assert found["seconds"]["trl"]["all"] == [3.0, 3.0] and found["times_faster"]["median"] == 1.5
        assert found["memory_of_peer"] == pytest.approx(4 / 9)
        assert found["memory_above_models_of_peer"] == pytest.approx(3 / 8)

    def test_measures_into_json_chart_and_table(self, fake_sides, small_model, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(ppo, "check", lambda pythons, job: {"full length": {"logps": 1e-6}})
        monkeypatch.setattr(ppo, "peer_versions", lambda python: {"trl": "1.12.0"})
        path = tmp_path / "found.json"
        words = f"--peer_python p --model {small_model} --episodes 4 --minibatch 2 --prompt 3 5 --completion 9"
        words += " --sizes 2:1 --peer_sizes 4:2 --rounds 1"
        ppo.main([*words.split(), "--output", str(path)])
        runs = json.loads(path.read_text())["runs"]
        assert all(run["peer_versions"] == {"trl": "1.12.0"} and run["machine"]["threads"] >= 1 for run in runs)
        cases = {(run["train"], run["lengths"]): run for run in runs}
        assert set(cases) == {(train, lengths) for train in ("full", "lora") for lengths in ("equal", "varying")}
        case = cases["lora", "varying"]
        assert case["optimizer_steps"] == 2 and case["prompt"] == [3, 5]
        assert cases["lora", "equal"]["biases"]["1"] == -1e4 < case["biases"]["1"]
        ppo.main(["--output", str(path), "--draw"])
        assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        assert "| 3 s | 2 s | 1.50 (1.50) | 900 MiB | 400 MiB | 0.44 (0.38) |" in capsys.readouterr().out

    def test_a_side_that_ends_says_why(self, job, tmp_path, monkeypatch):
        script = tmp_path / "broken.py"
        script.write_text("import sys; sys.exit('no such thing')")
        monkeypatch.setitem(SCRIPTS, "ours", str(script))
        with pytest.raises(BenchmarkError, match="no such thing"), running("ours", sys.executable, job):
            pass

    def test_a_peer_of_another_version_is_refused(self):
        with pytest.raises(BenchmarkError, match=r"the peer is trl 1\.12\.0"):
            peer_versions(sys.executable)

    def test_what_needs_a_gpu_is_skipped_and_says_so(self, monkeypatch, tmp_path, capsys):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        words = ["--peer_python", "p", "--model", "random-7b", "--train", "qlora"]
        ppo.main([*words, "--output", str(tmp_path / "none.json")])
        assert "needs a GPU" in capsys.readouterr().out
        assert not list(tmp_path.glob("none*"))


class TestPPOMemory:
    def test_random_models_are_written_in_shards(self, monkeypatch, tmp_path):
        monkeypatch.setattr(random_models, "SHARD_SIZE", "50KB")
        shape = dict(vocab_size=1100, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2)
        monkeypatch.setitem(random_models.RANDOM, "random-small", shape)
        folder = models.prepare("random-small", "lora", "float32", tmp_path / "models")
        assert len(list((folder / "base").glob("*.safetensors"))) > 1
        policy = load_policy(folder / "policy", load_tokenizer(folder / "policy"))
        weights = {name: item for name, item in policy.get_base_model().named_parameters() if "lora" not in name}
        for name, weight in weights.items():
            deviation = weight.std().item()
            assert deviation == (0.0 if "norm" in name else pytest.approx(0.02, rel=0.2)), name

    def test_measures_into_json_chart_and_table(self, small_model, tmp_path, capsys):
        path = tmp_path / "found.json"
        words = f"--model {small_model} --episodes 4 --minibatch 2 --sizes 2:1 --prompt 5 5 --completion 4"
        ppo_memory.main([*words.split(), "--output", str(path)])
        (run,) = json.loads(path.read_text())["runs"]
        assert run["train"] == "qlora" and len(run["iterations"]) == 2
        assert run["peak_mib"] == max(item["peak_mib"] for item in run["iterations"]) >= run["models_mib"] > 0
        ppo_memory.main(["--output", str(path), "--draw"])
        assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        assert "| QLoRA | 5, 4 | 4, 2 and 1 |" in capsys.readouterr().out


class TestPPOLearning:
    def test_summary_takes_the_end_of_the_curves(self):
        """Rewards 0..9, the last five average 7; the other side is 1 and 3 higher: 2, and Student's t 12.706 x 1."""

        def curve(side, seed, more, seconds):
            points = [{"reward": place + more, "gold": 0.0, "kl": 1.0} for place in range(10)]
            return {"side": side, "seed": seed, "points": points, "seconds": seconds}

        curves = [
            curve("trl", 0, 0, 30.0),
            curve("ours", 0, 1, 20.0),
            curve("trl", 1, 0, 30.0),
            curve("ours", 1, 3, 10.0),
        ]
        summary = ppo_learning.summarise([*curves, curve("trl", 2, 5, 1.0)])
        assert summary["seeds"] == [0, 1] and summary["trl"]["reward"]["mean"] == 7
        difference = summary["ours_minus_trl"]["reward"]
        assert (difference["mean"], difference["high"]) == pytest.approx((2, 2 + 12.706))
        assert summary["times_faster"] == [1.5, 3.0]

    def test_picture_and_table(self, tmp_path):
        curves = []
        for side, more in (("trl", 0.0), ("ours", 1.0)):
            points = [
                {"episodes": 8 * place, "seconds": float(place), "reward": more, "gold": more, "kl": 0.5}
                for place in range(6)
            ]
            curves += [{"side": side, "seed": seed, "points": points, "seconds": 6.0 - more} for seed in (0, 1)]
        path = tmp_path / "found.json"
        run = {"recipe": "tiny-cpu", "curves": curves, "summary": ppo_learning.summarise(curves)}
        write_run(path, run, same=("recipe",))
        ppo_learning.draw(read_runs(path), chart := path.with_suffix(".png"))
        assert chart.read_bytes().startswith(b"\x89PNG")
        assert "| processor time | 6 s | 5 s | 1.20 to 1.20 times faster |" in ppo_learning.table(read_runs(path))
