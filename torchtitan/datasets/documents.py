"""A document's tokens: its text encoded, or ids as they come, between BOS and EOS as data.add_bos and add_eos say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from torchtitan.config.job_config import Data
from torchtitan.datasets.units import FORMAT
from torchtitan.tools.errors import UserError

if TYPE_CHECKING:  # components stand above datasets
    from torchtitan.components.tokenizer import Tokenizer

EMPTY = np.empty(0, np.int32)


@dataclass(frozen=True)
class Encoder:
    """Text to documents; made by make_encoder. bos, eos: the ids put at the ends, [] for none."""

    tokenizer: Tokenizer
    bos: list[int]
    eos: list[int]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The documents, int32[n] each; an empty one, without ends, for text that is blank."""
        there = [text for text in texts if text and not text.isspace()]
        ids = iter(self.tokenizer.encode_batch(there) if there else [])
        return [self._between_ends(next(ids)) if text and not text.isspace() else EMPTY for text in texts]

    def _between_ends(self, ids: list[int]) -> np.ndarray:
        return np.array(self.bos + ids + self.eos, np.int32) if ids else EMPTY

    def add_ends(self, ids: np.ndarray) -> np.ndarray:
        """Ids int32[n], n > 0, of a document that somebody else tokenized, with the ends that they lack."""
        bos = self.bos if ids[0] not in self.bos else []
        eos = self.eos if ids[-1] not in self.eos else []
        return np.concatenate([np.array(bos, np.int32), ids, np.array(eos, np.int32)])


def make_encoder(tokenizer: Tokenizer, data: Data) -> Encoder:
    """The encoder of a stage; UserError if data.add_bos or add_eos asks for a token that the tokenizer lacks."""
    for wanted, token, name in ((data.add_bos, tokenizer.bos_id, "bos"), (data.add_eos, tokenizer.eos_id, "eos")):
        if wanted and token is None:
            raise UserError(
                f"data.add_{name} = true, but the tokenizer in {tokenizer.folder} names no {name.upper()} token in "
                f"tokenizer_config.json, special_tokens_map.json, generation_config.json or config.json: set "
                f"data.add_{name} = false, or name the token in one of these files."
            )
    bos = [tokenizer.bos_id] if data.add_bos and tokenizer.bos_id is not None else []
    eos = [tokenizer.eos_id] if data.add_eos and tokenizer.eos_id is not None else []
    return Encoder(tokenizer, bos, eos)


def policy_key(tokenizer: Tokenizer, data: Data) -> list[Any]:
    """What the tokens depend on beside the content, for the key of a corpus."""
    return [FORMAT, tokenizer.fingerprint, data.add_bos, data.add_eos]


def policy_about(tokenizer: Tokenizer, data: Data) -> dict[str, Any]:
    """The same in words, for corpus.json."""
    return {
        "format": FORMAT,
        "tokenizer": tokenizer.fingerprint,
        "tokenizer_folder": tokenizer.folder,
        "vocab_size": tokenizer.vocab_size,
        "add_bos": data.add_bos,
        "add_eos": data.add_eos,
    }
