"""Keys of torchtitan that mean nothing here, each with what to write instead.

Consulted for TOML files and for the command line before the nearest known name is guessed, so that someone who
brings a configuration from torchtitan is told what became of a key instead of being offered a look-alike.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

_NO_PIPELINE = (
    "pipeline parallelism is not offered: a long row needs its tokens divided, not the layers. Remove it and use FSDP2 "
    "(parallelism.data_parallel_shard_degree) with tensor and context parallelism"
)
_NO_EXPERTS = (
    "expert parallelism is not offered: the models here are dense. Use FSDP2 (parallelism.data_parallel_shard_degree) "
    "with tensor and context parallelism"
)
_SOURCES = 'the data are named in the TOML file: a [[data.sources]] table with name = "..." and path = "..." for each'
_FLOAT8 = 'its keys are those of [quantize]: recipe_name = "rowwise" or "tensorwise", filter_fqns, emulate'
_NO_MX = "the MX formats are not offered: remove it; [quantize] has FP8"

# Shell patterns over `table.key` or `table`; the first that matches speaks.
_EXPLANATIONS: dict[str, str] = {
    "parallelism.pipeline_parallel_*": _NO_PIPELINE,
    "parallelism.module_fqns_per_model_part": _NO_PIPELINE,
    "experimental.pipeline_parallel_*": _NO_PIPELINE,
    "training.pipeline_parallel_*": _NO_PIPELINE,
    "parallelism.expert_*": _NO_EXPERTS,
    "parallelism.enable_async_tensor_parallel": "asynchronous tensor parallelism is not in this version: remove it",
    "parallelism.enable_compiled_autograd": "compiled autograd is not used: remove it; compile.enable compiles blocks",
    "parallelism.context_parallel_rotate_method": "there is no ring to rotate: remove it;"
    " parallelism.context_parallel_exchange says how keys and values move",
    "parallelism.disable_loss_parallel": "the loss is always computed on logits cut by vocabulary: remove it",
    "training.dataset": _SOURCES,
    "training.dataset_path": _SOURCES,
    "training.batch_size": "it is called training.local_batch_size (rows in a micro-batch of one data-parallel rank)",
    "training.data_parallel_degree": "it is called parallelism.data_parallel_shard_degree",
    "training.data_parallel_*": "the degrees of parallelism are keys of [parallelism], under the same names",
    "training.tensor_parallel_degree": "it is called parallelism.tensor_parallel_degree",
    "training.context_parallel_degree": "it is called parallelism.context_parallel_degree",
    "training.warmup_steps": "it is called lr_scheduler.warmup_steps",
    "training.compile": "it is called compile.enable",
    "training.gc_debug": "there is no garbage-collection debugging: remove it; training.gc_freq is offered",
    "model.name": "the architecture comes from model.flavor, or from config.json in model.hf_assets_path when flavor is"
    ' "auto"; remove it and write e.g. flavor = "llama3.1_8b"',
    "model.tokenizer_path": "it is called model.hf_assets_path: the folder with tokenizer.json or tokenizer.model",
    "model.converters": "model converters are not offered: remove it; FP8 is quantize.recipe_name",
    "model.print_after_conversion": "model converters are not offered: remove it",
    "model.norm_type": "the norm (RMSNorm) belongs to model.flavor: remove it",
    "checkpoint.enable_checkpoint": "it is called checkpoint.enable",
    "checkpoint.initial_load_model_only": 'it is checkpoint.exclude_from_loading = ["optimizer"]',
    "checkpoint.create_seed_checkpoint": "weights are initialised alike on every layout, from training.seed: remove it",
    "checkpoint.enable_first_step_checkpoint": "there is none after the first step: remove it, or set"
    " checkpoint.interval = 1 for a trial",
    "checkpoint.interval_type": "checkpoint.interval counts steps: remove it",
    "checkpoint.model_weights_only": "a checkpoint always holds the whole state: remove it",
    "checkpoint.last_save_model_only": "a checkpoint always holds the whole state: remove it",
    "activation_checkpoint.per_op_sac_*": "matrix products are not told apart by their shapes: remove it;"
    " activation_checkpoint.selective_ac_matmuls says how many are saved",
    "optimizer.fused": 'it is optimizer.implementation = "fused"',
    "optimizer.early_step_in_backward": "the optimizer steps after the whole backward: remove it",
    "lr_scheduler.lr_min": "it is called lr_scheduler.min_lr_factor (a factor of optimizer.lr)",
    "lr_scheduler.lr_decay_*": "the keys are lr_scheduler.decay_ratio, decay_type and min_lr_factor, without lr_",
    "metrics.disable_color_printing": "nothing to disable: colours are used on a terminal only; remove it",
    "metrics.save_for_all_ranks": "metrics are global values, written once by rank 0: remove it",
    "metrics.rank_0_only": "metrics are global values, written once by rank 0: remove it",
    "metrics.enable_color_printing": "colours are used on a terminal only: remove it",
    "profiling.trace_dir": "it is called profiling.save_traces_folder",
    "comm.save_traces_file_prefix": "the flight recorder's files are called rank_0, rank_1, ...: remove it",
    "job.custom_config_module": "there are no plug-in configurations: remove it; a new option is a new field in"
    " torchtitan/config/schema.py",
    "job.use_for_integration_test": "tests live in tests/: remove it",
    "experimental*": "there is no [experimental] table: remove it",
    "memory_estimation*": "memory is not estimated in this version: remove it",
    "fault_tolerance*": "there is no torchft here: remove it; a run resumes from its newest complete checkpoint",
    "validation*": "there is no validation during training in this version: remove it",
    "float8*": _FLOAT8,
    "quantize.linear.mx*": _NO_MX,
    "quantize.linear*": _FLOAT8,
    "mx*": _NO_MX,
}


def explain(name: str) -> str | None:
    """What became of torchtitan's `table.key` (or `table`), or None when there is nothing to say about it."""
    for pattern, explanation in _EXPLANATIONS.items():
        if fnmatchcase(name, pattern):
            return explanation
    return None
