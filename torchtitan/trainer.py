"""The Trainer: builds the parts of a stage from its JobConfig, and does one training step.

The whole configuration is seen here, in train.py and inputs.py, by config/ and by
distributed/parallelize.py; every other part gets what it needs as arguments.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from torchtitan.attention.backends import choose_backend
from torchtitan.components.bad_loss import BadLossError, BadLossPolicy
from torchtitan.components.checkpoint import (
    Checkpointer,
    damage_of_all,
    load,
    random_state,
    saved_parts,
    set_random_state,
)
from torchtitan.components.lineage import differences, flat, shown
from torchtitan.components.loss import position_bucket, train_micro_batch
from torchtitan.components.lr_scheduler import lr_factor
from torchtitan.components.manifest import digest, export_folder, read_manifest, results_file
from torchtitan.components.metrics import MetricsLogger, duration, log_step
from torchtitan.components.optimizer import build_optimizer, clip_gradients, optimizer_state
from torchtitan.components.setup import StageInputs
from torchtitan.components.start import Start
from torchtitan.components.step_timing import StepTiming
from torchtitan.config import JobConfig, as_tables, dump_toml
from torchtitan.config.checks import accumulation_steps, resolve_shard_degree
from torchtitan.datasets.loader import build_loader
from torchtitan.distributed.context_parallel.shard import LocalBatch, shard
from torchtitan.distributed.fully_shard import reduce_over_replicas
from torchtitan.distributed.options.quantize import describe_quantize
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.distributed.parallelize import build_sharded_model
from torchtitan.distributed.self_check import run_self_check
from torchtitan.extensions.cluster.gates import Gates
from torchtitan.extensions.cluster.health import Heartbeat, StackDumps, Stragglers, who_answers
from torchtitan.extensions.cluster.node_check import NodeCheck
from torchtitan.extensions.cluster.profiling import Profiler
from torchtitan.extensions.cluster.progress import ProgressBar
from torchtitan.extensions.convert.export import export, publish
from torchtitan.extensions.evaluation.checks import is_asked_for
from torchtitan.extensions.evaluation.forward import Ranks
from torchtitan.extensions.evaluation.hook import StageEvaluation
from torchtitan.extensions.planner.data_report import DataReport
from torchtitan.extensions.planner.host_memory import HostMemoryCheck
from torchtitan.models.architecture import as_json
from torchtitan.models.hf.weights import load_weights
from torchtitan.models.rope import RopeArgs
from torchtitan.models.rope_config import describe_rope, rope_warnings
from torchtitan.models.rope_scaling import GeneScaling
from torchtitan.models.transformer import init_weights, parameter_counts
from torchtitan.models.work import Recomputed, Work, forward_flops, recomputed_by, training_flops, work_of
from torchtitan.tools.constants import IGNORED_LABEL
from torchtitan.tools.device import (
    GarbageCollection,
    host_name,
    init_process_group,
    make_deterministic,
    peak_flops,
    peak_memory_gib,
    pick_device,
    record_collectives,
)
from torchtitan.tools.errors import UserError
from torchtitan.tools.folders import put_aside
from torchtitan.tools.logging import logger
from torchtitan.tools.torch_compat import compilations, default_store, set_timeout


class Trainer:
    """The running stage: model, optimizer, data, checkpoints, and the counters step and tokens_seen."""

    def __init__(self, config: JobConfig, inputs: StageInputs, rank: int, local_rank: int, world_size: int):
        self.config, self.inputs, self.rank = config, inputs, rank
        self.dump_folder = Path(config.job.dump_folder)
        self.device = pick_device(local_rank)
        if self.device.type == "cuda" and config.comm.trace_buf_size:
            record_collectives(self.dump_folder / config.comm.save_traces_folder, config.comm.trace_buf_size)
        init_process_group(self.device, rank, world_size, config.comm.init_timeout_seconds)
        p, t = config.parallelism, config.training
        self.dims = ParallelDims.build(
            self.device.type,
            p.data_parallel_replicate_degree,
            resolve_shard_degree(config, world_size),
            p.context_parallel_degree,
            p.tensor_parallel_degree,
        )
        self.cpu_group = dist.new_group(backend="gloo")  # for counters: no stream of the GPU waits for them
        self._check_agreed()
        self.world_size = world_size
        self.hosts = [""] * world_size
        dist.all_gather_object(self.hosts, host_name(), self.cpu_group)
        self.hooks = (NodeCheck(), Heartbeat(), StackDumps(), Stragglers(), ProgressBar(), Profiler(), Gates())
        self._call("configured")
        torch.manual_seed(t.seed)
        if t.deterministic:
            make_deterministic()
        self.garbage_collection = GarbageCollection(t.gc_freq)

        self.accumulation = accumulation_steps(config, world_size)
        if p.self_check and world_size > 1:
            run_self_check(
                inputs.args, config, self.dims, self.device, self.cpu_group, self.accumulation, train_micro_batch
            )
        HostMemoryCheck().configured(self)
        self.evaluation = self._prepared_evaluation()
        self.model = build_sharded_model(inputs.args, config, self.dims, self.device)
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.work = work_of(inputs.args)
        self.recomputed = recomputed_by(config, inputs.args)
        self.step = self.tokens_seen = 0
        self.stop_requested = False
        self.compiled_in_first_step = 0
        self.losses = BadLossPolicy(t)
        self.checkpointer = Checkpointer(config.checkpoint, self.dump_folder) if config.checkpoint.enable else None
        self._load()
        if rank == 0 and (self.step == 0 or config.checkpoint.load_step >= 0):
            # what is there is not of this run, and would pass for its own
            for folder in (results_file(config, 0).parent, export_folder(config, 0).parent):
                if aside := put_aside(folder, self.step or -1):
                    logger.info(f"what an earlier run left in {folder} is in {aside} now")
        loader = build_loader(
            inputs.plan,
            dp_rank=self.dims.dp_rank,
            dp_degree=self.dims.dp_degree,
            local_batch_size=t.local_batch_size,
            start_step=self.step,
            num_workers=config.data.num_workers,
            pin_memory=self.device.type == "cuda",
            finish=partial(
                shard,
                backend=choose_backend(config.model.attention_backend, self.device.type),
                layout=p.context_parallel_layout,
                exchange=p.context_parallel_exchange,
                cp=p.context_parallel_degree,
                rank=self.dims.cp_rank,
                sliding_window=inputs.args.sliding_window,
                sliding_share=inputs.args.sliding_share,
            ),
        )
        self.batches: Iterator[LocalBatch] = iter(loader)
        self.timing = StepTiming()
        self.metrics: MetricsLogger | None = None
        if rank == 0:
            self._write_inputs()
            keep_going = config.checkpoint.on_failed_save == "go_on"
            self.metrics = MetricsLogger(
                config.metrics, self.dump_folder, config.stage.name, asdict(config), self.step, keep_going
            )

    def _check_agreed(self) -> None:
        """Collective. UserError unless all ranks have made the same plan, model and start: each has read the files for
        itself, and those may lie on local disks, or have changed in between."""
        start = self.inputs.start
        mine = {
            "the plan of the data": self.inputs.plan.fingerprint,
            "the start": str(start.path) if start else None,
            "the start's manifest": digest(start.manifest) if start and start.manifest else None,
            **flat(as_json(self.inputs.args)),
        }
        all_of_them: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(all_of_them, mine, self.cpu_group)
        for what, value in all_of_them[0].items():
            others = [rank for rank, theirs in enumerate(all_of_them) if theirs[what] != value]
            if others:
                raise UserError(
                    f"The ranks do not agree on {what}: rank 0 has {shown(value)}, rank {others[0]} "
                    f"{shown(all_of_them[others[0]][what])} ({len(others)} of {len(all_of_them)} differ from rank 0). "
                    "They must see the same files: data, cache, assets and checkpoints on a shared file system, or the "
                    "same on every node; and nothing may change there while they start."
                )

    def _write_inputs(self) -> None:
        self.dump_folder.mkdir(parents=True, exist_ok=True)
        (self.dump_folder / "config.toml").write_text(dump_toml(self.config))
        total = parameter_counts(self.inputs.args)[0]
        sizes = ", ".join(f"{name} {self.dims.size(name)}" for name in ("dp_replicate", "dp_shard", "cp", "tp"))
        logger.info(f"stage {self.config.stage.name}: {self.config.job.description}".rstrip(": "))
        rope, head_dim = self.inputs.args.rope, self.inputs.args.head_dim
        length = self.config.data.target_seq_len or self.config.training.seq_len
        logger.info(f"RoPE: {describe_rope(rope)}")
        for warning in rope_warnings(rope, head_dim, length):
            logger.warning(warning)
        quantize = self.config.quantize
        if quantize.recipe_name != "none":
            logger.info(describe_quantize(self.inputs.args, quantize, self.dims.size("tp")))
        logger.info(f"model {self.config.model.flavor}: {total / 1e6:,.1f}M parameters on {self.device.type}; {sizes}")
        DataReport().started(self)

    def _prepared_evaluation(self) -> StageEvaluation | None:
        """What [evaluation] asks for, its texts read; None if nothing."""
        config, p = self.config, self.config.parallelism
        if not is_asked_for(config):
            return None
        backend = choose_backend(config.model.attention_backend, self.device.type)
        layout, exchange = p.context_parallel_layout, p.context_parallel_exchange
        ranks = Ranks.of(self.dims, self.device, backend, layout, exchange, self.cpu_group)
        return StageEvaluation(config, self.inputs.tokenizer, self.inputs.args, ranks, self.rank)

    # ---- state ------------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, dict[str, torch.Tensor]]:
        return {
            "model": {name: param.detach() for name, param in self.model.named_parameters()},
            "optimizer": optimizer_state(self.model, self.optimizer),
            "rng": random_state(),
        }

    def _load(self) -> None:
        """Resume from the newest complete checkpoint, else start from Hugging Face weights or from scratch."""
        path = None
        if self.checkpointer:
            self.checkpointer.prepare()
            path = self.checkpointer.find()
        if path and self.checkpointer:
            state = self._state()
            load(path, state, self.checkpointer.group)
            set_random_state(state["rng"])
            manifest = read_manifest(path)
            self.step, self.tokens_seen = manifest["step"], manifest["tokens_seen"]
            self.losses.load(manifest.get("watch", {}))
            logger.info(f"resumed from {path}")
        elif self.inputs.start:
            self._start_from(self.inputs.start)
        elif self.config.checkpoint.initial_load_in_hf:
            load_weights(self.model, Path(self.config.model.hf_assets_path))
            logger.info(f"weights from {self.config.model.hf_assets_path}")
        else:
            init_weights(self.model, self.config.training.seed)

    def _start_from(self, start: Start) -> None:
        """Collective. The parts of the stage before (or of a checkpoint from elsewhere), and what changes from it."""
        if start.manifest is None:
            load_weights(self.model, start.path)
            logger.info(f"weights from {start.path}")
            return
        group = self.checkpointer.group if self.checkpointer else self.cpu_group
        if damage := damage_of_all(start.path, group):
            raise UserError(f"{start.path}, which this run would start from, is damaged: {damage}")
        parts = saved_parts(start.path)
        taken = [part for part in start.parts if part in parts]
        state = self._state()
        load(start.path, {part: state[part] for part in taken}, group)
        name, left = start.manifest["stage"], [part for part in ("model", "optimizer") if part not in taken]
        logger.info(
            f"{' and '.join(taken)} from {start.path}: stage {name}, step {start.manifest['step']}, "
            f"{start.manifest['tokens_seen']:,} tokens" + (f"; {', '.join(left)} anew" if left else "")
        )
        logger.info(f"what changes from stage {name} to {self.config.stage.name}:")
        for line in differences(start.manifest, as_tables(self.config), as_json(self.inputs.args)):
            logger.info(f"  {line}")

    def save(self, last: bool = False) -> bool:
        """Collective. Save the state after self.step; False if that failed and the run goes on. last: of the run."""
        assert self.checkpointer
        self.pause("saving")
        manifest = {
            "step": self.step,
            "tokens_seen": self.tokens_seen,
            "stage": self.config.stage.name,
            "stages_before": self.inputs.stages_before,
            "rope_before": as_json(self.inputs.rope_before) if self.inputs.rope_before else None,
            "config": as_tables(self.config),
            "architecture": as_json(self.inputs.args),
            "tokenizer": self.inputs.tokenizer.fingerprint,
            "seq_len": self.config.training.seq_len,
            "plan": self.inputs.plan.inputs,
            "world_size": dist.get_world_size(),
            "watch": self.losses.state(),
        }
        return self.checkpointer.save(self._state(), manifest, last)

    # ---- training ---------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Steps until training.steps, or until some rank has been asked to stop; saves at intervals and at the end."""
        config, steps = self.config, self.config.training.steps
        start, saved_at, first_step = time.perf_counter(), self.step, self.step + 1
        if self.step >= steps:
            logger.info(f"nothing to do: step {self.step} of {steps} is done")
        self._call("started")
        if self._evaluate():
            torch.compiler.reset()  # else the stage's own lengths would be seen as changed ones: see self_check.py
        window, recent, skipped = Window(), deque[float](maxlen=20), len(self.losses.skipped)
        while self.step < steps:
            self._call("before_step")
            try:
                numbers = self.train_step(window)
            except BadLossError:  # on all ranks at once: what is being saved in the background is sound
                if self.checkpointer:
                    self.checkpointer.wait()
                raise
            if numbers is None:
                break
            if numbers["skipped_steps"] == skipped:
                recent.append(numbers["loss"])
            skipped = numbers["skipped_steps"]
            if self.step == first_step:
                groups = [*self.dims.groups(), dist.group.WORLD, self.cpu_group]
                set_timeout(config.comm.train_timeout_seconds, groups)
                self.compiled_in_first_step = compilations()
            if self.step % config.metrics.log_freq == 0 or self.step in (first_step, steps):
                self._log(numbers, window)
                window = Window()
            if self.checkpointer:
                due = self.step % config.checkpoint.interval == 0 or self.step == steps
                if due and self.save(last=self.step == steps):
                    saved_at = self.step
                self.stop_requested |= self.checkpointer.must_stop()
            window.start += self._evaluate()
            self.garbage_collection.run(self.step)
            self._call("after_step", numbers)
        if self.step < steps:
            logger.info(f"asked to stop: ending after step {self.step} of {steps}")
            if self.checkpointer and saved_at < self.step:
                self.save(last=True)
        if self.checkpointer:
            self.pause("saving")
            self.checkpointer.wait(last=True)
        self._call("ended")
        if self.finished and self.checkpointer and config.checkpoint.last_save_in_hf:
            self._export(self.checkpointer)
        mean = f"; mean loss of the last {len(recent)} steps {sum(recent) / len(recent):.3f}" if recent else ""
        logger.info(f"ended at step {self.step} after {duration(time.perf_counter() - start)}{mean}")

    def _evaluate(self) -> float:
        """Collective. The evaluation that is due after self.step, if one is; the seconds that it took."""
        start = time.perf_counter()
        if self.evaluation is None or not self.evaluation.due(self.step):
            return 0.0
        self.pause("evaluating")
        tensorboard = self.metrics.tensorboard if self.metrics else None
        self.evaluation.run(self.model, self.step, self.tokens_seen, tensorboard)
        return time.perf_counter() - start

    @property
    def finished(self) -> bool:
        """Whether the last step of the stage has ended."""
        return self.step >= self.config.training.steps

    def pause(self, what: str) -> None:
        """Tell all hooks that this rank does something else than steps until the next one."""
        self.timing.rest()
        self._call("pausing", what)

    def _call(self, method: str, *arguments: Any) -> None:
        for hook in self.hooks:
            getattr(hook, method)(self, *arguments)

    def _export(self, checkpointer: Checkpointer) -> None:
        """Collective. The last checkpoint as a Hugging Face folder, each rank some of its files; once only."""
        out = export_folder(self.config, self.step)
        if out.exists():
            return
        config, rank, ranks = self.config, self.rank, dist.get_world_size()
        path = checkpointer.folder / f"step-{self.step}"
        assets = Path(config.model.hf_assets_path)
        dist.barrier(checkpointer.group)  # every rank has seen that it is not there
        export(path, out, config.checkpoint.export_dtype, assets, part=rank, parts=ranks)
        dist.barrier(checkpointer.group)
        if rank == 0 and ranks > 1:
            publish(out)
        logger.info(f"Hugging Face folder: {out}")

    def train_step(self, window: Window) -> dict[str, Any] | None:
        """One optimizer step over the global batch; None, and nothing done, if a rank has been asked to stop.

        The loss is the sum of token losses over the number of valid labels of the whole global batch, so it does not
        depend on how the rows are split over ranks and accumulation. Raises BadLossError before anything is changed.
        """
        asked = time.perf_counter()
        batches = list(islice(self.batches, self.accumulation))
        window.waited += time.perf_counter() - asked
        self._check_tokens(batches)
        counts_here = self.dims.counts_here
        valid = sum(batch.num_valid for batch in batches) if counts_here else 0
        counts = torch.tensor([valid, int(self.stop_requested)])
        self.timing.arrive()
        dist.all_reduce(counts, group=self.cpu_group)
        valid = int(counts[0])
        if counts[1] > 0:
            return None
        self.step += 1
        if valid == 0:
            raise UserError(
                f"No token of step {self.step} has a label: every segment of its rows is one token long, or of a "
                "conversation that was cut off before the first response."
            )

        names = self.inputs.plan.names
        token_losses_of = []
        for i, batch in enumerate(batches):
            reduce_over_replicas(self.model, i == len(batches) - 1)
            rope = self._drawn_rope(i)
            losses = train_micro_batch(self.model, batch.to(self.device), valid, rope)
            token_losses_of.append(losses)
        # only now: reading a number off the GPU waits for it
        by_source = torch.zeros(len(names), 2, dtype=torch.float64)  # loss, labels
        by_position = torch.zeros(int(position_bucket(torch.tensor(2**31))) + 1, 2, dtype=torch.float64)
        for batch, losses in zip(batches, token_losses_of, strict=True):
            counted = torch.stack((losses.double().cpu(), (batch.labels != IGNORED_LABEL).double()), dim=1)
            # padding has no loss and no label: it adds nothing to source 0
            by_source.index_add_(0, batch.source.clamp(min=0), counted)
            by_position.index_add_(0, position_bucket(batch.index), counted)
            window.add(batch, self.work, self.recomputed)
        norm = clip_gradients(self.model.parameters(), self.config.training.max_norm, self.cpu_group)
        sums = torch.cat((by_source, by_position)) * counts_here
        dist.all_reduce(sums, group=self.cpu_group)
        self.timing.release()
        by_source, by_position = sums.split([len(by_source), len(by_position)])
        loss = float(by_source[:, 0].sum()) / valid
        skipped = self._is_skipped(loss, norm)
        lr = self.config.optimizer.lr * lr_factor(self.step, self.config.training.steps, self.config.lr_scheduler)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if not skipped:
            self.optimizer.step()
        self.optimizer.zero_grad()
        tokens = self.inputs.plan.tokens_in_step(self.step - 1)
        self.tokens_seen += tokens
        window.tokens += tokens
        window.steps += 1
        return {
            "step": self.step,
            "loss": loss,
            "grad_norm": norm,
            "lr": lr,
            "tokens_seen": self.tokens_seen,
            "skipped_steps": len(self.losses.skipped),
            "loss_by_source": {
                name: float(loss_sum / n) for name, (loss_sum, n) in zip(names, by_source, strict=True) if n > 0
            },
            "loss_by_position": {
                str(2 ** (b - 1) if b else 0): float(loss_sum / n) for b, (loss_sum, n) in enumerate(by_position) if n
            },
        }

    def _is_skipped(self, loss: float, norm: float) -> bool:
        """Whether the gradients of this step are thrown away; alike on all ranks, whose numbers are the same sums."""
        rows = range(self.inputs.plan.rows_per_step)
        try:
            why = self.losses.judge(self.step, loss, norm)
        except BadLossError as e:
            raise BadLossError(f"{e}. Its rows:\n{self._described(rows)}") from None
        if why and self.rank == 0:
            logger.warning(f"step {self.step} is skipped: {why}. Its rows:\n{self._described(rows)}")
        return why is not None

    def _described(self, rows: range) -> str:
        return "\n".join(f"  row {s}: {self.inputs.plan.describe(self.step - 1, s)}" for s in rows)

    def _drawn_rope(self, micro_batch: int) -> RopeArgs | None:
        """GeNE's RoPE for a micro-batch of this step, the same on all ranks; None where nothing is drawn."""
        rope, t = self.inputs.args.rope, self.config.training
        if not isinstance(rope.scaling, GeneScaling):
            return None
        return replace(rope, scaling=rope.scaling.drawn(t.seq_len, t.seed, self.step, micro_batch))

    def _check_tokens(self, batches: list[LocalBatch]) -> None:
        """UserError for an id beyond the vocabulary: cut over tp ranks, the embedding would answer it with zeros."""
        for batch in batches:
            wrong = (batch.tokens < 0) | (batch.tokens >= self.inputs.args.vocab_size)
            if wrong.any():
                source = self.inputs.plan.names[int(batch.source[wrong][0])]
                raise UserError(
                    f"Step {self.step + 1} reads token {int(batch.tokens[wrong][0])} of source {source!r}, but the "
                    f"model's vocabulary is 0 to {self.inputs.args.vocab_size - 1}: the source was tokenized with "
                    "another tokenizer, or its files are damaged."
                )

    def _log(self, numbers: dict[str, Any], window: Window) -> None:
        """Collective. Rank 0 completes the numbers of the step with the rates since the last line, and writes them."""
        most = torch.tensor(
            [peak_memory_gib(self.device), compilations() - self.compiled_in_first_step], dtype=torch.float64
        )
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self.cpu_group)
        cp = self.dims.size("cp")
        work = torch.tensor([window.pairs_of_busiest * cp, window.pairs, window.kv_received, window.kv_of_all_gather])
        dist.all_reduce(work, group=self.cpu_group)
        self.throughput = window
        self._call("logging", numbers)
        if not self.metrics:
            return
        stragglers = numbers.pop("stragglers")
        gathered = cp > 1 and self.config.parallelism.context_parallel_exchange != "ulysses"
        seconds = time.perf_counter() - window.start
        ranks_a_row = self.dims.size("cp") * self.dims.size("tp")
        peak = peak_flops(self.device, self.config.metrics.peak_tflops)
        numbers |= {
            "tokens_per_second": window.tokens / seconds,
            "padding": 1
            - window.tokens / (window.steps * self.inputs.plan.rows_per_step * self.config.training.seq_len),
            "cp_imbalance": float(work[0] / work[1]) if cp > 1 else None,
            "cp_kv_received": float(work[2] / work[3]) if gathered else None,
            "data_wait": window.waited / seconds,
            "mfu": window.flops / ranks_a_row / seconds / peak if peak else None,
            "hfu": (window.flops + window.recomputed_flops) / ranks_a_row / seconds / peak if peak else None,
            "memory_gib": float(most[0]),
            "recompilations": int(most[1]),
            "seconds_per_step": seconds / window.steps,
            "stragglers": stragglers,
        }
        self.metrics.log(numbers)
        log_step(numbers, self.config.training.steps, seconds / window.steps)

    def who_is_missing(self) -> str:
        """After a collective has failed: the ranks that do not answer any more, in a sentence."""
        return who_answers(default_store(), self.rank, self.hosts)

    def close(self) -> None:
        """Release files, loader processes and process groups."""
        self._call("closed")
        self.batches = iter(())
        if self.metrics:
            self.metrics.close()
        dist.destroy_process_group()


class Window:
    """What has been done since the last log line, for rates."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.steps = self.tokens = 0
        """Of the global batches; padding is no token."""
        self.flops = self.recomputed_flops = self.waited = 0.0
        """Of this rank's micro-batches, like which all have about as much; seconds that it waited for its loader."""
        self.pairs = self.pairs_of_busiest = self.kv_received = self.kv_of_all_gather = 0.0
        """Of this rank's micro-batches, see LocalBatch."""

    def add(self, batch: LocalBatch, work: Work, recomputed: Recomputed) -> None:
        """Count the work of a micro-batch; padding is none."""
        self.flops += training_flops(work.parameters, batch.unpadded, work.width, batch.pairs)
        self.recomputed_flops += forward_flops(recomputed.parameters, batch.unpadded, recomputed.width, batch.pairs)
        self.pairs += batch.pairs
        self.pairs_of_busiest += batch.pairs_of_busiest
        self.kv_received += batch.kv_received
        self.kv_of_all_gather += batch.kv_of_all_gather
