"""What is found before any model is loaded: every problem of every stage at once, by stage, setting and value."""

import random
import shutil
import types

import datasets
import numpy as np
import pytest
import torch
from helpers.stage_files import write_model, write_recipe, write_rows
from rich.console import Console
from transformers import set_seed

from instructgpt_hf import cli, pipeline
from instructgpt_hf.config.recipe import load_recipe
from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.stages import stage as stage_module
from instructgpt_hf.stages.checks import disk, hub, models
from instructgpt_hf.stages.checks import run as checks
from instructgpt_hf.stages.checks.rewards import try_function

COMMON = {"max_steps": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "use_cpu": True}
LETTERS = "efghijklmn"
ROWS = {
    "sft": [{"prompt": f"a b {word}", "completion": f"{word} d"} for word in LETTERS],
    "reward": [
        {"prompt": f"a {word}", "completions": ["c", f"d {word}", "e f g"], "ranks": [2, 1, 2]} for word in LETTERS
    ],
    "ppo": [{"prompt": f"{word} b", "completion": word * 2, "target": 1} for word in LETTERS],
}
FUNCTIONS = """
CALLS = []

def good(completions, completion, target, **kwargs):
    CALLS.append((completions, completion, target, kwargs))
    return [float(len(text)) for text in completions]

async def later(completions, **kwargs):
    return [1.0 for _ in completions]

def number(**kwargs):
    return 0.5

def nothing(**kwargs):
    return None

def short(**kwargs):
    return [1.0]

def texts(completions, **kwargs):
    return ["good" for _ in completions]

def broken(completions, answers, **kwargs):
    return [0.0 for _ in completions]

def raises(completions, **kwargs):
    return [float(text) for text in completions]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    """Data, functions, a base model, and a recipe with nothing wrong."""
    root = tmp_path_factory.mktemp("checks")
    for stage, rows in ROWS.items():
        write_rows(root / f"{stage}.jsonl", rows)
    write_rows(root / "text.jsonl", [{"text": "a b c"}, {"text": "d e"}])
    (root / "early_rewards.py").write_text(FUNCTIONS)
    base = write_model(root / "base", tokenizer)
    stages = {
        "sft": {"model_name_or_path": str(base), "prompt_template": "raw", "max_length": 32},
        "reward": {"max_length": 32},
        "ppo": {
            "generation_batch_size": 4,
            "max_completion_length": 4,
            "pretraining_dataset_name": f"{root}/text.jsonl",
            "ptx_max_length": 8,
        },
    }
    values = {stage: {**COMMON, "dataset_name": f"{root}/{stage}.jsonl", **own} for stage, own in stages.items()}
    write_recipe(root / "recipe", values)
    return root


@pytest.fixture
def run(place, tmp_path, capsys, monkeypatch):
    """Run all stages from the command line, of which none may begin; returns what was printed."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(pipeline, "train_stage", lambda _: 1 / 0)
    monkeypatch.setattr(stage_module, "train", lambda *_, **__: 1 / 0)

    def attempt(*words, code=2):
        before = sorted(tmp_path.rglob("*"))
        command = ["run", str(place / "recipe"), "--output_dir", str(tmp_path / "run"), *map(str, words)]
        assert cli.main(command) == code
        assert sorted(tmp_path.rglob("*")) == before, "something was left behind"
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return types.SimpleNamespace(out=printed.out, err=printed.err, message=" ".join(printed.err.split()))

    return attempt


def test_check_prints_what_was_found_and_does_nothing_else(run, place):
    printed = run("--check", "--ppo.reward_functions", "early_rewards:good,early_rewards:later", code=0)
    assert max(map(len, printed.out.splitlines())) <= 80
    lines = " ".join(printed.out.split())
    for found in ("base model", "llama", "10 rows", "rankings", "2 rows: text", "returned [18.0, 18.0]", "GB free"):
        assert found in lines
    assert lines.endswith("checks passed; nothing was trained.")


def test_problems_of_all_stages_come_at_once(run, place, tmp_path):
    """The case for it: without these checks, two stages are trained before the third one says what is missing."""
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": ["b", "c"], "ranks": [1, 2]}] * 9)
    printed = run(
        *("--sft.model_name_or_path", "./nope", "--reward.dataset_name", rows),
        *("--ppo.dataset_name", "nowhere/prompts.jsonl", "--ppo.reward_functions", "no_such_module:close"),
        *("--ppo.reward_model_path", f"{place}/base", "--ppo.value_model_path", "./gone"),
    )
    message = printed.message
    assert "no model was loaded" in message and printed.err.count("\n  - ") == 6
    for problem in (
        "sft.yaml: model_name_or_path: ./nope: no such folder",
        f"reward.yaml: dataset_name: rankings: {rows}: missing column 'completions' (did you mean 'completion'?)",
        "ppo.yaml: dataset_name: prompts: nowhere/prompts.jsonl: no such file or folder",
        "ppo.yaml: reward_functions = ['no_such_module:close']: these cannot be used:",
        "'no_such_module:close': there is no module 'no_such_module'",
        f"ppo.yaml: reward_model_path: {place}/base/stage.json: not found",
        "ppo.yaml: value_model_path: value model: ./gone: no such folder",
    ):
        assert problem in message


def test_wrong_columns_of_all_stages(run, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"prmpt": "a", "cmpletion": "b"}] * 9)
    words = [f"--{stage}.dataset_name={path}" for stage in ("sft", "reward", "ppo")]
    message = run(*words, "--ppo.reward_functions", "early_rewards:later").message
    for stage in ("sft", "reward", "ppo"):
        assert f"{stage}.yaml: dataset_name: " in message
    assert message.count("did you mean") >= 2


@pytest.mark.parametrize(
    ("setting", "value", "problem"),
    [
        ("sft.dataset_name", "{place}/ppo.txt", "sft.yaml: dataset_name: demonstrations: {place}/ppo.txt"),
        ("sft.dataset_name", "nobody/nothing", "sft.yaml: dataset_name: demonstrations: 'nobody/nothing'"),
        ("sft.model_name_or_path", "nobody/nothing", "sft.yaml: model_name_or_path: 'nobody/nothing' is neither"),
        ("sft.prompt_template", "chat", "sft.yaml: prompt_template: 'chat' needs a chat template"),
        ("ppo.dataset_test_split", "tst", None),  # a single file has no splits
        ("ppo.dataset_name", "{place}", "ppo.yaml: dataset_name: prompts: {place}: no train.jsonl"),
        ("ppo.pretraining_dataset_name", "{place}/sft.jsonl", "ppo.yaml: pretraining_dataset_name: pretraining: "),
        ("ppo.pretraining_dataset_text_field", "txt", "missing column 'txt' (did you mean 'text'?)"),
        ("ppo.generation_batch_size", "10", "9 prompts, fewer than generation_batch_size = 10"),
        ("ppo.max_prompt_length", "1", "every prompt is longer than max_prompt_length=1 tokens"),
        ("reward.max_length", "3", "reward.yaml: dataset_name: rankings: {place}/reward.jsonl: no ranking is left"),
        ("sft.max_length", "4", "sft.yaml: dataset_name: demonstrations: {place}/sft.jsonl: every demonstration is"),
        ("ppo.generation_batch_size", "12", "9 prompts, fewer than generation_batch_size = 12"),
        ("ppo.max_completion_length", "2048", "ppo.yaml: max_completion_length: the policy has 2048 positions"),
        ("ppo.sft_model_path", "./gone", "ppo.yaml: sft_model_path: sft stage: ./gone: no such folder"),
        (
            "ppo.extra_reward_model_paths",
            "./gone",
            "ppo.yaml: extra_reward_model_paths: reward stage: ./gone: no",
        ),
    ],
)
def test_kinds(run, place, setting, value, problem):
    value = value.format(place=place)
    words = {"10": ["--ppo.per_device_train_batch_size=5", "--ppo.max_steps=2"], "12": ["--ppo.max_steps=3"]}.get(
        value, []
    )
    if problem is None:
        assert run(f"--{setting}", value, "--check", code=0)
        return
    assert problem.format(place=place) in run(f"--{setting}", value, *words, "--check").message


def test_the_first_wrong_rows_are_named(run, tmp_path):
    rows = [{"prompt": "a", "completion": "b"}] * 3 + [{"prompt": "a", "completion": ""}] * 2
    path = write_rows(tmp_path / "rows.jsonl", rows * 9)
    message = run("--sft.dataset_name", path, "--check").message
    assert "row 3: completion: found ''" in message and "row 4: completion: found ''" in message


def test_a_template_that_refuses_the_rows_of_a_later_stage(run, place, tokenizer, tmp_path):
    """Rendered before SFT begins: its rows are fine, the prompts have a turn that the template does not take."""
    base = tmp_path / "base"
    shutil.copytree(place / "base", base)
    (base / "chat_template.jinja").write_text(
        "{% for turn in messages %}"
        "{% if turn['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
        "{{ turn['content'] }} <eos> {% endfor %}"
    )
    turns = [[{"role": "system", "content": "a"}, {"role": "user", "content": word}] for word in LETTERS]
    path = write_rows(tmp_path / "chat.jsonl", [{"prompt": prompt} for prompt in turns])
    words = ("--sft.model_name_or_path", base, "--sft.prompt_template", "chat")
    run(*words, "--check", code=0)
    message = run(*words, "--ppo.dataset_name", path).message
    assert f"ppo.yaml: dataset_name: prompts: {path}: rows that the prompt format cannot render" in message
    assert "row 0: " in message and "no system turns" in message


def test_a_missing_test_split(run, tmp_path):
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data" / "train.jsonl", ROWS["ppo"])
    message = run("--ppo.dataset_name", tmp_path / "data", "--ppo.dataset_test_split", "tst").message
    assert f"ppo.yaml: dataset_test_split: prompts: {tmp_path}/data: no tst.jsonl" in message


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("number", "reward function early_rewards:number returned 0.5 (float); expected a list with one number"),
        ("nothing", "reward function early_rewards:nothing returned None"),
        ("short", "reward function early_rewards:short returned 1 values: [1.0]"),
        ("texts", "reward function early_rewards:texts returned at index 0 'good' (str)"),
        (
            "broken",
            "broken raised TypeError: broken() missing 1 required positional argument: 'answers'",
        ),
        ("raises", "early_rewards.py, line 27: return [float(text) for text in completions])"),
    ],
)
def test_a_function_is_tried_before_models_load(run, name, problem):
    message = run("--ppo.reward_functions", f"early_rewards:{name},early_rewards:good").message
    assert "ppo.yaml: reward_functions: reward function early_rewards:" in message and problem in message


def test_a_trial_is_a_call_as_in_training(run, tmp_path):
    import early_rewards

    early_rewards.CALLS.clear()
    chat = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in ROWS["ppo"]]
    for rows, shape in ((ROWS["ppo"], str), (chat, list)):
        path = write_rows(tmp_path / f"{shape.__name__}.jsonl", rows)
        run("--check", "--ppo.dataset_name", path, "--ppo.reward_functions", "early_rewards:good", code=0)
        completions, completion, target, others = early_rewards.CALLS.pop()
        assert [type(item) for item in completions] == [shape] * 2
        assert (completion, target) == (["ee", "ff"], [1, 1])
        assert {"prompts", "completion_ids", "trainer_state", "log_extra", "log_metric"} == set(others)
        assert others["prompts"] == [row["prompt"] for row in rows[:2]]
        others["log_metric"]("name", 1.0), others["log_extra"]("name", [1, 2])


def test_a_trial_leaves_the_random_states_alone():
    def draws(completions, **_):
        return [torch.rand(()) + np.random.rand() + random.random() for _ in completions]

    set_seed(0)
    expected = _drawn()
    set_seed(0)
    try_function(draws, datasets.Dataset.from_dict({"prompt": ["a", "b"]}), None)
    assert _drawn() == expected


def _drawn():
    return torch.rand(()).item(), np.random.rand(), random.random()


def test_a_column_whose_name_is_taken(run, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{**row, "trainer_state": 1} for row in ROWS["ppo"]])
    message = run("--ppo.dataset_name", path, "--ppo.reward_functions", "early_rewards:later").message
    assert "column 'trainer_state': reward functions receive something else under this name" in message


class TestModels:
    def test_without_weights(self, run, place, tmp_path):
        shutil.copytree(place / "base", tmp_path / "base")
        (tmp_path / "base" / "model.safetensors").unlink()
        assert f"{tmp_path}/base: has no weights" in run("--sft.model_name_or_path", tmp_path / "base").message

    def test_weights_of_another_format_on_the_hub(self, place, tmp_path, monkeypatch):
        shutil.copytree(place / "base", tmp_path / "snapshot")
        (tmp_path / "snapshot" / "model.safetensors").unlink()
        files = {"pytorch_model.bin": 5}
        found = self.on_the_hub(monkeypatch, tmp_path / "snapshot", files)
        with pytest.raises(InstructGPTError, match=r"no weights \(model.safetensors\): it has pytorch_model.bin"):
            found()
        files |= {"model-00001.safetensors": 2_000_000, "model-00002.safetensors": 1_000_000, "onnx/x.safetensors": 9}
        model = found()
        assert (model.weights, model.download) == (3_000_000, 3_000_000)
        assert model.described() == "llama, 3 MB to download"

    def on_the_hub(self, monkeypatch, folder, files):
        def model_info(self, source, revision, files_metadata):
            return types.SimpleNamespace(
                siblings=[types.SimpleNamespace(rfilename=name, size=size) for name, size in files.items()]
            )

        monkeypatch.setattr(models, "base_model_folder", lambda *_, **__: folder)
        monkeypatch.setattr(models.HfApi, "model_info", model_info)
        return lambda: models.find_model("some/model", None, "model")

    @pytest.mark.parametrize(
        ("words", "problems"),
        [
            (["--use_peft"], []),
            (["--sft.use_peft", "--reward.use_peft=false"], ["reward.yaml: use_peft: this stage continues to train"]),
            (
                ["--use_peft", "--sft.lora_r=4", "--ppo.lora_r=8"],
                ["ppo.yaml: use_peft", "lora_r = 8: the adapter has 4"],
            ),
            # Which modules are linear is known once the adapter is there.
            (["--sft.use_peft", "--reward.lora_target_modules", "q_proj"], []),
            (["--reward.use_peft", "--ppo.lora_r=3"], []),  # the policy is whole
        ],
    )
    def test_adapters_that_the_run_will_leave(self, run, words, problems):
        message = run(*words, "--check", code=2 if problems else 0).message
        assert all(problem in message for problem in problems)

    def test_a_value_model_of_another_tokenizer(self, run, place, tokenizer, tmp_path):
        from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

        AutoModelForSequenceClassification.from_pretrained(place / "base", num_labels=1).save_pretrained(
            tmp_path / "v"
        )
        tokenizer.save_pretrained(tmp_path / "v")
        run("--ppo.value_model_path", tmp_path / "v", "--check", code=0)
        text = tokenizer._tokenizer.to_str().replace('"w3"', '"other"')
        changed = type(tokenizer._tokenizer).from_str(text)
        PreTrainedTokenizerFast(tokenizer_object=changed, pad_token="<pad>", eos_token="<eos>").save_pretrained(
            tmp_path / "v"
        )
        message = run("--ppo.value_model_path", tmp_path / "v", "--check").message
        assert f"ppo.yaml: value_model_path: {tmp_path}/v: has another tokenizer than the policy" in message

    @pytest.mark.parametrize(
        ("architecture", "sizes", "problem"),
        [
            ("bert", dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4), None),
            (
                "codegen",
                dict(n_embd=32, n_layer=1, n_head=4, rotary_dim=4, n_positions=32, n_ctx=32),
                "reward.yaml: model_name_or_path: {base}: transformers has no sequence classifier",
            ),
            (
                "t5",
                dict(d_model=32, d_ff=32, num_layers=1, num_heads=4),
                "sft.yaml: model_name_or_path: {base}: t5 is no",
            ),
        ],
    )
    def test_architectures(self, run, tokenizer, tmp_path, architecture, sizes, problem):
        from transformers import AutoConfig

        base = tmp_path / "base"
        AutoConfig.for_model(architecture, vocab_size=64, **sizes).save_pretrained(base)
        tokenizer.save_pretrained(base)
        (base / "model.safetensors").write_bytes(b"x")
        printed = run("--sft.model_name_or_path", base, "--check", code=2 if problem else 0)
        assert problem is None or problem.format(base=base) in printed.message


class TestPlaces:
    @pytest.mark.parametrize(
        ("name", "stage"), [("ppo-ptx", "ppo"), ("reward", "reward"), (".work", "sft"), ("evaluation", "ppo")]
    )
    def test_a_file_where_a_folder_goes(self, run, tmp_path, name, stage):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / name).touch()
        message = run().message
        assert f"{stage}: --output_dir: {tmp_path}/run/{name}: is a file where a folder of the run goes" in message

    def test_a_disk_without_room_for_the_models(self, run, place, monkeypatch):
        size = (place / "base" / "model.safetensors").stat().st_size
        monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=5 * size - 1))
        message = run("--ppo.compare_without_ptx", "false").message
        assert "the disk has" in message and "the finished models take at least" in message
        monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=5 * size))
        run("--ppo.compare_without_ptx", "false", "--check", code=0)
        run("--ppo.compare_without_ptx", "true")  # a second policy, with its value model and average

    def test_pushing_without_a_token(self, run, monkeypatch):
        assert "push_to_hub = True: offline mode is on" in run("--sft.push_to_hub", "true").message
        monkeypatch.setattr(checks.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(checks, "get_token", lambda: None)
        message = run("--ppo.push_to_hub", "true", "--ppo.ptx_coef", "0").message
        assert "ppo.yaml: push_to_hub = True: there is no token for the Hub; log in with `hf auth login`" in message

    def test_the_lab_is_looked_at_without_writing_into_the_run(self, tmp_path):
        console = Console(record=True, width=80, quiet=True)
        findings = pipeline.check(load_recipe("tiny-cpu"), tmp_path / "run", console)
        assert {item.source for item in findings} >= {"lab", "lab:prompts", "lab:pretraining"}
        assert not (tmp_path / "run").exists()


def test_one_stage_checks_its_own(run, place, tmp_path, capsys):
    folder = ["--output_dir", str(tmp_path / "run")]
    words = ["--config", str(place / "recipe"), *folder, "--dataset_name", "nowhere.jsonl"]
    assert cli.main(["ppo", *words, "--reward_functions", "early_rewards:number"]) == 2
    message = " ".join(capsys.readouterr().err.split())
    for problem in ("the sft stage has not been run here", "the reward stage has not been run here", "nowhere.jsonl"):
        assert problem in message
    assert cli.main(["sft", "--check", "--config", str(place / "recipe"), *folder]) == 0
    assert "reward" not in capsys.readouterr().out


class TestHub:
    @pytest.fixture(autouse=True)
    def no_network(self, monkeypatch):
        """A Hub behind a port where nobody listens, and waits that would be noticed."""
        for module in (hub.constants, datasets.config):
            monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub.constants, "ENDPOINT", "http://127.0.0.1:9")
        monkeypatch.setattr("time.sleep", lambda seconds: 1 / 0)

    def test_what_is_not_in_the_cache_says_why(self, run):
        words = ("--sft.model_name_or_path", "nobody/model", "--ppo.dataset_name", "nobody/data")
        printed = run(*words, "--check")
        assert " - http://127.0.0.1:9 cannot be reached (" in printed.message
        assert (
            "set HF_HOME to the folder of a cache that has all of it. - sft.yaml: model_name_or_path"
            in printed.message
        )
        assert "ppo.yaml: dataset_name: prompts: 'nobody/data'" in printed.message
        assert not hub.constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE

    def test_what_is_in_the_cache_is_enough(self, run, monkeypatch):
        monkeypatch.setattr(hub, "_named_on_hub", lambda _: True)
        assert "HF_HUB_OFFLINE=1 reads it without waiting" in run("--check", code=0).message

    def test_nobody_is_asked_for_local_files(self, run, monkeypatch):
        monkeypatch.setattr(hub, "_unreachable", lambda: 1 / 0)
        run("--check", code=0)
