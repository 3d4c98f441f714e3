"""Hand-written rows in the real schemas of published rankings, and what they mean."""

import json
from pathlib import Path

import pytest
from datasets import Dataset
from helpers.turns import assistant, user

from instructgpt_hf.data.prompts import PromptFormat
from instructgpt_hf.data.rankings.rows import DROPPED, ranking_rows, tokenize_rankings
from instructgpt_hf.data.rankings.schemas import SCHEMAS, recognise
from instructgpt_hf.data.sources import load_split
from instructgpt_hf.errors import InstructGPTError


def read(name, *rows):
    """The rows in the canonical form, after checking that they are recognised as `name`."""
    data = Dataset.from_list(list(rows))
    assert recognise(data, "here")[0].name == name
    return places_left_out(ranking_rows(data, "here"))


def places_left_out(rows):
    return [{name: value for name, value in row.items() if name != "row"} for row in rows]


def one(name, *rows):
    (found,) = read(name, *rows)
    return found


class TestOpenAssistant:
    @staticmethod
    def message(name, parent, role, rank=None, **more):
        row = {"message_id": name, "parent_id": parent, "user_id": "u", "text": f"text of {name}", "role": role}
        row |= {"lang": "en", "review_count": 3, "review_result": True, "deleted": False, "rank": rank}
        return row | {"synthetic": False, "message_tree_id": name[0], "tree_state": "ready_for_export"} | more

    def tree(self):
        message = self.message
        return [
            message("a", None, "prompter"),
            message("a1", "a", "assistant", 1),
            message("a2", "a", "assistant", 0),
            message("a3", "a", "assistant", 2),
            message("a21", "a2", "prompter", 0),
            message("a211", "a21", "assistant", 0),
            message("a212", "a21", "assistant", 1),
            message("a11", "a1", "prompter", 0),
            message("a111", "a11", "assistant", 0),
        ]

    def test_one_ranking_per_prompter_turn_with_two_replies(self):
        first, second = read("oasst", *self.tree())
        assert first == {
            "prompt": [user("text of a")],
            "completions": ["text of a1", "text of a2", "text of a3"],
            "ranks": [2, 1, 3],
            "unranked": 0,
        }
        assert second["prompt"] == [user("text of a"), assistant("text of a2"), user("text of a21")]
        assert second["completions"] == ["text of a211", "text of a212"] and second["ranks"] == [1, 2]

    def test_deleted_and_synthetic_replies_are_left_out_and_leave_a_gap(self):
        rows = self.tree()[:4]
        rows += [self.message("a4", "a", "assistant", 3, synthetic=True), self.message("a5", "a", "assistant", 4)]
        rows[1]["deleted"] = True
        assert one("oasst", *rows)["completions"] == ["text of a2", "text of a3", "text of a5"]
        assert one("oasst", *rows)["ranks"] == [1, 2, 3]

    def test_reply_without_a_rank(self):
        found = one("oasst", *self.tree()[:4], self.message("a4", "a", "assistant"))
        assert found["unranked"] == 1 and len(found["completions"]) == 3

    def test_conversation_without_its_beginning(self):
        """The second turn's question is missing in one, the answer before it in the other."""
        tree = self.tree()
        assert len(read("oasst", *tree[:4], *tree[5:])) == 1
        (found,) = read("oasst", *tree[:2], *tree[3:])
        assert found["prompt"] == [user("text of a")] and found["completions"] == ["text of a1", "text of a3"]

    def test_nothing_ranked(self):
        with pytest.raises(InstructGPTError, match="here: no prompt has two ranked completions"):
            read("oasst", *self.tree()[:2])


class TestNectar:
    def row(self, prompt="\n\nHuman: Name a fruit.\n\nAssistant: ", ranks=(3.0, 1.0, 2.0), **more):
        texts = ("Stone.", "Fig.", "A fruit.")
        answers = [{"answer": text, "model": "gpt-4", "rank": rank} for text, rank in zip(texts, ranks, strict=True)]
        return {"prompt": prompt, "answers": answers, "turns": 1, "num_responses": 3, "source": ["x"], **more}

    def test_ranks(self):
        assert one("nectar", self.row(good_natured=True)) == {
            "prompt": [user("Name a fruit.")],
            "completions": ["Stone.", "Fig.", "A fruit."],
            "ranks": [3, 1, 2],
            "unranked": 0,
        }

    def test_several_turns(self):
        found = one("nectar", self.row("\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: A fruit?\n\nAssistant: "))
        assert found["prompt"] == [user("Hi."), assistant("Hello."), user("A fruit?")]

    def test_prompt_that_is_no_transcript_stays_text(self):
        prompts = ["Name a fruit.", "Be brief.\n\nHuman: A fruit?\n\nAssistant: "]
        assert [row["prompt"] for row in read("nectar", *map(self.row, prompts))] == prompts

    def test_answer_without_a_rank(self):
        found = one("nectar", self.row(ranks=(2.0, float("nan"), 1.0)))
        assert found["completions"] == ["Stone.", "A fruit."] and found["ranks"] == [2, 1] and found["unranked"] == 1


class TestUltraFeedback:
    def completion(self, text, overall, fine=None, ratings=()):
        aspects = ("helpfulness", "honesty", "instruction_following", "truthfulness")
        annotations = {
            name: {"Rating": rating, "Rationale": "r"} for name, rating in zip(aspects, ratings, strict=False)
        }
        scores = {"overall_score": overall, "fine-grained_score": fine}
        return {"response": text, "model": "m", "annotations": annotations or None, "critique": "c", **scores}

    def row(self, *completions):
        more = {"source": "s", "models": ["m"], "correct_answers": ["None"], "incorrect_answers": ["None"]}
        return {"instruction": "Name a fruit.", "completions": list(completions), **more}

    def test_overall_score(self):
        found = one("ultrafeedback", self.row(self.completion("Fig.", 8.5, 1), self.completion("Stone.", 2.0, 5)))
        assert found == {
            "prompt": "Name a fruit.",
            "completions": ["Fig.", "Stone."],
            "ranks": [1, 2],
            "unranked": 0,
        }

    def test_equal_scores_tie(self):
        completions = [self.completion(text, 7.0) for text in ("Fig.", "Pear.")]
        assert one("ultrafeedback", self.row(*completions))["ranks"] == [1, 1]

    def test_other_ratings_where_the_overall_score_is_missing(self):
        fine = self.row(self.completion("Fig.", None, 2.5), self.completion("Pear.", 9.0, 4.0))
        assert one("ultrafeedback", fine)["ranks"] == [2, 1]
        rated = [
            self.completion("Fig.", None, None, ["5", "3"]),
            self.completion("Pear.", 9.0, None, ["1", "2"]),
        ]
        assert one("ultrafeedback", self.row(*rated))["ranks"] == [1, 2]

    def test_completion_without_any_rating(self):
        rated = [
            self.completion("Fig.", 3.0, None, ["N/A", "3"]),
            self.completion("Pear.", 9.0, None, ["1", "2"]),
            self.completion("Stone.", None, None, ["1", "2"]),
        ]
        found = one("ultrafeedback", self.row(*rated))
        assert found["completions"] == ["Fig.", "Pear."] and found["ranks"] == [2, 1] and found["unranked"] == 1


class TestPairs:
    def binarised(self, better, worse, chosen="Fig.", rejected="Stone."):
        question = [{"role": "system", "content": "Be brief."}, user("Name a fruit.")]
        return {
            "prompt": "Name a fruit.",
            "prompt_id": "1",
            "chosen": [*question, assistant(chosen)],
            "rejected": [*question, assistant(rejected)],
            "messages": [*question, assistant(chosen)],
            "score_chosen": better,
            "score_rejected": worse,
        }

    def test_binarised_ultrafeedback(self):
        """The messages hold more than the column `prompt`: here the system's."""
        assert one("scored-pairs", self.binarised(8.0, 5.0)) == {
            "prompt": [{"role": "system", "content": "Be brief."}, user("Name a fruit.")],
            "completions": ["Fig.", "Stone."],
            "ranks": [1, 2],
            "unranked": 0,
        }

    def test_equal_scores_tie_and_missing_scores_do_not(self):
        tied, unscored = read("scored-pairs", self.binarised(5.0, 5.0), self.binarised(None, None))
        assert (tied["ranks"], unscored["ranks"]) == ([1, 1], [1, 2])

    def test_scores_against_the_labels(self):
        with pytest.raises(InstructGPTError, match=r"row 0: .*score_chosen 4\.0 is below score_rejected 5\.0"):
            read("scored-pairs", self.binarised(4.0, 5.0))

    def test_hh(self):
        start = "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: A fruit?\n\nAssistant:"
        found = one("hh-rlhf", {"chosen": f"{start} Fig.", "rejected": f"{start} Figure it out."})
        assert found == {
            "prompt": [user("Hi."), assistant("Hello."), user("A fruit?")],
            "completions": ["Fig.", "Figure it out."],
            "ranks": [1, 2],
            "unranked": 0,
        }

    def test_hh_rows_that_cannot_be_learned_from_leave_with_a_count(self, tokenizer):
        start = "\n\nHuman: a\n\nAssistant:"
        rows = [
            {"chosen": f"{start} b", "rejected": f"{start} c"},
            {"chosen": f"{start} b", "rejected": f"{start} b"},
            {"chosen": f"{start} b", "rejected": f"{start}"},
            {"chosen": f"{start} b", "rejected": f"{start} c\n\nHuman: d\n\nAssistant: e"},
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"},
            {"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: c"},
        ]
        data = ranking_rows(Dataset.from_list(rows), "here")
        made = PromptFormat.create("raw", tokenizer)
        kept, counts, _ = tokenize_rankings(data, made, tokenizer, 20, "here")
        assert len(kept) == 1 and counts["dropped_too_few"] == 5
        assert counts["dropped_contradictions"] == 2 and counts["dropped_unranked"] == 1 + 2 + 2 + 2

    def test_own_pair_of_equal_texts_is_an_error(self):
        with pytest.raises(InstructGPTError, match="chosen and rejected are the same text, ranked 1 and 2"):
            read("pairs", {"prompt": "a", "chosen": "b", "rejected": "b"})

    def test_trl_conversational_pair_with_prompt(self):
        row = {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]}
        assert one("pairs", row) == {"prompt": [user("a")], "completions": ["b", "c"], "ranks": [1, 2], "unranked": 0}

    @pytest.mark.parametrize(("better", "ranks"), [(-3, [1, 2]), (1, [2, 1]), (0, [1, 1])])
    def test_helpsteer3(self, better, ranks):
        row = {"domain": "general", "language": "english", "context": [user("a"), assistant("b"), user("c")]}
        row |= {"response1": "d", "response2": "e", "overall_preference": better, "individual_preference": []}
        found = one("helpsteer3", row)
        assert found["prompt"] == row["context"] and found["completions"] == ["d", "e"] and found["ranks"] == ranks

    @pytest.mark.parametrize(("better", "ranks"), [(1.0, [1, 2]), (1.98, [2, 1]), (1.5, [1, 1]), (None, [])])
    def test_alpaca_eval(self, better, ranks):
        row = {"instruction": "a", "output_1": "b", "generator_1": "x", "output_2": "c", "generator_2": "y"}
        assert one("alpaca-eval", {**row, "annotator": "z", "preference": better})["ranks"] == ranks


class TestSummaries:
    def row(self, choice, **info):
        absent = dict.fromkeys(["post", "title", "subreddit", "site", "article"])
        summaries = [{"text": " A dog.", "policy": "ref", "note": None}, {"text": " Pets.", "policy": "sup4"}]
        more = {"batch": "0", "split": "train", "extra": {"confidence": None}}
        return {
            "info": {"id": "1", **absent, **info},
            "summaries": summaries,
            "choice": choice,
            "worker": "w7",
            **more,
        }

    def test_post(self):
        found = one("summarize-from-feedback", self.row(1, post="I met a dog.", title="A dog", subreddit="pets"))
        assert found == {
            "prompt": "SUBREDDIT: r/pets\n\nTITLE: A dog\n\nPOST: I met a dog.\n\nTL;DR:",
            "completions": ["A dog.", "Pets."],
            "ranks": [2, 1],
            "unranked": 0,
            "labeler": "w7",
        }

    def test_article(self):
        found = one("summarize-from-feedback", self.row(0, article="News about a dog.", title="Dog"))
        assert found["prompt"] == "News about a dog.\n\nTL;DR:" and found["ranks"] == [1, 2]


class TestHelpSteer:
    def row(self, prompt, response, helpfulness):
        others = dict.fromkeys(["correctness", "coherence", "complexity", "verbosity"], 2)
        return {"prompt": prompt, "response": response, "helpfulness": helpfulness, **others}

    def test_rows_of_a_prompt_are_one_ranking(self):
        rows = [self.row("a", "b", 2), self.row("d", "e", 0), self.row("a", "c", 4), self.row("a", "f", 2)]
        first, second = read("helpsteer", *rows)
        assert first == {"prompt": [user("a")], "completions": ["b", "c", "f"], "ranks": [2, 1, 2], "unranked": 0}
        assert second["completions"] == ["e"]  # nothing to compare with; the tokenization counts it

    def test_several_turns(self):
        """The second prompt is missing: in published data it leaves with its count."""
        prompt = "a\n<extra_id_1>Assistant\nb\n<extra_id_1>User\nc"
        found, lost = read("helpsteer", self.row(prompt, "d", 1), self.row(prompt, "e", 3), self.row(None, "f", 1))
        assert lost["completions"] == [] and lost["unranked"] == 1
        assert found["prompt"] == [user("a"), assistant("b"), user("c")]


class TestLongRows:
    def test_ranks_and_labelers(self):
        rows = [
            {"prompt": "a", "completion": text, "rank": rank, "labeler": labeler}
            for text, rank, labeler in [("b", 1, "x"), ("c", 2, "x"), ("b", 1, "y"), ("c", 1, "y")]
        ]
        assert read("long-ranks", *rows) == [
            {"prompt": "a", "completions": ["b", "c"], "ranks": [1, 2], "unranked": 0, "labeler": "x"},
            {"prompt": "a", "completions": ["b", "c"], "ranks": [1, 1], "unranked": 0, "labeler": "y"},
        ]

    @pytest.mark.parametrize(
        ("prompt", "completion"), [("prompt", "completion"), ("prompt", "response"), ("instruction", "output")]
    )
    def test_scores(self, prompt, completion):
        rows = [{prompt: "a", completion: text, "score": score} for text, score in [("b", 0.5), ("c", 2.5)]]
        assert one("long-scores", *rows)["ranks"] == [2, 1]

    def test_wrong_ranking_is_named_by_its_first_row(self):
        rows = [
            {"prompt": word, "completion": text, "rank": rank} for word, text, rank in ["ab1", "cd1", "ce3", "af2"]
        ]
        rows = [{**row, "rank": int(row["rank"])} for row in rows]
        with pytest.raises(InstructGPTError, match=r"- row 1: ranks: found \[1, 3\], which skip a rank"):
            read("long-ranks", *rows)


class TestFiles:
    ROWS = (
        {"prompt": "a, b", "completions": ["c", 'd "e"', "f\ng"], "ranks": [2, 1, 3]},
        {"prompt": "h", "completions": ["i", "j"], "ranks": [1, 1]},
    )

    def write(self, path):
        rows = [dict(row) for row in self.ROWS]
        if path.suffix == ".csv":
            rows = [{**row, **{key: json.dumps(row[key]) for key in ("completions", "ranks")}} for row in rows]
            Dataset.from_list(rows).to_csv(str(path))
        elif path.suffix == ".parquet":
            Dataset.from_list(rows).to_parquet(str(path))
        else:
            lines = map(json.dumps, rows)
            path.write_text("\n".join(lines) if path.suffix == ".jsonl" else f"[{','.join(lines)}]")
        return str(path)

    @pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
    @pytest.mark.parametrize("streaming", [False, True])
    def test_every_format_holds_the_same_rankings(self, tmp_path, suffix, streaming):
        source = self.write(tmp_path / f"rankings{suffix}")
        found = places_left_out(ranking_rows(load_split(source, "train", streaming=streaming), "here"))
        prompts = [[user(row["prompt"])] if streaming else row["prompt"] for row in self.ROWS]
        assert found == [{**row, "prompt": x, "unranked": 0} for row, x in zip(self.ROWS, prompts, strict=True)]

    def test_csv_in_long_form(self, tmp_path):
        path = tmp_path / "long.csv"
        path.write_text("prompt,completion,score\na,b,0.5\na,c,\na,d,1\n")
        data = load_split(str(path), "train")
        assert places_left_out(ranking_rows(data, "here")) == [
            {"prompt": "a", "completions": ["b", "d"], "ranks": [2, 1], "unranked": 1}
        ]

    def test_messages_in_csv_are_json(self, tmp_path):
        turns = [user("a, b")]
        rows = [{"prompt": json.dumps(turns), "completions": '["c", "d"]', "ranks": "[2, 1]"}]
        Dataset.from_list(rows).to_csv(str(tmp_path / "chat.csv"))
        found = places_left_out(ranking_rows(load_split(str(tmp_path / "chat.csv"), "train"), "here"))
        assert found == [{"prompt": turns, "completions": ["c", "d"], "ranks": [2, 1], "unranked": 0}]

    def test_pairs_of_conversations_in_csv(self, tmp_path):
        rows = [{key: json.dumps([user("a"), assistant(key)]) for key in ("chosen", "rejected")}]
        Dataset.from_list(rows).to_csv(str(tmp_path / "chat.csv"))
        (found,) = ranking_rows(load_split(str(tmp_path / "chat.csv"), "train"), "here").to_list()
        assert found["prompt"] == [user("a")] and found["completions"] == ["chosen", "rejected"]

    def test_messages_that_python_wrote_in_long_form(self):
        rows = [{"prompt": str([user("a")]), "completion": text, "rank": rank} for text, rank in [("b", 1), ("c", 2)]]
        assert one("long-ranks", *rows)["prompt"] == [user("a")]

    def test_lists_that_python_wrote(self):
        row = {"prompt": str([user("a")]), "completions": "['b', 'it\\'s c']", "ranks": "[1, 2]"}
        assert one("rankings", row)["completions"] == ["b", "it's c"]

    def test_csv_whose_lists_are_not_json(self, tmp_path):
        path = tmp_path / "wrong.csv"
        path.write_text("prompt,completions,ranks\na,b;c,1;2\n")
        data = load_split(str(path), "train")
        with pytest.raises(InstructGPTError, match="row 0: ranks: found '1;2', which is neither JSON nor"):
            ranking_rows(data, "here")


def test_documentation_names_every_format_and_count():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    assert all(f"`{schema.name}`" in page for schema in SCHEMAS)
    assert all(f"| `{name}` |" in page for name in DROPPED)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "a", "output": "b", "label": True}, "missing column 'rank'"),
        ({"prompt": "a", "answers": ["b", "c"], "ranks": [1, 2]}, "missing column 'completions'"),
    ],
)
def test_columns_of_a_schema_with_other_values(row, expected):
    with pytest.raises(InstructGPTError, match=expected):
        ranking_rows([row], "mine")


def test_lists_of_texts_behind_an_instruction():
    row = {"instruction": "a", "completions": ["b", "c"], "ranks": [1, 2]}
    assert ranking_rows([row], "mine")["completions"] == [["b", "c"]]


def test_a_wrong_tree_is_named():
    tree = {"message_tree_id": "1", "prompt": {"message_id": "1", "text": "a", "role": "prompter", "replies": []}}
    with pytest.raises(InstructGPTError, match="trees: row 1: is not a row of the format 'oasst-trees'"):
        ranking_rows([tree, {"message_tree_id": "2", "prompt": {"text": "b"}}], "trees")


@pytest.mark.parametrize("first", [True, False])
def test_hh_row_without_texts_leaves_with_a_count(first):
    right = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
    rows = ranking_rows([*[{"chosen": None, "rejected": None}] * first, right, {"chosen": None, "rejected": ""}], "hh")
    assert rows["completions"] == [*[[]] * first, ["b", "c"], []]


def test_unknown_schema_lists_the_known_ones():
    with pytest.raises(InstructGPTError) as caught:
        recognise(Dataset.from_list([{"prompt": "a", "answer": "b"}]), "my data")
    message = str(caught.value)
    assert message.startswith("my data: missing column 'rank' (choose from answer, prompt); it has 'prompt', 'answer'")
    assert "\n  - nectar: prompt, answers (berkeley-nest/Nectar)\n" in message
    assert message.count("long-ranks") == 1 and all(f"\n  - {schema.name}: " in message for schema in SCHEMAS)


def test_ranks_come_before_scores_where_both_are_there():
    row = {"prompt": "a", "completions": ["b", "c"], "ranks": [1, 2], "scores": [0.0, 1.0]}
    assert one("rankings", row)["ranks"] == [1, 2]
