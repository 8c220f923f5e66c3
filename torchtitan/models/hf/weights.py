"""Hugging Face's weights: the names of our parameters there, and safetensors straight into sharded parameters."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch.distributed.checkpoint import FileSystemReader, LoadPlan, LoadPlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.futures import Future

from torchtitan.models.hf.folder import DEQUANTIZE, StoredTensor, StoredWeights, read_folder
from torchtitan.models.transformer import Transformer, TransformerArgs, parameter_shapes
from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import logger

SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""The dtypes of plain weights, by safetensors' names. Whatever else a file holds is a form of quantization."""

_TOP = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    # Olmo 2 and 3: there a norm of the same Hugging Face name stands elsewhere
    "attention_post_norm": "post_attention_layernorm",
    "ffn_post_norm": "post_feedforward_layernorm",
}
_WITHOUT_CONTENT = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
"""Ends of names: tables of RoPE, which every model computes itself. transformers and vLLM pass over them too."""
_OF_QUANTIZED = re.compile(
    r"scales?(_inv)?$|qweight|qzeros|g_idx$|_packed$|zero_point|absmax|quant_map|quant_state|SCB$"
)
_SLICE = 1 << 24
"""Elements that are compared at once."""


def hf_name(name: str) -> str:
    """Hugging Face's name of our parameter: layers.3.attention.wq.weight -> model.layers.3.self_attn.q_proj.weight."""
    if name in _TOP:
        return _TOP[name]
    _, layer, rest = name.split(".", 2)
    module, kind = rest.rsplit(".", 1)
    return f"model.layers.{layer}.{_LAYER[module]}.{kind}"


def check_weights(folder: Path, args: TransformerArgs, say: Callable[[str], None] = logger.info) -> StoredWeights:
    """Compare the folder's tensors with the model; UserError with the first that differ, and for quantized weights.

    Reads headers only, so that a wrong folder is refused before anything is allocated; of a tied model that has an
    output matrix of its own also that matrix and the embedding. say: gets a sentence about each file that is not read,
    and about dtypes if there are several.
    """
    stored = read_folder(folder)
    expected = {hf_name(name): shape for name, shape in parameter_shapes(args).items()}
    tensors = {key: tensor for key, tensor in stored.tensors.items() if not key.endswith(_WITHOUT_CONTENT)}
    _refuse_quantized(tensors, expected)
    if args.tied_embeddings and "lm_head.weight" in tensors:
        _check_tied(tensors)
        del tensors["lm_head.weight"]
    wrong = [
        f"{name} should be {list(shape)} and is {list(tensors[name].shape) if name in tensors else 'missing'}"
        for name, shape in expected.items()
        if name not in tensors or tensors[name].shape != shape
    ]
    # a bias that the file has and the model lacks would be dropped in silence: another architecture
    extra = [
        f"{name} {list(tensor.shape)} in {tensor.file.name} has no place in the model"
        for name, tensor in tensors.items()
        if name not in expected
    ]
    if wrong or extra:
        untied = "lm_head.weight" in expected and "lm_head.weight" not in tensors
        tie = " There is no lm_head.weight: is the model tied? Then tie_word_embeddings must be true in config.json."
        numbers = [int(match[1]) for name in tensors if (match := re.match(r"model\.layers\.(\d+)\.", name))]
        layers = max(numbers, default=-1) + 1
        count = f"the files have {layers} layers, config.json or the flavor says {args.n_layers}; " * (
            0 < layers != args.n_layers
        )
        raise UserError(
            f"The weights in {folder} do not fit the model: {count}{len(wrong)} of {len(expected)} tensors differ, "
            f"{len(extra)} are left over. First: {'; '.join(wrong[:4] + extra[:2])}.{tie * untied}"
        )
    for sentence in stored.passed_over:
        say(sentence)
    dtypes = Counter(tensor.dtype for tensor in tensors.values())
    if len(dtypes) > 1 or "F64" in dtypes:
        counted = ", ".join(f"{count} of {name}" for name, count in dtypes.most_common())
        say(
            f"{folder} holds tensors of several dtypes, or of F64: {counted}. Training and evaluation cast them to one."
        )
    return stored


def _refuse_quantized(tensors: dict[str, StoredTensor], expected: dict[str, tuple[int, ...]]) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in SAFETENSORS_DTYPES and (name in expected or name.endswith(".weight")):
            what = f"{name} is {tensor.dtype}"
        elif name not in expected and _OF_QUANTIZED.search(name):
            what = f"{name} is no weight of the model"
        else:
            continue
        raise UserError(f"{tensor.file} holds quantized weights: {what}. {DEQUANTIZE}")


def _check_tied(tensors: dict[str, StoredTensor]) -> None:
    """UserError if a tied model's file has another output matrix."""
    names = ("model.embed_tokens.weight", "lm_head.weight")
    if names[0] not in tensors:
        return
    embedding, head = (tensors[name] for name in names)
    difference = (
        f"the shapes are {list(embedding.shape)} and {list(head.shape)}" if embedding.shape != head.shape else ""
    )
    with safe_open(embedding.file, "pt") as a, safe_open(head.file, "pt") as b:
        one, other = a.get_slice(names[0]), b.get_slice(names[1])
        rows = max(1, _SLICE // max(1, *embedding.shape[1:]))
        for start in range(0, 0 if difference else embedding.shape[0], rows):
            unequal = one[start : start + rows] != other[start : start + rows]
            if unequal.any():
                difference = f"they differ first in the row of token {start + int(unequal.nonzero()[0, 0])}"
                break
    if difference:
        raise UserError(
            f"{head.file} holds {names[1]}, another matrix than {names[0]} ({difference}), but the model is tied: "
            "config.json, or the flavor, has tie_word_embeddings = true. transformers 5 and vLLM 0.32 would use the "
            f"file's matrix, versions before them the embedding. If {names[1]} is meant, set tie_word_embeddings = "
            "false in config.json (or name an untied flavor); else delete it from the file."
        )


class FolderReader(FileSystemReader):
    """Reads for DCP what a rank's planner asks for: slices of the tensors of a folder, each from its own file."""

    def __init__(self, stored: StoredWeights):
        super().__init__(str(stored.folder))
        self._tensors = stored.tensors

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        indices = {}
        for name, tensor in self._tensors.items():
            size, start = torch.Size(tensor.shape), torch.Size([0] * len(tensor.shape))
            properties = TensorProperties(dtype=SAFETENSORS_DTYPES.get(tensor.dtype, torch.uint8))
            entries[name] = TensorStorageMetadata(properties, size, [ChunkStorageMetadata(start, size)])
            indices[MetadataIndex(name, start)] = tensor.file
        return Metadata(state_dict_metadata=entries, storage_data=indices)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[Path, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            by_file[self._tensors[item.storage_index.fqn].file].append(item)
        for path, items in by_file.items():
            with safe_open(path, "pt") as file:
                for item in items:
                    ends = zip(item.storage_offsets, item.lengths, strict=True)
                    part = file.get_slice(item.storage_index.fqn)[tuple(slice(o, o + n) for o, n in ends)]
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(part)
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def load_weights(model: Transformer, folder: Path) -> None:
    """Copy the safetensors into the model's (sharded) parameters, cast to their dtype.

    Collective. Every rank reads just the slices of its own shards; nothing is held whole.
    """
    # named_parameters gives a tied matrix once, under the embedding's name, as the files do
    dcp.load(
        {hf_name(name): param.detach() for name, param in model.named_parameters()},
        storage_reader=FolderReader(read_folder(folder)),
    )
