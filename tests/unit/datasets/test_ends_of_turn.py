"""The tokens that end an answer, from corpora put together by hand."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from torchtitan.datasets.corpus import ASSISTANT, Corpus
from torchtitan.datasets.ends_of_turn import begins_with_bos, ends_of_turn, stop_ids
from torchtitan.datasets.tokenizer import Tokenizer, load_tokenizer
from torchtitan.tools.errors import UserError

ASSETS = Path(__file__).parents[3] / "assets" / "tokenizer"
BOS, EOS, OTHER, NOT_SPECIAL = 0, 1, 4096, 4097


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    """The repository's, with a special token more and an added one that is not marked as special."""
    shutil.copytree(ASSETS, tmp_path / "assets")
    file = tmp_path / "assets/tokenizer.json"
    content = json.loads(file.read_text())
    like = content["added_tokens"][0]
    content["added_tokens"].append(like | {"id": OTHER, "content": "<|eot|>"})
    content["added_tokens"].append(like | {"id": NOT_SPECIAL, "content": "<|eom|>", "special": False})
    file.write_text(json.dumps(content))
    return load_tokenizer(tmp_path / "assets")


def corpus(*documents: str) -> Corpus:
    """Each token as its id, trained ones with a star: "0 7 8* 1*"."""
    offsets, tokens, roles = [0], [], []
    for document in documents:
        for word in document.split():
            tokens.append(int(word.rstrip("*")))
            roles.append(ASSISTANT if word.endswith("*") else 0)
        offsets.append(len(tokens))
    shard = np.array(offsets, np.int64), np.array(tokens, np.int32)
    return Corpus("corpus", [shard], "print", None, [np.array(roles, np.int8)])


def text(*documents: str) -> Corpus:
    made = corpus(*documents)
    return Corpus("text", [(np.stack(made._bounds[0]), made._values[0])], "print", None)


def test_the_token_after_which_nothing_is_trained(tokenizer: Tokenizer) -> None:
    assert ends_of_turn([text("0 7* 8* 1*")], tokenizer) == []
    assert ends_of_turn([corpus("0 7 8* 4096* 9 8* 4096*")], tokenizer) == [OTHER]
    # a document that was cut off, a call of a tool with an end of its own, other special tokens within a response
    several = corpus("0 7 8* 9*", "0 7 8* 4097* 0 9 8* 1*", "7 4096* 8* 1*")
    assert ends_of_turn([text("5"), several], tokenizer) == [EOS, NOT_SPECIAL]
    assert ends_of_turn([text("5")], tokenizer, [OTHER]) == [OTHER], "of an earlier stage"
    assert ends_of_turn([several], tokenizer, [OTHER]) == [EOS, OTHER, NOT_SPECIAL]
    parts = corpus("0 7 8* 4097* 9 8* 4096*", "0 7 8* 1* 0 9 8* 4097* 9 9 8* 4096* 9", "7 0 9")
    assert ends_of_turn([parts], tokenizer) == [EOS, OTHER], "the end of its thoughts is not that of a response"
    rare = corpus(*["0 7 8* 1*"] * 5000, *["0 7 8* 4096*"] * 5000)
    assert ends_of_turn([rare], tokenizer) == [EOS, OTHER], "not only of the first documents"


def test_conversations_without_an_end_are_named(tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("torchtitan")
    logger.propagate, before = True, logger.propagate
    try:
        assert ends_of_turn([corpus("0 7 8* 9*"), corpus("7 8 9")], tokenizer) == []
    finally:
        logger.propagate = before
    (message,) = [record.getMessage() for record in caplog.records]
    assert "no trained response ends with a special token" in message


def test_a_generation_stops_at_all_of_them(tokenizer: Tokenizer) -> None:
    assert stop_ids(tokenizer) == [EOS] and stop_ids(tokenizer, [OTHER, EOS]) == [EOS, OTHER]
    for named, ids in ((9, [EOS, 9]), ([7, EOS], [EOS, 7]), (None, [EOS]), (0, [EOS, 0])):
        (Path(tokenizer.folder) / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
        assert stop_ids(tokenizer) == ids and stop_ids(tokenizer, [OTHER]) == [*ids, OTHER]
    for wrong in ("9", [7, "9"], True, {}):
        (Path(tokenizer.folder) / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
        with pytest.raises(UserError, match="generation_config.json: eos_token_id = .* must be the id of a token"):
            stop_ids(tokenizer)


def test_whether_texts_begin_with_bos() -> None:
    """Conversations say nothing: their template decides."""
    with_bos, without, talk = text("0 7 1", "0 8"), text("7 1", "8"), corpus("0 7* 1*")
    assert begins_with_bos([with_bos, talk], BOS) is True and begins_with_bos([without], BOS) is False
    assert begins_with_bos([talk], BOS) is None and begins_with_bos([with_bos, without], BOS) is None
    assert begins_with_bos([without], None) is False
