"""Made the mds_* folders beside this file, with the real MDSWriter of mosaicml-streaming 0.13.0 and numpy 2.4.6.

Run it in a Python of its own: `pip install --no-deps mosaicml-streaming zstd brotli python-snappy numpy` and what the
import then asks for. The import fails beside a PyTorch for CPUs (torchvision::nms), hence the stand-ins below.
`python make_mds.py` writes the folders anew.
"""

from __future__ import annotations

import importlib.machinery
import shutil
import sys
import types
from pathlib import Path


class StandIn(types.ModuleType):
    """Lets streaming import what it needs for images, which are not used here."""

    __path__: list[str] = []

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return object


for module in ("", ".transforms", ".transforms.functional", ".datasets", ".io"):
    sys.modules["torchvision" + module] = StandIn("torchvision" + module)

import numpy as np  # noqa: E402
from streaming import MDSWriter  # noqa: E402

HERE = Path(__file__).parent


def unpacked() -> list[np.ndarray]:
    """Documents of 3 to 62 tokens; the second has the byte tokenizer's BOS 256 and EOS 257, the third BOS only."""
    documents = [np.arange(length, dtype=np.int32) + 10 * length for length in (3, 20, 5, 62, 1, 17, 40, 8)]
    documents[1][[0, -1]] = 256, 257
    documents[2][0] = 256
    return documents


def packed() -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows of 64 tokens with the [start, stop) of the documents in them."""
    cuts = ([0, 64], [0, 10, 64], [0, 1, 2, 40, 64], [0, 32, 64])
    rows = [np.arange(64, dtype=np.uint32) + 100 * number for number in range(len(cuts))]
    return [(row, np.array(list(zip(at, at[1:])), np.uint32)) for row, at in zip(rows, cuts)]


def main() -> None:
    """Write the folders."""
    for name, compression in (("mds_unpacked", None), ("mds_zstd", "zstd:7")):
        shutil.rmtree(HERE / name, ignore_errors=True)
        columns = {"domain": "str", "input_ids": "ndarray:int32", "length": "int32"}
        with MDSWriter(columns=columns, out=str(HERE / name), compression=compression, size_limit=800) as out:
            for ids in unpacked():
                out.write({"domain": "wiki", "input_ids": ids, "length": np.int32(len(ids))})
    shutil.rmtree(HERE / "mds_packed", ignore_errors=True)
    kinds = {"part-0": ("ndarray:uint32", "ndarray:uint32"), "part-1": ("ndarray:uint32:64", "ndarray")}
    for (folder, (ids_kind, indices_kind)), rows in zip(kinds.items(), (packed()[:3], packed()[3:])):
        columns = {"input_ids": ids_kind, "indices": indices_kind, "length": "int32", "domain": "str"}
        with MDSWriter(columns=columns, out=str(HERE / "mds_packed" / folder)) as out:
            for ids, indices in rows:
                out.write({"input_ids": ids, "indices": indices, "length": np.int32(len(ids)), "domain": "books"})


def more() -> None:
    """As llm-foundry writes tokens (bytes of int64, chunks of one length); a mask by another name; and text."""
    columns = {"tokens": "bytes"}
    write("mds_bytes", columns, [{"tokens": (np.arange(16) * 10 + n).astype(np.int64).tobytes()} for n in range(20)])
    columns = {"tokens": "ndarray:uint16", "loss_mask": "ndarray:uint8", "source": "str"}
    rows = [{"tokens": np.arange(n, 2 * n + 4, dtype=np.uint16), "source": "chat"} for n in range(5)]
    for row in rows:
        row["loss_mask"] = (row["tokens"] % 3 == 0).astype(np.uint8)
    write("mds_mask", columns, rows)
    columns = {"text": "str", "meta": "json", "score": "float32", "n": "int", "turns": "json"}
    texts = ["one", "zwei \u00e4", "", "three\nlines", "five"]
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"text": t, "meta": {"lang": "de" if "z" in t else "en"}, "turns": turns} for t in texts]
    write("mds_text", columns, [row | {"score": np.float32(n / 4), "n": n} for n, row in enumerate(rows)])


def write(name: str, columns: dict[str, str], rows: list[dict[str, object]]) -> None:
    """A folder of its own."""
    shutil.rmtree(HERE / name, ignore_errors=True)
    with MDSWriter(columns=columns, out=str(HERE / name), size_limit=2000) as out:
        for row in rows:
            out.write(row)


if __name__ == "__main__":
    more()
    main()
