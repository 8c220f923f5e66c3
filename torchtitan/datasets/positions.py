"""Position ids: what RoPE is given for the tokens of a row.

`reset` counts from 0 in each document and `continue` in each row; skipped_positions.py has the other methods. Only the
ids change, and only what RoPE makes of them. cu_seqlens alone says who may see whom: segments end where they ended, a
jump of the positions ends no document, and causality follows the order of the tokens.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from torchtitan.datasets.skipped_positions import skipped_positions
from torchtitan.datasets.tokenizer import Tokenizer
from torchtitan.tools.errors import UserError

SENTENCE_ENDS = (".", "?", "!", "\n", ".\n")
"""What LongRecipe cuts sentences at: the texts of the five Llama-3 tokens in its released code."""


def reset_positions(lengths: np.ndarray) -> np.ndarray:
    """0, 1, 2, ... in each segment of the given lengths, int64[S]: int64[T]."""
    return np.arange(lengths.sum(), dtype=np.int64) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def row_positions(
    method: str,
    segment_lengths: np.ndarray,
    limit: int | None,
    seed: tuple[int, int, int],
    ends: np.ndarray | None = None,
) -> np.ndarray:
    """Position ids of a row of T tokens in segments of the given lengths (int64[S], none empty): int64[T].

    method and limit are data.positions and data.target_seq_len; `reset` and `continue` need no limit. The segments are
    the mask's, but the documents for `reset`, even if documents see each other. seed is (training.seed, step, slot):
    the same three numbers and lengths give the same positions. ends, bool[T], marks the last token of every sentence
    and is for longrecipe only; a segment's end ends a sentence too. ValueError for a segment longer than limit and for
    wrong arguments.
    """
    lengths = np.asarray(segment_lengths, dtype=np.int64)
    if (lengths < 1).any():
        raise ValueError(f"segments must not be empty, got lengths {lengths.tolist()[:8]}")
    if method == "continue":
        return np.arange(lengths.sum())
    if method == "reset":
        return reset_positions(lengths)
    return skipped_positions(method, lengths, limit, seed, ends)


def sentence_ends(tokens: np.ndarray, end_ids: Collection[int]) -> np.ndarray:
    """bool[T]: which of the tokens (int [T]) end a sentence, given sentence_end_ids."""
    return np.isin(tokens, np.array(sorted(end_ids), dtype=np.int64))


def sentence_end_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids, rising, of the tokens that are SENTENCE_ENDS after a word; ends that take several tokens are left out.

    UserError if the tokenizer has none.
    """
    # After a letter, because tokenizers of the SentencePiece kind put a space before a text's first character.
    word = tokenizer.encode("a")
    encoded = tokenizer.encode_batch(["a" + end for end in SENTENCE_ENDS])
    ids = {tokens[-1] for tokens in encoded if len(tokens) == len(word) + 1 and tokens[:-1] == word}
    if not ids:
        raise UserError(
            f"data.positions = 'longrecipe' cuts text into sentences after {', '.join(map(repr, SENTENCE_ENDS))}, but "
            f"the tokenizer in model.hf_assets_path = {tokenizer.folder!r} has none of them as a single token. 'pose', "
            "'cream' and 'random' work with any tokenizer."
        )
    return tuple(sorted(ids))
