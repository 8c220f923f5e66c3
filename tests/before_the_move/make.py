"""Made this folder, with the code as it was before its modules moved: `python -m tests.before_the_move.make`.

It is kept to be read. Run again after the move it would record what is to be checked, so it refuses to write over what
is there; `git show` of this file's first commit is the code that it was run with. losses.json is losses.py's.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import tokenizers
from safetensors.torch import load_file
from tokenizers import decoders, pre_tokenizers, trainers

from tests.before_the_move.record import FOLDER, MACHINE, REPOSITORY, machine, metrics, run, train

SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
WORDS = (  # noqa: SIM905
    "a the an old new river stone house bird mountain red green blue walks sings waits under over beside "
    "and but when because slowly never always seventeen 1984 Größe 木 naïve (perhaps) however; winter morning letters "
    "reader"
).split()


def sentences(rand: random.Random, words: int) -> str:
    """About so many words, in sentences and paragraphs."""
    text = ""
    while words > 0:
        n = min(words, rand.randint(3, 12))
        text += " ".join(rand.choices(WORDS, k=n)).capitalize() + rand.choice([". ", ". ", "? ", "! ", ".\n\n"])
        words -= n
    return text.strip()


def write_lines(path: Path, records: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def write_texts(rand: random.Random) -> None:
    """Ragged lengths: many documents shorter than a row, some of several rows."""
    for name, count, longest in (("notes", 40, 60), ("tales", 16, 250)):
        lengths = [rand.randint(1, longest) for _ in range(count)] + [2 * longest, 3 * longest]
        write_lines(FOLDER / f"texts/{name}.jsonl", [{"text": sentences(rand, n)} for n in lengths])
    talks = []
    for i in range(30):
        said = [{"role": "system", "content": "Be brief."}] if i % 3 == 0 else []
        for _ in range(rand.randint(1, 3)):
            said += [{"role": role, "content": sentences(rand, rand.randint(1, 15))} for role in ("user", "assistant")]
        talks.append({"messages": said})
    write_lines(FOLDER / "texts/talks.jsonl", talks)


def write_model() -> None:
    folder = FOLDER / "model"
    folder.mkdir()
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = (FOLDER / "texts/notes.jsonl").read_text().splitlines()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"], special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([json.loads(line)["text"] for line in texts], trainer)
    made.save(str(folder / "tokenizer.json"))
    names = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1], "pad_token": SPECIAL[2]}
    about = names | {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=1) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=1) + "\n")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1) + "\n")


def write_corpus() -> None:
    """Without a key in the folder's name, so that the TOML files can be read."""
    given = ("--path", "texts/notes.jsonl", "--out-name", "notes", "--assets", "model", "--cache-folder", "corpus")
    run(FOLDER, REPOSITORY / "scripts/tokenize_corpus.py", *given, "--num-proc", "1")
    (made,) = (FOLDER / "corpus").glob("notes-*")
    made.rename(FOLDER / "corpus/notes")
    about = FOLDER / "corpus/notes/corpus.json"
    about.write_text(about.read_text().replace(f"{FOLDER}/", ""))  # where the text lay on the machine that made it
    for other in (FOLDER / "corpus").iterdir():
        if other.name != "notes":
            shutil.rmtree(other) if other.is_dir() else other.unlink()


def tensor_digests(folder: Path) -> dict[str, str]:
    """Name -> type, shape and SHA-256 of the bytes, of all tensors of a Hugging Face folder."""
    tensors = {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}
    return {
        name: f"{t.dtype} {list(t.shape)} {hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest()}"
        for name, t in sorted(tensors.items())
    }


def amounts(plan: Path) -> list[dict[str, Any]]:
    """Of each source of plan.json: what there is and what is read."""
    keys = ("name", "documents", "tokens", "longest_document", "tokens_read", "parts_read", "trained_tokens")
    return [{key: source[key] for key in keys} for source in json.loads(plan.read_text())["sources"]]


def main() -> int:
    if (FOLDER / "runs").exists():
        print("error: runs/ exists, and nothing is written over", file=sys.stderr)
        return 1
    write_texts(random.Random(0))
    write_model()
    write_corpus()
    recorded = FOLDER / "recorded"
    recorded.mkdir()
    for name in ("first", "second", "chat"):
        train(FOLDER, f"{name}.toml", *(["--checkpoint.enable", "False"] if name == "chat" else []))
        write_lines(recorded / f"{name}.jsonl", metrics(FOLDER / f"runs/{name}/metrics.jsonl"))
        plan = amounts(FOLDER / f"runs/{name}/plan.json")
        (recorded / f"{name}.plan.json").write_text(json.dumps(plan, indent=1) + "\n")
    convert = (REPOSITORY / "scripts/convert.py", "runs/first/checkpoint/step-6", "runs/export", "--to", "huggingface")
    run(FOLDER, *convert, "--assets", "model")
    (recorded / "export.json").write_text(json.dumps(tensor_digests(FOLDER / "runs/export"), indent=1) + "\n")
    for name in ("second", "chat", "export"):
        shutil.rmtree(FOLDER / "runs" / name)
    shutil.rmtree(FOLDER / "cache")
    for file in (FOLDER / "runs/first").iterdir():
        if file.name != "checkpoint":
            shutil.rmtree(file) if file.is_dir() else file.unlink()
    MACHINE.write_text(json.dumps(machine(), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
