"""Positions of whole rows: what each segment is given, seeds, wrong arguments; the tokens that end a sentence."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.unit.datasets.test_skipped_positions import SHORT, far_apart, runs
from torchtitan.datasets.positions import reset_positions, row_positions, sentence_end_ids, sentence_ends
from torchtitan.datasets.tokenizer import Tokenizer, load_tokenizer
from torchtitan.tools.errors import UserError

LENGTHS = np.array([5, 1, 40, 2, 3, 77])
ENDS = np.random.default_rng(5).random(LENGTHS.sum()) < 0.2


def test_reset_counts_in_segments_and_continue_in_the_row() -> None:
    for lengths in (LENGTHS, np.array([1]), np.array([7]), np.array([], np.int64)):
        reset = [i for n in lengths for i in range(n)]
        assert reset_positions(lengths).tolist() == reset
        for limit in (None, 2):  # which they do not look at
            assert row_positions("reset", lengths, limit, (0, 0, 0)).tolist() == reset
            assert row_positions("continue", lengths, limit, (0, 0, 0)).tolist() == list(range(len(reset)))
    for lengths in (LENGTHS.astype(np.int32), LENGTHS[:0]):
        assert reset_positions(lengths).dtype == row_positions("reset", lengths, None, (0, 0, 0)).dtype == np.int64


@pytest.mark.parametrize("method", SHORT)
def test_each_segment_is_placed_by_itself(method: str) -> None:
    limit = 1000
    positions = row_positions(method, LENGTHS, limit, (0, 1, 2), ENDS)
    assert positions.dtype == np.int64 and positions.shape == (LENGTHS.sum(),)
    parts = np.split(positions, np.cumsum(LENGTHS)[:-1])
    marks = np.split(ENDS, np.cumsum(LENGTHS)[:-1])
    for n, part, ends in zip(LENGTHS, parts, marks):
        assert part[-1] < limit and (np.diff(part) > 0).all()
        if method != "random":
            assert part[0] == 0
        if method == "cream" and n > 1:
            assert part[-1] == limit - 1
        if method == "longrecipe":  # jumps lie after ends of sentences; one more may be where the reset ends
            jumps = np.flatnonzero(np.diff(part) != 1)
            assert (~ends[jumps]).sum() <= 1
    # The first segment does not know of those behind it.
    assert (row_positions(method, LENGTHS[:1], limit, (0, 1, 2), ENDS[:5]) == positions[:5]).all()


@pytest.mark.parametrize("method", SHORT)
def test_rows_that_fill_the_limit_are_counted(method: str) -> None:
    lengths = np.array([13, 13])
    positions = row_positions(method, lengths, 13, (3, 4, 5), np.zeros(26, bool))
    assert positions.tolist() == list(range(13)) * 2


@pytest.mark.parametrize("method", SHORT)
def test_a_row_is_a_function_of_seed_step_and_slot(method: str) -> None:
    numbers = list(itertools.product(range(3), repeat=3))
    rows = [row_positions(method, np.array([60, 40]), 5000, seed, ENDS[:100]).tolist() for seed in numbers]
    assert len({tuple(row) for row in rows}) == len(rows)
    again = [row_positions(method, np.array([60, 40]), 5000, seed, ENDS[:100]).tolist() for seed in reversed(numbers)]
    assert again == rows[::-1]
    as_numpy = tuple(np.int64(number) for number in numbers[-1])
    assert row_positions(method, np.array([60, 40]), 5000, as_numpy, ENDS[:100]).tolist() == rows[-1]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_rows_are_independent_along_seeds_steps_and_slots(axis: int) -> None:
    n, limit, draws = 16, 1016, 3000
    skips = np.array(
        [row_positions("pose", np.array([n]), limit, tuple(np.roll([i, 7, 7], axis)), None)[-1] for i in range(draws)]
    )
    assert far_apart(skips, np.arange(n - 1, limit).repeat(3)) < 0.04
    for lag in (1, 2, 8):
        assert abs(np.corrcoef(skips[lag:], skips[:-lag])[0, 1]) < 0.06


def test_longrecipe_does_not_write_to_the_ends() -> None:
    ends = np.zeros(10, bool)
    row_positions("longrecipe", np.array([4, 6]), 100, (0, 0, 0), ends)
    assert not ends.any()


def test_longrecipe_cuts_where_the_ends_are() -> None:
    """One long gap, since the limit is far: the second half of a row of two sentences moves as one."""
    ends = np.zeros(40, bool)
    ends[29] = True
    positions = row_positions("longrecipe", np.array([40]), 10**6, (0, 0, 0), ends)
    assert runs(positions)[-1] == list(range(positions[30], positions[30] + 10)) and positions[30] > positions[29] + 1


def test_wrong_arguments() -> None:
    seed, lengths = (0, 0, 0), np.array([3, 4])
    for method in SHORT:
        with pytest.raises(ValueError, match="4 tokens"):
            row_positions(method, lengths, 3, seed, np.zeros(7, bool))
        with pytest.raises(ValueError, match="limit"):
            row_positions(method, lengths, None, seed, np.zeros(7, bool))
    with pytest.raises(ValueError, match="'yarn'"):
        row_positions("yarn", lengths, 10, seed)
    for ends in (None, np.zeros(6, bool)):
        with pytest.raises(ValueError, match=r"bool\[7\]"):
            row_positions("longrecipe", lengths, 10, seed, ends)
    for method in (*SHORT, "reset", "continue"):
        with pytest.raises(ValueError, match="empty"):
            row_positions(method, np.array([3, 0]), 10, seed, np.zeros(3, bool))


# Ends of sentences


def test_sentence_ends_marks_the_ids() -> None:
    tokens = np.random.default_rng(0).integers(0, 50, 1000)
    for ids in ((), (3,), (3, 0, 49, 60)):
        assert sentence_ends(tokens, ids).tolist() == [token in ids for token in tokens.tolist()]


def test_ids_of_the_demos_and_of_a_byte_tokenizer(tokenizer: Tokenizer) -> None:
    assert sentence_end_ids(tokenizer) == tuple(sorted(b".?!\n"))
    demo = load_tokenizer(Path(__file__).parents[3] / "assets" / "tokenizer")
    ids = sentence_end_ids(demo)
    assert {demo.decode([i]) for i in ids} >= {".", "?", "!", "\n"}
    text = "Is it so? It is.\nYes! So be it. And"
    ends = sentence_ends(np.array(demo.encode(text)), ids)
    sentences = np.split(demo.encode(text), np.flatnonzero(ends) + 1)
    assert [demo.decode(s.tolist()).strip() for s in sentences] == [
        "Is it so?",
        "It is.",
        "",
        "Yes!",
        "So be it.",
        "And",
    ]


def test_ids_are_those_after_a_word(tokenizer: Tokenizer) -> None:
    """A tokenizer of the SentencePiece kind puts a space before a text: "." alone is another token than in text."""
    pieces = {"\N{LOWER ONE EIGHTH BLOCK}a": 1, ".": 2, "\N{LOWER ONE EIGHTH BLOCK}.": 3, "?": 4, ".\n": 5}

    def encode(text: str) -> list[int]:
        text, ids = "\N{LOWER ONE EIGHTH BLOCK}" + text, []
        while text:
            piece = max((p for p in pieces if text.startswith(p)), key=len, default=text[0])
            ids.append(pieces.get(piece, 99))
            text = text[len(piece) :]
        return ids if 99 not in ids else [0, 0, 0, 0]

    other = replace(tokenizer, _encode_batch=lambda texts: [encode(text) for text in texts])
    assert sentence_end_ids(other) == (2, 4, 5)


def test_a_tokenizer_without_sentence_ends_is_refused(tokenizer: Tokenizer) -> None:
    blind = replace(tokenizer, _encode_batch=lambda texts: [[0, 1, 2] for _ in texts])
    with pytest.raises(UserError, match="longrecipe.*assets/bytes"):
        sentence_end_ids(blind)
