"""The schemas in which rankings are published: by which columns each is recognised, and how its rows are read.

A reader converts a source row to `prompt` (text or messages), `completions` [K], and `ranks` [K] (1 = best) or
`scores` [K] (higher = better), where None means that the completion was not ranked; and `labeler` if the source names
who ranked. `data.rankings.checks` checks what it returns.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from typing import Any, NamedTuple

from datasets import Dataset, IterableDataset
from trl import extract_prompt

from instructgpt_hf.errors import InstructGPTError, nearest

Row = dict[str, Any]
GroupReader = Callable[[Iterable[Row]], Iterator[tuple[int, Row]]]
UNREADABLE = (AttributeError, IndexError, KeyError, TypeError, ValueError)  # from a reader whose row has another shape

_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_TURNS = re.compile(r"\n\n(Human|Assistant):")
_HELPSTEER_TURNS = re.compile(r"\n<extra_id_1>(User|Assistant)\n")
_WRITTEN_MESSAGES = re.compile(r"""\s*\[\s*\{\s*['"](role|content)['"]\s*:""")
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
    """

    name: str
    columns: tuple[str, ...]
    source: str
    read: Callable[[Row], Row] | None = None
    group: GroupReader | None = None
    matches: Callable[[Row], bool] = lambda row: True
    strict: bool = False


def recognise(dataset: Dataset | IterableDataset, where: str) -> tuple[Schema, Row]:
    """Find the schema of a dataset by its columns; returns the schema and the first row.

    Raises:
        InstructGPTError: if no schema has these columns. Lists all known schemas and the columns missing from the
            closest one that is not of a published dataset.
    """
    first = next(iter(dataset), None)
    if first is None:
        raise InstructGPTError(f"{where}: has no rows.")
    columns = set(first)
    for schema in SCHEMAS:
        if columns.issuperset(schema.columns) and schema.matches(first):
            return schema, first
    own = [schema for schema in SCHEMAS if schema.strict]
    closest = max(own, key=lambda schema: len(columns.intersection(schema.columns)) / len(schema.columns))
    hints = ", ".join(f"{name!r} ({nearest(name, columns)})" for name in closest.columns if name not in columns)
    formats = {schema.name: schema for schema in reversed(SCHEMAS)}  # the first of a name
    known = [f"{x.name}: {', '.join(x.columns)} ({x.source})" for x in reversed(formats.values())]
    raise InstructGPTError(
        f"{where}: missing column {hints}; it has {', '.join(map(repr, first))}. Rankings are read in these "
        f"formats:\n  - " + "\n  - ".join(known)
    )


def ranks_from_scores(scores: list[float]) -> list[int]:
    """Competition ranks of scores where higher is better: [2.0, 5.0, 2.0] -> [2, 1, 2]."""
    return [1 + sum(other > score for other in scores) for score in scores]


def _parsed(value: Any) -> Any:
    """Messages that are written as JSON, as in CSV files, which have no lists; other values unchanged."""
    return json.loads(value) if isinstance(value, str) and _WRITTEN_MESSAGES.match(value) else value


def _listed(row: Row) -> Row:
    raw: Row = {name: row[name] for name in ("prompt", "completions", "ranks", "scores", "labeler") if name in row}
    for name in ("completions", "ranks", "scores"):
        if isinstance(raw.get(name), str):
            raw[name] = json.loads(raw[name])
    return raw | {"prompt": _parsed(row["prompt"])}


def _number(value: Any, sign: int = 1) -> float | None:
    """`sign` times the number that a judge gave, or None for `N/A` and NaN."""
    try:
        number = sign * float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _pair(row: Row) -> Row:
    """TRL's preference pairs. A conversation holds its prompt; the column `prompt` may then be missing or shorter."""
    row = {name: _parsed(row[name]) for name in ("prompt", "chosen", "rejected") if name in row}
    if "prompt" not in row and isinstance(row["chosen"], str):
        row = extract_prompt(row)
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    if isinstance(chosen, list):
        if chosen[:-1] != rejected[:-1]:
            raise ValueError("chosen and rejected do not continue the same conversation")
        prompt = chosen[:-1] or prompt
        chosen, rejected = chosen[-1:], rejected[-1:]
    return {"prompt": prompt, "completions": [chosen, rejected], "ranks": [1, 2]}


def _scored_pair(row: Row) -> Row:
    pair, scores = _pair(row), [row["score_chosen"], row["score_rejected"]]
    if None in scores:
        return pair
    if scores[0] < scores[1]:
        raise ValueError(f"score_chosen {scores[0]} is below score_rejected {scores[1]}")
    return {"prompt": pair["prompt"], "completions": pair["completions"], "scores": scores}


def _turns(text: str) -> list[dict[str, str]]:
    r"""Messages of a transcript "\n\nHuman: ...\n\nAssistant: ...", without an empty last turn."""
    parts = _TURNS.split(text)
    if parts[0].strip():
        return []
    roles = {"Human": "user", "Assistant": "assistant"}
    spoken = zip(parts[1::2], parts[2::2], strict=True)
    turns = [{"role": roles[role], "content": text.strip()} for role, text in spoken]
    return turns[:-1] if turns and not turns[-1]["content"] else turns


def _transcripts(row: Row) -> Row:
    """HH-RLHF: two transcripts that share all turns but the assistant's last one."""
    chosen, rejected = row["chosen"], row["rejected"]
    start = chosen.rfind(_ASSISTANT)
    while start >= 0 and not rejected.startswith(chosen[: start + len(_ASSISTANT)]):
        start = chosen.rfind(_ASSISTANT, 0, start)
    completions = [text[start + len(_ASSISTANT) :].strip() for text in (chosen, rejected)]
    single = start >= 0 and not any(_HUMAN in completion for completion in completions)
    return {
        "prompt": _turns(chosen[: max(start, 0)]),
        "completions": completions,
        "ranks": [1, 2] if single else [None, None],  # None: the conversations differ before their last turn
    }


def _nectar(row: Row) -> Row:
    completions = [item["answer"] for item in row["answers"]]
    scores = [_number(item["rank"], -1) for item in row["answers"]]
    return {"prompt": _turns(row["prompt"]) or row["prompt"], "completions": completions, "scores": scores}


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


def _long(prompt: str, completion: str, value: str) -> GroupReader:
    """Reader of one completion per row; the rows of a prompt, or of a prompt and a labeler, make a ranking."""
    form = "ranks" if value == "rank" else "scores"

    def group(rows: Iterable[Row]) -> Iterator[tuple[int, Row]]:
        rankings: dict[str, tuple[int, Row]] = {}
        for number, row in enumerate(rows):
            key = json.dumps([row[prompt], row.get("labeler")])
            labeler = {"labeler": row["labeler"]} if "labeler" in row else {}
            empty = {"prompt": row[prompt], "completions": [], form: [], **labeler}
            _, ranking = rankings.setdefault(key, (number, empty))
            ranking["completions"].append(row[completion])
            ranking[form].append(row[value])
        for number, ranking in rankings.values():
            try:
                yield number, ranking | {"prompt": _parsed(ranking["prompt"])}
            except ValueError as error:
                yield number, ranking | {"problem": f"prompt: holds messages that are not JSON ({error})"}

    return group


def _helpsteer(rows: Iterable[Row]) -> Iterator[tuple[int, Row]]:
    """HelpSteer and HelpSteer2: ranked by `helpfulness`, 0 to 4; equal ratings tie."""
    for number, ranking in _long("prompt", "response", "helpfulness")(rows):
        first, *rest = _HELPSTEER_TURNS.split(ranking["prompt"] or "")
        if rest:
            spoken = [("User", first), *zip(rest[::2], rest[1::2], strict=True)]
            turns = [{"role": role.lower(), "content": text.strip()} for role, text in spoken]
            ranking["prompt"] = turns[:-1] if not turns[-1]["content"] else turns
        else:
            ranking["prompt"] = [{"role": "user", "content": first}]
        yield number, ranking


def _oasst(rows: Iterable[Row]) -> Iterator[tuple[int, Row]]:
    """OpenAssistant: message trees, in which the replies to a prompter's message are ranked from 0 (the best)."""
    messages: dict[str, tuple[int, Row]] = {}
    replies: dict[str, list[Row]] = {}
    for number, row in enumerate(rows):
        messages[row["message_id"]] = (number, row)
        if row["role"] == "assistant" and not row.get("deleted") and not row.get("synthetic"):
            replies.setdefault(row["parent_id"], []).append(row)
    for parent, children in replies.items():
        if parent not in messages or sum(child["rank"] is not None for child in children) < 2:
            continue
        path, node = [], parent
        while node in messages:
            path.append(messages[node][1])
            node = messages[node][1]["parent_id"]
        if node is not None or any(message.get("deleted") for message in path):
            continue  # the beginning of the conversation is missing
        roles = {"prompter": "user"}
        prompt = [{"role": roles.get(turn["role"], turn["role"]), "content": turn["text"]} for turn in reversed(path)]
        scores = [_number(child["rank"], -1) for child in children]
        yield messages[parent][0], {"prompt": prompt, "completions": [x["text"] for x in children], "scores": scores}


def _is_dicts(name: str, key: str) -> Callable[[Row], bool]:
    """Whether the first row's column `name` is a list of objects with `key`."""
    return lambda row: bool(row[name]) and isinstance(row[name], list) and key in dict(row[name][0])


def _is_transcript(row: Row) -> bool:
    return "prompt" not in row and str(row["chosen"]).startswith(_HUMAN)


def _long_schemas() -> Iterator[Schema]:
    texts = (("prompt", "completion"), ("prompt", "response"), ("instruction", "output"))
    for value, (prompt, completion) in product(("rank", "score"), texts):
        columns = (prompt, completion, value)
        yield Schema(f"long-{value}s", columns, "your own, one completion per row", group=_long(*columns), strict=True)


# The first schema that matches is used.
SCHEMAS: tuple[Schema, ...] = (
    Schema(
        "ultrafeedback",
        ("instruction", "completions"),
        "openbmb/UltraFeedback",
        _ultrafeedback,
        matches=_is_dicts("completions", "response"),
    ),
    Schema("rankings", ("prompt", "completions", "ranks"), "your own", _listed, strict=True),
    Schema("scores", ("prompt", "completions", "scores"), "your own", _listed, strict=True),
    Schema("nectar", ("prompt", "answers"), "berkeley-nest/Nectar", _nectar, matches=_is_dicts("answers", "rank")),
    Schema("hh-rlhf", ("chosen", "rejected"), "Anthropic/hh-rlhf", _transcripts, matches=_is_transcript),
    Schema(
        "scored-pairs",
        ("chosen", "rejected", "score_chosen", "score_rejected"),
        "binarised UltraFeedback, such as trl-lib/ultrafeedback_binarized",
        _scored_pair,
    ),
    Schema("pairs", ("chosen", "rejected"), "TRL's preference pairs", _pair, strict=True),
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
    *_long_schemas(),
)
