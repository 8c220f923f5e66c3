"""Made megatron_*.bin and .idx beside this file, with the real IndexedDatasetBuilder of megatron-core 0.16.1.

Run it in a Python that has PyTorch and numpy: `pip install --no-deps --target DIR megatron-core`, then
`PYTHONPATH=DIR python make_megatron.py`. It writes the files anew.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

HERE = Path(__file__).parent

DOCUMENTS = [[[65, 66, 67], [68, 257]], [[256, 97, 98]], [[]], [[1], [], [2, 3, 4, 257]], [[256, 7, 7, 257]]]
"""Documents of sequences, as in test_token_files.py. 256 begins and 257 ends a document of the byte tokenizer."""


def write(name: str, dtype: type, documents: list[list[list[int]]]) -> None:
    """One dataset: document after document, each sequence by add_item."""
    builder = IndexedDatasetBuilder(str(HERE / f"{name}.bin"), dtype=dtype)
    for document in documents:
        for sequence in document:
            builder.add_item(torch.tensor(sequence, dtype=torch.int64))
        builder.end_document()
    builder.finalize(str(HERE / f"{name}.idx"))


def main() -> None:
    """Write the datasets; the last is merged of the two before, as Megatron's tools merge shards."""
    write("megatron_uint16", np.uint16, DOCUMENTS)
    write("megatron_int32", np.int32, DOCUMENTS)
    merged = IndexedDatasetBuilder(str(HERE / "megatron_merged.bin"), dtype=np.uint16)
    merged.add_index(str(HERE / "megatron_uint16"))
    merged.add_document(torch.tensor([9, 8, 7, 257]), [3, 1])
    merged.finalize(str(HERE / "megatron_merged.idx"))


if __name__ == "__main__":
    main()
