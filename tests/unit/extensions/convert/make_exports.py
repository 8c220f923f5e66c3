"""Writes a small export of every RoPE method and architecture, for scripts/check_export_servers.py.

    python -m tests.unit.extensions.convert.make_exports ./exports

Random weights, 1.3 million of them: 64 tokens originally, trained for 256. Heads have 32 numbers, since vLLM has no
attention for smaller ones on a CPU. The tokenizer is that of assets/.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.unit.extensions.convert.models import (
    ARCHITECTURES,
    ORIGINAL,
    SCALINGS,
    TRAINED,
    random_weights,
    with_rope,
)
from torchtitan.datasets.tokenizer import load_tokenizer
from torchtitan.extensions.convert.export import write_hugging_face
from torchtitan.models.rope_method import Scaling
from torchtitan.models.rope_scaling import DynamicNTKScaling, LongRopeScaling, YarnScaling
from torchtitan.models.transformer import TransformerArgs

ASSETS = Path(__file__).parents[4] / "assets" / "tokenizer"
HEAD_DIM = 32
_SHORT, _LONG = ([1 + j / per for j in range(HEAD_DIM // 2)] for per in (50, 2))
METHODS: dict[str, Scaling | None] = {
    **{name: SCALINGS[name] for name in ("none", "linear", "ntk", "dynamic", "ntk_by_parts", "llama3", "yarn")},
    "yarn, attention factor 1": YarnScaling(4.0, ORIGINAL, attention_factor=1.0),
    "yarn, betas 8 and 2": YarnScaling(4.0, ORIGINAL, 8.0, 2.0),
    "yarn, not truncated": YarnScaling(4.0, ORIGINAL, truncate=False),
    "yarn, mscale": YarnScaling(4.0, ORIGINAL, mscale=1.0, mscale_all_dim=0.7),
    "longrope, two lists": LongRopeScaling(ORIGINAL, tuple(_LONG), tuple(_SHORT), 1.1, 4.0),
    "longrope, one list": LongRopeScaling(ORIGINAL, tuple(_LONG), tuple(_LONG), None, 4.0),
    "longrope, attention factor 1": LongRopeScaling(ORIGINAL, tuple(_LONG), tuple(_LONG), 1.0, 4.0),
    "gene": SCALINGS["gene"],
    "dynamic, never trained": DynamicNTKScaling(4.0, ORIGINAL),
    "yarn, trained beyond its factor": YarnScaling(2.0, ORIGINAL),
    "yarn, factor 1": YarnScaling(1.0, ORIGINAL, attention_factor=1.3),
}


def sized(args: TransformerArgs, vocab_size: int) -> TransformerArgs:
    """The same architecture at these sizes; heads that are wider than the model's share of each stay so."""
    wide = args.head_dim * args.n_heads > args.dim
    return replace(args, dim=128, head_dim=2 * HEAD_DIM if wide else HEAD_DIM, ffn_dim=256, vocab_size=vocab_size)


def cases() -> dict[str, TransformerArgs]:
    vocab_size = load_tokenizer(ASSETS).vocab_size + 32  # transformers adds a token to a Qwen 2's
    models = {name: sized(args, vocab_size) for name, args in ARCHITECTURES.items()}
    models |= {"olmo3, no window": models["olmo2"], "mistral, no window": models["llama"]}
    result = {name: with_rope(scaling, models["llama"]) for name, scaling in METHODS.items()}
    result["theta"] = with_rope(None, models["llama"], theta=2e6)
    result |= {f"{name}, llama3": with_rope(METHODS["llama3"], models[name]) for name in ("qwen2", "qwen3", "olmo2")}
    return result | {f"{name}, yarn": with_rope(METHODS["yarn"], models[name]) for name in models if name != "llama"}


ORIGINALS = {"olmo3, no window, yarn": "olmo3", "mistral, no window, yarn": "mistral"}
"""What the assets of these say that they were trained from; without it they would be exported as olmo2 and llama."""


def main(folder: Path) -> None:
    for case, args in cases().items():
        with TemporaryDirectory() as assets:
            shutil.copytree(ASSETS, assets, dirs_exist_ok=True)
            if case in ORIGINALS:
                (Path(assets) / "config.json").write_text(json.dumps({"model_type": ORIGINALS[case]}))
            write_hugging_face(random_weights(args), folder / re.sub(r"\W+", "_", case), Path(assets))
    print(f"{len(cases())} exports of models that were trained for {TRAINED} tokens")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
