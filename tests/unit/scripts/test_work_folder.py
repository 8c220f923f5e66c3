"""scripts/studies/work_folder.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.scripts import load_script
from torchtitan.tools.errors import UserError

begin_or_go_on = load_script("studies/work_folder").begin_or_go_on


def test_a_folder_goes_on_with_the_options_it_was_begun_with(tmp_path: Path):
    work = tmp_path / "a/b"
    begin_or_go_on(work, {"steps": 3, "lengths": (1, 2), "corpus": tmp_path})
    begin_or_go_on(work, {"steps": 3, "lengths": (1, 2), "corpus": tmp_path})
    with pytest.raises(UserError, match="begun with steps = 3, and not 4"):
        begin_or_go_on(work, {"steps": 4, "lengths": (1, 2), "corpus": tmp_path})
    with pytest.raises(UserError, match="begun with seed = None, and not 0"):
        begin_or_go_on(work, {"steps": 3, "lengths": (1, 2), "corpus": tmp_path, "seed": 0})
