"""What a stage is made of, read and checked before anything is allocated and before ranks talk to each other.

Whatever a user can have wrong is found here, so that it costs seconds and one paragraph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from torchtitan.attention.backends import choose_backend
from torchtitan.attention.varlen import check_window
from torchtitan.components.changes import flat, shown
from torchtitan.components.data_start import DataStart, data_start
from torchtitan.components.lineage import check_previous, lineage
from torchtitan.components.manifest import digest
from torchtitan.components.metrics import import_wandb
from torchtitan.components.resumed import check_resumable, own_manifest
from torchtitan.components.stage_rope import StageRope, check_stage_rope, rope_of_weights
from torchtitan.components.start import Start, check_start, find_start, hugging_face_start
from torchtitan.config import JobConfig, as_tables
from torchtitan.config.checks import rows_per_step
from torchtitan.config.data_schema import Data, Source
from torchtitan.config.schema import Training
from torchtitan.datasets.corpus import Corpus
from torchtitan.datasets.ends_of_turn import begins_with_bos, ends_of_turn, named_ends
from torchtitan.datasets.masked_documents import check_masked
from torchtitan.datasets.plan import Plan
from torchtitan.datasets.positions import sentence_end_ids
from torchtitan.datasets.tokenizer import Tokenizer, load_tokenizer
from torchtitan.distributed.options.quantize import check_quantize
from torchtitan.distributed.options.ulysses import check_ulysses
from torchtitan.distributed.parallelize import check_compile_backend
from torchtitan.distributed.tensor_parallel import check_tensor_parallel
from torchtitan.models.architecture import as_json, complete
from torchtitan.models.flavor import architecture
from torchtitan.models.hf.config_in import check_token_ids
from torchtitan.models.hf.config_out import config_json, original_config
from torchtitan.models.hf.folder import sampled_digest
from torchtitan.models.hf.weights import check_weights
from torchtitan.models.rope import RopeArgs, drawn_rope
from torchtitan.models.rope_config import build_rope, check_mixed_window
from torchtitan.models.transformer import TransformerArgs
from torchtitan.tools.device import device_type
from torchtitan.tools.errors import UserError
from torchtitan.tools.folders import make_writable


@dataclass(frozen=True)
class StageInputs:
    """What a stage is made of, read and checked without allocating a model or talking to another rank."""

    tokenizer: Tokenizer
    args: TransformerArgs
    plan: Plan
    rope: StageRope

    start: Start | None
    """What a fresh run starts from; None if there is a checkpoint to resume from, or if it starts from scratch."""

    stages_before: list[dict[str, Any]]
    """lineage() of the previous stage, the first stage first."""

    data_start: DataStart
    """Where the plan begins."""

    rope_before: RopeArgs | None = None
    """RoPE of the weights that the run starts, or started, from."""

    ends_of_turn: Sequence[int] = ()
    """Tokens that end a response, as this stage and the previous ones train it."""

    begins_with_bos: bool | None = None
    """Whether documents of plain text do, in this stage or the last one that had any; None if it is not known."""

    hugging_face_weights: str | None = None
    """Digest of the weights that the run starts from if a Hugging Face folder has them."""

    def manifest(self, config: JobConfig, step: int, tokens_seen: int) -> dict[str, Any]:
        """What a checkpoint says of itself, as JSON: all that the next stage, or this one resumed, needs to know."""
        return {
            "step": step,
            "tokens_seen": tokens_seen,
            "stage": config.stage.name,
            "stages_before": self.stages_before,
            "rope_before": as_json(self.rope_before) if self.rope_before else None,
            "config": as_tables(config),
            "architecture": as_json(self.args),
            "tokenizer": self.tokenizer.fingerprint,
            "seq_len": config.training.seq_len,
            "plan": self.plan.inputs,
            "data_changes": list(self.data_start.changes),
            "ends_of_turn": list(self.ends_of_turn),
            "begins_with_bos": self.begins_with_bos,
            "world_size": dist.get_world_size(),
        }

    def drawn_rope(self, training: Training, step: int, micro_batch: int) -> RopeArgs | None:
        """GeNE's RoPE for a micro-batch of this step, the same on all ranks; None if nothing is drawn."""
        return drawn_rope(self.args.rope, training.seq_len, training.seed, step, micro_batch)


OpenSource = Callable[[Source, Tokenizer, Data], Corpus]
"""Turns a source of [[data.sources]] into a corpus: extensions/ingest/resolve.py does, tokenizing what is text."""


def prepare_inputs(config: JobConfig, world_size: int, open_source: OpenSource) -> StageInputs:
    """UserError for everything that can be wrong with a stage whose tables have been checked."""
    assets = Path(config.model.hf_assets_path)
    tokenizer = load_tokenizer(assets)
    resumed = own_manifest(config)
    check_previous(config, resumed)
    start = None if resumed else find_start(config)
    stages_before = resumed.get("stages_before", []) if resumed else lineage(start.manifest if start else None)
    weights = start
    if config.checkpoint.initial_load_in_hf and not resumed:
        weights = hugging_face_start(assets, f"checkpoint.initial_load_in_hf = true, model.hf_assets_path = {assets}")
    rope_before = rope_of_weights(config, resumed, stages_before, weights)
    args = model_args(config, rope_before)
    if resumed:  # an older version also counted the length of the flavor's published weights
        length = complete(resumed["architecture"])["rope"]["max_position_embeddings"]
        args = replace(args, rope=replace(args.rope, max_position_embeddings=length))
    if weights:
        check_start(weights, args, tokenizer.fingerprint)
    weights_digest = None
    if weights and weights.manifest is None:
        weights_digest = sampled_digest(check_weights(weights.path, args))
    rope = check_stage_rope(config, args, rope_before, weights)
    if config.checkpoint.last_save_in_hf:
        # refuses a model that has no form there
        config_json(args, config.checkpoint.export_dtype, original_config(assets))
        check_token_ids(assets, args.vocab_size)
    _check_model(config, args, tokenizer)
    begin = data_start(config, resumed, start)
    plan = make_plan(config, world_size, tokenizer, args, open_source, begin)
    if resumed:
        check_resumable(config, resumed, args, tokenizer, plan, begin)
    if config.metrics.enable_wandb:
        import_wandb()
    make_writable("job.dump_folder", Path(config.job.dump_folder))
    if config.checkpoint.enable:
        make_writable("job.dump_folder / checkpoint.folder", Path(config.job.dump_folder) / config.checkpoint.folder)
    # nothing else knows the ends of a Hugging Face model whose weights are used with another folder's tokenizer
    before = named_ends(start.path) if start and start.manifest is None else []
    manifest = resumed or (start.manifest if start else None) or {}
    ends = ends_of_turn(plan.corpora, tokenizer, [*before, *manifest.get("ends_of_turn", [])])
    bos = begins_with_bos(plan.corpora, tokenizer.bos_id)
    bos = manifest.get("begins_with_bos") if bos is None else bos
    return StageInputs(tokenizer, args, plan, rope, start, stages_before, begin, rope_before, ends, bos, weights_digest)


def _check_model(config: JobConfig, args: TransformerArgs, tokenizer: Tokenizer) -> None:
    """UserError if the model cannot be computed in this layout, with this backend or in FP8, or lacks tokens."""
    p, assets = config.parallelism, config.model.hf_assets_path
    check_tensor_parallel(args, p.tensor_parallel_degree)
    check_ulysses(args.n_heads, p)
    if choose_backend(config.model.attention_backend, device_type()) == "varlen" and args.sliding_window is not None:
        check_window(args.sliding_window)
    if config.compile.enable:
        check_compile_backend(config.compile.backend)
    tokens = config.training.seq_len * config.training.local_batch_size // p.context_parallel_degree
    check_quantize(args, config.quantize, p.tensor_parallel_degree, tokens, config.training.mlp_tile_tokens)
    if tokenizer.vocab_size > args.vocab_size:
        model = f"{assets}/config.json" if config.model.flavor == "auto" else f'model.flavor = "{config.model.flavor}"'
        raise UserError(
            f"The tokenizer in model.hf_assets_path = {assets} has {tokenizer.vocab_size} tokens, but the model of "
            f"{model} has a vocabulary of {args.vocab_size}: they do not belong together. Name the assets of that "
            "model, or another flavor."
        )


def make_plan(
    config: JobConfig,
    world_size: int,
    tokenizer: Tokenizer,
    args: TransformerArgs,
    open_source: OpenSource,
    begin: DataStart | None = None,
) -> Plan:
    """The data plan of the stage; begin: where it begins, if its chain has read something before. UserError for a
    corpus of another tokenizer."""
    begin = begin or DataStart()
    data, cache = config.data, Path(config.data.cache_folder).expanduser()
    vocab_size, mixed = args.vocab_size, config.rope.mixed_window
    if not cache.is_dir():  # one that is there may be read-only, if it holds what is needed
        make_writable("data.cache_folder", cache)
    corpora = [open_source(source, tokenizer, data) for source in data.sources]
    for source, corpus in zip(data.sources, corpora, strict=True):
        if corpus.max_token_id is not None and corpus.max_token_id >= vocab_size:
            raise UserError(
                f'Source "{source.name}" holds token {corpus.max_token_id}, but the model\'s vocabulary ends at '
                f"{vocab_size - 1}: data.sources.path = {source.path} was made with another tokenizer."
            )
    check_masked(data, corpora, config.training.seq_len)
    return Plan(
        data,
        corpora,
        seq_len=config.training.seq_len,
        rows_per_step=rows_per_step(config, world_size),
        steps=config.training.steps,
        seed=config.training.seed,
        separators=[tokenizer.encode(source.separator) for source in data.sources],
        sentence_end_ids=sentence_end_ids(tokenizer) if data.positions == "longrecipe" else (),
        cache=cache,
        short_window=args.rope.scaling.original_max_position_embeddings if mixed else None,  # type: ignore[union-attr]
        read=[begin.read.now(corpus) for corpus in corpora],
        first_step=begin.first_step,
    )


def model_args(config: JobConfig, rope_before: RopeArgs | None = None) -> TransformerArgs:
    """The architecture that [model] names, with what [rope] changes. rope_before: of the weights it starts from; None:
    they are random."""
    args = architecture(config.model)
    length = config.data.target_seq_len or config.training.seq_len
    random = rope_before is None
    rope = build_rope(config.rope, args.rope, args.head_dim, args.n_kv_heads, length, rope_before, random)
    check_mixed_window(config.rope.mixed_window, rope)
    return replace(args, rope=rope)


def check_agreed(inputs: StageInputs, group: dist.ProcessGroup) -> None:
    """Collective. UserError unless all ranks have made the same plan, model and start.

    Each rank has read the files for itself, and those may lie on local disks, or may have changed in between.
    """
    start = inputs.start
    mine = {
        "the plan of the data": inputs.plan.fingerprint,
        "the start": str(start.path) if start else None,
        "the start's manifest": digest(start.manifest) if start and start.manifest else None,
        "the weights in the Hugging Face folder": inputs.hugging_face_weights,
        **flat(as_json(inputs.args)),
    }
    answers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(answers, mine, group)
    for what, value in answers[0].items():
        others = [rank for rank, answer in enumerate(answers) if answer[what] != value]
        if others:
            raise UserError(
                f"The ranks do not agree on {what}: rank 0 has {shown(value)}, rank {others[0]} "
                f"{shown(answers[others[0]][what])} ({len(others)} of {len(answers)} differ from rank 0). They must "
                "see the same files: data, cache, assets and checkpoints on a shared file system, or the same on every "
                "node; and nothing may change there while they start."
            )
