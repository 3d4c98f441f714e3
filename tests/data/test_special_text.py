"""Text that mentions a special token is text: neither cut nor read as the token."""

import pytest
from datasets import Dataset
from helpers.text_tokenizers import KINDS, SPECIAL, text_tokenizer
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from instructgpt_hf.data.pretraining import PretrainingStream
from instructgpt_hf.data.prompts import PromptFormat
from instructgpt_hf.data.special_text import encode_text

TEXTS = ("It is <end>, then a line.", "<end> is it", "<turn>user", "<pad><s>", "is it <turn>? <end><end>, no")
OTHER = "~"  # an ordinary character in place of the brackets


@pytest.fixture(params=KINDS)
def spelling(request):
    return text_tokenizer(request.param)


def special_ids(spelling, ids):
    return [item for item in ids if item in spelling.convert_tokens_to_ids(list(SPECIAL))]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ["raw", "user-assistant", "instruction"])
def test_plain(spelling, name, text):
    made = PromptFormat.create(name, spelling)
    prompt = made.prompt_ids(text, spelling)
    assert not special_ids(spelling, prompt)
    assert spelling.decode(prompt) == made.prompt_text(text, spelling)
    *ids, last = made.completion_ids("Why?", text, spelling)
    assert last == spelling.eos_token_id and not special_ids(spelling, ids)
    assert made.completion_text("Why?", [*ids, last], spelling) == text


@pytest.mark.parametrize("text", TEXTS)
def test_chat(spelling, text):
    """The template's own special tokens stay, those of the data are spelled."""
    made = PromptFormat.create("chat", spelling)
    turns = [{"role": role, "content": text} for role in ("user", "assistant", "user")]
    frame = spelling.convert_tokens_to_ids(["<s>", *["<turn>", "<end>"] * 3, "<turn>"])
    ids = made.prompt_ids(turns, spelling)
    assert special_ids(spelling, ids) == frame
    assert f"<turn>user\n{text}<end>" in made.prompt_text(turns, spelling)
    *ids, last = made.completion_ids(turns, text, spelling)
    assert last == spelling.eos_token_id and not special_ids(spelling, ids)
    assert made.completion_text(turns, [*ids, last], spelling) == text
    assert made.completion_ids(turns, text, spelling, finished=False) == ids


@pytest.mark.parametrize("name", ["raw", "chat"])
def test_every_other_id_is_that_of_the_tokenizer(spelling, name):
    """A special token's letters stand where the tokenizer reads other letters, and nothing around them changes."""
    made = PromptFormat.create(name, spelling)
    special = made.prompt_ids("  if <end> it: <turn>\n", spelling)
    other = made.prompt_ids(f"  if {OTHER}end> it: {OTHER}turn>\n", spelling)
    bracket, letter = spelling.convert_tokens_to_ids(["<", OTHER])
    assert [letter if item == bracket else item for item in special] == other
    text = made.prompt_text("Why < end >?", spelling)
    assert made.prompt_ids("Why < end >?", spelling) == spelling(text, add_special_tokens=False)["input_ids"]


def test_pretraining_text(spelling):
    text = "it <end> it"
    length = len(encode_text(text, spelling)) + 1
    block = next(PretrainingStream(Dataset.from_dict({"text": [text]}), spelling, length, seed=0))
    assert special_ids(spelling, block) == [spelling.eos_token_id] == block[-1:]
    assert spelling.decode(block[:-1]) == text


def test_tokenizer_whose_vocabulary_has_the_name_as_a_word(tokenizer):
    """Its parts are read, which are unknown words here."""
    made, unknown = PromptFormat.create("raw", tokenizer), tokenizer.unk_token_id
    c, d = tokenizer.convert_tokens_to_ids(["c", "d"])
    assert made.completion_ids("a", "c <eos> d", tokenizer) == [c, unknown, unknown, d, tokenizer.eos_token_id]
    assert made.prompt_ids("c <pad> d", tokenizer) == [c, unknown, unknown, d]


def test_pieces_whose_vocabulary_has_the_name():
    """As in unigram models, in which the name of EOS is the likeliest piece."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((letter, -1.0) for letter in "ab</s>")]
    unigram = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=unigram, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    ids = PromptFormat.create("raw", tokenizer).completion_ids("a", "a</s>b", tokenizer)
    assert tokenizer.convert_ids_to_tokens(ids) == ["a", "<", "/", "s", ">", "b", "</s>"]
