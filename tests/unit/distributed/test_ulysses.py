"""What Ulysses refuses, with the arithmetic."""

from __future__ import annotations

import pytest

from torchtitan.distributed.context_parallel.ulysses import check_ulysses
from torchtitan.tools.errors import UserError


def test_heads_that_do_not_divide_are_refused_with_what_works():
    with pytest.raises(UserError, match=r"12 / 8 = 1\.50.*Degrees of 1, 2, 3, 4, 6, 12"):
        check_ulysses(12, cp=8, tp=1)
    with pytest.raises(UserError, match=r"12 query heads / tensor_parallel_degree 2 = 6.*6 / 4 = 1\.50"):
        check_ulysses(12, cp=4, tp=2)
    check_ulysses(12, cp=6, tp=2)
