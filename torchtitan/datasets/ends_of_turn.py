"""Which tokens end an answer: what the tokenizer's folder names, and what the conversations of a stage taught. And
whether BOS begins a text.

A base model that is trained on conversations learns to end its answers with the token of its chat template, which none
of its files names as an end. What was trained stands in the data, whoever made them: after the last token of a response
nothing is trained, so that a generation has to stop there. Checkpoints keep these tokens in their manifest.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torchtitan.datasets.corpus import ASSISTANT, Corpus
from torchtitan.datasets.tokenizer import Tokenizer, json_if_present
from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import logger

SAMPLE = 1000
"""At most this many documents of a corpus are read, spread over it."""


def ends_of_turn(corpora: Sequence[Corpus], tokenizer: Tokenizer, inherited: Sequence[int] = ()) -> list[int]:
    """Ids, ascending, of the special tokens that end a trained response of these corpora; and the inherited ones, which
    earlier stages trained. Logs a warning for conversations without any."""
    ends = set(inherited)
    for corpus in corpora:
        if not corpus.has_roles:
            continue
        last: set[int] = set()
        for index in _some(corpus):
            last |= _last_of_responses(corpus, index, list(tokenizer.special.values()))
        special = last & set(tokenizer.added.values())
        if last and not special:
            logger.warning(
                f"{corpus.folder}: no trained response ends with a special token, so the model does not learn where "
                "to stop."
            )
        ends |= special
    return sorted(ends)


def _last_of_responses(corpus: Corpus, index: int, special: list[int]) -> set[int]:
    """The last tokens of a document's responses. A template can train a response in parts (its thoughts, then what
    follows): with no special token between two parts they are of one response, as in extensions/ingest/chat.py."""
    tokens, trained = corpus.document(index), corpus.roles(index) == ASSISTANT
    stops = np.flatnonzero(trained & ~np.append(trained[1:], False))
    between = np.cumsum(np.isin(tokens, special) & ~trained)
    ends = np.append(np.diff(between[stops]) > 0, True)[: len(stops)]
    return set(tokens[stops[ends]].tolist())


def begins_with_bos(corpora: Sequence[Corpus], bos_id: int | None) -> bool | None:
    """Whether documents of plain text begin with BOS; None if there are none, or if some do and others do not."""
    begin = set()
    for corpus in corpora:
        if not corpus.has_roles:  # what a conversation begins with, its template says
            begin |= {corpus.document(i)[:1].tolist() == [bos_id] for i in _some(corpus)}
    return begin.pop() if len(begin) == 1 else None


def _some(corpus: Corpus) -> list[int]:
    return np.unique(np.linspace(0, len(corpus) - 1, SAMPLE).astype(int)).tolist()


def named_ends(folder: str | Path) -> list[int]:
    """The ids that generation_config.json in a model's folder names as eos_token_id; [] if it names none. UserError if
    they are no ids."""
    file = Path(folder) / "generation_config.json"
    ids = as_ids(json_if_present(file).get("eos_token_id"))
    if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise UserError(f"{file}: eos_token_id = {json.dumps(ids)} must be the id of a token, or a list of ids.")
    return ids


def as_ids(eos_token_id: Any) -> list[int]:
    """The value of eos_token_id, a number, a list of numbers or null, as a list."""
    return [] if eos_token_id is None else eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]


def stop_ids(tokenizer: Tokenizer, trained: Sequence[int] = ()) -> list[int]:
    """Ids of the tokens at which a generation stops: the tokenizer's EOS, those that its folder's
    generation_config.json names, and those that conversations taught (ends_of_turn of a manifest)."""
    eos = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    return list(dict.fromkeys([*eos, *named_ends(tokenizer.folder), *trained]))
