"""The Trainer: the loop over a stage's steps, and one training step.

It builds the parts (components/build.py) and calls the hooks (components/hooks.py); it knows no extension.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from torchtitan.components.bad_loss import BadLossError, BadLossPolicy
from torchtitan.components.build import (
    State,
    build_batches,
    build_model,
    connect,
    load_state,
    log_stage,
    open_metrics,
    shorten_timeouts,
)
from torchtitan.components.checkpoint import Checkpointer, random_state
from torchtitan.components.hooks import Hook
from torchtitan.components.loss import check_labels, check_tokens, mean_losses, sum_losses, train_micro_batch
from torchtitan.components.lr_scheduler import learning_rate
from torchtitan.components.metrics import duration, log_step
from torchtitan.components.optimizer import build_optimizer, clip_gradients, optimizer_state
from torchtitan.components.setup import StageInputs, check_agreed
from torchtitan.components.step_timing import StepTiming
from torchtitan.components.throughput import Throughput
from torchtitan.config import JobConfig
from torchtitan.distributed.fully_shard import reduce_over_replicas
from torchtitan.tools.device import GarbageCollection
from torchtitan.tools.logging import logger


class Trainer:
    """The running stage. Hooks may read these attributes, set stop_requested, and call pause():

    config, inputs (StageInputs), rank, world_size, dump_folder (Path), device, dims (ParallelDims), cpu_group (gloo,
    all ranks), hosts (the host name of each rank), model, optimizer, checkpointer (None without checkpoints), metrics
    (MetricsLogger on rank 0, else None), throughput, timing, bad_loss_policy. step: finished steps; finished: whether
    these are all. tokens_seen: tokens of the global batches so far, without padding. stop_requested: if True on any
    rank, all stop before the next step.
    """

    def __init__(
        self,
        config: JobConfig,
        inputs: StageInputs,
        rank: int,
        local_rank: int,
        world_size: int,
        hooks: Sequence[Hook] = (),
    ):
        self.config, self.inputs, self.rank, self.world_size, self.hooks = config, inputs, rank, world_size, hooks
        self.dump_folder = Path(config.job.dump_folder)
        self.step = self.tokens_seen = 0
        self.stop_requested = False
        self.device, self.dims, self.cpu_group, self.hosts = connect(config, rank, local_rank, world_size)
        check_agreed(inputs, self.cpu_group)
        try:
            self._call("configured")
            self._build()
        except BaseException:
            self._close_hooks()
            raise

    def _build(self) -> None:
        """Collective. All that is allocated or loaded."""
        config, inputs = self.config, self.inputs
        self.garbage_collection = GarbageCollection(config.training.gc_freq)
        self.accumulation, self.model = build_model(config, inputs.args, self.dims, self.device, self.cpu_group)
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.bad_loss_policy = BadLossPolicy(config.training)
        self.checkpointer = Checkpointer(config.checkpoint, self.dump_folder) if config.checkpoint.enable else None
        if manifest := load_state(config, inputs, self.model, self.state, self.checkpointer, self.cpu_group):
            self.step, self.tokens_seen = manifest["step"], manifest["tokens_seen"]
            self.bad_loss_policy.load(manifest.get("bad_loss", manifest.get("watch", {})))  # watch: in older ones
        self.batches = build_batches(config, inputs, self.dims, self.device, self.step)
        self.timing = StepTiming()
        self.throughput = Throughput(config, inputs, self.dims, self.device)
        if self.rank == 0:
            log_stage(config, inputs, self.dims, self.device)
        self.metrics = open_metrics(config, self.step) if self.rank == 0 else None

    @property
    def finished(self) -> bool:
        """Whether the last step of the stage is done."""
        return self.step >= self.config.training.steps

    def state(self) -> State:
        """The tensors of a checkpoint: model, optimizer and rng, by name; DTensors with this rank's shards."""
        return {
            "model": {name: param.detach() for name, param in self.model.named_parameters()},
            "optimizer": optimizer_state(self.model, self.optimizer),
            "rng": random_state(),
        }

    def save(self, last: bool = False) -> bool:
        """Collective. Save the state after self.step; False if the save failed and the run goes on.

        last: the last save of the run, which must not fail.
        """
        assert self.checkpointer
        self.pause("saving")
        manifest = self.inputs.manifest(self.config, self.step, self.tokens_seen)
        manifest["bad_loss"] = self.bad_loss_policy.state()
        self._call("saving", manifest)
        files = self.inputs.data_start.files(self.inputs.plan, self.step) if self.rank == 0 else {}
        return self.checkpointer.save(self.state(), manifest, last, files)

    def pause(self, what: str) -> None:
        """Tell all hooks that until the next step this rank is busy with `what`: "saving", "evaluating", ..."""
        self.timing.rest()
        self._call("pausing", what)

    def train(self) -> None:
        """Train until training.steps, or until a rank is asked to stop; save at intervals and at the end."""
        config, steps = self.config, self.config.training.steps
        start, saved_at, first_step = time.perf_counter(), self.step, self.step + 1
        if self.finished:
            logger.info(f"nothing to do: step {self.step} of {steps} is done")
        self._call("started")
        recent, skipped = deque[float](maxlen=20), len(self.bad_loss_policy.skipped)
        self.throughput.restart()
        while not self.finished:
            self._call("before_step")
            try:
                numbers = self.train_step()
            except BadLossError:  # on all ranks at once; a checkpoint that is being saved in the background is sound
                if self.checkpointer:
                    self.checkpointer.wait()
                raise
            if numbers is None:
                logger.info(f"asked to stop: ending after step {self.step} of {steps}")
                if self.checkpointer and saved_at < self.step:
                    self.save(last=True)
                break
            if numbers["skipped_steps"] == skipped:
                recent.append(numbers["loss"])
            skipped = numbers["skipped_steps"]
            if self.step == first_step:
                shorten_timeouts(config, self.dims, self.cpu_group)
                self.throughput.first_step_ended()
            if self.step % config.metrics.log_freq == 0 or self.step in (first_step, steps):
                self._log(numbers)
            if self.checkpointer:
                due = self.step % config.checkpoint.interval == 0 or self.finished
                if due and self.save(last=self.finished):
                    saved_at = self.step
                self.stop_requested |= self.checkpointer.must_stop()
            self._call("after_step", numbers)
            self.garbage_collection.run(self.step)
        if self.checkpointer:
            self.pause("saving")
            self.checkpointer.wait(last=True)
        self._call("ended")
        mean = f"; mean loss of the last {len(recent)} steps {sum(recent) / len(recent):.3f}" if recent else ""
        logger.info(f"ended at step {self.step} after {duration(time.perf_counter() - start)}{mean}")

    def train_step(self) -> dict[str, Any] | None:
        """One optimizer step over the global batch; None, with nothing changed, if a rank has been asked to stop.

        The loss is the sum of token losses divided by the number of valid labels of the global batch, so it does not
        depend on how the rows are split over ranks and accumulation. BadLossError before a parameter has changed.
        """
        asked = time.perf_counter()
        batches = list(islice(self.batches, self.accumulation))
        self.throughput.waited += time.perf_counter() - asked
        check_tokens(batches, self.inputs, self.step)
        counts_here = self.dims.counts_here
        valid = sum(batch.num_valid for batch in batches) if counts_here else 0
        counts = torch.tensor([valid, int(self.stop_requested)])
        self.timing.arrive()
        dist.all_reduce(counts, group=self.cpu_group)
        valid = int(counts[0])
        if counts[1] > 0:
            return None
        self.step += 1
        check_labels(valid, self.step)

        token_losses = []
        for i, batch in enumerate(batches):
            reduce_over_replicas(self.model, i == len(batches) - 1)
            rope = self.inputs.drawn_rope(self.config.training, self.step, i)
            token_losses.append(train_micro_batch(self.model, batch.to(self.device), valid, rope))
        # not earlier: reading a number from the GPU waits for it
        names = self.inputs.plan.names
        sums = sum_losses(batches, token_losses, len(names)) * counts_here
        norm = clip_gradients(self.model.parameters(), self.config.training.max_norm, self.cpu_group)
        dist.all_reduce(sums, group=self.cpu_group)
        self.timing.release()
        loss, by_source, by_position = mean_losses(sums, valid, names)
        skipped = self._judge(loss, norm)
        lr = learning_rate(self.step, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if not skipped:
            self.optimizer.step()
        self.optimizer.zero_grad()
        tokens = self.inputs.plan.tokens_in_step(self.step - 1)
        self.tokens_seen += tokens
        self.throughput.add(batches, tokens)
        return {
            "step": self.step,
            "loss": loss,
            "grad_norm": norm,
            "lr": lr,
            "tokens_seen": self.tokens_seen,
            "skipped_steps": len(self.bad_loss_policy.skipped),
            "loss_by_source": by_source,
            "loss_by_position": by_position,
        }

    def _judge(self, loss: float, norm: float) -> bool:
        """Whether this step's gradients are discarded, equal on all ranks; BadLossError, with the step's rows, if the
        run must end."""
        plan = self.inputs.plan
        try:
            why = self.bad_loss_policy.judge(self.step, loss, norm)
        except BadLossError as e:
            raise BadLossError(f"{e}. Its rows:\n{plan.describe_step(self.step - 1)}") from None
        if why and self.rank == 0:
            logger.warning(f"step {self.step} is skipped: {why}. Its rows:\n{plan.describe_step(self.step - 1)}")
        return why is not None

    def _log(self, numbers: dict[str, Any]) -> None:
        """Collective. Add the rates since the last logged step to the step's numbers; rank 0 writes them."""
        numbers |= self.throughput.gather(self.cpu_group)
        self._call("logging", numbers)
        if self.metrics:
            self.metrics.log(numbers)
            log_step(numbers, self.config.training.steps)
        self.throughput.restart()

    def _call(self, method: str, *arguments: Any) -> None:
        for hook in self.hooks:
            getattr(hook, method)(self, *arguments)

    def _close_hooks(self) -> None:
        """All of them, even if one fails: what ends the run may be another error."""
        for hook in self.hooks:
            try:
                hook.closed(self)
            except Exception:
                logger.exception(f"{type(hook).__name__}.closed failed")

    def close(self) -> None:
        """Release files, loader processes and process groups."""
        self._close_hooks()
        self.batches = iter(())
        if self.metrics:
            self.metrics.close()
        dist.destroy_process_group()
