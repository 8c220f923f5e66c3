"""Tokenizers: a folder of assets -> text to ids and back.

Two file kinds: Hugging Face `tokenizer.json` (the `tokenizers` library) and Llama-3 style `tokenizer.model` (lines of
base64 bytes and a rank, through `tiktoken`). No text is ever turned into a special token, so data cannot inject the
end of a document: whoever makes a corpus adds BOS and EOS by id. The one exception is what a chat template made
(encode_template); extensions/ingest/chat.py makes sure that only the template spells special tokens there.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from torchtitan.datasets.long_text import find_cuts
from torchtitan.tools.errors import UserError
from torchtitan.tools.folders import lfs_pointer, read_json

# The split pattern and the special tokens published with Llama 3; the names are Llama 3.1's where the two differ.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPECIAL_TOKENS = 256
LLAMA3_NAMED = {
    "<|begin_of_text|>": 0,
    "<|end_of_text|>": 1,
    "<|finetune_right_pad_id|>": 4,
    "<|start_header_id|>": 6,
    "<|end_header_id|>": 7,
    "<|eom_id|>": 8,
    "<|eot_id|>": 9,
    "<|python_tag|>": 10,
}

# tiktoken's matcher overflows its stack on some millions of characters and its merging grows faster than linearly with
# a run that the pattern cannot split; these are the limits that Llama 3's published tokenizer keeps.
MAX_CHARACTERS = 400_000
MAX_RUN = 25_000


@dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back; made by load_tokenizer.

    vocab_size counts the ids, special ones included: every id is below it. bos_id and eos_id are None if the folder
    names no such token. fingerprint is the SHA-256 of the tokenizer file's bytes and of the two ids. special: spelling
    -> id of the tokens that are marked as special; added: of these and of all others that were added to the vocabulary,
    which a text is searched for before it is divided.
    """

    folder: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    fingerprint: str
    _encode_batch: Callable[[list[str]], list[list[int]]]
    _decode: Callable[[list[int]], str]
    special: dict[str, int] = field(default_factory=dict)
    added: dict[str, int] = field(default_factory=dict)
    _encode_template: Callable[[str], tuple[list[int], list[tuple[int, int]]]] | None = None
    adds_bos: bool = False
    """Whether BOS is put before a text unasked: as tokenizer_config.json says, else as tokenizer.json does."""
    file_adds_bos: bool = False
    """Whether tokenizer.json does by itself: most of transformers 5's tokenizers go by that alone."""
    pieces: Callable[[Iterable[str]], Iterator[str]] | None = None
    """A text, given in parts, in pieces that have its tokens; None if it can only be encoded whole (long_text.py)."""

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without BOS and EOS; the spelling of a special token is ordinary text."""
        return self._encode_batch([text])[0]

    def encode_long(self, parts: Iterable[str], before: Sequence[int], after: Sequence[int]) -> np.ndarray:
        """Ids of a text that is given in parts, between those of `before` and `after`: int32[n], or empty if the text
        has none. Beside them no more is held than a piece."""
        ids = bytearray(np.array(before, np.int32).tobytes())
        size = len(ids)
        for piece in self.pieces(parts) if self.pieces else ["".join(parts)]:
            ids += np.array(self.encode(piece), np.int32).tobytes()
        if len(ids) == size:
            return np.empty(0, np.int32)
        ids += np.array(after, np.int32).tobytes()
        return np.frombuffer(ids, np.int32)

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of a text that continues another: tokenizers of the SentencePiece kind (Llama 2, Mistral) put a space
        before the first character of a text, which must not appear in the middle of one."""
        for before in (":", "a"):
            head, whole = self._encode_batch([before, before + text])
            if whole[: len(head)] == head:
                return whole[len(head) :]
        return self.encode(text)  # it begins with what joins both: no space is put before a text, then

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """encode() of each text; on several cores if the library can."""
        return self._encode_batch(texts)

    def encode_template(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of what a chat template made, in which the spelling of a special token is that token, and of each of them
        the characters [start, stop) that it has a part of. Nothing is added at the ends."""
        assert self._encode_template is not None
        return self._encode_template(text)

    def decode(self, ids: list[int]) -> str:
        """Text of the ids, special tokens spelled out; bytes that are not UTF-8 become U+FFFD."""
        return self._decode(ids)


def load_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer in a Hugging Face style assets folder; tokenizer.json is preferred over tokenizer.model."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise UserError(
            f"model.hf_assets_path = {str(folder)!r} is not a folder (looked for {path.absolute()}); it "
            "should be one with tokenizer.json or tokenizer.model."
        )
    if (path / "tokenizer.json").is_file():
        return _load_hugging_face(path)
    if (path / "tokenizer.model").is_file():
        return _load_tiktoken(path)
    raise UserError(
        f"model.hf_assets_path = {str(folder)!r} holds no tokenizer: looked for tokenizer.json and tokenizer.model in "
        f"{path.absolute()} and found {', '.join(sorted(p.name for p in path.iterdir())[:8]) or 'nothing'}."
    )


def _load_hugging_face(folder: Path) -> Tokenizer:
    import tokenizers

    path = folder / "tokenizer.json"
    content = path.read_bytes()
    try:
        description = json.loads(content)
        library = tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises bare Exception
        why = lfs_pointer(content) or f"{error}."
        raise UserError(f"{path} is not a tokenizer.json that the tokenizers library can read: {why}") from error

    ids = library.get_vocab(with_added_tokens=True)
    bos, eos = (_special_id(folder, name, ids) for name in ("bos", "eos"))
    # encode_special_tokens leaves alone only what is marked special, so the document's ends must be.
    unmarked = [t for t in description.get("added_tokens", []) if t["id"] in (bos, eos) and not t.get("special")]
    for token in unmarked:
        token["special"] = True
    if unmarked:
        library = tokenizers.Tokenizer.from_str(json.dumps(description))
    library.encode_special_tokens = True
    library.no_truncation()
    library.no_padding()

    def encode_batch(texts: list[str]) -> list[list[int]]:
        return [e.ids for e in library.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(token_ids: list[int]) -> str:
        return str(library.decode(token_ids, skip_special_tokens=False))

    @cache  # only chat data need it
    def for_templates() -> tokenizers.Tokenizer:
        # A post-processor moves the offsets of tokens that begin with a space, and what it adds is not wanted here.
        made = tokenizers.Tokenizer.from_str(json.dumps(description | {"post_processor": None}))
        made.no_truncation()
        made.no_padding()
        return made

    def encode_template(text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = for_templates().encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    added_tokens = description.get("added_tokens", [])
    added = {t["content"]: int(t["id"]) for t in added_tokens}
    special = {t["content"]: int(t["id"]) for t in added_tokens if t.get("special")}
    fingerprint = _fingerprint(content, bos, eos)
    size = max(ids.values()) + 1
    setting = json_if_present(folder / "tokenizer_config.json").get("add_bos_token")
    by_file = bos is not None and library.encode("a").ids[:1] == [bos]
    adds_bos = bos is not None and setting if isinstance(setting, bool) else by_file
    made = Tokenizer(str(folder), size, bos, eos, fingerprint, encode_batch, decode, special, added, encode_template)
    cuts = find_cuts(json.loads(library.to_str()))
    return replace(made, adds_bos=adds_bos, file_adds_bos=by_file, pieces=cuts.pieces if cuts else None)


def _load_tiktoken(folder: Path) -> Tokenizer:
    import tiktoken

    path = folder / "tokenizer.model"
    content = path.read_bytes()
    ranks = _read_ranks(path, content)
    named = {name: len(ranks) + index for name, index in LLAMA3_NAMED.items()}
    # The config files may use Llama 3.0's or 3.1's numbering of the reserved tokens; only named ones can be BOS or EOS.
    special = dict(named)
    for index in sorted(set(range(LLAMA3_SPECIAL_TOKENS)) - set(LLAMA3_NAMED.values())):
        special[f"<|reserved_special_token_at_{index}|>"] = len(ranks) + index
    library = tiktoken.Encoding(name=str(path), pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=special)
    bos, eos = (_special_id(folder, name, named) for name in ("bos", "eos"))
    bos = named["<|begin_of_text|>"] if bos is None else bos
    eos = named["<|end_of_text|>"] if eos is None else eos

    def encode_batch(texts: list[str]) -> list[list[int]]:
        return [[i for part in bounded_parts(text) for i in library.encode_ordinary(part)] for text in texts]

    def decode(token_ids: list[int]) -> str:
        return str(library.decode(token_ids, errors="replace"))

    spelled = re.compile("(" + "|".join(map(re.escape, sorted(special, key=len, reverse=True))) + ")")

    def encode_template(text: str) -> tuple[list[int], list[tuple[int, int]]]:
        made: list[int] = []
        lengths: list[int] = []  # of each token in bytes; a special token's spelling is one
        for part in spelled.split(text):
            part_ids = [special[part]] if part in special else encode_batch([part])[0]
            made += part_ids
            lengths += [len(library.decode_single_token_bytes(i)) for i in part_ids]
        # a token may begin within a character of several bytes: all bytes of one are that character
        is_first = (np.frombuffer(text.encode(), np.uint8) & 0xC0) != 0x80
        character = np.cumsum(is_first) - 1
        bounds = np.cumsum([0, *lengths])
        starts, lasts = (character[at].tolist() if made else [] for at in (bounds[:-1], bounds[1:] - 1))
        return made, [(start, last + 1) for start, last in zip(starts, lasts, strict=True)]

    size = len(ranks) + LLAMA3_SPECIAL_TOKENS
    fingerprint = _fingerprint(content, bos, eos)
    ends = (True, True, lambda parts: bounded_parts("".join(parts)))
    return Tokenizer(
        str(folder), size, bos, eos, fingerprint, encode_batch, decode, special, special, encode_template, *ends
    )


def _read_ranks(path: Path, content: bytes) -> dict[bytes, int]:
    """Lines `base64-of-the-bytes rank`, ranks 0..n-1; every single byte must have one."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            piece, rank = line.split()
            ranks[base64.b64decode(piece, validate=True)] = int(rank)
        except ValueError as error:
            raise UserError(
                f"{path} line {number} is not 'base64 rank' as in Llama 3's tokenizer.model. A SentencePiece "
                "tokenizer.model (Llama 2, Mistral) cannot be read: put the model's tokenizer.json in the folder."
            ) from error
    missing = sum(bytes([b]) not in ranks for b in range(256))
    if missing or sorted(ranks.values()) != list(range(len(ranks))):
        what = (
            f"{missing} of the 256 single bytes are missing" if missing else "its ranks are not 0, 1, 2, ... once each"
        )
        raise UserError(f"{path} has {len(ranks)} ranks and is damaged or not Llama 3's format: {what}.")
    return ranks


def _fingerprint(content: bytes, bos: int | None, eos: int | None) -> str:
    return hashlib.sha256(content + f"\nbos={bos} eos={eos}".encode()).hexdigest()


def _special_id(folder: Path, name: str, ids: dict[str, int]) -> int | None:
    """Id of the token called bos or eos; None if a tokenizer file says null, or no file names one."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        config = json_if_present(folder / file)
        if f"{name}_token" in config:
            token = config[f"{name}_token"]
            content = token.get("content") if isinstance(token, dict) else token
            if content is None:
                return None
            if content not in ids:
                raise UserError(
                    f"{folder / file} says {name}_token = {content!r}, which the tokenizer does not have: name one of "
                    f"its tokens there, or null if it has no {name.upper()}."
                )
            return ids[content]
    for file in ("generation_config.json", "config.json"):
        value = said = json_if_present(folder / file).get(f"{name}_token_id")
        if isinstance(value, list):  # several ends are listed for chat models, the document's end first
            value = value[0] if value else None
        if isinstance(value, bool) or not isinstance(value, int | None):
            raise UserError(f"{folder / file}: {name}_token_id = {json.dumps(said)} must be the id of a token.")
        if value is not None:
            return value
    return None


def json_if_present(path: Path) -> dict[str, Any]:
    """The JSON object in a file, {} if there is no such file; UserError if the file holds anything else."""
    return read_json(path) if path.is_file() else {}


# Places where LLAMA3_PATTERN always ends a token: after a line break and before a lone space, since no alternative has
# a line break before, or a space after, a character that is not white space.
_SAFE_CUT = re.compile(r"(?<=\n)(?=\S)|(?<=\S)(?= \S)")
_SEARCH = 20_000


def bounded_parts(text: str) -> Iterator[str]:
    """The text in parts of at most MAX_CHARACTERS without a run of white space, or of none, above MAX_RUN.

    Linear in the text. A cut is placed so that the tokens stay the same, which a cut inside a longer run cannot do.
    """
    start = 0
    while len(text) - start > MAX_CHARACTERS:
        stop = start + MAX_CHARACTERS
        for match in _SAFE_CUT.finditer(text, stop - _SEARCH, stop + 1):
            stop = match.start()
        yield from _bounded_runs(text[start:stop])
        start = stop
    yield from _bounded_runs(text[start:])


def _bounded_runs(text: str) -> Iterator[str]:
    # A run above MAX_RUN covers one of these blocks whole: most texts are cleared without looking at every word.
    half = MAX_RUN // 2
    blocks = (text[i : i + half] for i in range(0, len(text) - half + 1, half))
    if all(not block.isspace() and len(block.split(maxsplit=1)[0]) < half for block in blocks):
        yield text
        return
    start = 0
    for run in re.finditer(r"\S+|\s+", text):
        for cut in range(run.start() + MAX_RUN, run.end(), MAX_RUN):
            yield text[start:cut]
            start = cut
    if start < len(text):
        yield text[start:]
