"""What README, docs and recipe pages say can be done: commands parse, links lead somewhere, names and paths exist."""

import ast
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
from helpers.metrics import find_metric
from helpers.symbols import assert_symbol_exists
from test_architecture import LAYERS

from instructgpt_hf.cli import build_parser
from instructgpt_hf.config.catalog import list_recipes
from instructgpt_hf.metric_register import stage_metrics

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("recipes/**/README.md"),
    ]
)
STAGES = ("sft", "reward", "ppo")
RECIPES = {name for name, _, _ in list_recipes()}


def page_id(page):
    return str(page.relative_to(ROOT))


def text_of(page):
    return page.read_text(encoding="utf-8")


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(page), re.MULTILINE | re.DOTALL)


def commands(page):
    """Every `instructgpt-hf ...` of the page's shell blocks and inline code, as words behind the command's name."""
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`(instructgpt-hf [^`\n]+)`", text_of(page))
    for line in lines:
        for part in line.split("&&"):
            words = shlex.split(part, comments=True)
            if words and Path(words[0]).name == "instructgpt-hf":
                yield words[1:]


COMMANDS = [(page, words) for page in PAGES for words in commands(page)]


@pytest.mark.parametrize(
    ("page", "words"), COMMANDS, ids=[f"{page_id(page)}: {' '.join(words)[:60]}" for page, words in COMMANDS]
)
def test_documented_command_is_accepted(page, words):
    if "..." in words or "--help" in words:
        pytest.skip("a placeholder, or a request for help")
    arguments, settings = build_parser().parse_known_args(words)
    if arguments.verb not in ("run", *STAGES):
        assert not settings
        return
    from instructgpt_hf.config.recipe import load_recipe

    name = arguments.recipe
    stages = STAGES if arguments.verb == "run" else (arguments.verb,)
    load_recipe(name if name in RECIPES else "tiny-cpu", settings, stages)


def test_commands_were_found():
    assert {page_id(page) for page, _ in COMMANDS} >= {"README.md", "docs/hub.md", "recipes/README.md", "docs/ppo.md"}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_relative_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{page_id(page)} links to {target}, which does not exist"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", text_of(found), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings]
            assert anchor in anchors, f"{page_id(page)} links to {target}; the page has {anchors}"


SNIPPETS = [(page, code) for page in PAGES for code in blocks(page, "python")]


@pytest.mark.parametrize(("page", "code"), SNIPPETS, ids=[page_id(page) for page, _ in SNIPPETS])
def test_snippet_compiles_and_its_imports_exist(page, code):
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            for name in node.names:
                importlib.import_module(name.name)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for name in node.names:
                assert hasattr(module, name.name) or importlib.import_module(f"{node.module}.{name.name}")


def trainer_example(page, name):
    """The page's example that builds a trainer and trains it."""
    return next(code for code in blocks(page, "python") if f" = {name}(" in code and "trainer.train()" in code)


def test_examples_of_the_trainers_run(tmp_path, monkeypatch):
    """In README and on its page, each trainer's example is the same; they run one after the other as they stand."""
    monkeypatch.chdir(tmp_path)
    for name, page in (("SFTTrainer", "sft"), ("RewardTrainer", "reward"), ("PPOTrainer", "ppo")):
        code = trainer_example(ROOT / "README.md", name)
        assert code == trainer_example(ROOT / "docs" / f"{page}.md", name)
        assert len(ast.parse(code).body) <= 6
        exec(compile(code, page, "exec"), {})
    from transformers import AutoModelForCausalLM

    from instructgpt_hf import load_reward_model

    assert AutoModelForCausalLM.from_pretrained("my-ppo") and load_reward_model("my-reward")


def test_examples_of_trainers_and_models_import_public_names():
    """From the package's top level; the pipeline, the measures and the Hub have modules of their own."""
    modules = {name for _, code in SNIPPETS for name in re.findall(r"from (instructgpt_hf\.[\w.]+) import", code)}
    assert modules <= {f"instructgpt_hf.{name}" for name in ("pipeline", "evaluation", "hub.publish")}


def test_readme_has_a_snippet_of_about_ten_lines():
    first = blocks(ROOT / "README.md", "python")[0]
    assert len([line for line in first.splitlines() if line.strip()]) <= 10


def tree_of(page):
    """Paths of the page's tree of the package; every line has a description."""
    tree = next(block for block in blocks(page, "text") if block.startswith("instructgpt_hf/"))
    parents, listed = [], set()
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name, description = re.match(r"\s*(\S+)\s{2,}(\S.*)", line).groups()
        assert description
        parents = [*parents[:depth], name]
        listed.add("".join(parents).rstrip("/"))
    return listed


def test_tree_in_the_readme_is_the_repository():
    """Every path of the tree exists, and no folder of the package is missing from it."""
    listed = tree_of(ROOT / "README.md")
    assert not [path for path in listed if not (ROOT / path).exists()]
    folders = {f"instructgpt_hf/{item.parent.name}" for item in (ROOT / "instructgpt_hf").glob("*/__init__.py")}
    assert folders <= listed


ARCHITECTURE = ROOT / "docs" / "architecture.md"


def test_tree_in_the_architecture_is_the_package():
    """Every path exists, no folder is missing, and a folder whose files are listed lists all of them."""
    listed = tree_of(ARCHITECTURE)
    assert not [path for path in listed if not (ROOT / path).exists()]
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "instructgpt_hf").rglob("*.py")}
    opened = {path.rpartition("/")[0] for path in listed if path.endswith(".py")}
    expected = {path for path in modules if not path.endswith("__init__.py") and path.rpartition("/")[0] in opened}
    folders = {path.rpartition("/")[0] for path in modules if path.endswith("__init__.py")}
    missing = (expected | folders) - listed
    assert not missing


def test_layers_stand_in_the_order_that_imports_follow():
    section = text_of(ARCHITECTURE).split("## Layers")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == LAYERS


NAMING = (ARCHITECTURE, ROOT / "CONTRIBUTING.md")


def spans(pattern):
    return sorted({span for page in NAMING for span in re.findall(rf"`({pattern})`", text_of(page))})


@pytest.mark.parametrize("name", spans(rf"(?:{'|'.join(LAYERS)})(?:\.\w+)+(?<!\.py)"))
def test_named_symbol_exists(name):
    assert_symbol_exists(name)


@pytest.mark.parametrize("path", spans(r"[\w./-]+\.(?:py|md|toml)(?:::\w+)?"))
def test_named_file_exists(path):
    file, _, test = path.partition("::")
    found = next((folder / file for folder in (ROOT, ROOT / "instructgpt_hf") if (folder / file).is_file()), None)
    assert found is not None, path
    assert not test or f"def {test}(" in text_of(found)


def test_names_and_files_were_found():
    assert len(spans(rf"(?:{'|'.join(LAYERS)})(?:\.\w+)+(?<!\.py)")) > 60
    assert len(spans(r"[\w./-]+\.(?:py|md|toml)(?:::\w+)?")) > 40


def test_ci_runs_the_test_command_of_the_readme():
    lines = [line for block in blocks(ROOT / "README.md", "bash") for line in block.splitlines()]
    command = next(line for line in lines if "pytest" in line)
    assert f"test_command='{command}'" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert f"\n{command}\n" in text_of(ROOT / "CONTRIBUTING.md")


# Tables "| `key` | default | source | ... |" below the heading "Settings that matter".
PAGE = {"sft": "docs/sft.md", "reward": "docs/reward.md", "ppo": "docs/ppo.md"}


@pytest.mark.parametrize("stage", STAGES)
def test_documented_defaults_are_the_defaults(stage):
    from instructgpt_hf.config.settings import stage_settings

    known = stage_settings(stage)
    section = text_of(ROOT / PAGE[stage]).split("## Settings that matter")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \|", section, re.MULTILINE)
    assert len(rows) >= 8
    for key, default, source in rows:
        assert key in known, key
        assert default.replace(",", "").strip("`") == shown(known[key].default), key
        assert source == (known[key].source or "TRL").partition(":")[0].partition(";")[0], key


def shown(default):
    if isinstance(default, bool):
        return str(default).lower()
    return "none" if default is None else str(default)


@pytest.mark.parametrize("stage", STAGES)
def test_every_registered_metric_is_explained(stage):
    page = text_of(ROOT / PAGE[stage])
    assert not [item.name for item in stage_metrics(stage) if f"`{item.name.replace('{}', '2')}`" not in page]


@pytest.mark.parametrize("stage", STAGES)
def test_units_in_the_tables_are_those_of_the_register(stage):
    """Rows "| `metric` | formula | unit |"; pages for readers say answer where the code says completion."""
    rows = dict(re.findall(r"^\| `([^`]+)` \| [^|]+ \| ([^|]+) \|$", text_of(ROOT / PAGE[stage]), re.MULTILINE))
    known = {item.name: item.unit for item in stage_metrics(stage) if item.unit and item.name in rows}
    assert known and known == {name: rows[name].replace("answer", "completion") for name in known}


def test_settings_that_a_stopped_run_may_change_are_listed():
    from instructgpt_hf.config.settings import adjustable_keys

    section = text_of(ROOT / "docs" / "ppo.md").split("**Stops.**")[1].split("\n## ")[0]
    assert set(adjustable_keys("ppo")) <= set(re.findall(r"`(\w+)`", section))


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "ppo-ptx"])
def test_every_metric_of_a_real_run_is_registered_and_explained(stage):
    record = json.loads(text_of(ROOT / "model_cards" / f"{stage}.stage.json"))
    names = {key for entry in record["training"].get("log", []) for key in entry} | set(record["metrics"])
    assert not {name for name in names if find_metric(name, stage) is None}
    page = text_of(ROOT / PAGE[stage.removesuffix("-ptx")])
    # The ends of an interval are explained with their value.
    assert not {name for name in names if f"`{re.sub('_(low|high)$', '', name)}`" not in page}


def test_lab_page_has_the_sizes_of_the_files():
    from instructgpt_hf.lab.files import SIZES

    page = text_of(ROOT / "docs" / "lab.md")
    for kind in ("demonstrations", "rankings", "prompts", "pretraining"):
        sizes = f"{SIZES[f'{kind}.train']}, {SIZES[f'{kind}.test']}"
        assert f"| `{kind}.train`, `.test` | {sizes} |" in page
    assert f"| `tasks.test` | {SIZES['tasks.test']} |" in page
