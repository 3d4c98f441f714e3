"""The gold labeler: a program that scores answers exactly, and ranks them with the noise of a person.

It takes the place of the paper's labelers. The score is a plain sum of criteria that can be read off the text.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

from instructgpt_hf.errors import InstructGPTError
from instructgpt_hf.lab import world
from instructgpt_hf.lab.instructions import Instruction, parse
from instructgpt_hf.lab.statements import GREETINGS, Claim, Sentence, read, split_sentences

# Longer answers lose points, in words; the longest complete answers have about 18.
WORD_LIMIT = 20
# Scores that differ by less are a tie.
TIE_MARGIN = 0.25
# Standard deviation of the noise on each score. Two labelers with this noise agree on about 73 % of the pairs that
# both rank strictly, as the paper's labelers do (section 3.4).
LABELER_NOISE = 2.7


def criteria(prompt: str, completion: str) -> dict[str, float]:
    """Score `completion` by each criterion.

    * asked (0 to 4): four times the share of the request that is met by true, readable sentences.
    * truth (0 to -3): -1.5 for each false statement.
    * clarity (-1 to 1): from all sentences unreadable to all readable; -1 if no readable sentence is on the topic.
    * courtesy (up to 1): 1 for one courteous formula beside an answer on the topic, -0.5 for each further one.
    * form (0 to -1): -0.5 without a capital at the start, -0.5 without a closing mark at the end.
    * topic (0 to -2): -0.5 for each readable sentence that mentions nothing of the request.
    * repetition (0 to -3): -1 for each sentence that repeats an earlier one's content; -0.5 for each doubled word.
    * length (0 to -3): -0.25 for each word beyond 20; -1 for an empty answer.

    Raises:
        InstructGPTError: if `prompt` is not one of the lab's, before any prompt template.
    """
    instruction = parse(prompt)
    sentences = _read_all(completion)
    answers = [said for said in sentences if said.kind in ("claim", "event", "greeting")]
    on_topic = [said for said in answers if _on_topic(instruction, said)]
    claims = {claim for said in answers for claim in said.claims}
    false = sum(not claim.true for claim in claims) + _wrong_openings(instruction, answers)
    courtesies = sum(said.kind == "courtesy" for said in sentences)
    readable = sum(said.kind is not None for said in sentences)
    text, words = completion.strip(), completion.split()
    return {
        "asked": 4.0 * _share_met(instruction, on_topic),
        "truth": max(-1.5 * false, -3.0),
        "clarity": 2.0 * readable / len(sentences) - 1.0 if on_topic else -1.0,
        "courtesy": (1.0 if on_topic and courtesies else 0.0) - 0.5 * max(courtesies - 1, 0),
        "form": -0.5 * (not text[:1].isupper()) - 0.5 * (text[-1:] not in (".", "!", "?") or not text),
        "topic": max(-0.5 * (len(answers) - len(on_topic)), -2.0),
        "repetition": max(-_repeated(sentences, words), -3.0),
        "length": max(-0.25 * max(len(words) - WORD_LIMIT, 0), -3.0) if words else -1.0,
    }


def gold_scores(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """Sum of the criteria for each completion; higher is better, 6 is a perfect answer, nonsense is below 0.

    Args:
        prompts: [N] instructions of the lab, before any prompt template.
        completions: [N] answers, without EOS.

    Raises:
        InstructGPTError: if the lengths differ or a prompt is not one of the lab's.
    """
    if len(prompts) != len(completions):
        raise InstructGPTError(f"{len(prompts)} prompts, but {len(completions)} completions: give as many of each.")
    return [sum(criteria(*pair).values()) for pair in zip(prompts, completions, strict=True)]


def gold_ranks(prompt: str, completions: Sequence[str], noise: float, rng: random.Random) -> list[int]:
    """Rank the completions of one prompt as a labeler with noisy judgement.

    Args:
        prompt: an instruction of the lab, before any prompt template.
        completions: [K] answers to it.
        noise: standard deviation of the Gaussian noise on each score: 0 for the exact labeler, `LABELER_NOISE` for a
            person.

    Returns:
        [K] ranks, 1 = best, without gaps; answers whose scores lie within `TIE_MARGIN` of the best of their rank tie.
    """
    scores = [score + rng.gauss(0.0, noise) for score in gold_scores([prompt] * len(completions), completions)]
    ranks = [0] * len(scores)
    rank, best = 0, float("inf")
    for index in sorted(range(len(scores)), key=lambda index: -scores[index]):
        if best - scores[index] >= TIE_MARGIN:
            rank, best = rank + 1, scores[index]
        ranks[index] = rank
    return ranks


def _read_all(completion: str) -> list[Sentence]:
    """Read every sentence; "It" refers to the first subject of the statement before."""
    sentences, subject = [], None
    for text in split_sentences(completion):
        # A missing capital or full stop costs form, not the content.
        said = read(world.capital(text if text[-1] in ".!?" else f"{text}."), subject)
        subject = said.claims[0].subject if said.claims else subject
        sentences.append(said)
    return sentences


def _on_topic(instruction: Instruction, said: Sentence) -> bool:
    if instruction.kind == "list":
        return any(claim[1:] == (instruction.relations[0], instruction.value) for claim in said.claims)
    return bool(said.words & {*instruction.things, instruction.value})


def _wrong_openings(instruction: Instruction, answers: list[Sentence]) -> int:
    """Number of statements that begin with the wrong yes or no, or with either where the request is not a check."""
    right = _right_opening(instruction) if instruction.kind == "check" else ""
    return sum(said.kind == "claim" and said.opening not in ("", right) for said in answers)


def _right_opening(instruction: Instruction) -> str:
    return "yes" if Claim(instruction.things[0], instruction.relations[0], instruction.value).true else "no"


def _share_met(instruction: Instruction, answers: list[Sentence]) -> float:
    """Share of the request, 0 to 1, that the readable sentences on the topic meet."""
    true = {claim for said in answers for claim in said.claims if claim.true}
    if instruction.kind in ("describe", "question"):
        wanted = [(instruction.things[0], relation) for relation in instruction.relations]
        return sum(any(claim[:2] == want for claim in true) for want in wanted) / len(wanted)
    if instruction.kind == "check":
        stated = any(claim[:2] == (instruction.things[0], instruction.relations[0]) for claim in true)
        return 0.5 * stated + 0.5 * any(said.opening == _right_opening(instruction) for said in answers)
    if instruction.kind == "list":
        named = sum(claim[1:] == (instruction.relations[0], instruction.value) for claim in true)
        return max(0.0, 1.0 - abs(instruction.count - named) / instruction.count)
    if instruction.kind == "write":
        words = {*instruction.things, instruction.value} - {""}
        return max((len(words & said.words) / len(words) for said in answers), default=0.0)
    if instruction.kind == "compare":
        return float(any({claim.subject, claim.value} == set(instruction.things) for claim in true
                         if claim.relation in ("larger", "smaller")))  # fmt: skip
    greeting = GREETINGS[instruction.relations[0]]
    return max((0.5 * (said.opening == greeting) + 0.5 * (said.kind == "greeting") for said in answers), default=0.0)


def _repeated(sentences: list[Sentence], words: list[str]) -> float:
    """1 for each sentence that repeats an earlier one's content, 0.5 for each word that follows itself."""
    contents = [(said.kind, said.claims or said.words) for said in sentences if said.kind not in (None, "courtesy")]
    doubled = sum(word == following for word, following in pairwise(words))
    return len(contents) - len(set(contents)) + 0.5 * doubled
