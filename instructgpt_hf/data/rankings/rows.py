"""Rankings in canonical form, and tokenized: K completions of a prompt with their ranks, 1 = best, equal = tied."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

from datasets import Dataset, Features, IterableDataset, Value
from transformers import PreTrainedTokenizerBase

from instructgpt_hf.data.prompts import PromptFormat
from instructgpt_hf.data.rankings.checks import canonical, is_prompt, row_problem
from instructgpt_hf.data.rankings.schemas import UNREADABLE, Row, Schema, recognise
from instructgpt_hf.data.rows import raise_wrong_rows
from instructgpt_hf.errors import InstructGPTError

Rows: TypeAlias = Dataset | IterableDataset

# Counts of what is dropped on the way to the trainer: completions, then prompts.
DROPPED = {
    "dropped_unranked": "completions without a rank",
    "dropped_duplicates": "completions listed twice",
    "dropped_contradictions": "completions that render equal but rank differently",
    "dropped_completions": "completions over a length limit",
    "dropped_too_few": "prompts left with fewer than two completions",
    "dropped_ties": "prompts with only ties",
}
_COUNTED = ("dropped_duplicates", "dropped_contradictions", "dropped_completions")  # by `limit_ranking`


def ranking_rows(dataset: Rows, where: str, recognised: tuple[Schema, Row] | None = None) -> Rows:
    """Convert a dataset of rankings from any known schema (`data.rankings.schemas.SCHEMAS`) to the canonical form.

    Args:
        dataset: rows of any known schema; a dataset in the canonical form is returned unchanged.
        where: name of the dataset in errors.
        recognised: what `recognise` returned, where the caller has called it; a stream opens again for each call.

    Returns:
        Columns `prompt` (text or messages), `completions` [K] (text), `ranks` [K] (whole numbers, 1 = best, equal =
        tied), `unranked` (number of completions dropped because they had no rank) and, if the source names the
        labeler, `labeler` (text). A stream is converted and checked row by row as it is read.

    Raises:
        InstructGPTError: if the schema is not known, or naming every wrong row; a stream raises at the first wrong
            row that is read.
    """
    if {"prompt", "completions", "ranks", "unranked"} <= set(dataset.column_names or ()):
        return dataset
    schema, first = recognised or recognise(dataset, where)
    streamed = isinstance(dataset, IterableDataset)
    if schema.group is not None and streamed:
        raise InstructGPTError(
            f"{where}: rows of the format {schema.name!r} cannot be streamed: the completions of a prompt are in "
            "several rows, and a stream does not tell which one is the last. Set streaming: false."
        )
    grouped = list(schema.group(dataset)) if schema.group is not None else None
    if grouped == []:
        raise InstructGPTError(f"{where}: no prompt has two ranked completions.")
    converter = _Converter(schema, grouped[0][1] if grouped else first)

    def convert(source: dict[str, Any], number: int) -> dict[str, Any]:
        row = converter.row(source)
        if streamed and row["problem"]:
            raise InstructGPTError(f"{where}: row {number}: {row['problem']}")
        return {**row, "row": number}

    if grouped:
        converted = Dataset.from_list([convert(raw, number) for number, raw in grouped], features=converter.features)
    else:
        # A cached result would outlive a change of this package's rules.
        options = {} if streamed else {"load_from_cache_file": False, "desc": "Reading rankings"}
        options |= {"remove_columns": list(first), "features": converter.features}
        converted = dataset.map(convert, with_indices=True, **options)
    if not streamed:
        raise_wrong_rows(where, zip(converted["row"], converted["problem"], strict=True))
    return converted.remove_columns(["row", "problem"])


class _Converter:
    """Converts the rows of one schema to the canonical form. Wrong rows become empty rows with a `problem`."""

    def __init__(self, schema: Schema, first: dict[str, Any]) -> None:
        self.schema = schema
        raw = self._read(first)
        # Where the first prompt is wrong itself, its type says nothing about the other rows.
        self.readable = is_prompt(raw.get("prompt")) or not schema.strict
        self.chat = isinstance(raw.get("prompt"), list)
        text, number, messages = Value("string"), Value("int64"), {"role": Value("string"), "content": Value("string")}
        columns = {"prompt": [messages] if self.chat else text, "completions": [text], "ranks": [number]}
        columns |= {"unranked": number, **({"labeler": text} if "labeler" in raw else {})}
        self.features = Features({**columns, "problem": text, "row": number})

    def row(self, source: dict[str, Any]) -> dict[str, Any]:
        """Convert one row; `problem` is None if it is right."""
        raw = self._read(source)
        problem = raw.get("problem") or row_problem(raw, self.schema)
        empty = dict[str, Any](dict.fromkeys(self.features), completions=[], ranks=[], unranked=0, problem=problem)
        if problem is not None:
            return empty
        if not is_prompt(raw["prompt"]):
            return empty | {"unranked": len(raw["completions"])}
        converted = empty | canonical(raw)
        if self.chat and isinstance(raw["prompt"], str):
            converted["prompt"] = [{"role": "user", "content": raw["prompt"]}]
        elif not self.chat and isinstance(raw["prompt"], list):
            other = "prompt: found messages, but the first row's prompt is text"
            converted |= {"prompt": None, "problem": other if self.readable else None}
        return converted

    def _read(self, source: dict[str, Any]) -> dict[str, Any]:
        if self.schema.read is None:
            return source
        try:
            return self.schema.read(source)
        except UNREADABLE as error:
            return {"problem": f"is not a row of the format {self.schema.name!r} ({type(error).__name__}: {error})"}


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
    dataset: Rows,
    prompt_format: PromptFormat,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    where: str,
    max_prompt_length: int | None = None,
) -> tuple[Rows, dict[str, int]]:
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
        InstructGPTError: if no ranking is left; not for a stream, whose end is not known.
    """

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        ranking = limit_ranking(encode_ranking(row, prompt_format, tokenizer), max_length, max_prompt_length)
        return {**ranking, "dropped_unranked": row.get("unranked", 0)}

    counts = dict.fromkeys(DROPPED, 0)

    def keep(row: dict[str, Any]) -> bool:
        return count_dropped(counts, row["dropped_unranked"], row)

    columns, counted = dataset.column_names, ["dropped_unranked", *_COUNTED]
    if isinstance(dataset, IterableDataset):
        return dataset.map(encode, remove_columns=columns).filter(keep).remove_columns(counted), counts
    encoded = dataset.map(encode, remove_columns=columns, desc="Tokenizing rankings")
    # Not by `filter`: a result from its cache would count nothing.
    kept = [index for index, row in enumerate(encoded.select_columns(["ranks", *counted])) if keep(row)]
    if not kept:
        raise InstructGPTError(
            f"{where}: no ranking is left to learn from: of {len(encoded)} prompts, {counts['dropped_too_few']} keep "
            f"fewer than two completions within max_length={max_length} tokens and {counts['dropped_ties']} have only "
            "ties."
        )
    return encoded.select(kept).remove_columns(counted), counts
