"""Rankings in one form, and tokenized: K completions of a prompt with their ranks, 1 = best, equal = tied."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

from datasets import Dataset, Features, IterableDataset, Value
from transformers import PreTrainedTokenizerBase

from instructgpt_hf.data.prompts import PromptFormat
from instructgpt_hf.data.rankings.checks import canonical, is_prompt, row_problem
from instructgpt_hf.data.rankings.schemas import UNREADABLE, Schema, recognise
from instructgpt_hf.errors import InstructGPTError, Problems

Rows: TypeAlias = Dataset | IterableDataset

CANONICAL = ("prompt", "completions", "ranks", "unranked")
# Counts of what is dropped on the way to the trainer: completions, then prompts.
DROPPED = {
    "dropped_unranked": "completions without a rank",
    "dropped_duplicates": "completions listed twice",
    "dropped_contradictions": "completions that render equal but rank differently",
    "dropped_completions": "completions over a length limit",
    "dropped_too_few": "prompts left with fewer than two completions",
    "dropped_ties": "prompts with only ties",
}
COUNTS = tuple(DROPPED)
COMPLETION_COUNTS, PROMPT_COUNTS = COUNTS[:4], COUNTS[4:]
_MESSAGES = [{"role": Value("string"), "content": Value("string")}]


def ranking_rows(dataset: Rows, where: str) -> Rows:
    """Convert a dataset of rankings from any known schema (`data.rankings.schemas.SCHEMAS`) to its one form.

    Args:
        dataset: rows of any known schema; a dataset in the one form is returned unchanged.
        where: name of the dataset in errors.

    Returns:
        Columns `prompt` (text or messages), `completions` [K] (text), `ranks` [K] (whole numbers, 1 = best, equal =
        tied), `unranked` (number of completions dropped because they had no rank) and, if the source names the
        labeler, `labeler` (text). A stream is converted and checked row by row as it is read.

    Raises:
        InstructGPTError: if the schema is not known, or naming every wrong row; a stream raises at the first wrong
            row that is read.
    """
    if set(CANONICAL) <= set(dataset.column_names or ()):
        return dataset
    schema, first = recognise(dataset, where)
    streamed = isinstance(dataset, IterableDataset)
    if schema.group is not None:
        if streamed:
            raise InstructGPTError(
                f"{where}: rows of the format {schema.name!r} cannot be streamed: the completions of a prompt are in "
                "several rows, and a stream does not tell which one is the last. Set streaming: false."
            )
        grouped = list(schema.group(dataset))
        if not grouped:
            raise InstructGPTError(f"{where}: no prompt has two ranked completions.")
        form = _Form(schema, grouped[0][1])
        table = [{**form.row(raw), "row": number} for number, raw in grouped]
        converted = Dataset.from_list(table, features=Features({**form.features, "row": Value("int64")}))
    else:
        form = _Form(schema, first)
        if streamed:
            return _stream(dataset, form, where, list(first))
        converted = dataset.map(
            form.batch,
            with_indices=True,
            batched=True,
            remove_columns=dataset.column_names,
            features=Features({**form.features, "row": Value("int64")}),
            load_from_cache_file=False,  # a cached result would outlive a change of this package's rules
            desc="Reading rankings",
        )
    problems = Problems(f"{where}: wrong rows")
    for number, problem in zip(converted["row"], converted["problem"], strict=True):
        if problem:
            problems.add(f"row {number}: {problem}")
    problems.raise_if_any()
    return converted.remove_columns(["row", "problem"])


class _Form:
    """Converts the rows of one schema to the one form. Wrong rows become empty rows with a `problem`."""

    def __init__(self, schema: Schema, first: dict[str, Any]) -> None:
        self.schema = schema
        raw = self._read(first)
        # Where the first prompt is wrong itself, its type says nothing about the other rows.
        self.readable = is_prompt(raw.get("prompt")) or not schema.strict
        self.chat = isinstance(raw.get("prompt"), list)
        self.features: dict[str, Any] = {
            "prompt": _MESSAGES if self.chat else Value("string"),
            "completions": [Value("string")],
            "ranks": [Value("int64")],
            "unranked": Value("int64"),
            **({"labeler": Value("string")} if "labeler" in raw else {}),
            "problem": Value("string"),
        }

    def batch(self, columns: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        """Convert a batch of source rows; the column `row` holds their numbers in the source."""
        rows = [self.row(dict(zip(columns, values, strict=True))) for values in zip(*columns.values(), strict=True)]
        return {"row": indices, **{name: [row[name] for row in rows] for name in self.features}}

    def row(self, source: dict[str, Any]) -> dict[str, Any]:
        """Convert one row; `problem` is None if it is right."""
        raw = self._read(source)
        problem = raw.get("problem") or row_problem(raw, self.schema)
        empty: dict[str, Any] = dict.fromkeys(self.features)
        empty |= {"completions": [], "ranks": [], "unranked": 0, "problem": problem}
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


def _stream(dataset: IterableDataset, form: _Form, where: str, columns: list[str]) -> IterableDataset:
    def convert(row: dict[str, Any], number: int) -> dict[str, Any]:
        converted = form.row(row)
        if problem := converted.pop("problem"):
            raise InstructGPTError(f"{where}: row {number}: {problem}")
        return converted

    features = {name: kind for name, kind in form.features.items() if name != "problem"}
    return dataset.map(convert, with_indices=True, remove_columns=columns, features=Features(features))


def encode_ranking(
    row: dict[str, Any], prompt_format: PromptFormat, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Tokenize a ranking, before any limit: `prompt_ids` [P], `completion_ids` [K][c_k], `ranks` [K]."""
    if not row["completions"]:
        return {"prompt_ids": [], "completion_ids": [], "ranks": []}
    return {
        "prompt_ids": prompt_format.prompt_ids(row["prompt"], tokenizer),
        "completion_ids": [prompt_format.completion_ids(row["prompt"], t, tokenizer) for t in row["completions"]],
        "ranks": row["ranks"],
    }


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
    kept = [(list(ids), rank) for ids, rank in agreed.items() if len(ids) <= room]
    return {
        "prompt_ids": ranking["prompt_ids"],
        "completion_ids": [ids for ids, _ in kept],
        "ranks": [rank for _, rank in kept],
        "dropped_duplicates": consistent - len(agreed),
        "dropped_contradictions": len(ranking["ranks"]) - consistent,
        "dropped_completions": len(agreed) - len(kept),
    }


def dropped_prompt(ranks: list[int]) -> str | None:
    """Why a prompt with these ranks is dropped, as one of `PROMPT_COUNTS`; None if it has a pair to learn from."""
    if len(ranks) < 2:
        return "dropped_too_few"
    return "dropped_ties" if len(set(ranks)) == 1 else None


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
        dataset: rankings in their one form (`ranking_rows`).
        max_length: longest prompt + completion, in tokens. Longer completions are dropped, not truncated: a truncated
            one would be scored without its EOS.
        max_prompt_length: longest prompt, in tokens; rankings of longer prompts are dropped.

    Returns:
        Rows with `prompt_ids` [P], `completion_ids` [K][c_k], each with its EOS, and `ranks` [K]; and the counts
        `dropped_unranked` (completions without a rank), `dropped_duplicates` (completions with the ids and the rank of
        another one), `dropped_contradictions` (completions with the ids of another one and a different rank),
        `dropped_completions` (over a limit), `dropped_too_few` (prompts left with fewer than two completions) and
        `dropped_ties` (prompts whose completions are all tied, which have no pair to learn from). The counts of a
        stream start at 0 and grow as this process reads it; rows read twice count twice.

    Raises:
        InstructGPTError: if no ranking is left; not for a stream, whose end is not known.
    """

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        ranking = limit_ranking(encode_ranking(row, prompt_format, tokenizer), max_length, max_prompt_length)
        return {**ranking, "dropped_unranked": row.get("unranked", 0)}

    columns = dataset.column_names
    if isinstance(dataset, IterableDataset):
        counts = dict.fromkeys(COUNTS, 0)

        def keep(row: dict[str, Any]) -> bool:
            for name in COMPLETION_COUNTS:
                counts[name] += row[name]
            if reason := dropped_prompt(row["ranks"]):
                counts[reason] += 1
            return not reason

        encoded = dataset.map(encode, remove_columns=columns).filter(keep)
        return encoded.remove_columns(list(COMPLETION_COUNTS)), counts

    encoded = dataset.map(encode, remove_columns=columns, desc="Tokenizing rankings")
    reasons = [dropped_prompt(ranks) for ranks in encoded["ranks"]]
    counts = {name: sum(encoded[name]) for name in COMPLETION_COUNTS}
    counts |= {name: reasons.count(name) for name in PROMPT_COUNTS}
    if not reasons.count(None):
        raise InstructGPTError(
            f"{where}: no ranking is left to learn from: of {len(encoded)} prompts, {counts['dropped_too_few']} keep "
            f"fewer than two completions within max_length={max_length} tokens and {counts['dropped_ties']} have only "
            "ties."
        )
    left = encoded.select([index for index, reason in enumerate(reasons) if reason is None])
    return left.remove_columns(list(COMPLETION_COUNTS)), counts
