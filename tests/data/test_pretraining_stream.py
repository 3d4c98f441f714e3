"""The pretraining stream: a function of its seed and position, whole documents, EOS between them."""

import copy
import itertools
import json

import pytest
from datasets import Dataset, IterableDataset
from tokenizers.processors import TemplateProcessing

from instructgpt_hf.data.documents import StreamedDocuments
from instructgpt_hf.data.pretraining import PretrainingStream, leading_ids, pretraining_rows, with_text
from instructgpt_hf.data.sources import load_split
from instructgpt_hf.errors import InstructGPTError

DOCUMENTS = ["a b c", "d e", "f", "g h i j", "k l"]


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


@pytest.fixture(params=["whole", "streamed"])
def stream(tokenizer, tmp_path, request):
    """Both ways to have a dataset."""
    data = load_split(write(tmp_path / "text.jsonl", DOCUMENTS), "train", streaming=request.param == "streamed")
    if request.param == "whole":
        data = pretraining_rows(data, "text")

    def build(block_length=4, seed=0, **shard):
        return PretrainingStream(data, tokenizer, block_length, seed, **shard)

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


def test_documents_do_not_begin_as_the_tokenizer_ends_texts(tokenizer):
    """A tokenizer that ends every text with EOS, which is its BOS token too, as in GPT-2."""
    ending = copy.deepcopy(tokenizer)
    ending.bos_token = ending.eos_token
    specials = [("<eos>", ending.eos_token_id)]
    ending._tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=specials)
    assert leading_ids(ending) == []
    ending._tokenizer.post_processor = TemplateProcessing(single="<eos> $A <eos>", special_tokens=specials)
    assert leading_ids(ending) == [ending.eos_token_id]


def test_documents_begin_as_the_tokenizer_begins_texts(tokenizer):
    """Gemma and Llama were trained with a beginning-of-text token before every document."""
    leading = copy.deepcopy(tokenizer)
    leading.add_special_tokens({"bos_token": "<bos>"})
    leading._tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", leading.bos_token_id), ("<eos>", leading.eos_token_id)]
    )
    data = Dataset.from_dict({"text": ["a b c", "d e"]})
    tokens = next(PretrainingStream(data, leading, 9, seed=0))
    found = [document.split() for document in leading.decode(tokens).split("<bos>")[1:]]
    assert sorted(found) == [["a", "b", "c", "<eos>"], ["d", "e", "<eos>"]]


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
    first = stream()
    taken(first, 1)
    state = json.loads(json.dumps(first.state_dict()))
    before = dict(state)
    taken(first, 5)
    resumed = stream()
    resumed.load_state_dict(state)
    taken(resumed, 5)
    assert state == before


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_together_read_the_blocks_of_one(stream, processes):
    alone = taken(stream(), 12)
    shards = [stream(process_index=index, num_processes=processes) for index in range(processes)]
    turns = [[next(shard) for shard in shards] for _ in range(12 // processes)]
    assert [block for turn in turns for block in turn] == alone
    states = [shard.state_dict() for shard in shards]
    assert all(state == states[0] for state in states), "rank 0 saves the position of all"


def test_resumes_with_another_number_of_processes(stream):
    expected = taken(stream(), 12)
    two = [stream(process_index=index, num_processes=2) for index in range(2)]
    assert [next(shard) for _ in range(3) for shard in two] == expected[:6]
    three = [stream(process_index=index, num_processes=3) for index in range(3)]
    for shard in three:
        shard.load_state_dict(two[0].state_dict())
    assert [next(shard) for _ in range(2) for shard in three] == expected[6:]


class TestStreamed:
    """What is particular to a dataset that is not there yet."""

    @pytest.fixture
    def documents(self, tmp_path):
        def build(texts, window=3, seed=0):
            path = write(tmp_path / "text.jsonl", texts)
            return StreamedDocuments(load_split(path, "train", streaming=True), seed, window)

        return build

    def test_a_pass_holds_every_document_once(self, documents):
        texts = [f"w{index}" for index in range(8)]
        found = documents(texts)
        passes = [[found.advance() for _ in texts] for _ in range(3)]
        assert all(sorted(item) == texts for item in passes)
        assert len({tuple(item) for item in passes}) == 3, "each pass has its own order"
        # Windows of 3 follow the stream.
        assert [sorted(passes[0][start : start + 3]) for start in (0, 3, 6)] == [texts[0:3], texts[3:6], texts[6:]]
        assert passes[0] != [*sorted(passes[0])]
        assert found.passes == 2

    @pytest.mark.parametrize("done", [0, 1, 2, 3, 4, 7, 8, 9, 20])
    def test_resumes_within_and_between_windows_and_passes(self, documents, done):
        texts = [f"w{index}" for index in range(8)]
        first = documents(texts)
        last = [first.advance() for _ in range(done)][-1:]
        state = json.loads(json.dumps(first.state_dict()))
        expected = [first.advance() for _ in range(12)]
        resumed = documents(texts)
        assert [resumed.load_state_dict(state)] == (last or [None])
        assert [resumed.advance() for _ in range(12)] == expected

    def test_rows_without_text_are_left_out(self, documents):
        found = documents(["a", "", None, "", "", " ", "b", ""])
        assert sorted(found.advance() for _ in range(2)) == ["a", "b"]
        assert sorted(found.advance() for _ in range(2)) == ["a", "b"]

    def test_no_text_at_all_is_an_error(self, documents):
        with pytest.raises(InstructGPTError, match="no row with text"):
            documents(["", " ", ""]).advance()

    def test_other_sources(self):
        """Streams that `datasets` resumes by other means: a generator, a mapped and filtered one, several shards."""

        def rows(names):
            for name in names:
                yield {"text": name, "more": 1}

        made = IterableDataset.from_generator(rows, gen_kwargs={"names": [f"w{index}" for index in range(10)]})
        mapped = made.map(lambda row: {"text": row["text"] + " a"}).filter(lambda row: row["text"] != "w3 a")
        shards = Dataset.from_dict({"text": [f"w{index}" for index in range(10)]}).to_iterable_dataset(num_shards=3)
        for dataset in (made, mapped, shards, mapped.skip(2)):
            first = StreamedDocuments(dataset, 0, window=3)
            for _ in range(5):
                first.advance()
            resumed = StreamedDocuments(dataset, 0, window=3)
            resumed.load_state_dict(first.state_dict())
            assert [resumed.advance() for _ in range(12)] == [first.advance() for _ in range(12)]


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
def test_text_may_stand_in_another_column(tokenizer, tmp_path, streaming):
    file = tmp_path / "text.jsonl"
    file.write_text('{"content": "a b c", "text": 3}\n' * 3, encoding="utf-8")
    data = load_split(str(file), "train", streaming=streaming)
    data = with_text(data, "content", "here") if streaming else pretraining_rows(data, "here", "content")
    stream = PretrainingStream(data, tokenizer, 4, seed=0)
    assert tokenizer.decode(next(stream)) == "a b c <eos>"
    resumed = PretrainingStream(data, tokenizer, 4, seed=0)
    resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    assert taken(resumed, 5) == taken(stream, 5)


def test_a_column_that_is_missing_is_named():
    with pytest.raises(InstructGPTError, match=r"here: missing column 'contents'.*content"):
        with_text(Dataset.from_dict({"content": ["a"]}), "contents", "here")


class TestRows:
    def test_only_text_is_kept(self):
        data = Dataset.from_list([{"text": "a", "meta": 1}])
        assert pretraining_rows(data, "text").to_list() == [{"text": "a"}]

    def test_missing_column(self):
        with pytest.raises(InstructGPTError, match=r"pretraining: missing column 'text' \(did you mean 'texts'\?\)"):
            pretraining_rows(Dataset.from_list([{"texts": "a"}]), "pretraining")

    @pytest.mark.parametrize("make", [Dataset.from_list, list], ids=["table", "rows"])
    def test_blank_documents_are_left_out(self, make):
        rows = make([{"text": text} for text in ("a", "", None, " \n", "b")])
        assert pretraining_rows(rows, "pretraining").to_list() == [{"text": "a"}, {"text": "b"}]

    def test_only_blank_documents(self):
        with pytest.raises(InstructGPTError, match="pretraining: no row holds text in its column 'text'"):
            pretraining_rows(Dataset.from_dict({"text": ["", " "]}), "pretraining")

    def test_something_else_than_text(self):
        with pytest.raises(InstructGPTError, match=r"row 1: text: found \['a'\], expected text"):
            pretraining_rows([{"text": "a"}, {"text": ["a"]}], "pretraining")
