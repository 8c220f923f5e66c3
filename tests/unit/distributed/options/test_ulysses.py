"""What Ulysses refuses, with the arithmetic; the heads of its chunks."""

from __future__ import annotations

from typing import Literal

import pytest

from torchtitan.config.schema import Parallelism
from torchtitan.distributed.options.ulysses import check_ulysses, head_chunks
from torchtitan.tools.errors import UserError


def check(
    query_heads: int, cp: int, tp: int, chunks: int = 1, exchange: Literal["needed", "ulysses"] = "ulysses"
) -> None:
    degrees = {"context_parallel_degree": cp, "tensor_parallel_degree": tp, "context_parallel_head_chunks": chunks}
    check_ulysses(query_heads, Parallelism(context_parallel_exchange=exchange, **degrees))


def test_heads_that_do_not_divide_are_refused_with_what_works():
    with pytest.raises(UserError, match=r"12 / 8 = 1\.50.*Degrees of 1, 2, 3, 4, 6, 12"):
        check(12, cp=8, tp=1)
    with pytest.raises(UserError, match=r"12 query heads / tensor_parallel_degree 2 = 6.*6 / 4 = 1\.50"):
        check(12, cp=4, tp=2)
    check(12, cp=6, tp=2)
    check(12, cp=8, tp=1, exchange="needed")
    check(12, cp=1, tp=1, chunks=5)


def test_chunks_that_do_not_divide_a_ranks_heads_are_refused_with_what_works():
    with pytest.raises(UserError, match=r"head_chunks = 4 .*24 / .*degree 2 / .*degree 2 = 6\. 1, 2, 3, 6 would"):
        check(24, cp=2, tp=2, chunks=4)
    check(24, cp=2, tp=2, chunks=6)


def test_every_query_head_of_a_chunk_reads_its_own_kv_head():
    for heads, kv_heads, chunks in ((12, 3, 6), (12, 3, 2), (8, 8, 4), (8, 1, 8), (24, 4, 3)):
        parts = head_chunks(heads, kv_heads, chunks)
        assert len(parts) == chunks
        for own, read in parts:
            queries = range(heads)[own]
            times = len(queries) // len(read)  # as grouped-query attention has it
            assert [read[i // times] for i in range(len(queries))] == [h * kv_heads // heads for h in queries]
