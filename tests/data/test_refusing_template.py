"""A chat template that refuses some conversations: one error names the rows and gives the template's own sentence."""

import pytest
from helpers.text_tokenizers import text_tokenizer

from instructgpt_hf.data.demonstrations import demonstration_rows, tokenize_demonstrations
from instructgpt_hf.data.prompt_rows import prompt_rows
from instructgpt_hf.data.prompts import PromptFormat
from instructgpt_hf.data.rankings.rows import ranking_rows, tokenize_rankings
from instructgpt_hf.errors import InstructGPTError

STRICT = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for turn in messages %}<turn>{{ turn['role'] }}\n{{ turn['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)
USER, SYSTEM = {"role": "user", "content": "Why?"}, {"role": "system", "content": "Be brief."}
PROMPTS = [[SYSTEM, USER] if number in (1, 3) else [USER] for number in range(5)]


@pytest.fixture
def chat():
    tokenizer = text_tokenizer("bytes")
    tokenizer.chat_template = STRICT
    return PromptFormat.create("chat", tokenizer), tokenizer


def demonstrations(rows, chat):
    read = demonstration_rows([{**row, "completion": "So."} for row in rows], "mine.jsonl")
    return tokenize_demonstrations(read, *chat, 99, "mine.jsonl").rows


def rankings(rows, chat):
    read = ranking_rows([{**row, "completions": ["a", "b"], "ranks": [1, 2]} for row in rows], "mine.jsonl")
    return tokenize_rankings(read, *chat, 99, "mine.jsonl").rows


def prompts(rows, chat):
    return prompt_rows(rows, *chat, 99, "mine.jsonl")[0]


@pytest.mark.parametrize("read", [demonstrations, rankings, prompts])
def test_rows_and_sentence(chat, read):
    with pytest.raises(InstructGPTError) as caught:
        read([{"prompt": prompt} for prompt in PROMPTS], chat)
    title, *lines = str(caught.value).splitlines()
    assert title.startswith("mine.jsonl") and len(lines) == 2
    for number, line in zip((1, 3), lines, strict=True):
        assert f"row {number}: the chat template refuses a conversation with the roles system, user" in line
        assert "System role not supported. Change its turns, or choose a plain prompt_template" in line
    assert len(read([{"prompt": prompt} for prompt in PROMPTS[::2]], chat)) == 3
