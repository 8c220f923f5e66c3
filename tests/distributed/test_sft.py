"""A stage of conversations and plain text: the loss is the contract's, under every layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lm_eval.api.instance import Instance

from tests.distributed.harness import TINY, flags, run_stage, spawn, write_assets
from torchtitan.attention.segments import Segments
from torchtitan.config import load_config
from torchtitan.datasets.tokenizer import load_tokenizer
from torchtitan.extensions.convert.export import write_hugging_face
from torchtitan.extensions.convert.weights import open_checkpoint
from torchtitan.extensions.evaluation.command_line import begins_with_bos
from torchtitan.extensions.evaluation.forward import Ranks
from torchtitan.extensions.evaluation.lm_eval_model import TorchtitanLM
from torchtitan.extensions.evaluation.loading import inspect_model, load
from torchtitan.extensions.wiring import inputs_of
from torchtitan.models.transformer import Transformer, init_weights

TEMPLATE = (
    "{% for m in messages %}{{ '<|begin_of_text|>' + m.role + '\\n' + m.content + '<|end_of_text|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|begin_of_text|>assistant\\n' }}{% endif %}"
)
SHARD, CONTEXT, TENSOR = (
    f"parallelism__{n}_degree" for n in ("data_parallel_shard", "context_parallel", "tensor_parallel")
)
LAYOUTS: list[dict[str, Any]] = [{SHARD: 2}, {CONTEXT: 2}, {TENSOR: 2}]


def arguments(folder: Path) -> list[str]:
    """The tiny stage with a second source: conversations of 1 to 3 turns, two thirds of the tokens."""
    assets = write_assets(folder)
    (assets / "chat_template.jinja").write_text(TEMPLATE)
    random = np.random.default_rng(0)
    words = ["red", "green", "blue", "stone", "river", "house", "bird"]
    with (folder / "chat.jsonl").open("w") as file:
        for _ in range(80):
            roles = ["user", "assistant"] * int(random.integers(1, 4))
            said = [{"role": r, "content": " ".join(random.choice(words, random.integers(1, 9)))} for r in roles]
            file.write(json.dumps({"messages": said}) + "\n")
    args = flags(folder, assets)
    with (folder / "stage.toml").open("a") as file:
        file.write(
            f'[[data.sources]]\nname = "chat"\npath = "{folder}/chat.jsonl"\nweight = 2.0\n'
            'messages_field = "messages"\nlong_document = "truncate"\n'
        )
    return args


def loss_by_hand(args: list[str]) -> float:
    """Of the first step: each document of its rows by itself, masked by what the tokens say."""
    config = load_config(args)
    inputs = inputs_of(config, 1)
    model = Transformer(inputs.args, "dense")
    init_weights(model, config.training.seed)
    opener = [0, *inputs.tokenizer.encode("assistant\n")]
    total = torch.zeros((), dtype=torch.float64)
    count = 0
    for slot in range(inputs.plan.rows_per_step):
        row = inputs.plan.row(0, slot)
        for source, document, start, length in zip(row.sources, row.documents, row.starts, row.lengths):
            ids = inputs.plan.corpora[source].document(int(document))[start : start + length].tolist()
            trained = [source == 0] * length
            at = 0
            while source == 1 and at < length:
                at += 1
                if ids[at - len(opener) : at] == opener and at >= len(opener):
                    while at < length:
                        trained[at] = True
                        at += 1
                        if ids[at - 1] == 1:
                            break
            labels = torch.tensor([t if keep else -100 for t, keep in zip(ids, trained)])[1:]
            if length < 2 or not (labels >= 0).any():
                continue
            with torch.no_grad():
                logits = model(
                    torch.tensor(ids[:-1]), torch.arange(length - 1), Segments.whole(np.array([0, length - 1]))
                )
            total += F.cross_entropy(logits.double(), labels, reduction="sum")
            count += int((labels >= 0).sum())
    return float(total) / count


def test_every_layout_gives_the_loss_on_responses_and_text(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    (alone,) = spawn(1, run_stage, [args], tmp_path)
    assert alone[0]["loss"] == pytest.approx(loss_by_hand(args), rel=1e-5)
    assert set(alone[0]["loss_by_source"]) == {"text", "chat"}
    cases = [args + [f"--{k.replace('__', '.')}={v}" for k, v in layout.items()] for layout in LAYOUTS]
    for numbers in spawn(2, run_stage, cases, tmp_path):
        for step, reference in zip(numbers, alone, strict=True):
            for key in ("loss", "grad_norm"):
                assert step[key] == pytest.approx(reference[key], rel=1e-5)


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def base_model(folder: Path) -> Path:
    """A base model's folder: its files name EOS alone as the end of a text. Its weights make each token follow from the
    one before: after a line break it says "Yes." and <|im_end|>, and then the same again and again."""
    from transformers import LlamaConfig, LlamaForCausalLM

    assets = write_assets(folder)
    content = json.loads((assets / "tokenizer.json").read_text())
    for number, token in enumerate(("<|im_start|>", "<|im_end|>"), 4096):
        content["added_tokens"].append(content["added_tokens"][0] | {"id": number, "content": token})
    (assets / "tokenizer.json").write_text(json.dumps(content))
    (assets / "chat_template.jinja").write_text(CHATML)
    config = TINY | {"vocab_size": 4098, "max_position_embeddings": 128}
    model = LlamaForCausalLM(LlamaConfig(**config, bos_token_id=0, eos_token_id=1))
    tokenizer = load_tokenizer(assets)
    (line,) = tokenizer.encode("\n")
    said = [line, *tokenizer.encode_continuation("Yes."), 4097]
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.normal_(generator=torch.Generator().manual_seed(0))
        model.lm_head.weight.zero_()
        for before, after in zip(said, [*said[1:], line]):
            model.lm_head.weight[after] += model.model.embed_tokens.weight[before]
    model.save_pretrained(assets)
    return assets


def test_an_export_stops_by_itself(tmp_path: Path) -> None:
    """After a stage of conversations, and after a later stage of plain text: in transformers, which goes by the files
    of the export, and in ours, from the export and from the checkpoint."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assets = base_model(tmp_path)
    talks = [[{"role": "user", "content": f"Is {n} even?"}, {"role": "assistant", "content": "No."}] for n in range(40)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    args = flags(tmp_path, assets)
    stage, source = (tmp_path / "stage.toml").read_text().split("[[data.sources]]")
    chat = f'name = "chat"\npath = "{tmp_path}/chat.jsonl"\nmessages_field = "messages"\nlong_document = "drop"\n'
    args += ["--checkpoint.enable", "--checkpoint.last_save_in_hf", "--training.steps", "1"]
    args += ["--lr_scheduler.warmup_steps", "0", "--optimizer.lr", "1e-4"]
    checkpoints, cases = [tmp_path / f"{name}/checkpoint/step-1" for name in ("chat", "text")], []
    starts = [["--checkpoint.initial_load_in_hf"], ["--checkpoint.initial_load_path", str(checkpoints[0])]]
    for checkpoint, of_source, start in zip(checkpoints, (chat, source), starts):
        toml = tmp_path / f"{checkpoint.parts[-3]}.toml"
        toml.write_text(f"{stage}[[data.sources]]\n{of_source}")
        cases.append(["--job.config_file", str(toml), *args[2:], *start])
        cases[-1] += ["--job.dump_folder", str(checkpoint.parents[1])]
    spawn(1, run_stage, cases, tmp_path)
    question = [{"role": "user", "content": "Is 4 even?"}]
    for checkpoint in checkpoints:
        export = checkpoint.parents[1] / "export/step-1"
        assert json.loads((export / "generation_config.json").read_text())["eos_token_id"] == [1, 4097]
        model, tokenizer = AutoModelForCausalLM.from_pretrained(export), AutoTokenizer.from_pretrained(export)
        asked = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")
        written = model.generate(**asked, max_new_tokens=20, do_sample=False, pad_token_id=2)
        answer = tokenizer.decode(written[0, asked["input_ids"].shape[1] :])
        assert answer == "Yes.<|im_end|>"
        # the documents of plain text began with BOS, which this tokenizer does not add by itself
        assert begins_with_bos(export) == (checkpoint == checkpoints[1]), "the first stage had no plain text"
        assert begins_with_bos(checkpoint), "as data.add_bos says"
        assert tokenizer("<|begin_of_text|>A text")["input_ids"] == [0, *tokenizer("A text")["input_ids"]]
        again = checkpoint.parents[1] / "converted"
        write_hugging_face(open_checkpoint(checkpoint), again, assets)
        assert (again / "generation_config.json").read_text() == (export / "generation_config.json").read_text()
        for folder in (export, checkpoint):
            on_disk = inspect_model(folder, load_config(cases[0]), 64)
            loaded = load(folder, "float32", tokenizer_folder=assets)
            lm = TorchtitanLM(loaded.model, Ranks(), on_disk.tokenizer, 64, silent=True, ends=on_disk.ends_of_turn)
            request = (lm.apply_chat_template(question), {"until": [], "max_gen_toks": 20})
            assert lm.generate_until([Instance("generate_until", {}, request, 0, ("t", 0, 1))]) == ["Yes."]
