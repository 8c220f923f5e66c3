"""Train the 4,096-token byte-level BPE in assets/tokenizer on the demo text (scripts/build_demo_corpus.py).

This script made the tokenizer in the repository; run it again only to change the tokenizer, which makes a different
model. Deterministic for a given text. Each digit is a token of its own; all 256 bytes are in the alphabet, so any text
can be encoded.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

BOS, EOS, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default="./data_cache/demo_text", help="folder with .jsonl files, field `text`")
    parser.add_argument("--out", default="./assets/tokenizer", help="folder for the tokenizer's three files")
    parser.add_argument("--vocab-size", type=int, default=4096, help="number of ids, including the three special ones")
    arguments = parser.parse_args()
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=arguments.vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        max_token_length=32,  # rows of dashes and the like are not worth an id
    )
    tokenizer.train_from_iterator(texts(Path(arguments.text)), trainer)
    if tokenizer.get_vocab_size() != arguments.vocab_size:
        raise SystemExit(f"the text is too small: it gave only {tokenizer.get_vocab_size()} ids")
    tokenizer.save(str(out / "tokenizer.json"))
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    config = {**special, "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, value in (("tokenizer_config.json", config), ("special_tokens_map.json", special)):
        (out / name).write_text(json.dumps(value, indent=2) + "\n")
    print(f"{out}: {tokenizer.get_vocab_size()} ids")


def texts(folder: Path) -> Iterator[str]:
    """The documents in pieces of 100 lines, so that the trainer does not hold a megabyte at a time."""
    for path in sorted(folder.glob("*.jsonl")):
        for record in path.open(encoding="utf-8"):
            lines = json.loads(record)["text"].splitlines(keepends=True)
            for start in range(0, len(lines), 100):
                yield "".join(lines[start : start + 100])


if __name__ == "__main__":
    main()
