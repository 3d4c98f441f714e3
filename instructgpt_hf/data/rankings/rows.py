"""Rankings in canonical form, and tokenized: K completions of a prompt with their ranks, 1 = best, equal = tied."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from datasets import Dataset, Features, IterableDataset, Value
from transformers import PreTrainedTokenizerBase

from instructgpt_hf.data.files import Row, Rows, is_part, numbered
from instructgpt_hf.data.messages import to_messages
from instructgpt_hf.data.prompts import PromptFormat
from instructgpt_hf.data.rankings.checks import canonical, check_ranking
from instructgpt_hf.data.rankings.schemas import UNREADABLE, Schema, recognise
from instructgpt_hf.data.rows import (
    MESSAGES,
    Tokenized,
    WrongRows,
    prompt_feature,
    raise_unrendered,
    rendering,
    uniform_prompts,
)
from instructgpt_hf.data.values import WrongRow
from instructgpt_hf.errors import InstructGPTError

# Counts of what is dropped on the way to the trainer: completions, then prompts.
DROPPED = {
    "dropped_unranked": "completions without a rank",
    "dropped_duplicates": "completions listed twice",
    "dropped_contradictions": "completions that render equal but rank differently",
    "dropped_completions": "completions over a length limit",
    "dropped_too_few": "prompts left with fewer than two completions",
    "dropped_ties": "prompts with only ties",
}
CANONICAL = {"prompt", "completions", "ranks", "unranked"}
_COUNTED = ("dropped_duplicates", "dropped_contradictions", "dropped_completions")  # by `limit_ranking`


def ranking_rows(rows: Rows, where: str, recognised: tuple[Schema, Row] | None = None) -> Dataset | IterableDataset:
    """Convert a dataset of rankings from any known schema (`data.rankings.schemas.SCHEMAS`) to the canonical form.

    Args:
        rows: rows of any known schema; a dataset in the canonical form is returned unchanged.
        where: name of the dataset in errors.
        recognised: what `recognise` returned, where the caller has called it; a stream opens again for each call.

    Returns:
        Columns `prompt` (text or messages), `completions` [K] (text), `ranks` [K] (whole numbers, 1 = best, equal =
        tied), `unranked` (number of completions dropped because they had no rank or no text), `row` (its place in the
        source) and, if the source names the labeler, `labeler` (text). A stream is converted and checked row by row as
        it is read, and its prompts are messages.

    Raises:
        InstructGPTError: if the schema is not known, or naming every wrong row; a stream raises at the first wrong
            row that is read.
    """
    if isinstance(rows, (Dataset, IterableDataset)) and set(rows.column_names or ()) >= CANONICAL:
        return rows
    schema, first = recognised or recognise(rows, where)
    if isinstance(rows, IterableDataset):
        return _streamed(rows, where, schema, first)
    converted, wrong = list[Row](), WrongRows(where, is_part(rows))
    for place, raw in _read(schema, rows, where):
        wrong.read += 1
        try:
            converted.append({**_convert(schema, raw), "row": place})
        except WrongRow as problem:
            wrong.add(place, problem)
            if problem.tolerable:
                converted.append({**_leave_out(raw), "row": place})
    if not wrong.read:
        raise InstructGPTError(f"{where}: no prompt has two ranked completions.")
    wrong.raise_unless_tolerable()
    converted = uniform_prompts(converted)
    features = _features(prompt_feature(converted), any("labeler" in row for row in converted))
    return Dataset.from_list([{name: row.get(name) for name in features} for row in converted], features=features)


def _streamed(rows: IterableDataset, where: str, schema: Schema, first: Row) -> IterableDataset:
    if schema.group is not None:
        raise InstructGPTError(
            f"{where}: rows of the format {schema.name!r} cannot be streamed: the completions of a prompt are in "
            "several rows, and a stream does not tell which one is the last. Set streaming: false."
        )

    def convert(source: Row, number: int) -> Row:
        raw = _read_row(schema, source)
        try:
            row = _convert(schema, raw)
        except WrongRow as problem:
            if not problem.tolerable:
                raise InstructGPTError(f"{where}: row {number}: {problem}") from problem
            row = _leave_out(raw)
        messages = None if row["prompt"] is None else to_messages(row["prompt"])
        row |= {"prompt": messages, "row": f"row {number}"}
        return {name: row.get(name) for name in features}

    features = _features(MESSAGES, "labeler" in _read_row(schema, first))
    return rows.map(convert, with_indices=True, remove_columns=list(first), features=features)


def _features(prompt: Any, labeler: bool) -> Features:
    text, number = Value("string"), Value("int64")
    columns = {"prompt": prompt, "completions": [text], "ranks": [number], "unranked": number}
    return Features({**columns, **({"labeler": text} if labeler else {}), "row": text})


def _read(schema: Schema, rows: Rows, where: str) -> list[tuple[str, Row]]:
    """What the schema's reader makes of the rows, each with its place in the source."""
    if schema.group is None:
        return [(place, _read_row(schema, row)) for place, row in numbered(rows)]
    place = ""

    def placed() -> Iterator[tuple[str, Row]]:
        nonlocal place
        for item in numbered(rows):
            place = item[0]
            yield item

    try:
        return list(schema.group(placed()))
    except UNREADABLE as error:
        problem = f"{type(error).__name__}: {error}"
        raise InstructGPTError(f"{where}: {place}: is not a row of the format {schema.name!r} ({problem})") from error


def _read_row(schema: Schema, row: Row) -> Row:
    """What the schema's reader makes of a row, or its `problem`."""
    try:
        return schema.read(row) if schema.read is not None else row
    except WrongRow as problem:
        return {"problem": problem}
    except UNREADABLE as error:
        message = f"is not a row of the format {schema.name!r} ({type(error).__name__}: {error})"
        return {"problem": WrongRow(message)}


def _convert(schema: Schema, raw: Row) -> Row:
    """The canonical form of what a reader returned; raises `WrongRow`."""
    if "problem" in raw:
        raise raw["problem"]
    check_ranking(raw, schema)
    return canonical(raw)


def _leave_out(raw: Row) -> Row:
    """The canonical form of a row that lacks something to learn from: what it has, or nothing."""
    if "problem" in raw:
        return {"prompt": None, "completions": [], "ranks": [], "unranked": 0}
    return canonical(raw)


def encode_ranking(
    row: dict[str, Any], prompt_format: PromptFormat, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Tokenize a ranking, before any limit: `prompt_ids` [P], `completion_ids` [K][c_k], `ranks` [K]."""
    prompt, texts = row["prompt"], row["completions"]
    prompt_ids = prompt_format.prompt_ids(prompt, tokenizer) if texts else []  # an unusable prompt has no completions
    completion_ids = [prompt_format.completion_ids(prompt, text, tokenizer) for text in texts]
    return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "ranks": row["ranks"]}


def limit_ranking(ranking: dict[str, Any], max_length: int | None, max_prompt_length: int | None) -> dict[str, Any]:
    """Drop the duplicate, contradictory and too long completions of a ranking.

    Args:
        ranking: `prompt_ids` [P], `completion_ids` [K][c_k], `ranks` [K].
        max_length, max_prompt_length: as in `tokenize_rankings`; None is no limit.

    Returns:
        The ranking with the completions that are left, and the counts `dropped_duplicates`, `dropped_contradictions`
        (equal completions with different ranks: all are dropped, because any choice would be a guess) and
        `dropped_completions`.
    """
    ranks: dict[tuple[Any, ...], set[int]] = {}
    for ids, rank in zip(ranking["completion_ids"], ranking["ranks"], strict=True):
        ranks.setdefault(tuple(ids), set()).add(rank)
    agreed = {ids: min(given) for ids, given in ranks.items() if len(given) == 1}
    consistent = sum(tuple(ids) in agreed for ids in ranking["completion_ids"])
    used = len(ranking["prompt_ids"])
    room = math.inf if max_length is None else max_length - used
    if max_prompt_length is not None and used > max_prompt_length:
        room = 0
    kept = {ids: rank for ids, rank in agreed.items() if len(ids) <= room}
    return {
        "prompt_ids": ranking["prompt_ids"],
        "completion_ids": [list(ids) for ids in kept],
        "ranks": list(kept.values()),
        "dropped_duplicates": consistent - len(agreed),
        "dropped_contradictions": len(ranking["ranks"]) - consistent,
        "dropped_completions": len(agreed) - len(kept),
    }


def count_dropped(counts: dict[str, int], unranked: int, ranking: dict[str, Any]) -> bool:
    """Add what is dropped of one ranking to `counts`; returns whether the ranking has a pair to learn from.

    Args:
        counts: the totals, by the names of `DROPPED`.
        unranked: number of completions of the row without a rank.
        ranking: what `limit_ranking` returned.
    """
    counts["dropped_unranked"] += unranked
    for name in _COUNTED:
        counts[name] += ranking[name]
    ranks = ranking["ranks"]
    if len(ranks) < 2:
        counts["dropped_too_few"] += 1
    elif len(set(ranks)) == 1:
        counts["dropped_ties"] += 1
    return len(set(ranks)) > 1


def tokenize_rankings(
    dataset: Dataset | IterableDataset,
    prompt_format: PromptFormat,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    where: str,
    max_prompt_length: int | None = None,
) -> Tokenized:
    """Tokenize rankings and drop what cannot be learned from.

    Args:
        dataset: rankings in their canonical form (`ranking_rows`).
        max_length: longest prompt + completion, in tokens. Longer completions are dropped, not truncated: a truncated
            one would be scored without its EOS.
        max_prompt_length: longest prompt, in tokens; rankings of longer prompts are dropped.

    Returns:
        Rows with `prompt_ids` [P], `completion_ids` [K][c_k], each with its EOS, and `ranks` [K]; and the counts of
        `DROPPED`. Duplicates have the ids and the rank of another completion, contradictions its ids and a different
        rank. The counts of a stream start at 0 and grow as this process reads it; rows read twice count twice.

    Raises:
        InstructGPTError: naming every row that the prompt format cannot render; or if no ranking is left, which of a
            stream is not known.
    """

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        ranking = limit_ranking(encode_ranking(row, prompt_format, tokenizer), max_length, max_prompt_length)
        return {**ranking, "dropped_unranked": row.get("unranked", 0)}

    counts = dict.fromkeys(DROPPED, 0)

    def keep(row: dict[str, Any]) -> bool:
        return count_dropped(counts, row["dropped_unranked"], row)

    columns, counted = dataset.column_names, ["dropped_unranked", *_COUNTED]
    if isinstance(dataset, IterableDataset):
        # With its features, a stream is known without being read, which would count.
        ids = [Value("int64")]
        features = Features(
            {"prompt_ids": ids, "completion_ids": [ids], "ranks": ids} | dict.fromkeys(counted, ids[0])
        )
        rows = dataset.map(encode, remove_columns=columns, features=features).filter(keep).remove_columns(counted)
        return Tokenized(rows, counts, [])
    nothing = {"prompt_ids": [], "completion_ids": [], "ranks": [], **dict.fromkeys(counted, 0)}
    encoded = dataset.map(
        rendering(encode, nothing), with_indices=True, remove_columns=columns, desc="Tokenizing rankings"
    )
    raise_unrendered(encoded["problem"], where)
    # Not by `filter`: a result from its cache would count nothing.
    kept = [index for index, row in enumerate(encoded.select_columns(["ranks", *counted])) if keep(row)]
    if not kept:
        raise InstructGPTError(
            f"{where}: no ranking is left to learn from: of {len(encoded)} prompts, {counts['dropped_too_few']} keep "
            f"fewer than two completions within max_length={max_length} tokens and {counts['dropped_ties']} have only "
            "ties."
        )
    return Tokenized(encoded.select(kept).remove_columns([*counted, "problem"]), counts, kept)
