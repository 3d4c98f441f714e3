"""Cards: what the metadata and the text hold for each stage, and the committed cards against their records."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.tiny_run import METRICS, PICTURE, record

from instructgpt_hf.artifacts import STAGE_FOLDERS, StageArtifact
from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.hub.card import card_of_record, main, render_card

MODEL_CARDS = Path(__file__).parents[2] / "model_cards"
RECORDS = sorted(MODEL_CARDS.glob("*.stage.json"))


def metadata(card: Any) -> dict[str, Any]:
    return yaml.safe_load(str(card).split("---\n")[1])


def check_shape(text: str) -> None:
    assert "\n\n\n" not in text
    assert text.endswith("\n") and not text.endswith("\n\n")
    assert not re.search(r"[ \t]+$", text, re.M)
    assert "licence" not in text
    assert "{{" not in text and "{%" not in text and "None" not in text
    assert not re.search(r"(/home|/tmp|/root|/work|C:\\)", text)
    for header, rule in re.findall(r"^(\|.*\|)\n(\| ---.*\|)$", text, re.M):
        assert header.count("|") == rule.count("|")


def test_model_cards_are_committed_for_a_whole_run() -> None:
    assert [path.name for path in RECORDS] == sorted(f"{stage}.stage.json" for stage in STAGE_FOLDERS)


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.name.split(".")[0])
def test_model_cards_are_what_their_records_render_to(path: Path) -> None:
    card = path.with_name(path.name.replace(".stage.json", ".md")).read_text(encoding="utf-8")
    assert card == card_of_record(path), (
        f"{path.name} renders to another card; write the cards again with "
        "`python -m instructgpt_hf.hub.card runs/tiny-cpu model_cards` and look at the difference"
    )
    check_shape(card)
    check_shape(json.dumps(json.loads(path.read_text(encoding="utf-8"))).replace("null", "") + "\n")


@pytest.mark.parametrize("stage", STAGE_FOLDERS)
def test_every_stage_renders(stage: str) -> None:
    card = str(render_card(record(stage), repo_id=f"alice/tiny-{stage}"))
    check_shape(card)
    assert "arXiv:2203.02155" in card
    assert f"`{stage}`" in card
    values = metadata(card)
    assert values["license"] == "apache-2.0"
    assert values["library_name"] == "transformers"
    assert values["pipeline_tag"] == ("text-classification" if stage == "reward" else "text-generation")
    assert values["tags"][0] == "trl"
    assert values["tags"][1] == {"sft": "sft", "reward": "reward-trainer"}.get(stage, "ppo")
    assert "base_model" not in values and "datasets" not in values  # nothing of this run is on the Hub
    index = values["model-index"][0]
    assert index["name"] == f"tiny-{stage}"
    numbers = [metric["value"] for result in index["results"] for metric in result["metrics"]]
    assert numbers and all(type(number) is float for number in numbers)


def test_rendering_is_deterministic_and_parses_back() -> None:
    from huggingface_hub import ModelCard

    card = render_card(record("ppo-ptx"))
    assert str(card) == str(render_card(record("ppo-ptx")))
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()


def test_metrics_are_labelled_and_the_others_kept() -> None:
    card = str(render_card(record("ppo-ptx")))
    assert "| Win rate against the SFT model | 61.0 % (95 % interval 54.0 % to 68.0 %) |" in card
    assert "| Judge of the win rate | gold labeler |" in card
    assert "| `objective/entropy` | 2.5 |" in card
    assert "win_rate_vs_sft_low" not in card
    assert "Pairwise loss" in str(render_card(record("reward", metrics={"eval_loss": 0.5})))
    counts = str(render_card(record("reward")))
    assert "| Strictly ordered pairs in that measurement | 1,200 |" in counts


def test_reward_model_shows_its_evaluation() -> None:
    card = str(render_card(record("reward")))
    lines = card.splitlines()
    expected = [
        "| Pairs that two labelers order alike | 73.0 % |",
        "| Pairwise accuracy where a prompt has 4 completions | 70.0 % |",
        "| Pairwise accuracy where a prompt has 10 completions | 75.0 % |",
        "| Pairwise accuracy of completions 1 apart in rank | 62.0 % |",
        "| Kendall's tau-b of scores and ranks, mean over prompts | 0.41 |",
        "| Expected calibration error | 4.5 % (95 % interval 2.0 % to 7.0 %) |",
    ]
    assert [line for line in lines if line in expected] == expected
    assert "](evaluation.png)" in card and "`evaluation.json`" in card
    assert "eval_accuracy_k" not in card
    assert "evaluation.png" not in str(render_card(record("reward", metrics={"eval_accuracy": 0.7})))
    assert "evaluation.png" not in str(render_card(record("ppo")))


@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
def test_numbers_that_are_none_are_left_out(bad: float | None) -> None:
    card = str(render_card(record("reward", metrics={"eval_accuracy": bad, "other": bad})))
    assert "model-index" not in card and "## Results" not in card


def test_numpy_scalars_become_plain_numbers() -> None:
    import numpy

    metrics = {"eval_accuracy": numpy.float32(0.5), "eval_pairs": numpy.int64(12)}
    card = str(render_card(record("reward", metrics=metrics)))
    assert "python/object" not in card
    assert metadata(card)["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.5
    assert "| 12 |" in card


def test_facts_that_were_not_recorded_are_left_out() -> None:
    bare = {name: {} for name in ("config", "base_model", "data", "model", "metrics", "training", "versions")}
    for stage in STAGE_FOLDERS:
        artifact = record(stage, paper_defaults={}, previous={}, hardware={}, finished_at="", **bare)
        card = str(render_card(artifact))
        check_shape(card)
        assert "license" not in metadata(card)
        assert "## Results" not in card and "### Data" not in card and "## Lineage" not in card
        assert "No result was recorded" in card


def test_several_rewards_are_named() -> None:
    artifact = record("ppo")
    assert "The reward model's score of the whole answer and" in str(render_card(artifact))
    names = [("model", "reward", 1.0), ("function", "mine:short", 0.25)]
    artifact.model["rewards"] = [{"kind": kind, "name": name, "weight": weight} for kind, name, weight in names]
    artifact.previous["value_start"] = {"source": "org/critic", "fingerprint": "abc"}
    card = str(render_card(artifact))
    assert "weighted sum of 2 rewards of the whole answer (`reward` times 1, `mine:short` times 0.25) and" in card
    assert "starts from another model than the reward model" in card


def test_hub_sources_are_linked_in_metadata() -> None:
    artifact = record("ppo")
    artifact.base_model = {"id": "EleutherAI/pythia-1.4b", "revision": "abc123", "fingerprint": "f"}
    artifact.data["prompts"]["source"] = "org/prompts"
    assert metadata(render_card(artifact))["base_model"] == "EleutherAI/pythia-1.4b"
    values = metadata(render_card(artifact, links={"sft": "alice/tiny-sft"}))
    assert values["base_model"] == "alice/tiny-sft"
    assert values["base_model_relation"] == "finetune"
    assert values["datasets"] == ["org/prompts"]
    artifact.base_model = {"id": "gpt2", "revision": "abc123"}
    assert metadata(render_card(artifact))["base_model"] == "gpt2"


def test_local_sources_are_named_but_not_in_metadata() -> None:
    artifact = record("sft")
    artifact.base_model["id"] = "/home/bob/models/smol"
    artifact.data["demonstrations"]["source"] = "/home/bob/data/demonstrations.jsonl"
    card = str(render_card(artifact))
    assert "base_model" not in metadata(card) and "datasets" not in metadata(card)
    assert "`smol` (local, not on the Hub)" in card
    assert "`demonstrations.jsonl` (local, not on the Hub)" in card
    assert "bob" not in card


def test_reward_model_with_a_base_of_its_own_does_not_descend_from_the_sft_model() -> None:
    artifact = record("reward", base_model={"id": "org/large", "revision": None})
    artifact.config["model_name_or_path"] = "org/large"
    card = render_card(artifact, links={"sft": "alice/tiny-sft"})
    assert metadata(card)["base_model"] == "org/large"
    assert "[alice/tiny-sft]" in str(card) and "its base model with a scalar head" in str(card)


def test_results_are_indexed_under_the_held_back_data() -> None:
    artifact = record("reward")
    artifact.data["rankings_test"] = {"source": "org/rankings", "split": "test", "rows": 200, "fingerprint": "f"}
    values = metadata(render_card(artifact))
    dataset = values["model-index"][0]["results"][0]["dataset"]
    assert (dataset["type"], dataset["split"]) == ("org/rankings", "test")
    assert values["datasets"] == ["org/rankings"]


def test_adapters_are_peft() -> None:
    artifact = record("sft", model={"kind": "adapter"}, base_model={"id": "org/base", "revision": "abc"})
    card = render_card(artifact, links={"adapter_base": "org/base"})
    values = metadata(card)
    assert (values["library_name"], values["base_model"]) == ("peft", "org/base")
    assert values["base_model_relation"] == "adapter"
    assert "AutoPeftModelForCausalLM" in str(card)


def test_chat_format_is_used_in_the_examples() -> None:
    chat = {"name": "chat", "template": "{% for m in messages %}...", "completion_prefix": "", "eos_token": "</s>"}
    for stage in STAGE_FOLDERS:
        card = str(render_card(record(stage, prompt_format=chat)))
        assert "apply_chat_template" in card and "add_special_tokens=False" in card
        example = re.search(r"```python\n(.*?)```", card, re.S)
        assert example is not None
        compile(example[1], "example", "exec")


def test_value_card_names_its_policy() -> None:
    links = {"ppo-ptx": "alice/tiny"}
    card = str(render_card(record("ppo-ptx"), repo_id="alice/tiny-value", links=links, value_model=True))
    check_shape(card)
    assert "[alice/tiny](https://huggingface.co/alice/tiny)" in card
    assert "value-model" in metadata(card)["tags"] and "pipeline_tag" not in metadata(card)
    with pytest.raises(InstructGPTError):
        render_card(record("sft"), value_model=True)


def test_unknown_stage_is_an_error() -> None:
    with pytest.raises(InstructGPTError, match="dpo"):
        render_card(dataclasses.replace(record("sft"), stage="dpo"))


def test_settings_that_bear_on_nothing_are_not_listed() -> None:
    defaults = {
        "lora_r": [16, "ours"],
        "save_steps": [100, "ours"],
        "residual_dropout": [None, "C.1"],
        "lam": [0.95, "ours: Stiennon"],
    }
    full = str(render_card(record("ppo", paper_defaults=defaults)))
    assert "| `lam` | 0.95 | ours: Stiennon |" in full
    assert not any(name in full for name in ("lora_r", "save_steps", "residual_dropout"))
    assert "| `lora_r` | 16 | ours |" in str(
        render_card(record("ppo", paper_defaults=defaults, model={"kind": "adapter"}))
    )


def test_cells_cannot_break_their_table() -> None:
    card = str(render_card(record("sft", config={"note": "a | b\nc"})))
    assert "| `note` | a \\| b c |" in card


def test_command_writes_records_and_cards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    for stage in METRICS:
        (run / stage).mkdir(parents=True)
        record(stage, run).save(run / stage)
    assert main([str(run), str(tmp_path / "cards")]) == 0
    names = [Path(line).name for line in capsys.readouterr().out.splitlines()]
    assert names == [f"{stage}{end}" for stage in STAGE_FOLDERS for end in (".stage.json", ".md")]
    written = (tmp_path / "cards" / "reward.stage.json").read_text()
    assert str(tmp_path) not in written
    assert "log" not in StageArtifact(**json.loads(written)).training
    assert (tmp_path / "cards" / "reward.md").read_text() == card_of_record(tmp_path / "cards" / "reward.stage.json")
    for name in ("evaluation.png", "evaluation.json"):
        (run / "reward" / name).write_bytes(PICTURE)
    assert main([str(run), str(tmp_path / "cards")]) == 0
    assert {(tmp_path / "cards" / f"evaluation.{end}").read_bytes() for end in ("png", "json")} == {PICTURE}
    assert main([str(tmp_path / "nothing"), str(tmp_path / "cards")]) == 2


LICENCES = {
    "https://example.org/l": "https://example.org/l",
    "LICENSE": "https://huggingface.co/org/base/blob/abc/LICENSE",
    "./LICENSE.md": "https://huggingface.co/org/base/blob/abc/LICENSE.md",
}


@pytest.mark.parametrize("link", LICENCES)
def test_a_licence_of_its_own_keeps_its_name_and_link(link: str) -> None:
    model = {"license": "other", "license_name": "smol-license", "license_link": link}
    for stage in STAGE_FOLDERS:
        artifact = record(stage, model=model, base_model={"id": "org/base", "revision": "abc", "path": None})
        values = metadata(render_card(artifact))
        assert (values["license"], values["license_name"]) == ("other", "smol-license")
        assert values["license_link"] == LICENCES[link]
        artifact.base_model = {"id": "my/base", "revision": "main", "path": "/home/bob/my/base"}
        values = metadata(render_card(artifact))
        assert values["license_name"] == "smol-license"
        assert values.get("license_link") == (link if "://" in link else None)


def test_an_adapter_of_a_local_model_does_not_name_what_that_came_from() -> None:
    artifact = record("ppo", model={"kind": "adapter"}, base_model={"id": "org/base", "revision": "abc"})
    assert "base_model" not in metadata(render_card(artifact, links={"adapter_base": "./sft"}))
