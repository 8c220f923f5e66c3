"""Loss by position against a plain oracle: all logits at once, through an explicit mask or one document at a time."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist

from tests.unit.extensions.evaluation.full_logits import losses_of_all_logits
from torchtitan.components.checkpoint import Checkpointer
from torchtitan.config.schema import Checkpoint
from torchtitan.datasets.tokenizer import load_tokenizer
from torchtitan.extensions.evaluation import plots
from torchtitan.extensions.evaluation.forward import Ranks, answer_scores, document_losses
from torchtitan.extensions.evaluation.held_out_text import long_documents
from torchtitan.extensions.evaluation.loading import load
from torchtitan.extensions.evaluation.runner import check_edges, default_edges, position_losses
from torchtitan.models.rope import RopeArgs, inverse_frequencies, rope_for
from torchtitan.models.rope_scaling import (
    DynamicNTKScaling,
    GeneScaling,
    HarpeScaling,
    LongRopeScaling,
    YarnScaling,
)
from torchtitan.models.transformer import Transformer
from torchtitan.tools.errors import UserError

REPOSITORY = Path(__file__).parents[4]
TOKENIZER = REPOSITORY / "assets/tokenizer"
VOCABULARY = load_tokenizer(TOKENIZER).vocab_size


def tokens_of(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))


def token_losses(model: Transformer, tokens: torch.Tensor, rope: RopeArgs | None = None, **cut: int) -> torch.Tensor:
    return document_losses(model, Ranks(), tokens, rope, **cut)


def test_losses_are_those_of_all_logits_at_once_whatever_the_tile(model: Transformer):
    tokens = tokens_of(401)
    expected = losses_of_all_logits(model, tokens)
    assert expected.std() > 1  # a model with the same loss for all tokens would prove nothing
    whole = model.output.tile_bytes
    for tokens_in_tile in (1, 256, 10_000):
        model.output.tile_bytes = 4 * VOCABULARY * tokens_in_tile
        torch.testing.assert_close(token_losses(model, tokens), expected, rtol=1e-5, atol=1e-5)
    model.output.tile_bytes = whole
    ((logprobs, _),) = answer_scores(model, Ranks(), [tokens[:151]], [tokens[151:]])
    torch.testing.assert_close(-logprobs, expected[150:], rtol=1e-5, atol=1e-5)
    assert model.output.weight is model.tok_embeddings.weight


def test_a_reset_makes_documents_of_their_own(model: Transformer):
    tokens = tokens_of(201)
    got = token_losses(model, tokens, reset_every=64)
    # each piece with the one token after it, which is scored and not read
    expected = torch.cat([losses_of_all_logits(model, tokens[p : p + 65]) for p in range(0, 200, 64)])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    whole = token_losses(model, tokens)
    assert (got[:64] - whole[:64]).abs().max() < 1e-5 < (got[64:] - whole[64:]).abs().max()
    torch.testing.assert_close(token_losses(model, tokens, reset_every=1000), whole)


def test_the_one_engine_gives_what_transformers_gives(model: Transformer, folder: Path):
    """Full context, overlapping windows and resets, each token by a pass of its own over what it may see."""
    from transformers import AutoModelForCausalLM

    witness = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = tokens_of(61, seed=4)

    @torch.no_grad()
    def expected(first_seen: list[int]) -> torch.Tensor:
        losses = []
        for p, first in enumerate(first_seen):
            logits = witness(tokens[None, first : p + 1]).logits[0, -1]
            losses.append(-logits.log_softmax(-1)[tokens[p + 1]])
        return torch.stack(losses)

    # a window of 16 begins at 0, 8, 16, ...: token p is in the second half of the one that began 8 to 15 tokens before
    windows = [max(0, p // 8 * 8 - 8) for p in range(60)]
    for cut, first_seen in (
        ({}, [0] * 60),
        ({"window": 16}, windows),
        ({"reset_every": 16}, [p // 16 * 16 for p in range(60)]),
    ):
        torch.testing.assert_close(token_losses(model, tokens, **cut), expected(first_seen), rtol=1e-4, atol=1e-4)
    window, reset = token_losses(model, tokens, window=16), token_losses(model, tokens, reset_every=16)
    assert (window - reset).abs().max() > 0.1, "they are not the same thing"


def test_ranges_are_means_over_the_positions_of_all_documents(model: Transformer):
    documents = [tokens_of(101, 1), tokens_of(101, 2), tokens_of(61, 3)]
    found = position_losses(model, Ranks(), documents, (0, 10, 64, 100))
    losses = [losses_of_all_logits(model, tokens) for tokens in documents]
    for i, (begin, end) in enumerate(((0, 10), (10, 64), (64, 100))):
        here = torch.cat([x[begin:end] for x in losses])
        assert found["count"][i] == len(here) and found["nll"][i] == pytest.approx(float(here.mean()), abs=1e-5)
    assert found["mean_nll"] == pytest.approx(float(torch.cat(losses).mean()), abs=1e-5)
    # tokens beyond the last edge are left out
    cut = position_losses(model, Ranks(), documents[:1], (0, 10, 64))
    assert cut["count"] == [10, 54] and cut["nll"][1] == pytest.approx(float(losses[0][10:64].mean()), abs=1e-5)


def test_edges():
    assert default_edges(300) == (0, 300)
    assert default_edges(2048) == (0, 512, 1024, 2048)
    assert default_edges(2500) == (0, 512, 1024, 2048, 2500)
    assert check_edges([100, 2048], 2500) == (0, 100, 2048, 2500)
    for wrong in ([100, 50], [3000], [-1]):
        with pytest.raises(UserError, match="must ascend"):
            check_edges(wrong, 2500)


def test_the_rope_of_a_call_replaces_the_models(model: Transformer):
    tokens = tokens_of(101)
    yarn = RopeArgs(100.0, YarnScaling(4.0, 64, 2.0, 0.5))
    losses = token_losses(model, tokens, yarn)
    torch.testing.assert_close(losses, losses_of_all_logits(model, tokens, yarn), rtol=1e-5, atol=1e-5)
    assert (losses - token_losses(model, tokens)).abs().max() > 1e-3
    assert model.args.rope.scaling is None


def test_long_and_short_lists_and_factors_by_the_length():
    long, short = (4.0, 3.0, 3.0, 8.0), (1.0, 1.0, 1.5, 2.0)
    rope = RopeArgs(100.0, LongRopeScaling(64, long, short, 1.25))
    beyond = inverse_frequencies(rope_for(rope, 65), 8)[1]
    within = inverse_frequencies(rope_for(rope, 64), 8)[1]
    plain = inverse_frequencies(RopeArgs(100.0), 8)
    torch.testing.assert_close(beyond, plain / torch.tensor(long).double())
    torch.testing.assert_close(within, plain / torch.tensor(short).double())
    gene = RopeArgs(100.0, GeneScaling(4.0, 64))
    assert [rope_for(gene, n).scaling.factor for n in (10, 256, 257, 1024)] == [4, 4, 5, 16]
    dynamic = RopeArgs(100.0, DynamicNTKScaling(2.0, 64))
    assert inverse_frequencies(rope_for(dynamic, 64), 8).equal(plain)
    assert inverse_frequencies(rope_for(dynamic, 256), 8)[-1] < plain[-1] / 4


def checkpoint(model: Transformer, folder: Path, tokenizer: str) -> Path:
    """Makes a run's dump folder with one checkpoint, and returns the checkpoint."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        checkpointer = Checkpointer(Checkpoint(), folder)
        checkpointer.prepare()
        state = {"model": {n: p.detach() for n, p in model.named_parameters()}, "optimizer": {"x": torch.ones(3)}}
        architecture = json.loads(json.dumps(asdict(model.args)))
        checkpointer.save(state, {"step": 3, "architecture": architecture, "tokenizer": tokenizer})
        checkpointer.wait()
    finally:
        dist.destroy_process_group()
    (folder / "config.toml").write_text(f'[model]\nhf_assets_path = "{TOKENIZER}"\n')
    return checkpointer.folder / "step-3"


@pytest.mark.parametrize(
    "scaling",
    [None, YarnScaling(4.0, 64), LongRopeScaling(64, (4.0,) * 4, (1.0,) * 4, 1.0), HarpeScaling((100.0, 50.0))],
    ids=lambda s: s.rope_type if s else "plain",
)
def test_a_checkpoint_is_evaluated_as_the_model_that_was_saved(model: Transformer, scaling, tmp_path: Path):
    saved = Transformer(replace(model.args, rope=replace(model.args.rope, scaling=scaling)))
    saved.load_state_dict(model.state_dict())
    folder = checkpoint(saved, tmp_path / "run", load_tokenizer(TOKENIZER).fingerprint)
    loaded = load(folder, "float32")
    tokens = tokens_of(101)
    assert loaded.model.args == saved.args
    assert token_losses(loaded.model, tokens).equal(token_losses(saved, tokens))
    assert loaded.tokenizer.vocab_size == VOCABULARY


def test_a_folder_that_cannot_be_evaluated_is_refused(model: Transformer, tmp_path: Path):
    folder = checkpoint(model, tmp_path / "run", "another")
    with pytest.raises(UserError, match="was trained with the tokenizer another"):
        load(folder)
    with pytest.raises(UserError, match="it holds step-3: name one of these"):
        load(folder.parent)
    with pytest.raises(UserError, match="is not a folder"):
        load(tmp_path / "nowhere")
    next(folder.glob("*.distcp")).write_bytes(b"x")
    with pytest.raises(UserError, match="is damaged"):
        load(folder)


def test_long_documents_are_cut_and_short_ones_left_out(tmp_path: Path):
    tokenizer = load_tokenizer(TOKENIZER)
    texts = ["word " * 50, "a longer text " * 200, "another long text " * 200]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    (tmp_path / "one.txt").write_text(texts[1])
    found = long_documents([tmp_path / "t.jsonl", tmp_path / "one.txt"], tokenizer, 200, 16)
    expected = [torch.tensor(tokenizer.encode(t)[:200]) for t in (texts[1], texts[2], texts[1])]
    assert len(found) == 3 and all(a.equal(b) for a, b in zip(found, expected))
    assert len(long_documents([tmp_path], tokenizer, 200, 2)) == 2
    with_bos = long_documents([tmp_path / "one.txt"], tokenizer, 200, 1, add_bos=True)[0]
    assert with_bos[0] == tokenizer.bos_id and with_bos[1:].equal(expected[0][:-1])
    with pytest.raises(UserError, match="None of the 4 documents of --text has 99,999 tokens"):
        long_documents([tmp_path], tokenizer, 99_999, 16)


def test_tokenized_rows_of_others_are_read_without_their_padding(tmp_path: Path):
    rows = {"input_ids": [[7, 7, *range(9), 7]] * 2, "attention_mask": [[0, 0] + [1] * 9 + [0]] * 2}
    pq.write_table(pa.table(rows | {"labels": [[-100] * 8 + [6, 7, 8, -100]] * 2}), tmp_path / "rows.parquet")
    found = long_documents([tmp_path / "rows.parquet"], load_tokenizer(TOKENIZER), 9, 16)
    assert [ids.tolist() for ids in found] == [list(range(9))] * 2


def test_the_command_line_measures_writes_and_draws(model: Transformer, folder: Path, script, tmp_path: Path, capsys):
    run = script("loss_by_position").main
    text = tmp_path / "book.txt"
    text.write_text("It was a bright cold day in April. " * 60)
    what = ["--model", str(folder), "--text", str(text), "--length", "200", "--dtype", "float32", "--edges", "64"]
    plain, yarn, picture = (tmp_path / name for name in ("plain.json", "yarn.json", "both.png"))
    assert run([*what, "--windows", "64", "--reset", "64", "--out", str(plain)]) == 0
    result = json.loads(plain.read_text())
    tokens = torch.tensor(load_tokenizer(TOKENIZER).encode(text.read_text()))[:201]
    losses = losses_of_all_logits(model, tokens)
    assert result["curves"][0]["nll"] == pytest.approx([float(losses[:64].mean()), float(losses[64:].mean())], abs=1e-5)
    full, window, reset = result["curves"]
    assert [(c["window"], c["reset_every"]) for c in (full, window, reset)] == [(None, None), (64, None), (None, 64)]
    assert window["count"] == reset["count"] == [64, 136] and window["nll"][1] != reset["nll"][1]
    cold = torch.cat([losses_of_all_logits(model, tokens[p : p + 65]) for p in range(0, 200, 64)])
    assert reset["nll"] == pytest.approx([float(cold[:64].mean()), float(cold[64:].mean())], abs=1e-5)
    said = capsys.readouterr().out
    assert f"{full['mean_nll']:.4f}" in said and "window 64 nats" in said and "reset 64 nats" in said
    scaled = ["--rope.type", "yarn", "--rope.factor", "4", "--rope.original_max_position_embeddings", "64"]
    assert run([*what, *scaled, "--out", str(yarn)]) == 0
    expected = losses_of_all_logits(model, tokens, RopeArgs(100.0, YarnScaling(4.0, 64)))
    assert json.loads(yarn.read_text())["curves"][0]["mean_nll"] == pytest.approx(float(expected.mean()), abs=1e-5)
    assert run(["--draw", str(plain), str(yarn), "--plot", str(picture)]) == 0
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_one_cut_is_not_drawn_as_the_other(script, tmp_path: Path, monkeypatch):
    """Results older than --reset have "window" for a reset."""
    common = {"label": "x", "edges": [0, 8], "length": 8, "trained_length": None}
    old = [{"window": None, "nll": [1.0]}, {"window": 64, "nll": [2.0]}]
    new = [{"window": 64, "reset_every": None, "nll": [1.0]}, {"window": None, "reset_every": 64, "nll": [None]}]
    labels = {}
    for name, curves in (("old", old), ("new", new)):
        (tmp_path / name).write_text(json.dumps(common | {"curves": curves}))
        result = script("loss_by_position").read_result(tmp_path / name)
        monkeypatch.setattr(plots, "save", lambda figure, path: labels.update({path: figure.axes[0].get_legend()}))
        plots.draw_positions([result], name)
        labels[name] = [text.get_text() for text in labels[name].get_texts()]
    gains = [
        {"window": 64, "edges": [0, 8], "nll_cut": [2.0]},
        {"window": 64, "stride": 32, "edges": [0, 8], "nll_cut": [2.0]},
    ]
    text = {"edges": [0, 8], "nll": [1.0], "gains_of_context": gains}
    figure = plots.position_figure({"label": "", "perplexity": {"x": text}})
    lines = [(line.get_label(), line.get_linestyle()) for line in figure.axes[0].get_lines()]
    assert lines == [("x", "-"), ("x, reset every 64", ":"), ("x, within 64", "--")]
    assert labels == {"old": ["x", "x, reset every 64"], "new": ["x, within 64", "x, reset every 64"]}


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--length", "10"], "--model is not given"),
        (["--model", "nowhere", "--text", "t.txt", "--length", "10"], "nowhere is not a folder"),
        (["--model", "m", "--text", "t.txt", "--length", "0"], "--length = 0 must be at least 1"),
        (["--model", "m", "--text", "t.txt", "--length", "9", "--edges", "20"], "--edges 20 must ascend"),
        (["--model", "m", "--text", "t.txt", "--length", "9", "--rope.type", "yarn"], "needs rope.factor"),
        (["--training.steps", "5"], "--training.steps is not known"),
        (["--draw", "nowhere.json", "--plot", "x.png"], "nowhere.json cannot be read"),
        (["--length", "10", "--out", "nowhere/x.json"], "nowhere/x.json cannot be written"),
    ],
)
def test_what_the_user_has_wrong_is_one_line(flags, says, script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert script("loss_by_position").main(flags) == 1
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
