"""The schemas in which rankings are published: by which columns each is recognised, and how its rows are read.

A reader converts a source row to `prompt` (text or messages), `completions` [K], and `ranks` [K] (1 = best) or
`scores` [K] (higher = better), where None means that the completion was not ranked; and `labeler` if the source names
who ranked. `data.rankings.checks` checks what it returns.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from typing import Any, NamedTuple

from instructgpt_hf.data.files import HEAD, Row, Rows, columns_of
from instructgpt_hf.data.messages import is_transcript, transcript_turns
from instructgpt_hf.data.rankings.pairs import (
    check_prompts,
    read_pair,
    read_transcripts,
    repeats_prompt,
)
from instructgpt_hf.data.rows import missing_columns
from instructgpt_hf.data.schemas import PROMPTS, has_prompt, read_prompt
from instructgpt_hf.data.values import WrongRow, as_list, as_number
from instructgpt_hf.errors import InstructGPTError

GroupReader = Callable[[Iterable[tuple[str, Row]]], Iterator[tuple[str, Row]]]
UNREADABLE = (AttributeError, IndexError, KeyError, TypeError, ValueError)  # from a reader whose row has another shape

_HELPSTEER_TURNS = re.compile(r"\n<extra_id_1>(User|Assistant)\n")
_RATED = ("overall_score", "fine-grained_score")


class Schema(NamedTuple):
    """One way in which rankings are written.

    Attributes:
        name: one word, shown to the user.
        columns: the columns it is recognised by.
        source: datasets that use it, for messages and documentation.
        read: reader of a row; None for rows that need no conversion.
        group: reader of all rows, where the completions of a prompt are in several of them; yields the number of the
            first source row and what `read` would return.
        matches: further condition on the first row.
        strict: whether an empty or contradictory completion is an error. Published datasets have such rows, which
            their users cannot correct: there the completion is dropped and counted.
        any_prompt: whether `prompt` may be any of the columns that `data.schemas` knows.
    """

    name: str
    columns: tuple[str, ...]
    source: str
    read: Callable[[Row], Row] | None = None
    group: GroupReader | None = None
    matches: Callable[[Row], bool] = lambda row: True
    strict: bool = False
    any_prompt: bool = False


def recognise(rows: Rows, where: str) -> tuple[Schema, Row]:
    """Find the schema of a dataset by its columns; returns the schema and the first row that has a value in each.

    Raises:
        InstructGPTError: if no schema has these columns. Lists all known schemas and the columns missing from the
            closest one that is not of a published dataset.
    """
    head = list(itertools.islice(rows, HEAD))
    if not head:
        raise InstructGPTError(f"{where}: has no rows.")
    named = columns_of(head)
    columns = {*named, *(["prompt"] if has_prompt(named) else [])}
    for schema in SCHEMAS:
        read = [name for name in schema.columns if name in named]
        first = next((row for row in head if all(row.get(name) is not None for name in read)), head[0])
        first = {**dict.fromkeys(named), **first}
        if (columns if schema.any_prompt else set(named)).issuperset(schema.columns) and schema.matches(first):
            if schema.name == "pairs":
                check_prompts(head, where)
                if repeats_prompt(head):
                    schema = schema._replace(read=functools.partial(read_pair, repeated=True))
            return schema, first
    own = [schema for schema in SCHEMAS if schema.strict and not columns.issuperset(schema.columns)]
    closest = max(own, key=lambda schema: len(columns.intersection(schema.columns)) / len(schema.columns))
    missing = [name for name in closest.columns if name not in columns]
    formats = {schema.name: schema for schema in reversed(SCHEMAS)}  # the first of a name
    known = [f"{x.name}: {', '.join(x.columns)} ({x.source})" for x in reversed(formats.values())]
    raise InstructGPTError(
        f"{missing_columns(named, missing, where)} Rankings are read in these formats, the prompt also from "
        f"{', '.join(PROMPTS[1:])}:\n  - " + "\n  - ".join(known)
    )


def ranks_from_scores(scores: list[float]) -> list[int]:
    """Competition ranks of scores where higher is better: [2.0, 5.0, 2.0] -> [2, 1, 2]."""
    return [1 + sum(other > score for other in scores) for score in scores]


def _listed(row: Row, form: str) -> Row:
    """The canonical schemas, whose values are in the column `form`: `ranks` or `scores`."""
    values = as_list(row.get(form), form)
    return {
        "prompt": read_prompt(row),
        "completions": as_list(row.get("completions"), "completions"),
        form: [as_number(value) for value in values] if isinstance(values, list) else values,
        **({"labeler": row["labeler"]} if "labeler" in row else {}),
    }


def _number(value: Any, sign: int = 1) -> float | None:
    """`sign` times the number that a judge gave, or None for `N/A` and NaN."""
    try:
        number = sign * float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _scored_pair(row: Row) -> Row:
    pair, scores = read_pair(row), [as_number(row["score_chosen"]), as_number(row["score_rejected"])]
    if None in scores:
        return pair
    if scores[0] < scores[1]:
        raise WrongRow(f"score_chosen {scores[0]} is below score_rejected {scores[1]}")
    return {"prompt": pair["prompt"], "completions": pair["completions"], "scores": scores}


def _nectar(row: Row) -> Row:
    completions = [item["answer"] for item in row["answers"]]
    scores = [_number(item["rank"], -1) for item in row["answers"]]
    return {"prompt": transcript_turns(row["prompt"]) or row["prompt"], "completions": completions, "scores": scores}


def _ultrafeedback(row: Row) -> Row:
    """Ranked by the first rating that every completion has: overall, fine-grained, mean of the aspects' ratings."""
    completions = row["completions"]
    rated = [[_number(item.get(name)) for item in completions] for name in _RATED]
    rated.append([_mean_rating(item.get("annotations") or {}) for item in completions])
    scores = next((scores for scores in rated if None not in scores), rated[0])
    return {"prompt": row["instruction"], "completions": [item["response"] for item in completions], "scores": scores}


def _mean_rating(annotations: dict[str, Any]) -> float | None:
    ratings = [_number((aspect or {}).get("Rating")) for aspect in annotations.values()]
    return None if not ratings or None in ratings else math.fsum(filter(None, ratings)) / len(ratings)


def _summaries(row: Row) -> Row:
    """Reddit posts get the headings of Stiennon et al. 2020; news articles get none."""
    info, choice = row["info"], row["choice"]
    post = info.get("post")
    text = f"SUBREDDIT: r/{info.get('subreddit')}\n\nTITLE: {info.get('title')}\n\nPOST: {post}" if post else None
    return {
        "prompt": f"{text or info['article']}\n\nTL;DR:",
        "completions": [summary["text"].strip() for summary in row["summaries"]],
        "ranks": [1 if number == choice else 2 for number in range(len(row["summaries"]))],
        "labeler": row.get("worker"),
    }


def _preference(row: Row) -> Row:
    """HelpSteer3: from -3 (the first is much better) to 3 (the second is much better); 0 is a tie."""
    better = _number(row["overall_preference"])
    scores = [None, None] if better is None else [-better, better]
    return {"prompt": row["context"], "completions": [row["response1"], row["response2"]], "scores": scores}


def _annotation(row: Row) -> Row:
    """AlpacaEval annotations: from 1 (the first is better) to 2 (the second is); 1.5 is a tie."""
    better = _number(row["preference"])
    scores = [None, None] if better is None or not 1 <= better <= 2 else [1.5 - better, better - 1.5]
    return {"prompt": row["instruction"], "completions": [row["output_1"], row["output_2"]], "scores": scores}


def _long(completion: str, value: str, read: Callable[[Row], Any] = read_prompt) -> GroupReader:
    """Reader of one completion per row; the rows of a prompt, or of a prompt and a labeler, make a ranking."""
    form = "ranks" if value == "rank" else "scores"

    def group(rows: Iterable[tuple[str, Row]]) -> Iterator[tuple[str, Row]]:
        rankings: dict[str, tuple[str, Row]] = {}
        for place, row in rows:
            labeler = {"labeler": row["labeler"]} if "labeler" in row else {}
            try:
                prompt: Any = read(row)
            except WrongRow as problem:
                yield place, {"problem": problem}
                continue
            key = json.dumps([prompt, row.get("labeler")], default=str)
            empty = {"prompt": prompt, "completions": [], form: [], **labeler}
            _, ranking = rankings.setdefault(key, (place, empty))
            ranking["completions"].append(row.get(completion))
            ranking[form].append(as_number(row.get(value)))
        yield from rankings.values()

    return group


def _helpsteer(rows: Iterable[tuple[str, Row]]) -> Iterator[tuple[str, Row]]:
    """HelpSteer and HelpSteer2: ranked by `helpfulness`, 0 to 4; equal ratings tie."""
    for place, ranking in _long("response", "helpfulness", lambda row: row["prompt"])(rows):
        first, *rest = _HELPSTEER_TURNS.split(ranking["prompt"] or "")
        if rest:
            spoken = [("User", first), *zip(rest[::2], rest[1::2], strict=True)]
            turns = [{"role": role.lower(), "content": text.strip()} for role, text in spoken]
            ranking["prompt"] = turns[:-1] if not turns[-1]["content"] else turns
        else:
            ranking["prompt"] = [{"role": "user", "content": first}]
        yield place, ranking


def _oasst(rows: Iterable[tuple[str, Row]]) -> Iterator[tuple[str, Row]]:
    """OpenAssistant: message trees, in which the replies to a prompter's message are ranked from 0 (the best)."""
    messages: dict[str, tuple[str, Row]] = {}
    replies: dict[str, list[Row]] = {}
    for place, row in rows:
        messages[row["message_id"]] = (place, row)
        if row["role"] == "assistant" and not row.get("deleted") and not row.get("synthetic"):
            replies.setdefault(row["parent_id"], []).append(row)
    for parent, children in replies.items():
        if parent not in messages or sum(child.get("rank") is not None for child in children) < 2:
            continue
        path, node = [], parent
        while node in messages:
            path.append(messages[node][1])
            node = messages[node][1]["parent_id"]
        if node is not None or any(message.get("deleted") for message in path):
            continue  # the beginning of the conversation is missing
        roles = {"prompter": "user"}
        prompt = [{"role": roles.get(turn["role"], turn["role"]), "content": turn["text"]} for turn in reversed(path)]
        scores = [_number(child.get("rank"), -1) for child in children]
        yield messages[parent][0], {"prompt": prompt, "completions": [x["text"] for x in children], "scores": scores}


def _oasst_trees(rows: Iterable[tuple[str, Row]]) -> Iterator[tuple[str, Row]]:
    """OpenAssistant's export, one conversation tree per row."""
    for place, row in rows:
        yield from _oasst((place, message) for message in _tree_messages(row["prompt"], None))


def _tree_messages(message: Row, parent: str | None) -> Iterator[Row]:
    yield {**message, "parent_id": parent}
    for reply in message.get("replies") or []:
        yield from _tree_messages(reply, message["message_id"])


def _alternatives(row: Row) -> Row:
    """LLaMA-Factory's former format: `output` holds the better answer, then the worse one."""
    return {"prompt": read_prompt(row), "completions": row["output"], "ranks": [*range(1, len(row["output"]) + 1)]}


def _shp(row: Row) -> Row:
    """Stanford Human Preferences: `labels` is 1 where answer A got more votes than B, else 0."""
    better = as_number(row["labels"])
    ranks = {1: [1, 2], 0: [2, 1]}.get(better, [None, None])
    return {"prompt": row["history"], "completions": [row["human_ref_A"], row["human_ref_B"]], "ranks": ranks}


def _webgpt(row: Row) -> Row:
    """WebGPT comparisons: scores of -1 to 1; equal scores tie."""
    question = row["question"]
    return {
        "prompt": question["full_text"] if isinstance(question, dict) else question,
        "completions": [row["answer_0"], row["answer_1"]],
        "scores": [_number(row["score_0"]), _number(row["score_1"])],
    }


def _is_dicts(name: str, key: str) -> Callable[[Row], bool]:
    """Whether the first row's column `name` is a list of objects with `key`."""
    return lambda row: isinstance(row[name], list) and bool(row[name]) and _has(row[name][0], key)


def _has(value: Any, key: str) -> bool:
    return isinstance(value, dict) and key in value


def _is_transcripts(row: Row) -> bool:
    return not has_prompt(row) and is_transcript(row["chosen"])


def _is_tree(row: Row) -> bool:
    return _has(row["prompt"], "message_id")


def _is_list(name: str) -> Callable[[Row], bool]:
    """Whether the first row's column `name` is a list of several values."""
    return lambda row: isinstance(row[name], list) and len(row[name]) > 1


def _listed_schemas() -> Iterator[Schema]:
    for name in ("ranks", "scores"):
        read = functools.partial(_listed, form=name)
        columns = ("prompt", "completions", name)
        yield Schema("rankings" if name == "ranks" else name, columns, "your own", read, strict=True, any_prompt=True)


def _long_schemas() -> Iterator[Schema]:
    for value, completion in product(("rank", "score"), ("completion", "response", "output", "answer")):
        columns = ("prompt", completion, value)
        reader = _long(completion, value)
        yield Schema(
            f"long-{value}s", columns, "your own, one completion per row", group=reader, strict=True, any_prompt=True
        )


# The first schema that matches is used.
SCHEMAS: tuple[Schema, ...] = (
    Schema(
        "ultrafeedback",
        ("instruction", "completions"),
        "openbmb/UltraFeedback",
        _ultrafeedback,
        matches=_is_dicts("completions", "response"),
    ),
    *_listed_schemas(),
    Schema("nectar", ("prompt", "answers"), "berkeley-nest/Nectar", _nectar, matches=_is_dicts("answers", "rank")),
    Schema("hh-rlhf", ("chosen", "rejected"), "Anthropic/hh-rlhf", read_transcripts, matches=_is_transcripts),
    Schema(
        "scored-pairs",
        ("chosen", "rejected", "score_chosen", "score_rejected"),
        "binarised UltraFeedback, such as trl-lib/ultrafeedback_binarized",
        _scored_pair,
    ),
    Schema("pairs", ("chosen", "rejected"), "TRL's preference pairs", read_pair, strict=True),
    Schema(
        "llama-factory",
        ("prompt", "output"),
        "LLaMA-Factory's lists",
        _alternatives,
        matches=_is_list("output"),
        strict=True,
        any_prompt=True,
    ),
    Schema("shp", ("history", "human_ref_A", "human_ref_B", "labels"), "stanfordnlp/SHP", _shp),
    Schema(
        "webgpt",
        ("question", "answer_0", "answer_1", "score_0", "score_1"),
        "openai/webgpt_comparisons",
        _webgpt,
    ),
    Schema(
        "summarize-from-feedback",
        ("info", "summaries", "choice"),
        "openai/summarize_from_feedback, comparisons",
        _summaries,
    ),
    Schema(
        "helpsteer", ("prompt", "response", "helpfulness"), "nvidia/HelpSteer, nvidia/HelpSteer2", group=_helpsteer
    ),
    Schema(
        "helpsteer3", ("context", "response1", "response2", "overall_preference"), "nvidia/HelpSteer3", _preference
    ),
    Schema(
        "alpaca-eval", ("instruction", "output_1", "output_2", "preference"), "AlpacaEval annotations", _annotation
    ),
    Schema("oasst", ("message_id", "parent_id", "role", "text", "rank"), "OpenAssistant/oasst1, oasst2", group=_oasst),
    Schema(
        "oasst-trees",
        ("message_tree_id", "prompt"),
        "OpenAssistant's files of trees",
        group=_oasst_trees,
        matches=_is_tree,
    ),
    *_long_schemas(),
)
