"""The command: fast and light help, exit codes, and nothing written when something is wrong."""

import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

import instructgpt_hf
from instructgpt_hf import cli

HEAVY = ["torch", "transformers", "trl", "peft", "datasets", "numpy", "bitsandbytes", "accelerate", "yaml", "rich"]
VERBS = ["run", "sft", "reward", "ppo", "recipes", "push", "data", "lab"]


@pytest.fixture
def pipeline(monkeypatch):
    """Stands for the pipeline and records how it is called."""
    calls = []
    module = types.ModuleType("instructgpt_hf.pipeline")
    module.run = lambda recipe, output_dir, **options: calls.append(("run", recipe, output_dir))
    module.run_stage = lambda recipe, stage, output_dir, **options: calls.append((stage, recipe, output_dir))
    monkeypatch.setitem(sys.modules, "instructgpt_hf.pipeline", module)
    monkeypatch.setattr(instructgpt_hf, "pipeline", module, raising=False)
    return calls


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Run in an empty folder, so that whatever is written shows."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def light(code):
    """The heavy modules that are loaded after running `code` in a fresh interpreter."""
    check = f"{code}\nimport sys\nprint([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.splitlines()[-1]


def test_importing_the_package_is_light():
    assert light("import instructgpt_hf") == "[]"


@pytest.mark.parametrize(
    "words", [[], ["--help"], ["--version"], *([verb, "--help"] for verb in VERBS), ["recipes", "list"]]
)
def test_help_is_light(words):
    code = (
        f"from instructgpt_hf import cli\ntry:\n    cli.main({words})\nexcept SystemExit as e:\n    assert e.code == 0"
    )
    assert light(code) == "[]"


def test_the_installed_command_answers():
    command = shutil.which("instructgpt-hf", path=str(Path(sys.executable).parent)) or pytest.skip("not installed")
    done = subprocess.run([command, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "instructgpt-hf run tiny-cpu" in done.stdout
    done = subprocess.run([command, "run", "no-such-recipe"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "\033" not in done.stderr


def test_no_argument_prints_help(capsys):
    assert cli.main([]) == 0
    assert "COMMAND" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [[verb] for verb in VERBS] + [["recipes", verb] for verb in ("list", "show", "copy")] + [["data", "inspect"]],
)
def test_every_help_has_an_example(words, capsys):
    with pytest.raises(SystemExit) as done:
        cli.main([*words, "--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert re.search(r"Example:?\s+instructgpt-hf " + " ".join(words), text)


class TestRunning:
    def test_run(self, pipeline):
        assert (
            cli.main(["run", "tiny-cpu", "--ppo.beta", "0.05", "--seed=3", "--output_dir", "out", "--use_peft"]) == 0
        )
        ((verb, recipe, output_dir),) = pipeline
        assert (verb, recipe.name, output_dir) == ("run", "tiny-cpu", Path("out"))
        assert recipe.stages["ppo"].training_args.beta == 0.05
        assert recipe.stages["ppo"].training_args.output_dir == str(Path("out") / "ppo")
        assert all(item.training_args.seed == 3 and item.model_args.use_peft for item in recipe.stages.values())

    def test_default_output_folder(self, pipeline):
        assert cli.main(["run", "tiny-cpu"]) == 0
        assert pipeline[0][2] == Path("runs") / "tiny-cpu"

    @pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
    def test_one_stage(self, pipeline, stage):
        assert cli.main([stage, "--config=tiny-cpu", "--learning_rate", "1e-3"]) == 0
        ((verb, recipe, output_dir),) = pipeline
        assert (verb, list(recipe.stages), output_dir) == (stage, [stage], Path("runs") / "tiny-cpu")
        assert recipe.stages[stage].training_args.learning_rate == 1e-3

    def test_interrupt_says_how_to_resume(self, pipeline, monkeypatch, capsys):
        def interrupted(recipe, output_dir, **options):
            raise KeyboardInterrupt

        monkeypatch.setattr(sys.modules["instructgpt_hf.pipeline"], "run", interrupted)
        assert cli.main(["run", "tiny-cpu", "--seed", "3"]) == 130
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "instructgpt-hf run tiny-cpu --seed 3" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["runn"], "runn"),
        (["run"], "RECIPE"),
        (["run", "tiny-cp"], "did you mean 'tiny-cpu'?"),
        (["run", "tiny-cpu", "--ppo.betta", "1"], "did you mean 'beta'?"),
        (["run", "tiny-cpu", "--ppo.beta", "high", "--sft.seed", "1.5"], "--sft.seed = '1.5': must be a whole number"),
        (["sft"], "--config"),
        (["ppo", "--config", "nowhere/ppo.yaml"], "not found"),
        (["recipes", "shw"], "shw"),
        (["recipes", "show", "tiny-cpu", "pppo.yaml"], "did you mean 'ppo.yaml'?"),
        (["recipes", "copy", "tiny", "x"], "no recipe"),
        (["recipes", "list", "--long"], "--long"),
        (["data", "inspect"], "DATASET"),
        (["data", "inspect", "no/such.jsonl"], "no/such.jsonl: no such file or folder"),
        (["data", "inspect", "lab:ranking"], "did you mean 'rankings'?"),
        (["data", "inspect", "lab:rankings", "--limit", "0"], "must be 1 or greater"),
        (["data", "inspect", "lab:rankings", "--limits", "1"], "--limits"),
        (["lab", "--sed", "3", "x"], "--sed"),
        (["lab", "x", "--seed", "many"], "invalid int"),
    ],
)
def test_mistakes_exit_with_2_and_write_nothing(words, message, capsys, pipeline, empty_folder):
    assert cli.main(words) == 2
    output = capsys.readouterr()
    assert message in output.err and "Traceback" not in output.err and output.out == ""
    assert pipeline == [] and list(empty_folder.iterdir()) == []


class TestRecipes:
    def test_list(self, capsys):
        assert cli.main(["recipes", "list"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines] == [
            "pythia-1.4b-6.9b",
            "qwen3-qlora-t4",
            "smollm2-135m",
            "tiny-cpu",
        ]
        assert max(map(len, lines)) <= 80

    def test_show_readme(self, capsys):
        assert cli.main(["recipes", "show", "tiny-cpu"]) == 0
        assert capsys.readouterr().out.startswith("# tiny-cpu")

    @pytest.mark.parametrize("file", ["ppo.yaml", "ppo"])
    def test_show_a_file_with_the_defaults_it_keeps(self, file, capsys):
        import yaml

        assert cli.main(["recipes", "show", "tiny-cpu", file]) == 0
        output = capsys.readouterr().out
        assert "# adam_beta2: 0.95  (App C)" in output and "# learning_rate:" not in output
        assert "# kl_target: null  (ours" in output and "# whiten_advantages: true" in output
        assert yaml.safe_load(output)["dataset_name"] == "lab:prompts"

    def test_copy_runs(self, capsys, pipeline):
        assert cli.main(["recipes", "copy", "tiny-cpu", "mine"]) == 0
        assert "instructgpt-hf run mine" in capsys.readouterr().out
        assert cli.main(["run", "mine"]) == 0
        assert pipeline[0][1].name == "mine"


class TestHelpOfAStage:
    @pytest.fixture
    def help_of(self, capsys):
        def text(stage):
            with pytest.raises(SystemExit):
                cli.main([stage, "--help"])
            return capsys.readouterr().out

        return text

    @pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
    def test_lists_every_setting_with_default_and_help(self, stage, help_of):
        from instructgpt_hf.config.settings import stage_settings

        text = help_of(stage)
        listed = dict(re.findall(r"^  --(\w+) (.*)\n      \S", text, re.M))
        assert not set(stage_settings(stage)) - set(listed)
        assert (
            listed["seed"] == "42"
            and listed["use_peft"] == "false"
            and listed["max_length" if stage != "ppo" else "beta"]
        )
        assert max(len(line) for line in text.splitlines() if " " in line.strip()) <= 82

    def test_names_the_source_of_a_default(self, help_of):
        assert "  --learning_rate 9e-06\n      The initial learning rate for AdamW. (C.2)" in help_of("reward")


@pytest.mark.parametrize("option", ["--output-dir", "--output_dir"])
def test_dashes_and_underscores_name_the_same(option, pipeline):
    words = [option, "my-out", "--max-steps", "8", "--ppo.max-prompt-length=9"]
    assert cli.main(["run", "tiny-cpu", *words]) == 0
    ((_, recipe, output_dir),) = pipeline
    assert output_dir == Path("my-out") and recipe.stages["sft"].training_args.max_steps == 8
    assert recipe.stages["ppo"].training_args.max_prompt_length == 9


def test_dashes_are_underscores_in_the_other_verbs_too(monkeypatch):
    parsed = cli.build_parser().parse_args(["push", "a-run", "--hub-namespace=my-name", "--quiet"])
    assert (parsed.run, parsed.hub_namespace, parsed.quiet) == ("a-run", "my-name", True)
    parsed = cli.build_parser().parse_args(["data", "inspect", "x", "--max-prompt-length", "5"])
    assert parsed.max_prompt_length == 5


@pytest.mark.parametrize("verb", [["run", "x"], ["sft", "--config", "x"], ["push", "x"], ["merge", "x", "y"]])
def test_verbs_that_take_a_while_have_quiet(verb):
    assert cli.build_parser().parse_args([*verb, "--quiet"]).quiet is True


PLAIN = {"PYTHONIOENCODING": "ascii"}, {"LANG": "C"}, {"LC_ALL": "C"}, {"LANG": "POSIX"}


@pytest.mark.parametrize("environment", PLAIN, ids=str)
@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["recipes", "show", "pythia-1.4b-6.9b"], "(section 4.1)"),
        (["run", "caf\u00e9"], r"caf\xe9: no recipe"),
        (["ppo", "--help"], "(section 3.5"),
    ],
    ids=["recipe", "error", "help"],
)
def test_ascii_terminals_get_ascii(environment, words, shown):
    unset = ("LANG", "LC_ALL", "LC_CTYPE", "PYTHONIOENCODING", "PYTHONUTF8")
    kept = {key: value for key, value in os.environ.items() if key not in unset}
    command = [sys.executable, "-m", "instructgpt_hf.cli", *words]
    done = subprocess.run(command, capture_output=True, env={**kept, **environment}, timeout=60)
    text = (done.stdout + done.stderr).decode("ascii")
    assert shown in text and "Traceback" not in text


DRAW = """
from rich.console import Console
from instructgpt_hf.cli.encoding import settle_encoding
from instructgpt_hf.evaluation.intervals import Estimate
from instructgpt_hf.evaluation.report import print_table
from instructgpt_hf.evaluation.results import PolicyRow
from instructgpt_hf.stages.output import Output, Phase
settle_encoding()
estimate = Estimate(1.0, 0.5, 2.0)
print_table([PolicyRow("base", kl=estimate), PolicyRow("SFT", mean_reward=estimate)])
output = Output(Console(force_terminal=True, width=80))
with output, output.phase(Phase("training", 4, "steps")) as phase:
    phase.at(2)
    output._bars.refresh()
"""


def test_a_table_and_a_bar_are_ascii_on_an_ascii_terminal():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", DRAW], capture_output=True, env=environment, timeout=60)
    text = done.stdout.decode("ascii")
    assert done.returncode == 0 and "2/4" in text and "-----" in text and "[0.50,2.00]" in text and "\\u" not in text


def test_push_passes_its_words_on(monkeypatch):
    calls = []
    module = types.ModuleType("instructgpt_hf.hub.publish")
    module.push_run = lambda *positional, **named: calls.append((positional, named))
    monkeypatch.setitem(sys.modules, "instructgpt_hf.hub.publish", module)
    assert cli.main(["push", "runs/x", "--hub_namespace", "me", "--public", "--stages", "sft", "ppo-ptx"]) == 0
    ((positional, named),) = calls
    assert positional == (Path("runs/x"), "me")
    assert named["private"] is False and named["stages"] == ["sft", "ppo-ptx"]
    assert cli.main(["push", "runs/x"]) == 0
    assert calls[1][1]["private"] is True and calls[1][1]["stages"] is None


def test_lab_passes_its_words_on(monkeypatch, capsys):
    from instructgpt_hf import lab

    calls = []
    monkeypatch.setattr(lab, "write", lambda folder, seed: calls.append((folder, seed)) or {"a": 1, "b": 2})
    assert cli.main(["lab", "data", "--seed", "5"]) == 0
    assert calls == [(Path("data"), 5)] and "Wrote 2 files to data" in capsys.readouterr().out
