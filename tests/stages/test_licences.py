"""The licence of a base model, from its card to the records of every stage."""

import pytest
from helpers.stage_files import write_model
from transformers import AutoModelForCausalLM

from instructgpt_hf.stages.inputs import base_record, model_record

CARD = "---\nlicense: other\nlicense_name: smol\nlicense_link: LICENSE\n---\n# Smol\n"
NONE = {"license": None, "license_name": None, "license_link": None}


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        (CARD, {"license": "other", "license_name": "smol", "license_link": "LICENSE"}),
        ("---\nlicense: mit\n---\n", {**NONE, "license": "mit"}),
        ("---\nlicense: [mit, gpl]\n---\n", NONE),
        ("# No metadata\n", NONE),
        (None, NONE),
    ],
)
def test_licence(tmp_path, tokenizer, card, expected):
    folder = write_model(tmp_path / "base", tokenizer)
    if card is not None:
        (folder / "README.md").write_text(card)
    base = base_record("org/base", None, folder, tokenizer)
    model = model_record(AutoModelForCausalLM.from_pretrained(folder), base)
    for found in (base, model):
        assert {key: found[key] for key in NONE} == expected
