"""A document's tokens: its text encoded, or ids as they come, between BOS and EOS as data.add_bos and add_eos say.

Or a conversation's, between which the chat template decides: chat.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from torchtitan.config.schema import Data, Source
from torchtitan.datasets.corpus import FORMAT
from torchtitan.datasets.tokenizer import Tokenizer
from torchtitan.extensions.ingest import chat
from torchtitan.extensions.ingest.chat import ChatEncoder
from torchtitan.extensions.ingest.chat_template import load_chat_template
from torchtitan.extensions.ingest.text import Fields, as_text
from torchtitan.extensions.ingest.units import Counts
from torchtitan.tools.errors import UserError

EMPTY = np.empty(0, np.int32)


@dataclass(frozen=True)
class Encoder:
    """Text to documents; made by make_encoder. bos, eos: the ids put at the ends, [] for none."""

    tokenizer: Tokenizer
    fields: Fields
    bos: list[int]
    eos: list[int]

    def read(self, record: dict[str, Any]) -> str | None:
        """The text of a record, None where it is blank; ValueError says why it is none."""
        text = as_text(record[self.fields.name], self.fields.name)
        return text if text and not text.isspace() else None

    def encode_batch(self, texts: Sequence[str | None]) -> list[np.ndarray]:
        """The documents, int32[n] each; an empty one, without ends, for None."""
        there = [text for text in texts if text is not None]
        ids = iter(self.tokenizer.encode_batch(there) if there else [])
        return [EMPTY if text is None else self._between_ends(next(ids)) for text in texts]

    def closing(self) -> Counts:
        """Nothing is to be kept beside the counts of a unit."""
        return {}

    def _between_ends(self, ids: list[int]) -> np.ndarray:
        return np.array(self.bos + ids + self.eos, np.int32) if ids else EMPTY

    def add_ends(self, document: np.ndarray) -> np.ndarray:
        """A document that somebody else tokenized, int32[n] or, with roles, [2, n], with the ends that it lacks."""
        if document.ndim == 2:  # a conversation, which ends as its template says
            return document
        bos = self.bos if document[0] not in self.bos else []
        eos = self.eos if document[-1] not in self.eos else []
        return np.concatenate([np.array(bos, np.int32), document, np.array(eos, np.int32)])


def make_encoder(source: Source, tokenizer: Tokenizer, data: Data) -> Encoder | ChatEncoder:
    """The encoder of a source; UserError if data.add_bos or add_eos asks for a token that the tokenizer lacks, or if
    there is no template for chat data."""
    if source.messages_field:
        return ChatEncoder(tokenizer, load_chat_template(tokenizer), source.messages_field)
    for wanted, token, name in ((data.add_bos, tokenizer.bos_id, "bos"), (data.add_eos, tokenizer.eos_id, "eos")):
        if wanted and token is None:
            raise UserError(
                f"data.add_{name} = true, but the tokenizer in {tokenizer.folder} names no {name.upper()} token in "
                f"tokenizer_config.json, special_tokens_map.json, generation_config.json or config.json: set "
                f"data.add_{name} = false, or name the token in one of these files."
            )
    bos = [tokenizer.bos_id] if data.add_bos and tokenizer.bos_id is not None else []
    eos = [tokenizer.eos_id] if data.add_eos and tokenizer.eos_id is not None else []
    return Encoder(tokenizer, Fields("text_field", source.text_field), bos, eos)


def policy_key(source: Source, tokenizer: Tokenizer, data: Data) -> list[Any]:
    """What the tokens depend on beside the content, for the key of a corpus."""
    if source.messages_field:
        template = load_chat_template(tokenizer)
        return [FORMAT, tokenizer.fingerprint, "chat", chat.FORMAT, template.fingerprint, source.messages_field]
    return [FORMAT, tokenizer.fingerprint, data.add_bos, data.add_eos]


def policy_about(source: Source, tokenizer: Tokenizer, data: Data) -> dict[str, Any]:
    """The same in words, for corpus.json."""
    about = {
        "format": FORMAT,
        "tokenizer": tokenizer.fingerprint,
        "tokenizer_folder": tokenizer.folder,
        "vocab_size": tokenizer.vocab_size,
    }
    if source.messages_field:
        template = load_chat_template(tokenizer)
        return about | {"messages_field": source.messages_field, "chat_template": template.fingerprint}
    return about | {"add_bos": data.add_bos, "add_eos": data.add_eos, "text_field": source.text_field}
