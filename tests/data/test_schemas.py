"""Prompts and demonstrations in the forms that people publish; messages are checked in one place for all of them."""

import csv
import json

import pytest
from datasets import Dataset
from helpers.turns import assistant, system, user

from instructgpt_hf.data.demonstrations import demonstration_rows, read_demonstrations, tokenize_demonstrations
from instructgpt_hf.data.files import Head
from instructgpt_hf.data.pretraining import document_ids, leading_ids
from instructgpt_hf.data.prompt_rows import prompt_rows
from instructgpt_hf.data.prompts import PromptFormat
from instructgpt_hf.data.rankings.rows import ranking_rows
from instructgpt_hf.data.sources import load_split
from instructgpt_hf.errors import InstructGPTError


def demonstrations(*rows):
    return [(row["prompt"], row["completion"]) for row in demonstration_rows(list(rows), "demos")]


def problem_of(*rows, read=demonstration_rows):
    with pytest.raises(InstructGPTError) as caught:
        read(list(rows), "demos")
    return str(caught.value)


CHAT = [user("a"), assistant("b")]
SHARE_GPT = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]


class TestDemonstrations:
    @pytest.mark.parametrize(
        ("row", "expected"),
        [
            ({"prompt": "a", "completion": "b"}, ("a", "b")),
            ({"question": "a", "answer": "b"}, ("a", "b")),
            ({"query": "a", "response": "b"}, ("a", "b")),
            ({"instruction": "a", "input": "", "output": "b"}, ("a", "b")),
            ({"instruction": "a", "input": "c", "output": "b", "text": "x"}, ("a\n\nc", "b")),
            ({"instruction": "a", "context": "c", "response": "b", "category": "x"}, ("a\n\nc", "b")),
            ({"instruction": "a", "output": "b", "system": "s"}, ([system("s"), user("a")], "b")),
            ({"instruction": "a", "output": "b", "system": None, "history": []}, ("a", "b")),
            (
                {"instruction": "a", "output": "b", "history": [["c", "d"]]},
                ([user("c"), assistant("d"), user("a")], "b"),
            ),
            ({"messages": CHAT}, ([user("a")], "b")),
            ({"conversations": SHARE_GPT}, ([user("a")], "b")),
            ({"conversations": SHARE_GPT, "system": "s"}, ([system("s"), user("a")], "b")),
            ({"conversation": SHARE_GPT}, ([user("a")], "b")),
            ({"messages": json.dumps(CHAT)}, ([user("a")], "b")),
            ({"messages": str(CHAT)}, ([user("a")], "b")),
            ({"prompt": json.dumps(CHAT[:1]), "completion": "b"}, ([user("a")], "b")),
            ({"prompt": [{"role": "human", "content": "a"}], "completion": "b"}, ([user("a")], "b")),
            (
                {"prompt": [user([{"type": "text", "text": "a"}, {"type": "text", "text": " c"}])], "completion": "b"},
                ([user("a c")], "b"),
            ),
            ({"prompt": "a", "completion": [assistant("b")]}, ("a", "b")),
            ({"prompt": "a", "completion": assistant("b")}, ("a", "b")),
            ({"text": "a b"}, (None, "a b")),
            ({"question": "a", "context": "c", "answer": "b"}, ("a\n\nc", "b")),
            ({"conversation": [{"input": "a", "output": "b"}]}, ([user("a")], "b")),
            # Keys in any order, as JSON and as one message.
            ({"prompt": json.dumps([{"id": 1, **user("a")}]), "completion": "b"}, ([user("a")], "b")),
            ({"prompt": json.dumps(user("a")), "completion": json.dumps(assistant("b"))}, ([user("a")], "b")),
            ({"prompt": '[{"a": 1}] is', "completion": '{"b": 2}'}, ('[{"a": 1}] is', '{"b": 2}')),
            ({"prompt": '[{"name": "x"}]', "completion": "b"}, ('[{"name": "x"}]', "b")),
            # Answers in JSON.
            ({"prompt": "a", "completion": '{"from": "Oslo", "value": 3}'}, ("a", '{"from": "Oslo", "value": 3}')),
            ({"prompt": "a", "completion": '[{"input": 1, "output": 2}]'}, ("a", '[{"input": 1, "output": 2}]')),
            ({"prompt": "a", "completion": '{"content": f(x)}'}, ("a", '{"content": f(x)}')),
        ],
    )
    def test_forms(self, row, expected):
        assert demonstrations(row) == [expected]

    def test_every_turn_of_the_assistant_is_a_demonstration(self):
        turns = [system("s"), user("a"), assistant("b"), user("c"), assistant("d")]
        assert demonstrations({"messages": turns}) == [(turns[:2], "b"), (turns[:4], "d")]
        assert demonstrations({"prompt": turns[:2], "completion": turns[2:]}) == [(turns[:2], "b"), (turns[:4], "d")]
        # What stands in the prompt is not trained on.
        assert demonstrations({"prompt": turns[:4], "completion": "d"}) == [(turns[:4], "d")]

    def test_turns_of_weight_0_are_only_read(self):
        turns = [user("a"), {**assistant("b"), "weight": 0}, user("c"), {**assistant("d"), "weight": 1}]
        expected = [([user("a"), assistant("b"), user("c")], "d")]
        assert demonstrations({"messages": turns}) == demonstrations({"messages": json.dumps(turns)}) == expected
        before, answer = demonstrations({"messages": turns, "system": "s"})[0]
        assert before == [system("s"), *expected[0][0]] and answer == "d"
        assert "every turn of the assistant has the weight 0" in problem_of({"messages": turns[:2]})

    def test_columns_that_the_first_row_lacks(self):
        rows = [{"prompt": "x"}, *[{"prompt": "a", "completion": "b"}] * 150]
        assert demonstrations(*rows) == [("a", "b")] * 150
        pairs = [{"prompt": "x"}, *[{"prompt": "a", "chosen": "b", "rejected": "c"}] * 150]
        assert ranking_rows(pairs, "pairs")["completions"][1:] == [["b", "c"]] * 150

    def test_text_is_learned_as_a_document(self, tokenizer):
        rows = demonstration_rows([{"text": "a b"}], "demos")
        (row,), _, _ = tokenize_demonstrations(rows, PromptFormat.create("raw", tokenizer), tokenizer, 9, "demos")
        assert row["input_ids"] == row["labels"] == document_ids("a b", tokenizer, leading_ids(tokenizer))

    @pytest.mark.parametrize(
        ("row", "expected"),
        [
            ({"prompts": "a", "completion": "b"}, "missing column 'prompt' (did you mean 'prompts'?)"),
            ({"prompt": "a", "reply": "b"}, "missing column 'completion'"),
            (
                {"role": "prompter", "parent_id": None, "text": "a"},
                "demos: one message per row (it has 'role', 'parent",
            ),
            ({"headline": "a", "summary": "b"}, "it has 'headline', 'summary'. Demonstrations have a prompt (prompt,"),
        ],
    )
    def test_unknown_columns(self, row, expected):
        assert expected in problem_of(row)


class TestMessages:
    """Rules for messages, wherever they stand."""

    @pytest.mark.parametrize(
        ("turn", "expected"),
        [
            ({"role": "assistant", "content": None}, "turn 1 (assistant): content is null; only turns of text"),
            ({"role": "assistant", "content": None, "tool_calls": [{"x": 1}]}, "content is null, and calls tools"),
            ({"role": "assistant", "content": "b", "tool_calls": [{"x": 1}]}, "turn 1 (assistant): it calls tools"),
            ({"role": "narrator", "content": "b"}, "turn 1: role 'narrator' is not known; choose from assistant, dev"),
            ({"role": "asistant", "content": "b"}, "role 'asistant' is not known; did you mean 'assistant'?"),
            ({"role": None, "content": "b"}, "turn 1: role None is not known"),
            ({"role": "assistant", "content": 7}, "turn 1 (assistant): content is 7, expected text"),
            (
                assistant([{"type": "image", "image": "x"}]),
                "content has the part {'type': 'image', 'image': 'x'}; only",
            ),
            ({"role": "assistant", "text": "b"}, "turn 1: found {'role': 'assistant', 'text': 'b'}, expected {'role'"),
            ("b", "turn 1: found 'b', expected {'role', 'content'}"),
        ],
    )
    def test_wrong_turn(self, turn, expected):
        after = [user("c"), assistant("d")]
        assert f"row 0: messages: {'turn' if expected.startswith('turn') else ''}" in problem_of(
            {"messages": [user("a"), turn, *after]}
        )
        assert expected in problem_of({"messages": [user("a"), turn, *after]})
        assert expected in problem_of({"prompt": [user("a"), turn, user("c")], "completion": "d"})
        pair = {"chosen": [user("a"), turn, *after], "rejected": [user("a"), turn, user("c"), assistant("e")]}
        assert expected in problem_of(pair, read=ranking_rows)

    @pytest.mark.parametrize(
        ("completion", "expected"),
        [
            ([user("0 degrees.")], "completion: turn 0: found role 'user' ('0 degrees.'), expected 'assistant'"),
            ([assistant("b"), user("c")], "completion: turn 1: found role 'user' ('c'), expected 'assistant'"),
            ([assistant("b"), user("c"), assistant(" ")], "completion: turn 2: the assistant's turn is empty"),
            ({"text": "b"}, "completion: found {'text': 'b'}, expected non-empty text or assistant messages"),
            (7, "completion: found 7, expected non-empty text or assistant messages"),
            ('[{"role": "assistant", "content": "b"', "neither JSON nor a Python list"),
        ],
    )
    def test_wrong_completion(self, completion, expected):
        assert expected in problem_of({"prompt": "a", "completion": completion})

    @pytest.mark.parametrize(
        ("row", "expected"),
        [
            ({"prompt": [user("a"), assistant("b")], "completion": "c"}, "the last turn, 'b', is the assistant's"),
            ({"prompt": [user("  ")], "completion": "c"}, "whose messages are empty"),
            ({"prompt": 7, "completion": "c"}, "prompt: found 7, expected non-empty text or chat messages"),
            ({"instruction": "a", "input": ["x"], "output": "c"}, "input: found ['x'], expected text"),
            (
                {"instruction": "a", "output": "c", "history": [["x"]]},
                "history: found [['x']], expected a list of [user",
            ),
            ({"prompt": "a", "completion": "c", "system": 7}, "system: found 7, expected text"),
            (
                {"prompt": [system("s"), user("a")], "completion": "c", "system": "t"},
                "system: found 't', but the messages begin with the system turn 's'",
            ),
        ],
    )
    def test_wrong_prompt(self, row, expected):
        assert f"row 0: {expected}" in problem_of(row) or expected in problem_of(row)


RIGHT = {"prompt": "a", "completion": "b"}


class TestFewEmptyRows:
    @pytest.mark.parametrize("empty", [{"completion": ""}, {"completion": None}, {"prompt": " "}, {"prompt": None}])
    def test_one_among_thousands_is_counted(self, empty):
        rows, left_out = read_demonstrations([*[RIGHT] * 1_500, {**RIGHT, **empty}], "demos")
        assert (len(rows), left_out) == (1_500, 1)

    def test_more_are_an_error_that_names_them_all(self):
        rows = [{**RIGHT, "completion": "" if number in (3, 8) else "b"} for number in range(12)]
        message = problem_of(*rows)
        assert "row 3: completion: found ''" in message and "row 8: completion" in message
        assert message.count("  - ") == 2

    def test_a_malformed_row_is_an_error_however_many_are_right(self):
        assert "row 1500: completion: found 7" in problem_of(*[RIGHT] * 1_500, {**RIGHT, "completion": 7})

    @pytest.mark.parametrize("rejected", ["", "b", None])
    def test_empty_and_equal_pairs(self, rejected):
        pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
        rows = ranking_rows([*[pair] * 1_500, {**pair, "rejected": rejected}], "pairs")
        assert len(rows) == 1_501
        message = problem_of(*[pair] * 10, {**pair, "rejected": rejected}, read=ranking_rows)
        assert (
            "row 10: rejected: found" if rejected != "b" else "row 10: chosen and rejected are the same"
        ) in message


class TestPrompts:
    @pytest.fixture
    def read(self, tokenizer):
        def build(*rows, columns=True):
            made = PromptFormat.create("raw", tokenizer)
            return prompt_rows(list(rows), made, tokenizer, None, "prompts", columns)[0].to_list()

        return build

    @pytest.mark.parametrize(
        ("row", "prompt"),
        [
            ({"question": "a"}, "a"),
            ({"instruction": "a", "input": "b", "output": "c"}, "a\n\nb"),
            ({"messages": CHAT}, [user("a")]),
            ({"conversations": SHARE_GPT}, [user("a")]),
            ({"prompt": json.dumps(CHAT[:1])}, [user("a")]),
            ({"prompt": "a", "system": "s"}, [system("s"), user("a")]),
        ],
    )
    def test_forms(self, read, row, prompt):
        assert read(row, columns=False) == [{"prompt": prompt}]
        assert read(row)[0]["prompt"] == prompt

    def test_columns_of_any_type_reach_reward_functions(self, read):
        values = [None, "x", 4, 3.7, {"a": [1]}, [2, "b"]]
        found = read(*({"prompt": "a", "extra": value, "number": 1} for value in values))
        assert [row["extra"] for row in found] == values and {row["number"] for row in found} == {1}

    @pytest.mark.parametrize("value", [["a", "b"], [{"a": 1}], [{"x": 1}, {"y": 2}], 7, {"a": 1}])
    def test_what_is_no_conversation(self, read, value):
        with pytest.raises(InstructGPTError, match="row 0: conversations: found "):
            read({"conversations": value})

    @pytest.mark.parametrize("extra", [{"system": {"os": "x"}}, {"context": {"a": 1}}, {"input": 3}, {"history": 3}])
    def test_columns_of_another_meaning(self, read, extra):
        with pytest.raises(InstructGPTError, match=r"row 0: .*; a column of another meaning needs another name"):
            read({"question": "a", **extra})

    def test_no_rows(self, read):
        for made in (read, demonstrations):
            with pytest.raises(InstructGPTError, match=": has no rows"):
                made()

    def test_only_the_assistant_speaks(self, read):
        with pytest.raises(InstructGPTError, match=r"row 0: messages: found .*in which only the assistant speaks"):
            read({"messages": [assistant("a")]})

    @pytest.mark.parametrize("template", ["raw", "user-assistant"])
    def test_transcript_that_the_assistant_goes_on(self, tokenizer, template):
        """Its turns are read as turns wherever the format writes roles; a raw prompt is the text as it is."""
        text, turns = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", [user("a"), assistant("b"), user("c")]
        made = PromptFormat.create(template, tokenizer)
        expected = {"raw": text, "user-assistant": "User: a\nAssistant: b\nUser: c\nAssistant:"}[template]
        assert made.prompt_text(text, tokenizer) == expected
        assert demonstrations({"prompt": text, "completion": "d", "system": "s"}) == [([system("s"), *turns], "d")]

    def test_unknown_columns(self, read):
        with pytest.raises(InstructGPTError, match=r"prompts: missing column 'prompt' \(did you mean 'promt'\?\)"):
            read({"promt": "a"})


def test_one_file_is_read_alike_by_all_stages(tmp_path, tokenizer):
    """Messages that a CSV file holds as JSON are messages for demonstrations, prompts and rankings."""
    turns = json.dumps([system("s"), user("a")])
    path = tmp_path / "all.csv"
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["prompt", "completion", "chosen", "rejected"])
        writer.writeheader()
        writer.writerow({"prompt": turns, "completion": "b", "chosen": "c", "rejected": "d"})
    rows = load_split(str(path), "train")
    made = PromptFormat.create("raw", tokenizer)
    read = [
        demonstration_rows(rows, "x")["prompt"][0],
        ranking_rows(rows, "x")["prompt"][0],
        prompt_rows(rows, made, tokenizer, None, "x")[0]["prompt"][0],
    ]
    assert read == [[system("s"), user("a")]] * 3


def test_rows_keep_their_places(tokenizer):
    """Behind an empty row and in the error of a prompt format that cannot render some."""
    rows = [{"prompt": "a", "completion": ""}, *[{"prompt": "a", "completion": "b"}] * 150]
    data, _ = read_demonstrations(Dataset.from_list(rows), "demos")
    assert data["row"][:2] == ["row 1", "row 2"]

    class Refusing:
        def prompt_ids(self, prompt, tokenizer):
            raise InstructGPTError("no")

    with pytest.raises(InstructGPTError, match="demos: rows that the prompt format cannot render\n  - row 1: no\n"):
        tokenize_demonstrations(data, Refusing(), tokenizer, 9, "demos")


def test_the_first_rows_say_nothing_about_shares():
    """One empty row among them may be one of thousands; a malformed one is wrong in any case."""
    rows = [{"prompt": "a", "completion": "" if number == 3 else "b"} for number in range(20)]
    assert len(demonstration_rows(Head([*rows, RIGHT], 20), "demos")) == 19
    with pytest.raises(InstructGPTError, match="row 3: completion: found ''"):
        demonstration_rows(Head(rows, 20), "demos")
    with pytest.raises(InstructGPTError, match="row 0: completion: found 7"):
        demonstration_rows(Head([{**RIGHT, "completion": 7}, *rows, RIGHT], 20), "demos")
