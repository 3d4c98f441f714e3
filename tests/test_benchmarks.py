"""The benchmarks run, refuse to time what is not equal, and the documentation quotes what they found."""

import argparse
import contextlib
import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks"
RESULTS = sorted((FOLDER / "results").glob("*.json"))


@pytest.fixture
def script(monkeypatch):
    """Imports a script of the folder, which finds its neighbours as when it is run."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


@pytest.fixture
def small_model(make_policy, tokenizer, tmp_path):
    folder = tmp_path / "model"
    make_policy().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


class TestRewardModel:
    @pytest.fixture
    def reward_model(self, script, monkeypatch):
        """The script; memory, which takes processes of their own, is not measured."""
        module = script("reward_model")
        seconds = {2: 3.0, 3: 1.0, 6: 2.0}
        monkeypatch.setattr(
            module, "probe", lambda setup, case, name, size: {"seconds": seconds[size], "peak_mib": 8.0 * size}
        )
        return module

    @pytest.fixture
    def setup(self, script, small_model):
        return script("contenders").Setup(small_model, "full", "float32", cuda=False, threads=1)

    def test_measures_equal_contenders_into_json_chart_and_table(self, reward_model, small_model, tmp_path, capsys):
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

    def test_nothing_is_timed_if_one_side_is_wrong(self, reward_model, script, setup, monkeypatch):
        contenders = script("contenders")
        right = contenders.pairs

        def one_pair_swapped(rows):
            first, *others = right(rows)
            return [{"chosen_ids": first["rejected_ids"], "rejected_ids": first["chosen_ids"]}, *others]

        monkeypatch.setattr(contenders, "pairs", one_pair_swapped)
        monkeypatch.setattr(reward_model.common, "interleave", lambda *_: pytest.fail("timed"))
        with pytest.raises(reward_model.BenchmarkError, match="do not compute the same thing"):
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
    def test_comparison_sees(self, reward_model, loss, gradients, message):
        vectors = lambda values: {name: torch.tensor(item) for name, item in values.items()}  # noqa: E731
        reference = (0.7, vectors({"a": [3.0], "b": [4.0]}))
        with pytest.raises(reward_model.BenchmarkError, match=message):
            reward_model.compare(reference, (loss, vectors(gradients)), 1e-3)
        # |(0, 0.1)| / |(3, 4)|
        found = reward_model.compare(reference, (0.7, vectors({"a": [3.0], "b": [4.1]})), 0.1)
        assert found["gradient"] == pytest.approx(0.02, rel=1e-5) and found["loss"] == 0

    def test_memory_is_above_what_the_process_held(self, script):
        memory = script("common").PeakMemory(cuda=False)
        memory.start()
        block = torch.ones(64 * 2**20)  # 256 MiB, much more than the system takes back meanwhile
        del block
        assert 128 < memory.peak_mib() < 300

    def test_a_probe_prints_one_line(self, reward_model, setup, capsys):
        request = {"setup": vars(setup), "case": {"completions": 2, "prompt": 3, "completion": 2, "prompts": 1}}
        reward_model.answer_probe(json.dumps({**request, "name": "shared_prefix", "micro_batch": 1}))
        found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
        assert found["seconds"] > 0 and math.isfinite(found["peak_mib"])

    def test_what_needs_a_gpu_is_skipped_and_says_so(self, reward_model, monkeypatch, tmp_path, capsys):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        reward_model.main(["--model", "random-1b", "--train", "qlora", "--output", str(tmp_path / "none.json")])
        assert "needs a GPU" in capsys.readouterr().out
        assert not list(tmp_path.glob("none*"))


RANKED = {"prompt_ids": [5], "completion_ids": [[6, 1], [7, 1], [8, 1]], "ranks": [2, 1, 2]}


class TestOverfitting:
    @pytest.fixture
    def overfitting(self, script):
        return script("overfitting")

    def test_pairs_are_the_strict_ones_better_first(self, overfitting):
        found = overfitting.as_pairs([RANKED])
        assert [row["completion_ids"] for row in found] == [[[7, 1], [6, 1]], [[7, 1], [8, 1]]]
        assert all(row["ranks"] == [1, 2] and row["prompt_ids"] == [5] for row in found)

    def test_accuracy_over_all_pairs(self, overfitting):
        """Three pairs of the first prompt: right, right, equal scores; two of the second, both wrong."""
        found = argparse.Namespace(
            predictions=[[3.0, 1.0, 1.0], [0.0, 0.0, 5.0]], label_ids=[[1, 2, 3], [1, 1, 2]], inputs=None
        )
        assert overfitting.accuracy(found) == {"accuracy": 2.5 / 5}

    def test_a_prompt_is_on_one_side_only(self, overfitting, tmp_path):
        rows = [{"prompt": f"p{index % 7}", "completions": [f"a{index}", "b"], "ranks": [1, 2]} for index in range(21)]
        path = tmp_path / "rankings.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        train, test = overfitting.file_rows(path)
        assert len(train) + len(test) == 21 and len(test) == 3
        assert not set(train["prompt"]) & set(test["prompt"])

    def test_end_of_a_pass(self, overfitting):
        losses = [0.7, 0.5, 0.6, 0.4, 0.9]
        points = [
            {"pass": place / 2, "held_out_loss": loss, "held_out_accuracy": 0.6, "training_loss": 0.3}
            for place, loss in enumerate(losses)
        ]
        first, second = (overfitting.at_pass(points, number) for number in (1, 2))
        assert (first["held_out_loss"], first["gap"], first["rise"]) == pytest.approx((0.6, 0.3, 0.1))
        assert (second["held_out_loss"], second["gap"], second["rise"]) == pytest.approx((0.9, 0.6, 0.5))

    def test_summary_pairs_the_arms_by_seed(self, overfitting):
        """Differences 0.1 and 0.3: mean 0.2, and Student's t for two runs, 12.706 x 0.1."""

        def curve(arm, seed, loss):
            point = {"pass": 1.0, "held_out_loss": loss, "held_out_accuracy": 0.5, "training_loss": 0.5}
            return {"arm": arm, "seed": seed, "learning_rate": 0.1, "points": [point]}

        curves = [curve("rankings", 0, 0.5), curve("pairs", 0, 0.6), curve("rankings", 1, 0.9), curve("pairs", 1, 1.2)]
        (entry,) = overfitting.summarise([*curves, curve("rankings", 2, 9.0)], passes=1)
        assert entry["seeds"] == [0, 1]
        found = entry["pairs_minus_rankings"]["held_out_loss"]
        assert (found["mean"], found["high"]) == pytest.approx((0.2, 0.2 + 1.2706), rel=1e-4)

    def test_runs_both_arms_on_a_file(self, overfitting, small_model, tmp_path, capsys):
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


class TestPtxGamma:
    @pytest.fixture
    def ptx_gamma(self, script):
        return script("ptx_gamma")

    def test_runs_what_is_missing_and_draws(self, ptx_gamma, script, small_model, tmp_path, capsys, monkeypatch):
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

    def test_gamma_in_token_means(self, script):
        """With sums a text of 65 tokens has 64 terms, and an answer of 16 tokens 16."""
        run = {"start": {"mean_length": 16.0}, "settings": {"ptx_max_length": 65}}
        found = [
            script("ptx_gamma_report").in_token_means({"gamma": 2.0, "reductions": name}, run)
            for name in ("mean/mean", "sum/sum", "sum/mean", "mean/sum")
        ]
        assert found == [2.0, 8.0, 0.125, 128.0]

    def test_a_reward_for_short_words(self, script):
        plain_words = script("ptx_gamma_bench").plain_words
        assert plain_words(["I am 24, hi!", "", [{"role": "assistant", "content": "four"}]]) == [-5 / 3, -12.0, -4.0]


class TestPPO:
    @pytest.fixture
    def ppo(self, script):
        return script("ppo")

    @pytest.fixture
    def job(self, script, small_model, tmp_path):
        """Four prompts, two of them in a minibatch, for the small model."""
        models = script("ppo_models")
        folder = models.prepare(small_model, "full", "float32", tmp_path / "models")
        prompts = models.make_prompts(4, 2, 5, models.load_tokenizer(folder / "policy"), 64)
        sizes = dict(episodes=4, minibatch=2, micro_batch=1, completion=6, rollout_batch=2)
        shared = dict(train="full", dtype="float32", cuda=False, threads=1)
        return script("ppo_side").Job(folder=str(folder), prompts=prompts, biases={"0": -1e4}, **shared, **sizes)

    def test_prompts_spread_evenly_and_hold_no_special_token(self, script, tokenizer):
        prompts = script("ppo_models").make_prompts(5, 8, 16, tokenizer, 64)
        assert [len(prompt) for prompt in prompts] == [8, 10, 12, 14, 16]
        assert min(map(min, prompts)) > 2

    def test_expected_length_is_that_of_the_truncated_geometric_distribution(self, script):
        """With probability p of EOS at every token: (1 - (1-p)^T) / p."""
        models = script("ppo_models")
        chance, longest = 0.1, 20
        margins = torch.full((3, longest), math.log(1000.0))
        bias = math.log(1000.0) + math.log(chance / (1 - chance))
        mean = (1 - (1 - chance) ** longest) / chance
        assert models.expected_length(margins, bias) == pytest.approx(mean, rel=1e-6)
        assert models.bias_for_mean(margins, mean) == pytest.approx(bias, rel=1e-6)

    @pytest.mark.parametrize("mean", [None, 10.0])
    def test_bias_gives_the_lengths_asked_for(self, script, job, mean):
        """200 sampled answers of at most 30 tokens; 10 lies within 4 standard errors of their mean."""
        models, side = script("ppo_models"), script("ppo_side")
        folder = Path(job.folder)
        tokenizer = models.load_tokenizer(folder / "policy")
        found = models.biases(folder, "float32", job.prompts, 30, mean)
        policy = side.set_biases(models.load_policy(folder / "policy", tokenizer), found)
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

    def test_names_are_those_without_adapters(self, script):
        plain = script("ppo_side").plain_name
        assert plain("policy.base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight") == (
            plain("policy.model.layers.0.mlp.up_proj.lora_A.default.weight")
        )
        assert plain("value_model.base_model.model.score.modules_to_save.default.weight") == (
            plain("value_model.score.modules_to_save.default.weight")
        )

    def test_this_side_records_what_is_compared(self, script, ppo, job, tmp_path):
        """Two steps on stored answers; a record equals itself, and not one of other answers."""
        models, ours, side = script("ppo_models"), script("ppo_ours"), script("ppo_side")
        tokenizer = models.load_tokenizer(Path(job.folder) / "policy")
        records = []
        for ends in (True, False):
            changed = ppo.stored(job.prompts, 6, ends, tokenizer, 64)
            lengths = [len(answer) for answer in changed["completions"]]
            assert (min(lengths), max(lengths)) == ((1, 6) if ends else (6, 6))
            assert [answer[-1] == 1 for answer in changed["completions"]] == [ends] * 3 + [False]
            record = str(tmp_path / f"{ends}.pt")
            one = side.Job(**{**vars(job), **changed, "record": record, "learning_rate": 0.1})
            ours.check(one, str(tmp_path / "work"))
            records.append(torch.load(record))
        assert [len(record["steps"]) for record in records] == [2, 2]
        assert records[0]["scalars"]["kl"] != 0, "the policy must differ from its reference"
        differences = ppo.compare(records[0], records[0], whole=True)
        assert max(differences.values()) == 0
        assert {"logps", "reference", "returns", "value_loss", "policy_gradient_2"} <= differences.keys()
        with pytest.raises(ppo.BenchmarkError, match=r"same thing.*logps"):
            ppo.compare(*records, whole=True)

    def test_comparison_may_leave_out_the_value_model(self, ppo):
        def record(value):
            tensors = {"logps": torch.tensor([[3.0, 4.0]])}
            steps = [{"policy.a": torch.ones(2), "value_model.a": torch.tensor([value])}]
            return {
                "tensors": tensors,
                "scalars": {"kl": 1.0, "policy_loss": 1.0, "value_loss": value},
                "steps": steps,
            }

        assert "value_loss" not in ppo.compare(record(1.0), record(2.0), whole=False)
        with pytest.raises(ppo.BenchmarkError, match=r"value_loss 1\.0e\+00, value_model_gradient_1 1\.0e\+00"):
            ppo.compare(record(1.0), record(2.0), whole=True)
        other = record(1.0)
        other["steps"][0]["policy.b"] = torch.ones(1)
        with pytest.raises(ppo.BenchmarkError, match=r"different parameters: \['policy.b'\]"):
            ppo.compare(record(1.0), other, whole=True)

    @pytest.fixture
    def fake_sides(self, ppo, monkeypatch):
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

    def test_sides_take_turns(self, ppo, fake_sides, job):
        found = ppo.measure_case({"trl": "a", "ours": "b"}, job, [ppo.sizes("1:2"), ppo.sizes("2:2")], rounds=2)
        assert fake_sides == ["trl", "trl"] + ["trl", "ours"] * 3
        assert [item["sizes"]["rollout_batch"] for item in found["peer_sizes"]] == [2, 1]
        assert found["seconds"]["trl"]["all"] == [3.0, 3.0] and found["times_faster"]["median"] == 1.5
        assert found["memory_of_peer"] == pytest.approx(4 / 9)
        assert found["memory_above_models_of_peer"] == pytest.approx(3 / 8)

    def test_measures_into_json_chart_and_table(self, ppo, fake_sides, small_model, tmp_path, monkeypatch, capsys):
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

    def test_a_side_that_ends_says_why(self, ppo, job, tmp_path, monkeypatch):
        script = tmp_path / "broken.py"
        script.write_text("import sys; sys.exit('no such thing')")
        monkeypatch.setitem(ppo.SCRIPTS, "ours", str(script))
        with pytest.raises(ppo.BenchmarkError, match="no such thing"), ppo.running("ours", sys.executable, job):
            pass

    def test_a_peer_of_another_version_is_refused(self, ppo):
        with pytest.raises(ppo.BenchmarkError, match=r"the peer is trl 1\.12\.0"):
            ppo.peer_versions(sys.executable)

    def test_what_needs_a_gpu_is_skipped_and_says_so(self, ppo, monkeypatch, tmp_path, capsys):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        words = ["--peer_python", "p", "--model", "random-7b", "--train", "qlora"]
        ppo.main([*words, "--output", str(tmp_path / "none.json")])
        assert "needs a GPU" in capsys.readouterr().out
        assert not list(tmp_path.glob("none*"))


class TestPPOMemory:
    def test_random_models_are_written_in_shards(self, script, monkeypatch, tmp_path):
        models, random = script("ppo_models"), script("random_models")
        monkeypatch.setattr(random, "SHARD_SIZE", "50KB")
        shape = dict(vocab_size=1100, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2)
        monkeypatch.setitem(random.RANDOM, "random-small", shape)
        folder = models.prepare("random-small", "lora", "float32", tmp_path / "models")
        assert len(list((folder / "base").glob("*.safetensors"))) > 1
        policy = models.load_policy(folder / "policy", models.load_tokenizer(folder / "policy"))
        weights = {name: item for name, item in policy.get_base_model().named_parameters() if "lora" not in name}
        for name, weight in weights.items():
            deviation = weight.std().item()
            assert deviation == (0.0 if "norm" in name else pytest.approx(0.02, rel=0.2)), name

    def test_measures_into_json_chart_and_table(self, script, small_model, tmp_path, capsys):
        memory, path = script("ppo_memory"), tmp_path / "found.json"
        words = f"--model {small_model} --episodes 4 --minibatch 2 --sizes 2:1 --prompt 5 5 --completion 4"
        memory.main([*words.split(), "--output", str(path)])
        (run,) = json.loads(path.read_text())["runs"]
        assert run["train"] == "qlora" and len(run["iterations"]) == 2
        assert run["peak_mib"] == max(item["peak_mib"] for item in run["iterations"]) >= run["models_mib"] > 0
        memory.main(["--output", str(path), "--draw"])
        assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        assert "| QLoRA | 5, 4 | 4, 2 and 1 |" in capsys.readouterr().out


class TestPPOLearning:
    def test_summary_takes_the_end_of_the_curves(self, script):
        """Rewards 0..9, the last five average 7; the other side is 1 and 3 higher: 2, and Student's t 12.706 x 1."""
        report = script("ppo_learning_report")

        def curve(side, seed, more, seconds):
            points = [{"reward": place + more, "gold": 0.0, "kl": 1.0} for place in range(10)]
            return {"side": side, "seed": seed, "points": points, "seconds": seconds}

        curves = [
            curve("trl", 0, 0, 30.0),
            curve("ours", 0, 1, 20.0),
            curve("trl", 1, 0, 30.0),
            curve("ours", 1, 3, 10.0),
        ]
        summary = report.summarise([*curves, curve("trl", 2, 5, 1.0)])
        assert summary["seeds"] == [0, 1] and summary["trl"]["reward"]["mean"] == 7
        difference = summary["ours_minus_trl"]["reward"]
        assert (difference["mean"], difference["high"]) == pytest.approx((2, 2 + 12.706))
        assert summary["times_faster"] == [1.5, 3.0]

    def test_picture_and_table(self, script, tmp_path):
        report, common = script("ppo_learning_report"), script("common")
        curves = []
        for side, more in (("trl", 0.0), ("ours", 1.0)):
            points = [
                {"episodes": 8 * place, "seconds": float(place), "reward": more, "gold": more, "kl": 0.5}
                for place in range(6)
            ]
            curves += [{"side": side, "seed": seed, "points": points, "seconds": 6.0 - more} for seed in (0, 1)]
        path = tmp_path / "found.json"
        run = {"recipe": "tiny-cpu", "curves": curves, "summary": report.summarise(curves)}
        common.write_run(path, run, same=("recipe",))
        assert report.draw(path).read_bytes().startswith(b"\x89PNG")
        assert "| processor time | 6 s | 5 s | 1.20 to 1.20 times faster |" in report.table(path)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_documentation_quotes_the_result_files(path, script):
    """The table of every result file stands in docs/benchmarks.md as the script prints it, and its picture exists."""
    names = ("reward_model", "overfitting", "ptx_gamma", "ppo_learning", "ppo_memory", "ppo")
    name = next(name for name in names if path.stem.startswith(name))
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert script(f"{name}_report").table(path) in page
    assert f"results/{path.with_suffix('.png').name}" in page
    assert path.with_suffix(".png").is_file()
