"""Streams: what filters, the long-document policy and the length strategies leave; merging keeps the shares."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.unit.conftest import DOMAINS, domain_data
from torchtitan.config.data_schema import Data, Source
from torchtitan.datasets.build_rows import check_epochs
from torchtitan.datasets.corpus import Corpus
from torchtitan.datasets.mixture import Stream, build_streams
from torchtitan.tools.errors import UserError

SEQ_LEN = 32768
WEIGHTS = (0.35, 0.25, 0.25, 0.15)
Domains = dict[str, Corpus]


def streams_of(domains: Domains, seq_len: int = SEQ_LEN, **options: Any) -> list[Stream]:
    lengths = [corpus.lengths for corpus in domains.values()]
    return build_streams(domain_data(**options), lengths, [0] * len(lengths), seq_len, range(1))[0]


def shares_by_source(streams: list[Stream]) -> list[float]:
    return [sum(s.share for s in streams if s.source == i) for i in range(len(DOMAINS))]


def long_shares(domains: Domains, streams: list[Stream], threshold: int = 4096) -> list[float]:
    """Of each source's tokens, the share that lies in documents over the threshold."""
    found = []
    for i, corpus in enumerate(domains.values()):
        mine = [s for s in streams if s.source == i]
        long = sum(s.share * s.lengths[corpus.lengths[s.documents] > threshold].sum() / s.lengths.sum() for s in mine)
        found.append(long / sum(s.share for s in mine))
    return found


def natural_long_shares(domains: Domains) -> list[float]:
    return [c.lengths[c.lengths > 4096].sum() / c.tokens for c in domains.values()]


def test_original_keeps_weights_and_lengths(domains: Domains) -> None:
    streams = streams_of(domains)
    assert shares_by_source(streams) == pytest.approx(WEIGHTS)
    assert long_shares(domains, streams) == pytest.approx(natural_long_shares(domains))
    for stream, corpus in zip(streams, domains.values()):
        assert stream.lengths.max() <= SEQ_LEN
        assert (np.bincount(stream.documents, stream.lengths) == corpus.lengths).all()


@pytest.mark.parametrize("strategy, limit", [("cut_4k", 4096), ("cut_128k", 131072)])
@pytest.mark.parametrize("packing", ["best_fit", "concat"])
def test_cuts_leave_no_longer_piece_and_lose_nothing(domains: Domains, strategy: str, limit: int, packing: str) -> None:
    streams = streams_of(domains, 2**18, strategy=strategy, packing=packing)
    assert shares_by_source(streams) == pytest.approx(WEIGHTS)
    for stream, corpus in zip(streams, domains.values()):
        assert stream.lengths.max() == limit
        assert (np.bincount(stream.documents, stream.lengths) == corpus.lengths).all()


@pytest.mark.parametrize("target", [0.7, 0.95])
def test_per_source_keeps_domains_and_raises_every_one(domains: Domains, target: float) -> None:
    streams = streams_of(domains, strategy="per_source_upsampling", long_share=target)
    assert shares_by_source(streams) == pytest.approx(WEIGHTS)
    before, after = natural_long_shares(domains), long_shares(domains, streams)
    assert min(before) < 0.7 < max(before)
    assert after == pytest.approx([max(target, p) for p in before])  # raised, never lowered


def test_global_reaches_the_share_and_moves_domains(domains: Domains) -> None:
    natural = natural_long_shares(domains)
    assert sum(w * p for w, p in zip(WEIGHTS, natural)) < 0.9
    streams = streams_of(domains, strategy="global_upsampling", long_share=0.9)
    shares, after = shares_by_source(streams), long_shares(domains, streams)
    assert sum(shares) == pytest.approx(1)
    assert sum(w * p for w, p in zip(shares, after)) == pytest.approx(0.9)
    # as if short documents were kept with one probability q everywhere
    q = [(p * (1 - t)) / (t * (1 - p)) for p, t in zip(natural, after)]
    assert q == pytest.approx([q[0]] * 4) and 0 < q[0] < 1
    kept = [w * (p + q[0] * (1 - p)) for w, p in zip(WEIGHTS, natural)]
    assert shares == pytest.approx([k / sum(kept) for k in kept])
    assert max(abs(a - b) for a, b in zip(shares, WEIGHTS)) > 0.02


def test_domain_upsampling_raises_the_named(domains: Domains) -> None:
    streams = streams_of(domains, strategy="domain_upsampling", upsampled_sources=("books", "wiki"))
    expected = np.array([0.6, 0.25, 0.25, 0.6])
    assert shares_by_source(streams) == pytest.approx(expected / expected.sum())
    assert long_shares(domains, streams) == pytest.approx(natural_long_shares(domains))


def test_a_source_can_be_raised_by_itself(domains: Domains) -> None:
    natural = natural_long_shares(domains)
    streams = streams_of(domains, wiki__upsample_to=0.8, web__upsample=5.0)
    after = long_shares(domains, streams)
    assert shares_by_source(streams) == pytest.approx(WEIGHTS)
    assert after[:2] == pytest.approx(natural[:2])
    assert after[3] == pytest.approx(0.8)
    assert after[2] / (1 - after[2]) == pytest.approx(5 * natural[2] / (1 - natural[2]))
    assert long_shares(domains, streams_of(domains, wiki__upsample_to=0.01))[3] == pytest.approx(natural[3])


def test_filters_and_policies_account_for_every_token() -> None:
    lengths = np.array([0, 3, 10, 16, 17, 40, 100])

    def left(**options: Any) -> tuple[dict[int, list[int]], Any]:
        data = Data(sources=(Source(name="a", path="a", **options),))
        streams, left_out = build_streams(data, [lengths], [0], 16, range(1))
        pieces: dict[int, list[int]] = {}
        for document, length in zip(streams[0].documents.tolist(), streams[0].lengths.tolist()):
            pieces.setdefault(document, []).append(length)
        return pieces, left_out[0]

    whole = {1: [3], 2: [10], 3: [16]}
    assert left()[0] == whole | {4: [16, 1], 5: [16, 16, 8], 6: [16] * 6 + [4]}
    assert left(chunk_length=8)[0] == {1: [3], 2: [8, 2], 3: [8, 8], 4: [8, 8, 1], 5: [8] * 5, 6: [8] * 12 + [4]}
    pieces, out = left(long_document="truncate")
    assert pieces == whole | {4: [16], 5: [16], 6: [16]} and out.truncated == (3, 1 + 24 + 84)
    pieces, out = left(long_document="drop")
    assert pieces == whole and out.dropped == (3, 157)
    pieces, out = left(long_document="drop", chunk_length=10)
    assert pieces == {1: [3], 2: [10]} and out.dropped == (4, 173)
    pieces, out = left(min_length=10, max_length=40)
    assert sorted(pieces) == [2, 3, 4, 5] and out.below_min_length == (2, 3) and out.above_max_length == (1, 100)
    pieces, out = left(max_documents=4)
    assert sorted(pieces) == [1, 2, 3] and out.beyond_max_documents == (3, 157)


@pytest.mark.parametrize("separator", [0, 3])
def test_a_separator_follows_each_document_where_it_has_room(separator: int) -> None:
    """It costs no document its place, and makes no piece of its own."""
    lengths = [np.array([5, 20, 14, 16, 32])]
    expected = {
        "split": [5 + separator, 16, 4 + separator, 14, 16, 16, 16],
        "truncate": [5 + separator, 16, 14, 16, 16],
        "drop": [5 + separator, 14, 16],
    }
    for policy, pieces in expected.items():
        data = Data(sources=(Source(name="a", path="a", long_document=policy),))  # type: ignore[arg-type]
        streams, (left_out,) = build_streams(data, lengths, [separator], 16, range(1))
        assert streams[0].lengths.tolist() == pieces
        assert left_out.truncated == ((2, 4 + 16) if policy == "truncate" else (0, 0))
    data = Data(sources=(Source(name="a", path="a"),), packing="concat")
    (stream,), _ = build_streams(data, lengths, [separator], 16, range(1))
    assert stream.lengths.tolist() == (lengths[0] + separator).tolist()


BAD: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "drop everywhere": (
        {"long_document": "drop"},
        ("'a'", "of 2", '2 longer than 16 tokens, which long_document = "drop"'),
    ),
    "min_length": ({"min_length": 1000}, ("'a'", "2 shorter than min_length = 1000", "40 to 100 tokens")),
    "max_length": ({"max_length": 39}, ("2 longer than max_length = 39",)),
    "no long document": ({"upsample_to": 0.5}, ("upsample_to", "4096", "its longest has 100")),
    "max_documents": ({"max_documents": 1, "min_length": 50}, ("of 1, 1 shorter than min_length = 50",)),
    "no long document, factor": ({"upsample": 3.0}, ("upsample ", "4096", "its longest has 100")),
}


@pytest.mark.parametrize("name", BAD)
def test_a_source_with_nothing_left(name: str) -> None:
    options, words = BAD[name]
    with pytest.raises(UserError) as error:
        build_streams(Data(sources=(Source(name="a", path="a", **options),)), [np.array([40, 100])], [0], 16, range(1))
    for word in words:
        assert word in str(error.value)


def test_upsampling_without_a_long_document(domains: Domains) -> None:
    for strategy in ("per_source_upsampling", "global_upsampling"):
        with pytest.raises(UserError, match=f"{strategy}.*500001"):
            streams_of(domains, strategy=strategy, long_threshold=500_001)


def test_per_source_leaves_a_source_without_long_documents_as_it_is(domains: Domains) -> None:
    streams = streams_of(domains, strategy="per_source_upsampling", wiki__max_length=4096)
    assert shares_by_source(streams) == pytest.approx(WEIGHTS)
    assert [s.kind for s in streams if s.source == 3] == ["all"]
    assert long_shares(domains, streams)[2] == pytest.approx(0.7)


def test_too_many_epochs_are_refused_with_the_arithmetic(domains: Domains) -> None:
    data = domain_data(books__max_epochs=0.5)
    streams = streams_of(domains)
    tokens = domains["books"].tokens
    check_epochs(data, streams, [tokens // 2, 10**12, 10**12, 10**12])
    with pytest.raises(UserError) as error:
        check_epochs(data, streams, [2 * tokens, 0, 0, 0])
    words = ("'books'", f"{tokens:,} tokens", "0.35 of", "2.00 times", "max_epochs = 0.5", "0.25 times its share")
    for word in words:
        assert word in str(error.value)
