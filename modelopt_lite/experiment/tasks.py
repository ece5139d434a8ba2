"""Tasks whose samples are made from a seed: needles, copies, and what RULER asks for.

``passkey`` is that of Mohtashami and Jaggi (https://arxiv.org/abs/2305.16300). ``needle``, ``multikey``,
``multivalue``, ``multiquery``, ``variable_tracking``, ``common_words`` and ``frequent_words`` follow the tasks of RULER
(https://arxiv.org/abs/2404.06654). Their texts are our own, so scores compare variants of a model with each other and
not with RULER's published table. Every prompt ends with the beginning of its answer, so that models without a chat
format understand it.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from .words import NOUNS, codes, distinct_words, names, sentences

TaskName: TypeAlias = Literal[
    "passkey",
    "needle",
    "copy",
    "multikey",
    "multivalue",
    "multiquery",
    "variable_tracking",
    "common_words",
    "frequent_words",
]
TASKS: tuple[TaskName, ...] = get_args(TaskName)
DEPTH_TASKS: tuple[TaskName, ...] = ("passkey", "needle")
TASK_NOTES: dict[TaskName, str] = {
    "passkey": "a five-digit key hidden at a depth of a repeated filler; https://arxiv.org/abs/2305.16300",
    "needle": "a seven-digit number hidden at a depth of running text (RULER's niah_single)",
    "copy": "a list of twelve words to repeat in order; the score is the share of words in their place",
    "multikey": "as needle, among three needles with other keys (niah_multikey)",
    "multivalue": "four numbers of one key, all to be named (niah_multivalue)",
    "multiquery": "the numbers of four keys, all to be named (niah_multiquery)",
    "variable_tracking": "five variables that hold one value through a chain of assignments, all to be named (vt)",
    "common_words": "the ten words that occur often in a long list, all to be named (cwe)",
    "frequent_words": "the three most frequent of coded words whose counts fall as 1 / rank^2, all to be named (fwe)",
}
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
COUNT = 4  # needles of multikey, multivalue and multiquery
HOPS = 4
COMMON = 10


@dataclass(frozen=True)
class Prompt:
    """One sample of a task.

    Attributes:
        text: what the model reads.
        answers: what the right answer holds.
        max_new_tokens: how many tokens the model may answer.
    """

    text: str
    answers: tuple[str, ...]
    max_new_tokens: int


@dataclass(frozen=True)
class TaskSample:
    """A sample and which one it is.

    Attributes:
        task: name of the task.
        length: upper bound of the tokens of prompt and answer together.
        depth: where its needle is, from 0 to 1; None if the task has no depth.
        index: its number among those of the same task, length and depth.
        prompt: the sample.
    """

    task: TaskName
    length: int
    depth: float | None
    index: int
    prompt: Prompt


Haystack: TypeAlias = Callable[[random.Random], Iterator[str]]
"""Yields sentences without end."""


def haystack_of(text: str) -> Haystack:
    """Return a haystack of a text's sentences, which begins somewhere in the text and goes round."""
    parts = [" ".join(part.split()) for part in re.split(r"(?<=[.!?])\s+", text)]
    parts = [part for part in parts if part]

    def haystack(generator: random.Random) -> Iterator[str]:
        start = generator.randrange(len(parts))
        return itertools.islice(itertools.cycle(parts), start, None)

    return haystack


def make_sample(
    task: TaskName,
    length: int,
    depth: float | None,
    index: int,
    seed: int,
    count_tokens: Callable[[str], int],
    haystack: Haystack = sentences,
) -> TaskSample:
    """Make a sample that is as long as it can be.

    Args:
        task: name of the task.
        length: upper bound of the tokens of prompt and answer together.
        depth: where the needle is, for :data:`DEPTH_TASKS`.
        index: number of the sample; another number is another sample.
        seed: another seed gives other samples throughout.
        count_tokens: returns a text's tokens as the model's tokenizer makes them.
        haystack: where sentences come from.

    Raises:
        ValueError: if the length is too short for the task.
    """

    def make(units: int) -> Prompt:
        # Anew each time, so that samples differ in nothing but their length while it is sought.
        return MAKERS[task](random.Random(f"{seed}/{task}/{length}/{depth}/{index}"), units, depth, haystack)

    def tokens(units: int) -> int:
        prompt = make(units)
        return count_tokens(prompt.text) + prompt.max_new_tokens

    units = _most_units(tokens, length)
    if units == 0:
        raise ValueError(f"{length} is not allowed; the shortest {task} sample is longer")
    return TaskSample(task, length, depth, index, make(units))


def _most_units(tokens: Callable[[int], int], limit: int) -> int:
    """Return about how many units give no more than ``limit`` tokens, 0 if not even one does: a secant search."""
    at, found = 1, tokens(1)
    if found > limit:
        return 0
    low, high = 1, 0  # the most that is known to fit, the least that is known not to
    slope: float = max((tokens(17) - found) / 16, 0.1)
    for _ in range(8):
        step = math.floor((limit - found) / slope)
        guess = max(at + step, low + 1)
        if high:
            guess = min(guess, high - 1)
        if guess <= low:
            break
        before, at, found = (at, found), guess, tokens(guess)
        slope = max((found - before[1]) / (at - before[0]), 0.1)
        if found > limit:
            high = at
        else:
            low = at
            if limit - found < slope:
                break
    return low


def score(sample: TaskSample, output: str) -> float:
    """Return how right an answer is, from 0 to 1: the share of answers it holds, for ``copy`` in their places."""
    answers = sample.prompt.answers
    if sample.task == "copy":
        words = re.findall(r"[\w-]+", output)
        return sum(map(str.__eq__, words, answers)) / len(answers)
    return sum(answer.lower() in output.lower() for answer in answers) / len(answers)


def _number(generator: random.Random, digits: int) -> str:
    return str(generator.randrange(10 ** (digits - 1), 10**digits))


def _hide(parts: list[str], needles: Sequence[str], places: Sequence[float]) -> str:
    """Put needles between the parts of a text, at shares of its length."""
    length = len(parts)
    for needle, place in sorted(zip(needles, places, strict=True), key=lambda pair: -pair[1]):  # from the end
        parts.insert(round(place * length), needle)
    return " ".join(parts)


def _take(haystack: Haystack, generator: random.Random, units: int) -> list[str]:
    return list(itertools.islice(haystack(generator), units))


def _passkey(generator: random.Random, units: int, depth: float | None, _: Haystack) -> Prompt:
    key = _number(generator, 5)
    needle = f"The pass key is {key}. Remember it. {key} is the pass key."
    text = _hide([FILLER] * units, [needle], [depth or 0.0])
    head = "There is important information hidden in the text below. Find it and remember it."
    return Prompt(f"{head}\n\n{text}\n\nWhat is the pass key? The pass key is", (key,), 8)


def _needle_text(name: str, number: str) -> str:
    return f"The secret number of the {name} is {number}."


def _ask(text: str, question: str, beginning: str) -> str:
    head = "Secret numbers are hidden in the text below. Remember them; you will be asked about them."
    return f"{head}\n\n{text}\n\n{question} {beginning}"


def _needle(generator: random.Random, units: int, depth: float | None, haystack: Haystack) -> Prompt:
    (name,), number = names(generator, 1), _number(generator, 7)
    text = _hide(_take(haystack, generator, units), [_needle_text(name, number)], [depth or 0.0])
    subject = f"secret number of the {name}"
    return Prompt(_ask(text, f"What is the {subject}?", f"The {subject} is"), (number,), 10)


def _multikey(generator: random.Random, units: int, _: float | None, haystack: Haystack) -> Prompt:
    keys = names(generator, COUNT)
    numbers = [_number(generator, 7) for _ in keys]
    places = [generator.random() for _ in keys]
    text = _hide(_take(haystack, generator, units), list(map(_needle_text, keys, numbers)), places)
    subject = f"secret number of the {keys[0]}"
    return Prompt(_ask(text, f"What is the {subject}?", f"The {subject} is"), (numbers[0],), 10)


def _multivalue(generator: random.Random, units: int, _: float | None, haystack: Haystack) -> Prompt:
    (name,), numbers = names(generator, 1), [_number(generator, 7) for _ in range(COUNT)]
    needles = [f"One of the secret numbers of the {name} is {number}." for number in numbers]
    text = _hide(_take(haystack, generator, units), needles, [generator.random() for _ in numbers])
    subject = f"{COUNT} secret numbers of the {name}"
    return Prompt(_ask(text, f"What are the {subject}?", f"The {subject} are"), tuple(numbers), 48)


def _multiquery(generator: random.Random, units: int, _: float | None, haystack: Haystack) -> Prompt:
    keys = names(generator, COUNT)
    numbers = [_number(generator, 7) for _ in keys]
    places = [generator.random() for _ in keys]
    text = _hide(_take(haystack, generator, units), list(map(_needle_text, keys, numbers)), places)
    listed = f"{', '.join(f'the {key}' for key in keys[:-1])} and the {keys[-1]}"
    question = f"What are the secret numbers of {listed}?"
    return Prompt(_ask(text, question, f"The secret numbers of {listed} are"), tuple(numbers), 48)


def _copy(generator: random.Random, units: int, _: float | None, haystack: Haystack) -> Prompt:
    words = generator.sample(NOUNS, 12)
    text = _hide(_take(haystack, generator, units), [f"The list of words is: {' '.join(words)}."], [generator.random()])
    head = "A list of words is hidden in the text below. Remember it."
    return Prompt(f"{head}\n\n{text}\n\nRepeat the list. The list of words is:", tuple(words), 36)


def _chain(generator: random.Random, sentences: list[str]) -> tuple[str, str, list[str]]:
    """Hide a chain of assignments in its order; return the text, the value and the variables."""
    variables, value = codes(generator, HOPS + 1, 5), _number(generator, 5)
    values = [value, *(f"VAR {variable}" for variable in variables)]
    needles = [f"VAR {name} = {value}." for name, value in zip(variables, values, strict=False)]
    places = sorted(generator.random() for _ in needles)
    return _hide(sentences, needles, places), value, variables


def _variable_tracking(generator: random.Random, units: int, _: float | None, haystack: Haystack) -> Prompt:
    head = "Track the variables that are assigned in the text below."
    question = "Question: Name all variables that hold the value {0}. Answer: The variables that hold {0} are"
    example, value, variables = _chain(generator, _take(haystack, generator, 4))
    shot = f"{head}\n\n{example}\n\n{question.format(value)} {', '.join(variables)}.\n\n"
    text, value, variables = _chain(generator, _take(haystack, generator, units))
    return Prompt(f"{shot}{head}\n\n{text}\n\n{question.format(value)}", tuple(variables), 40)


def _word_list(generator: random.Random, words: list[str], often: int, seldom: int) -> str:
    listed = words[:COMMON] * often + words[COMMON:] * seldom
    generator.shuffle(listed)
    return " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1))


def _common_words(generator: random.Random, units: int, _: float | None, __: Haystack) -> Prompt:
    head = "Below is a numbered list of words. Some of them occur much more often than the others."
    question = f"Question: Which {COMMON} words occur most often? Answer: The {COMMON} words that occur most often are:"
    words = distinct_words(generator, COMMON + 20 + COMMON + units)
    shown, asked = words[: COMMON + 20], words[COMMON + 20 :]
    shot = f"{head}\n{_word_list(generator, shown, 4, 1)}\n{question} {', '.join(shown[:COMMON])}.\n\n"
    # About as often as in RULER at 8k tokens, where it is 30 times; there the others occur 3 times, here once.
    text = _word_list(generator, asked, max(8, units // 40), 1)
    return Prompt(f"{shot}{head}\n{text}\n{question}", tuple(asked[:COMMON]), 60)


def _frequent_words(generator: random.Random, units: int, _: float | None, __: Haystack) -> Prompt:
    total = 60 + 10 * units
    ranked = codes(generator, 1 + total, 4)
    listed = []
    for rank, word in enumerate(ranked, 1):
        listed += [word] * max(1, round(total * 0.6 / rank**2))
        if len(listed) >= total:
            break
    generator.shuffle(listed)
    head = "Below is a coded text. Count how often each coded word occurs."
    question = "Question: Which 3 coded words occur most often? Answer: The 3 words that occur most often are:"
    return Prompt(f"{head}\n{' '.join(listed)}\n{question}", tuple(ranked[:3]), 30)


MAKERS: dict[TaskName, Callable[[random.Random, int, float | None, Haystack], Prompt]] = {
    "passkey": _passkey,
    "needle": _needle,
    "copy": _copy,
    "multikey": _multikey,
    "multivalue": _multivalue,
    "multiquery": _multiquery,
    "variable_tracking": _variable_tracking,
    "common_words": _common_words,
    "frequent_words": _frequent_words,
}
