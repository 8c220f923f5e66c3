"""The stream of a hub dataset: opened, read from any position, and tokenized by threads as it arrives."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from torchtitan.extensions.ingest.chat import ChatEncoder
from torchtitan.extensions.ingest.documents import Encoder
from torchtitan.extensions.ingest.source_files import SourceFile
from torchtitan.extensions.ingest.text import Fields, without_nulls
from torchtitan.extensions.ingest.units import Counts
from torchtitan.extensions.ingest.workers import Progress
from torchtitan.tools.errors import UserError

logger = logging.getLogger(__name__)

UNIT_CHARACTERS = 128 << 20  # what a kill can cost to download again; nobody knows how many units it will be
BATCH_CHARACTERS = 1 << 20  # what a thread tokenizes at a time


@dataclass(frozen=True)
class HubDataset:
    """What is asked for. name: OWNER/NAME, or a local folder, whose files are then listed."""

    name: str
    subset: str
    split: str
    revision: str
    files: tuple[SourceFile, ...] = ()

    def request(self) -> dict[str, str]:
        """For corpus.json, by which it is found when the hub cannot be reached."""
        return {"name": self.name, "subset": self.subset, "split": self.split, "revision": self.revision}


def open_dataset(wanted: HubDataset, commit: str, fields: Fields) -> Any:
    """The datasets library's IterableDataset of the wanted fields alone; UserError if it cannot be had."""
    import datasets

    try:
        dataset = datasets.load_dataset(
            wanted.name, wanted.subset or None, split=wanted.split, revision=commit or None, streaming=True
        )
        columns = dataset.column_names
    except Exception as error:  # the library raises ValueError, OSError, RuntimeError and its own
        if is_gated(error):
            raise UserError(gated_message(wanted.name)) from error
        raise UserError(
            f"The dataset {wanted.name} with hub_subset = {wanted.subset!r}, hub_split = {wanted.split!r} and "
            f"hub_revision = {wanted.revision!r} cannot be opened: {one_line(error)}"
        ) from error
    if columns is None:  # some files do not say; the first record will
        return dataset
    if fields.name not in columns:
        raise UserError(_no_field(wanted.name, fields, columns))
    return dataset.select_columns([fields.name, *(name for name in fields.beside if name in columns)])


def is_gated(error: BaseException | None) -> bool:
    """Whether the error, or one that it came from, is the hub's refusal to hand out a gated dataset."""
    from huggingface_hub.utils import GatedRepoError

    while error is not None:
        if isinstance(error, GatedRepoError) or "gated dataset" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def gated_message(name: str) -> str:
    """What to do about a gated dataset."""
    return (
        f"The dataset {name} is gated: accept its terms at https://huggingface.co/datasets/{name} and log in with a "
        "token of that account (hf auth login, or the variable HF_TOKEN)."
    )


def one_line(error: BaseException) -> str:
    """An error of a library as part of a sentence."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


def _no_field(name: str, fields: Fields, columns: Any) -> str:
    return (
        f"The dataset {name} has no column {fields.name!r} (the source's {fields.key}); it has "
        f"{', '.join(map(repr, columns)) or 'none'}. {fields.hint(columns)}"
    )


class Stream:
    """The documents of a dataset in order, cut into units by their characters.

    dataset: of open_dataset. max_documents: of those that are not blank; None: all. ended: nothing is left.
    """

    def __init__(
        self, dataset: Any, name: str, encoder: Encoder | ChatEncoder, threads: int, max_documents: int | None
    ) -> None:
        self.ended = False
        self._dataset, self._name = dataset, name
        self._encoder: Any = encoder
        self._threads, self._max_documents = threads, max_documents
        self._records: Iterator[dict[str, Any]] | None = None
        self._read = self._kept = 0

    def position(self) -> Counts:
        """Where the stream is, after a unit, as JSON."""
        import datasets

        state = self._dataset.state_dict()
        return {
            "read": self._read,
            "kept": self._kept,
            "ended": self.ended,
            "state": state,
            "library": datasets.__version__,
        }

    def resume(self, position: Counts) -> None:
        """Go on from a position, before anything is read.

        The library's own state costs the download of what lies before the position in its file, a part of the
        dataset. Another version of the library may not read it: skip() then downloads all that lies before.
        """
        import datasets

        self._read, self._kept = position["read"], position["kept"]
        if position["library"] == datasets.__version__:
            self._dataset.load_state_dict(position["state"])
        else:
            logger.info("%s: skipping %d records, begun with datasets %s", self._name, self._read, position["library"])
            self._dataset = self._dataset.skip(self._read)

    def unit(self, progress: Progress) -> Iterator[np.ndarray]:
        """The documents of the next unit, int32[n] each."""
        waiting: deque[Future[list[np.ndarray]]] = deque()

        def encoded() -> list[np.ndarray]:
            documents = waiting.popleft().result()
            progress.advance(0, len(documents), sum(document.shape[-1] for document in documents))
            return documents

        with ThreadPoolExecutor(self._threads) as pool:  # the tokenizers leave the interpreter lock alone
            for texts in self._batches():
                waiting.append(pool.submit(self._encoder.encode_batch, texts))
                if len(waiting) > 2 * self._threads:
                    yield from encoded()
            while waiting:
                yield from encoded()

    def _batches(self) -> Iterator[list[Any]]:
        batch: list[Any] = []
        held = total = 0
        while total < UNIT_CHARACTERS and (record := self._next()) is not None:
            try:
                one = self._encoder.read({name: without_nulls(value) for name, value in record.items()})
            except ValueError as error:
                raise UserError(f"{self._name}, record {self._read}: {error}") from error
            self._kept += one is not None
            batch.append(one)
            held += len(one or "")
            total += len(one or "")
            if held >= BATCH_CHARACTERS:
                yield batch
                batch, held = [], 0
        yield batch

    def _next(self) -> dict[str, Any] | None:
        """The next record, None at the end."""
        if self.ended or self._kept == self._max_documents:
            self.ended = True
            return None
        try:
            if self._records is None:
                self._records = iter(self._dataset)
            record = next(self._records, None)
        except Exception as error:  # from the network, or from files that are not what they seem
            if is_gated(error):
                raise UserError(gated_message(self._name)) from error
            raise UserError(
                f"The stream of {self._name} broke after {self._read} records: {one_line(error)}. Start again: it goes "
                "on after the last whole unit."
            ) from error
        if record is None:
            self.ended = True
            return None
        if self._encoder.fields.name not in record:
            raise UserError(_no_field(self._name, self._encoder.fields, record))
        self._read += 1
        return record
