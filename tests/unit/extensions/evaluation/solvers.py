"""Who reads a prompt's text and copies the answer from it: what a perfect model would write, task by task."""

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
    """Of the files that test_ruler.py makes: what was asked stands in a document with its answer behind it."""
    asked = prompt[prompt.rindex("Question: ") + 10 :].removesuffix("? Answer:")
    found = re.search(rf"{re.escape(asked)} is (\S+)\.", prompt)
    assert found
    return (found[1],)


BY_TASK = {"vt": variables, "cwe": common_words, "fwe": frequent_words, "json_kv": pair_value}


def solve(item: Question, prompt: str) -> Solved:
    """prompt: the text of the item's tokens."""
    return BY_TASK.get(item.task, document if item.task.startswith("qa") else needles)(prompt)
