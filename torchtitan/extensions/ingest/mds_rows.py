"""What the samples of MDS shards are: rows of token ids, or records of text; both are imported into a corpus folder.

Of tokens: the ids, which may be bytes without a type, as llm-foundry writes them; the columns of token_columns.py; and
`indices` [k, 2], which says that a row is packed and where its documents begin and end. Of text: text_field or
messages_field, and the fields of `where`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from torchtitan.config.data_schema import Data, Source
from torchtitan.datasets.tokenizer import Tokenizer
from torchtitan.extensions.ingest.convert_tables import TokenReader
from torchtitan.extensions.ingest.encoder import make_encoder
from torchtitan.extensions.ingest.mds import MdsShard, array_of, parse_encoding, samples_of
from torchtitan.extensions.ingest.token_columns import IDS, Columns, check_added, choose_columns
from torchtitan.extensions.ingest.token_rows import Lists
from torchtitan.extensions.ingest.token_tables import ends_of, refuse_column_keys
from torchtitan.tools.errors import UserError

logger = logging.getLogger(__name__)

SPANS = "indices"
OLD: list[Any] = [1, "input_ids", [], None, None]  # what was read always, and names a corpus as it did
BYTES = ("<i8", "<u4", "<u2")
"""Types that ids without a type may have, the widest first: wider ones of no other file's bytes are all ids."""

PROBED = 64  # rows that are looked at to find it
NUMBERS = {f"{kind}{bits}" for kind in ("int", "uint", "float") for bits in (8, 16, 32, 64)} | {"int"}


def mds_reader(
    source: Source, shards: Sequence[MdsShard], tokenizer: Tokenizer, data: Data
) -> tuple[Any, str, Callable[[MdsShard, Any], Iterator[np.ndarray]]]:
    """What is in the place of an encoder, a word for the corpus's key, and what reads a shard with the first. UserError
    if the columns do not fit the source."""
    if not shards:
        raise UserError(f"The index.json of data source {source.name!r} lists no shard. Download it again.")
    first = shards[0]
    encodings = first.encodings
    kinds = {name: _kind(source, name, encoding) for name, encoding in encodings.items() if name != SPANS}
    wanted = source.messages_field or source.text_field
    has_text = wanted.split(".")[0] in encodings
    columns = None
    if source.format != "text" and not (source.messages_field and has_text):
        columns = choose_columns(source, kinds, encodings, first.path)
    if columns is None:
        return _text_reader(source, first, tokenizer, data, has_text)
    if has_text and not source.ids_field:
        raise UserError(
            f"{first.path} of data source {source.name!r} has text, in the column {wanted!r}, and tokens, in "
            f'{columns.ids!r}: set ids_field = "{columns.ids}" to read the tokens, or format = "text" to tokenize the '
            "text."
        )
    for key in ("where", "messages_field"):
        if value := getattr(source, key):
            raise UserError(
                f"Data source {source.name!r} has {key} = {value!r}, but its path {source.path!r} is a folder of MDS "
                f"shards, which hold tokens: leave {key} out."
            )
    for shard in shards:
        for name in columns.names:
            if name not in shard.encodings:
                raise UserError(f"{shard.path} has no column {name!r}, which other shards of its source have.")
            if shard.encodings[name] != "bytes":
                parse_encoding(shard.path, name, shard.encodings[name])
        added = shard.encodings.keys() - encodings.keys() - {SPANS}
        check_added(shard.path, {name: _kind(source, name, shard.encodings[name]) for name in added}, columns)
    dtype = _dtype_of_bytes(source, shards, columns, tokenizer) if encodings[columns.ids] == "bytes" else ""
    found = f" (bytes, found out to be of {np.dtype(dtype).name})" if dtype else ""
    logger.info("%s: MDS shards of tokens, %s%s", source.name, columns.describe(), found)
    bos, eos = ends_of(source, columns, tokenizer, data)
    reader = TokenReader(columns, tokenizer, bos, eos, dtype)
    return reader, "mds" if columns.key == OLD else json.dumps(["mds", columns.key, dtype]), read_tokens


def _kind(source: Source, name: str, encoding: str) -> str:
    """As kind_of_type of token_columns.py."""
    named = [source.ids_field] if source.ids_field else IDS
    if name in named and encoding not in ("str", "json"):
        return "ids"  # or refused, with the encodings that are known
    if encoding == "bytes":
        return "bytes"
    if encoding.partition(":")[0] == "ndarray":
        return "list" if "float" in encoding else "ids"
    return "number" if encoding in NUMBERS else ""


def _dtype_of_bytes(source: Source, shards: Sequence[MdsShard], columns: Columns, tokenizer: Tokenizer) -> str:
    """The type of ids that are written as bytes: the widest in which all that are looked at are ids."""
    looked: list[bytes] = []
    for shard in shards[:: max(1, len(shards) // 8)]:
        for _, sample in samples_of(shard, [columns.ids]):
            looked.append(sample[columns.ids])
            if len(looked) % 8 == 0 or len(looked) >= PROBED:
                break
    content = [c for c in looked if c]
    for dtype in BYTES:
        width = np.dtype(dtype).itemsize
        if dtype == "<u2" and tokenizer.vocab_size > 1 << 16:
            continue  # else any bytes would fit
        if content and all(
            len(c) % width == 0
            and (np.frombuffer(c, dtype) >= 0).all()
            and int(np.frombuffer(c, dtype).max()) < tokenizer.vocab_size
            for c in content
        ):
            return dtype
    raise UserError(
        f"{shards[0].path} of data source {source.name!r}: the bytes of {columns.ids} are not ids of the tokenizer in "
        f"{tokenizer.folder}, which has those below {tokenizer.vocab_size}, as int64, uint32 or uint16 (16 bits are "
        "tried if they hold all of these). Set model.hf_assets_path to the tokenizer that made them."
    )


def read_tokens(shard: MdsShard, reader: TokenReader) -> Iterator[np.ndarray]:
    """The documents of a shard in order, int32[n] or, with roles, [2, n]. Those of packed rows get no ends."""
    columns = reader.columns
    packed = SPANS in shard.encodings
    for place, sample in samples_of(shard, [*columns.names, *([SPANS] if packed else [])]):
        arrays = {name: _array(shard, sample[name], name, reader.dtype, place) for name in columns.names}
        for name, array in arrays.items():
            if array.ndim != 1:
                raise UserError(f"{place}: {name} has the shape {array.shape}; it must have one dimension.")
        length = len(arrays[columns.ids])
        spans = [(0, length)]
        if packed:
            spans = _spans(array_of(sample[SPANS], shard.encodings[SPANS], place, SPANS), length, place)
        for start, stop in spans:
            lists = {columns.ids: Lists(np.array([start, stop]), arrays[columns.ids])}
            for name, kind in columns.said:
                bounds = [start, stop if len(arrays[name]) == length else len(arrays[name])]
                whole = kind in ("lengths", "ends")
                lists[name] = Lists(np.array([0, len(arrays[name])] if whole else bounds), arrays[name])
            yield from reader.documents(lists, lambda row: place, packed)  # noqa: B023


def _array(shard: MdsShard, content: bytes, name: str, dtype: str, place: str) -> np.ndarray:
    if shard.encodings[name] != "bytes":
        return array_of(content, shard.encodings[name], place, name)
    if len(content) % np.dtype(dtype).itemsize:
        raise UserError(f"{place}: {name} has {len(content)} bytes, no whole number of {np.dtype(dtype).name} ids.")
    return np.frombuffer(content, dtype)


def _spans(indices: np.ndarray, length: int, place: str) -> list[tuple[int, int]]:
    """The documents [start, stop) of a packed row."""
    good = indices.ndim == 2 and indices.shape[1] == 2
    if good:
        ends = indices.astype(np.int64).ravel()
        good = bool((np.diff(ends) >= 0).all()) and ends[0] >= 0 and ends[-1] <= length
    if not good:
        raise UserError(
            f"{place}: indices must be the [start, stop) of its documents, rising and within its {length} tokens; it "
            f"has the shape {indices.shape} and holds {np.array2string(indices.ravel(), threshold=8)}."
        )
    return [(int(start), int(stop)) for start, stop in indices]


# Text


def _text_reader(
    source: Source, first: MdsShard, tokenizer: Tokenizer, data: Data, has_text: bool
) -> tuple[Any, str, Callable[[MdsShard, Any], Iterator[np.ndarray]]]:
    key, name = (
        ("messages_field", source.messages_field) if source.messages_field else ("text_field", source.text_field)
    )
    columns = f"it has {', '.join(first.encodings) or 'none'}"
    if not has_text:
        raise UserError(
            f"{first.path} of data source {source.name!r} has no column {name!r} ({key}), and none of token ids that "
            f"is called {', '.join(IDS)}; {columns}. Set {key}, or ids_field if it holds tokens."
        )
    refuse_column_keys(source, f"the MDS shards of {source.path} are read as text")
    for end in ("document_end", "document_start"):
        if getattr(source, end) is not None:
            raise UserError(
                f"Data source {source.name!r} has {end}, which is read for token ids, but its MDS shards hold text: "
                "leave it out."
            )
    encoder = make_encoder(source, tokenizer, data)
    logger.info("%s: MDS shards of text, from the column %r", source.name, name)
    return encoder, f"mds of text: {name}", read_text


def read_text(shard: MdsShard, encoder: Any) -> Iterator[np.ndarray]:
    """The documents of a shard of text, in order."""
    columns = encoder.fields.columns(dict.fromkeys(shard.encodings), shard.path)
    for place, sample in samples_of(shard, columns):
        try:
            record = encoder.fields.of_columns(partial(_value, shard, sample), columns)
            document = None if record is None else encoder.encode(encoder.read(record))
        except ValueError as error:
            raise UserError(f"{place}: {error}") from error
        if document is not None:
            yield document


def _value(shard: MdsShard, sample: dict[str, bytes], name: str) -> Any:
    """A column of a sample as a value of a record; ValueError if it is of no such kind."""
    encoding, content = shard.encodings[name], sample[name]
    if encoding == "str":
        return content.decode()
    if encoding == "json":
        return json.loads(content)
    if encoding in NUMBERS:
        return np.frombuffer(content, "<i8" if encoding == "int" else np.dtype(encoding).newbyteorder("<"))[0].item()
    if encoding in ("str_int", "str_float"):
        return (int if encoding == "str_int" else float)(content.decode())
    raise ValueError(f"the column {name!r} has the encoding {encoding!r}; text, JSON and numbers are read.")
