"""RULER's qa_1 and qa_2: a question of SQuAD 2.0 or HotpotQA; the documents it needs stand among as many others as fit.

The files are the user's. lm-evaluation-harness has these tasks too, but only with a network: it downloads the files.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from torchtitan.extensions.evaluation.checks import QA_FILES
from torchtitan.extensions.evaluation.fitting import Render, Task, Wording, generator
from torchtitan.extensions.evaluation.questions import string_match_part
from torchtitan.tools.errors import UserError

BUDGET = 32


@dataclass(frozen=True)
class QAEntry:
    """A question. needed, near: indices of the documents that answer it, and of those that are added to them first."""

    question: str
    answers: tuple[str, ...]
    needed: tuple[int, ...]
    near: tuple[int, ...] = ()


@dataclass(frozen=True)
class Documents:
    """The texts of a file and questions about them; task: qa_1 or qa_2, which the file is for."""

    task: str
    texts: tuple[str, ...]
    asked: tuple[QAEntry, ...]


@cache
def _read(file: Path) -> Documents:
    """A file in the form of SQuAD 2.0 or HotpotQA, recognized by what it holds. UserError for anything else."""
    if not file.is_file():
        raise UserError(f"evaluation.qa_files names {file}, which does not exist.")
    try:
        content = json.loads(file.read_bytes())
        documents = _squad(content["data"]) if isinstance(content, dict) else _hotpot(content)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"evaluation.qa_files names {file}, which is neither {QA_FILES['qa_1']} nor {QA_FILES['qa_2']} nor in "
            f"their form ({type(error).__name__}: {error})."
        ) from error
    if not documents.asked:
        raise UserError(f"evaluation.qa_files names {file}, which has no question that can be answered.")
    return documents


def _squad(articles: list[dict]) -> Documents:
    texts = list(dict.fromkeys(p["context"] for article in articles for p in article["paragraphs"]))
    index = {text: i for i, text in enumerate(texts)}
    asked = []
    for article in articles:
        same = dict.fromkeys(index[p["context"]] for p in article["paragraphs"])
        for p in article["paragraphs"]:
            here = index[p["context"]]
            near = tuple(i for i in same if i != here)
            for entry in p["qas"]:
                answers = tuple(dict.fromkeys(a["text"] for a in entry["answers"]))
                if not entry.get("is_impossible") and answers:
                    asked.append(QAEntry(entry["question"], answers, (here,), near))
    return Documents("qa_1", tuple(texts), tuple(asked))


def _hotpot(entries: list[dict]) -> Documents:
    def text(title: str, sentences: list[str]) -> str:
        return f"{title}\n{''.join(sentences)}"

    index: dict[str, int] = {}
    asked = []
    for entry in entries:
        needed = tuple(index.setdefault(text(*pair), len(index)) for pair in entry["context"])
        asked.append(QAEntry(entry["question"], (entry["answer"],), needed))
    return Documents("qa_2", tuple(index), tuple(asked))


def qa_task(file: Path) -> Task:
    """qa_1 or qa_2, whichever the file is for; UserError for a file that is for neither."""
    documents = _read(file)
    name = documents.task
    texts, asked = documents.texts, documents.asked

    def build(length: int, text: str, seed: int, n: int) -> tuple[Render, int]:
        # the same questions at all lengths
        order = generator(seed, name, 0, 0).permutation(len(asked))
        entry = asked[order[n % len(order)]]
        rng = generator(seed, name, length, n)
        near = [entry.near[i] for i in rng.permutation(len(entry.near))]
        first = {*entry.needed, *near}
        far = [int(i) for i in rng.permutation(len(texts)) if int(i) not in first]
        ranked = [*entry.needed, *near, *far]

        def render(size: int) -> Wording:
            shown = generator(seed, name, length, n, 1).permutation(ranked[:size])
            context = "\n\n".join(f"Document {i}:\n{texts[k]}" for i, k in enumerate(shown, 1))
            task = (
                "Answer the question based on the given documents. Only give me the answer and do not output any other "
                "words."
            )
            prompt = (
                f"{task}\n\nThe following are given documents.\n\n{context}\n\n{task}\n\n"
                f"Question: {entry.question} Answer:"
            )
            return Wording(prompt, f" {entry.answers[0]}", entry.answers)

        return render, len(entry.needed)

    return Task(name, build, string_match_part, BUDGET, most=len(texts), haystack="documents")
