"""The pretraining stream: a function of its seed and position, whole documents, EOS between them."""

import itertools

import pytest
from datasets import Dataset

from instructgpt_hf.data.pretraining import PretrainingStream, pretraining_rows
from instructgpt_hf.errors import InstructGPTError

DOCUMENTS = ["a b c", "d e", "f", "g h i j", "k l"]


@pytest.fixture
def stream(tokenizer):
    def build(block_length=4, seed=0, documents=DOCUMENTS, **shard):
        return PretrainingStream(Dataset.from_dict({"text": documents}), tokenizer, block_length, seed, **shard)

    return build


def taken(stream, blocks):
    return list(itertools.islice(stream, blocks))


def documents_of(tokens, tokenizer):
    """The texts between EOS tokens; the last one may be cut."""
    return tokenizer.decode(tokens).replace(" <eos>", "|").replace("| ", "|").split("|")


def test_blocks_are_full_and_deterministic(stream):
    blocks = taken(stream(), 20)
    assert {len(block) for block in blocks} == {4}
    assert blocks == taken(stream(), 20)
    assert blocks != taken(stream(seed=1), 20)


def test_a_pass_holds_every_document_once_with_eos_between(stream, tokenizer):
    size = sum(len(text.split()) + 1 for text in DOCUMENTS)
    tokens = taken(stream(block_length=size), 3)
    for one_pass in tokens:
        assert sorted(documents_of(one_pass, tokenizer)[:-1]) == sorted(DOCUMENTS)
        assert one_pass[-1] == tokenizer.eos_token_id and one_pass.count(tokenizer.eos_token_id) == len(DOCUMENTS)
    assert len({tuple(one_pass) for one_pass in tokens}) > 1, "each pass has its own order"


def test_block_length_does_not_change_the_tokens(stream):
    short = [token for block in taken(stream(block_length=3), 20) for token in block]
    assert short == [token for block in taken(stream(block_length=5), 12) for token in block]


@pytest.mark.parametrize("done", [0, 1, 3, 7, 16])
def test_resumes_at_the_next_token(stream, done):
    first = stream()
    taken(first, done)
    state = first.state_dict()
    expected = taken(first, 10)
    resumed = stream()
    resumed.load_state_dict(state)
    assert taken(resumed, 10) == expected


def test_state_is_plain_and_a_copy(stream):
    import json

    first = stream()
    taken(first, 1)
    state = json.loads(json.dumps(first.state_dict()))
    before = dict(state)
    taken(first, 5)
    resumed = stream()
    resumed.load_state_dict(state)
    taken(resumed, 5)
    assert state == before


def test_processes_share_a_pass_without_overlap(stream, tokenizer):
    seen = []
    for index in range(2):
        shard = stream(block_length=1, process_index=index, num_processes=2)
        tokens = []
        while shard.passes == 0 and not (
            shard.position == len(shard._order) - 1 and shard.cursor == len(shard._document)
        ):
            tokens += next(shard)
        seen.append([text for text in documents_of(tokens, tokenizer) if text])
    assert sorted(seen[0] + seen[1]) == sorted(DOCUMENTS)
    assert abs(len(seen[0]) - len(seen[1])) <= 1


def test_more_processes_than_documents(stream):
    assert len(taken(stream(documents=["a b"], process_index=3, num_processes=4), 5)) == 5


class TestRows:
    def test_only_text_is_kept(self):
        data = Dataset.from_list([{"text": "a", "meta": 1}])
        assert pretraining_rows(data, "text").to_list() == [{"text": "a"}]

    def test_missing_column(self):
        with pytest.raises(InstructGPTError, match=r"pretraining: missing column 'text' \(did you mean 'texts'\?\)"):
            pretraining_rows(Dataset.from_list([{"texts": "a"}]), "pretraining")

    def test_empty_document(self):
        with pytest.raises(InstructGPTError, match="row 1: text: found ''"):
            pretraining_rows(Dataset.from_dict({"text": ["a", ""]}), "pretraining")
