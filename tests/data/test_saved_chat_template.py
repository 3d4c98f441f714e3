"""The chat template that a trained model is saved with gives the ids of its prompt format."""

import pytest
from helpers.text_tokenizers import KINDS, text_tokenizer
from transformers import AutoTokenizer

from instructgpt_hf.config.data import PROMPT_TEMPLATES
from instructgpt_hf.data.prompts import PromptFormat

USER, ANSWER = {"role": "user", "content": "Why is it so?"}, {"role": "assistant", "content": "It is: so."}
SYSTEM = {"role": "system", "content": "Be brief \\ 'kind' {{ x }} \"and\"\ncalm. "}
CONVERSATIONS = [
    [USER],
    [{"role": "user", "content": "  def f:\n"}],
    [SYSTEM, USER],
    [SYSTEM],
    [SYSTEM, USER, ANSWER, USER],
    [USER, ANSWER],
]


@pytest.mark.parametrize("frame", ["$A", "<s> $A", "<s> $A <end>"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PROMPT_TEMPLATES)
def test_ids(name, kind, frame, tmp_path):
    tokenizer = text_tokenizer(kind, frame)
    made = PromptFormat.create(name, tokenizer)
    made.save_tokenizer(tokenizer, tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    answer = {"role": "assistant", "content": "It is <so>.\n  Yes"}
    for turns in CONVERSATIONS:
        prompt = made.prompt_ids(turns, tokenizer)
        options = {"tokenize": True, "return_dict": False}
        assert saved.apply_chat_template(turns, add_generation_prompt=True, **options) == prompt
        text, lead = made.prompt_text(turns, tokenizer), "" if name == "chat" else frame.split("$A")[0].strip()
        expected = f"{text}{made.completion_prefix}{answer['content']}<end>"
        whole = saved.apply_chat_template([*turns, answer], tokenize=False)
        assert whole.removeprefix(lead).strip() == expected.strip() or whole.removeprefix(f"{lead} ") == expected
        if kind == "bytes" and text.endswith(("\n", ":")):  # where the two are no one token's ends
            ids = [*prompt, *made.completion_ids(turns, [answer], tokenizer)]
            assert saved.apply_chat_template([*turns, answer], **options)[: len(ids)] == ids
