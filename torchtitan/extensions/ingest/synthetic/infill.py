"""Fill in the middle (Bavarian et al., arXiv 2207.14255): a text whose middle is moved to its end.

A text is cut at two random characters, before it is tokenized. PSM: prefix, suffix, middle. SPM: the suffix first, then
prefix and middle as one, with the markers of the paper's joint training. The markers are tokens that the tokenizer
has for this, or texts that the user names.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from torchtitan.datasets.tokenizer import Tokenizer
from torchtitan.extensions.ingest.synthetic.hay import Encode, Hay, Piece, size
from torchtitan.tools.errors import UserError

SENTINELS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen2.5, CodeGemma, OpenAI's cl100k
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, SantaCoder's successors, Granite
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek-Coder
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),  # Code Llama
)
"""Prefix, suffix, middle, as tokenizers spell them."""


def markers(tokenizer: Tokenizer, texts: Sequence[str], source_name: str) -> list[Piece]:
    """The markers of prefix, suffix and middle; UserError if the tokenizer has none and no texts are given."""
    for spelled in SENTINELS:
        if all(one in tokenizer.added for one in spelled):
            if texts:
                raise UserError(
                    f"Data source {source_name!r} has fim_markers, but the tokenizer in {tokenizer.folder} has tokens "
                    f"for this ({', '.join(spelled)}): leave fim_markers out."
                )
            return [Piece(one, np.array([tokenizer.added[one]], np.int32)) for one in spelled]
    if not texts:
        raise UserError(
            f"Data source {source_name!r} has the task fill_middle, but the tokenizer in {tokenizer.folder} has no "
            'tokens for prefix, suffix and middle: give three texts, such as fim_markers = ["<PRE>", "<SUF>", "<MID>"].'
        )
    return [Piece(one, np.array(tokenizer.encode_continuation(one), np.int32)) for one in texts]


def fill_middle(
    rate: float,
    spm_rate: float,
    marked: Sequence[Piece],
    rng: np.random.Generator,
    hay: Hay,
    encode: Encode,
    room: int,
    least: int,
) -> list[Piece] | None:
    """A text of the files with its middle at the end, with a probability of `rate`, in SPM with `spm_rate`; or as it
    is. None if it spells a marker."""
    fixed = size(marked) + 12  # a cut inside a word makes a few more tokens
    text = "".join(piece.text for piece in hay.of_one_text(room - fixed, max(1, least - fixed - 32))).rstrip()
    if not text or any(one.text in text for one in marked):
        return None
    if rng.random() >= rate:
        return encode.begin(text)
    first, second = np.sort(rng.integers(len(text) + 1, size=2)).tolist()
    prefix, middle, suffix = (
        [Piece(part, np.array(encode.tokenizer.encode_continuation(part) if part else [], np.int32))]
        for part in (text[:first], text[first:second], text[second:])
    )
    before, after, between = marked
    filled = [Piece(middle[0].text, middle[0].ids, answer=True)]
    if rng.random() < spm_rate:
        return [before, after, *suffix, between, *prefix, *filled]
    return [before, *prefix, after, *suffix, between, *filled]
