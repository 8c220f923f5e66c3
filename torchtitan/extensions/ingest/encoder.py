"""A record -> the tokens of a document: its text, encoded, between BOS and EOS if data.add_bos and add_eos are on.

Conversations have an encoder of their own (chat.py), because their chat template decides about the ends. An encoder
says what its tokens depend on, twice: `key` names the corpus folder, `metadata` is for people and open_corpus.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from torchtitan.config.data_schema import Data, Source
from torchtitan.datasets.corpus import CORPUS_FORMAT
from torchtitan.datasets.long_text import LONG, LongText, chunks_of
from torchtitan.datasets.tokenizer import Tokenizer
from torchtitan.datasets.where import Where
from torchtitan.extensions.ingest.bad_records import BadRecords
from torchtitan.extensions.ingest.parts import LIST, Parts, list_field, parts_of
from torchtitan.extensions.ingest.records import Fields, as_text
from torchtitan.tools.errors import UserError

EMPTY = np.empty(0, np.int32)


@dataclass(frozen=True)
class Encoder:
    """Text to documents; made by make_encoder. bos, eos: the ids put at the ends, [] for none."""

    tokenizer: Tokenizer
    fields: Fields
    bos: list[int]
    eos: list[int]
    parts: Parts | None = None

    @property
    def key(self) -> list[Any]:
        """What the tokens depend on beside the content, as JSON."""
        where = [["where", self.fields.where.text]] if self.fields.where else []
        parts = [["parts", *self._parts.values()]] if self.parts else []
        return [CORPUS_FORMAT, self.tokenizer.fingerprint, bool(self.bos), bool(self.eos), *where, *parts]

    @property
    def metadata(self) -> dict[str, Any]:
        """The same in words, for corpus.json."""
        ends = {"add_bos": bool(self.bos), "add_eos": bool(self.eos), "text_field": self.fields.name} | self._parts
        where = {"where": self.fields.where.text} if self.fields.where else {}
        return tokenizer_metadata(self.tokenizer) | ends | where

    @property
    def _parts(self) -> dict[str, str]:
        """The keys of the source that say how parts of a document are put together, {} if each is one text."""
        if not (parts := self.parts):
            return {}
        text_field = self.fields.name + (f"{LIST}{parts.text}" if parts.text else "")
        keys = {"text_field": text_field, "group_by": parts.group_by}
        return keys | {"part_order": parts.order, "part_header": parts.header}

    def read(self, record: dict[str, Any]) -> str | LongText | None:
        """The text of a record, None if it is blank; ValueError if the field is not text."""
        value = record[self.fields.name]
        if self.parts and self.parts.text:
            value = self.parts.joined(value, self.fields.name)
        elif self.parts:
            for check in (self.parts.group, self.parts.rank, self.parts.head):
                check(record)
        text = value if isinstance(value, LongText) else as_text(value, self.fields.name)
        return text if text and not text.isspace() else None

    def encode(self, text: str | LongText | None) -> np.ndarray:
        """The document, int32[n]; an empty one, without ends, for None."""
        if isinstance(text, LongText) or (text is not None and len(text) > LONG):
            return self.tokenizer.encode_long(chunks_of(text), self.bos, self.eos)
        ids = self.tokenizer.encode(text) if text is not None else []
        return np.array(self.bos + ids + self.eos, np.int32) if ids else EMPTY

    def closing(self) -> dict[str, Any]:
        """What `where` and bad records add to the counts of a unit."""
        return (self.fields.where.counts() if self.fields.where else {}) | self.fields.bad.counts()


def make_encoder(source: Source, tokenizer: Tokenizer, data: Data) -> Any:
    """The source's Encoder or ChatEncoder; UserError if data.add_bos or add_eos asks for a token that the tokenizer
    lacks, or if chat data have no template."""
    where = Where(source.where, f"Data source {source.name!r}") if source.where else None
    bad = BadRecords(source.on_bad_record == "skip")
    if source.messages_field:
        from torchtitan.extensions.ingest.chat import ChatEncoder
        from torchtitan.extensions.ingest.chat_template import load_chat_template

        template = load_chat_template(tokenizer)
        return ChatEncoder(tokenizer, template, source.messages_field, where, bad, source.messages_format)
    ends = []
    for wanted, token, name in ((data.add_bos, tokenizer.bos_id, "bos"), (data.add_eos, tokenizer.eos_id, "eos")):
        if wanted and token is None:
            raise UserError(
                f"data.add_{name} = true, but the tokenizer in {tokenizer.folder} names no {name.upper()} token in "
                f"tokenizer_config.json, special_tokens_map.json, generation_config.json or config.json: set "
                f"data.add_{name} = false, or name the token in one of these files."
            )
        ends.append([token] if wanted and token is not None else [])
    parts = parts_of(source)
    also = parts.fields if parts and source.group_by else ()
    name = list_field(source.text_field)[0] or source.text_field
    fields = Fields("text_field", name, where=where, bad=bad, also=also, nulls=bool(parts))
    return Encoder(tokenizer, fields, ends[0], ends[1], parts)


def tokenizer_metadata(tokenizer: Tokenizer) -> dict[str, Any]:
    """What corpus.json says of the tokenizer."""
    return {
        "format": CORPUS_FORMAT,
        "tokenizer": tokenizer.fingerprint,
        "tokenizer_folder": tokenizer.folder,
        "vocab_size": tokenizer.vocab_size,
    }
