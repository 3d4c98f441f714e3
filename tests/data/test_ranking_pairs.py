"""The prompt of pairs: read from a column, from messages or from transcripts, and never cut out of two answers."""

import json

import pytest
from helpers.turns import assistant, system, user

from instructgpt_hf.data.rankings.rows import ranking_rows
from instructgpt_hf.errors import InstructGPTError


def one(row, others=()):
    found = ranking_rows([row, *others], "pairs")[0]
    return found["prompt"], found["completions"]


def problem_of(row):
    with pytest.raises(InstructGPTError) as caught:
        ranking_rows([row], "pairs")
    return str(caught.value)


ANSWERS = {"chosen": "It is b.", "rejected": "It may be c."}


class TestColumns:
    @pytest.mark.parametrize(
        ("row", "prompt"),
        [
            ({"question": "a"}, "a"),
            ({"system": "s", "question": "a"}, [system("s"), user("a")]),
            ({"instruction": "a", "input": ""}, "a"),
            ({"instruction": "a", "input": "d"}, "a\n\nd"),
            ({"query": "a"}, "a"),
            ({"instruction": "a", "input": "", "history": [["x", "y"]]}, [user("x"), assistant("y"), user("a")]),
            ({"conversations": [{"from": "human", "value": "a"}]}, [user("a")]),
        ],
    )
    def test_prompt(self, row, prompt):
        assert one({**row, **ANSWERS}) == (prompt, list(ANSWERS.values()))

    def test_answers_of_llama_factory(self):
        answers = {name: {"from": "gpt", "value": text} for name, text in ANSWERS.items()}
        row = {"conversations": [{"from": "human", "value": "a"}], **answers}
        assert one(row) == ([user("a")], list(ANSWERS.values()))

    @pytest.mark.parametrize("name", ["request", "input_text", "post"])
    def test_a_column_that_is_not_known(self, name):
        message = problem_of({name: "Capital?", **ANSWERS})
        assert f"missing column 'prompt'; it has {name!r}, 'chosen', 'rejected'" in message
        assert "prompt, messages, conversations" in message and "question" in message


class TestSharedText:
    @pytest.mark.parametrize(
        ("chosen", "rejected"),
        [
            ("Q: colour? A: Blue", "Q: colour? A: Blueish"),
            ("Question: capital?\nAnswer: Paris.", "Question: capital?\nAnswer: Parma."),
            ("The capital is b.", "The moon c."),
        ],
    )
    def test_is_no_prompt(self, chosen, rejected):
        assert "Pairs of text need a column with the prompt" in problem_of({"chosen": chosen, "rejected": rejected})

    @pytest.mark.parametrize("gap", ["\n\n", "\n"])
    @pytest.mark.parametrize("start", ["\n\n", ""])
    def test_transcripts_part_at_the_last_turn(self, gap, start):
        before = f"{start}Human: a{gap}Assistant: b{gap}Human: c{gap}Assistant: "
        prompt, completions = one({"chosen": f"{before}Paris.", "rejected": f"{before}Parma."})
        assert prompt == [user("a"), assistant("b"), user("c")] and completions == ["Paris.", "Parma."]


class TestConversations:
    def test_of_capybara(self):
        """`conversation` is written in a way of its own; the pair's conversations hold it, too."""
        before = [user("a"), assistant("b"), user("c")]
        pair = {"chosen": [*before, assistant("d")], "rejected": [*before, assistant("e")]}
        earlier = [{"input": "a", "output": "b"}, {"input": "c", "output": "x"}]
        assert one({"conversation": earlier, **pair}) == (before, ["d", "e"])

    def test_single_messages_as_json(self):
        texts = [json.dumps(assistant(text)) for text in "de"]
        assert one({"prompt": "a", "chosen": texts[0], "rejected": texts[1]}) == ("a", ["d", "e"])


class TestRepeatedPrompt:
    def transcripts(self, prompt, before="\n\nHuman: a?\n\nAssistant:"):
        return {"prompt": prompt, "chosen": f"{before} yes", "rejected": f"{before} no"}

    @pytest.mark.parametrize("prompt", ["a?", "\n\nHuman: a?\n\nAssistant:", [user("a?")]])
    def test_in_transcripts(self, prompt):
        found, completions = one(self.transcripts(prompt))
        assert found in ("a?", [user("a?")]) and completions == ["yes", "no"]

    @pytest.mark.parametrize("gap", [" ", "\n", "\n\n", ""])
    def test_in_texts_of_all_rows(self, gap):
        rows = [
            {"prompt": f"Is {n} even?", "chosen": f"Is {n} even?{gap}It is.", "rejected": f"Is {n} even?{gap}No."}
            for n in range(4)
        ]
        assert one(rows[0], rows[1:]) == ("Is 0 even?", ["It is.", "No."])

    def test_by_chance_in_one_row(self):
        row = {"prompt": "Hello", "chosen": "Hello! You?", "rejected": "Hello."}
        assert one(row, [{"prompt": "Bye", "chosen": "See you", "rejected": "No"}])[1] == ["Hello! You?", "Hello."]

    def test_inside_a_word(self):
        rows = [{"prompt": "The", "chosen": "Theory", "rejected": "Thesis"}]
        assert one(rows[0])[1] == ["Theory", "Thesis"]

    @pytest.mark.parametrize(
        ("prompt", "before", "expected"),
        [
            ([system("s"), user("a")], [user("a")], [system("s"), user("a")]),  # the prompt holds more
            ([user("a")], [system("s"), user("a")], [system("s"), user("a")]),  # the conversations hold more
            ("a", [user("a"), assistant("b"), user("c")], [user("a"), assistant("b"), user("c")]),
            ("a ", [user("a")], "a "),
            ([user("x"), assistant("y"), user("a")], [user("a")], [user("x"), assistant("y"), user("a")]),
        ],
    )
    def test_in_messages_the_longer_is_kept(self, prompt, before, expected):
        row = {"prompt": prompt, "chosen": [*before, assistant("d")], "rejected": [*before, assistant("e")]}
        assert one(row) == (expected, ["d", "e"])

    @pytest.mark.parametrize("prompt", ["other", [user("other")], [system("t"), user("other")]])
    def test_another_conversation(self, prompt):
        row = {"prompt": prompt, "chosen": [user("a"), assistant("d")], "rejected": [user("a"), assistant("e")]}
        message = problem_of(row)
        assert "row 0: prompt: found" in message and "one must hold the other" in message
        assert "one must hold the other" in problem_of(self.transcripts(prompt))


class TestPublished:
    @pytest.mark.parametrize(("labels", "ranks"), [(1, [1, 2]), (0, [2, 1]), ("1", [1, 2]), (None, [])])
    def test_shp(self, labels, ranks):
        row = {"post_id": "x", "history": "a", "human_ref_A": "b", "human_ref_B": "c", "labels": labels, "score_A": 3}
        (found,) = ranking_rows([row], "x")
        assert found["prompt"] == "a" and found["ranks"] == ranks

    @pytest.mark.parametrize("question", ["a", {"dataset": "eli5", "id": "x", "full_text": "a"}])
    @pytest.mark.parametrize(("scores", "ranks"), [((1.0, -1.0), [1, 2]), ((0.0, 0.0), [1, 1])])
    def test_webgpt(self, question, scores, ranks):
        row = {"question": question, "answer_0": "b", "answer_1": "c", "score_0": scores[0], "score_1": scores[1]}
        (found,) = ranking_rows([row], "x")
        assert found["prompt"] == "a" and found["ranks"] == ranks

    def test_llama_factory_lists(self):
        row = {"instruction": "a", "input": "", "output": ["b", "c"]}
        assert one(row) == ("a", ["b", "c"])

    def test_trees_of_open_assistant(self):
        def node(name, role, rank=None, replies=()):
            return {"message_id": name, "text": name, "role": role, "rank": rank, "replies": list(replies)}

        deeper = node("q2", "prompter", None, [node("d", "assistant", 1), node("e", "assistant", 0)])
        tree = node("q1", "prompter", None, [node("b", "assistant", 1, [deeper]), node("c", "assistant", 0)])
        rows = ranking_rows([{"message_tree_id": "q1", "tree_state": "ready", "prompt": tree}], "x")
        assert [(row["prompt"][-1]["content"], row["completions"], row["ranks"]) for row in rows] == [
            ("q1", ["b", "c"], [2, 1]),
            ("q2", ["d", "e"], [2, 1]),
        ]
        assert rows[1]["prompt"] == [user("q1"), assistant("b"), user("q2")]


class TestNumbers:
    @pytest.mark.parametrize(
        ("completion", "score"), [("NA", "5"), ("None", "1"), ("0010", "2.50"), ("True", " 3 "), ("null", "1e1")]
    )
    def test_of_csv(self, completion, score):
        rows = [
            {"prompt": "a", "completion": text, "score": value} for text, value in [(completion, score), ("x", "0")]
        ]
        assert one(rows[0], rows[1:])[1] == [completion, "x"]
        assert ranking_rows(rows, "x")[0]["ranks"] == [1, 2]

    def test_that_is_none(self):
        rows = [{"prompt": "a", "completion": text, "score": "good"} for text in "bc"]
        with pytest.raises(InstructGPTError, match=r"row 0: scores: found \['good', 'good'\], expected numbers"):
            ranking_rows(rows, "x")
