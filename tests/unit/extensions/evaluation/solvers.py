"""Readers that find the answer in a prompt's text: what a perfect model would write, task by task."""

from __future__ import annotations

import json
import re
from collections import Counter

from torchtitan.extensions.evaluation.questions import Question

Solved = tuple[str, ...]


def needles(prompt: str) -> Solved:
    asked = re.search(r"special magic \w+ for ([^?]*) mentioned in the provided text (?:is|are)$", prompt)
    assert asked
    found: list[str] = []
    for key in re.split(r", and |, ", asked[1]):
        found += re.findall(rf"One of the special magic \w+ for {key} is: ([\w-]+)\.", prompt)
    return tuple(found)


def variables(prompt: str) -> Solved:
    task = prompt[prompt.rindex("Memorize and track") :]
    value = re.search(r"assigned the value (\d+) in the text", task)
    assert value
    known: dict[str, str] = {}
    for name, told in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", task):
        known[name] = known.get(told, told)
    return tuple(name for name, is_ in known.items() if is_ == value[1])


def common_words(prompt: str) -> Solved:
    task = prompt[prompt.rindex("Below is a numbered list") : prompt.rindex("\nQuestion")]
    return tuple(word for word, _ in Counter(re.findall(r"\d+\. (\S+)", task)).most_common(10))


def frequent_words(prompt: str) -> Solved:
    task = prompt[prompt.index("coded words. ") + 13 : prompt.rindex("\nQuestion")]
    return tuple(word for word, _ in Counter(task.split()).most_common(4) if word != "...")


def pair_value(prompt: str) -> Solved:
    pairs = json.loads(prompt[prompt.index("{") : prompt.index("}") + 1])
    return (pairs[re.findall(r"Key: (\S+)", prompt)[-1]],)


def document(prompt: str) -> Solved:
    """For the files of conftest.py: a document states the question with its answer after it."""
    asked = prompt[prompt.rindex("Question: ") + 10 :].removesuffix("? Answer:")
    found = re.search(rf"{re.escape(asked)} is (\S+)\.", prompt)
    assert found
    return (found[1],)


BY_TASK = {"vt": variables, "cwe": common_words, "fwe": frequent_words, "json_kv": pair_value}


def solve(question: Question, prompt: str) -> Solved:
    """What the task's reader finds; prompt: the text of the question's tokens."""
    return BY_TASK.get(question.task, document if question.task.startswith("qa") else needles)(prompt)
