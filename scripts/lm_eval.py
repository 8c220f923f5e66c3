"""Tasks of lm-evaluation-harness on a model in any layout.

    python scripts/lm_eval.py --model ./SmolLM2 --tasks arc_easy,wikitext --out results.json
    python scripts/lm_eval.py --job.config_file stage.toml --tasks mmlu --num_fewshot 5 --limit 50
    python scripts/lm_eval.py --model outputs/checkpoint/step-1000 --processes 8 --tasks mine --include_path tasks/ \\
        --parallelism.context_parallel_degree 8 --max_length 131072

--model, --step, --processes and every --table.key are as in scripts/evaluate.py. --out gets the harness' own results
and defaults to evaluation/step-N_lm_eval.json of the stage. Needs `pip install -e ".[eval]"`. docs/evaluation.md says
what differs from the harness' own model class.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import json
import logging
import os
import random
import sys
from pathlib import Path
from typing import Any

from torchtitan.config import JobConfig
from torchtitan.extensions.cluster.launch import launch
from torchtitan.extensions.evaluation.command_line import check_at_least, parser_of, resolve_request
from torchtitan.tools.errors import UserError
from torchtitan.tools.folders import make_writable, write_text


def main(args: list[str]) -> int:
    """0; 1 and one line for a mistake; or the code of a process that failed."""
    parser = parser_of(__doc__)
    parser.add_argument("--tasks", help="tasks, groups or tags, separated by commas; * stands for anything")
    parser.add_argument("--include_path", type=Path, help="folder of task files of your own")
    parser.add_argument("--limit", type=float, help="documents per task; below 1, a share of them")
    parser.add_argument("--num_fewshot", type=int, help="examples before each question (what the task says)")
    parser.add_argument("--max_length", type=int, help="tokens that the model may read (what it was trained for)")
    parser.add_argument("--truncate", action="store_true", help="cut longer requests from the left, and count them")
    parser.add_argument("--apply_chat_template", action="store_true", help="ask in the tokenizer's chat template")
    parser.add_argument("--log_samples", action="store_true", help="write every request and its answer to --out too")
    parser.add_argument("--metadata", type=json.loads, default={}, help='JSON for tasks: {"max_seq_lengths": [4096]}')
    options, overrides = parser.parse_known_args(args)
    rank = int(os.environ.get("RANK", "0"))
    try:
        if importlib.util.find_spec("lm_eval") is None:
            raise UserError('lm-evaluation-harness is not installed: pip install -e ".[eval]"')
        config, folder = resolve_request(options, overrides, suffix="_lm_eval")
        check_questions(options)
        if "RANK" not in os.environ and options.processes > 1:
            return launch([sys.executable, __file__, *args], options.processes)
        result = run(options, config, folder)
        if rank == 0:
            report(result, options.out)
    except UserError as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def check_questions(options: argparse.Namespace) -> None:
    """UserError for mistakes that can be found without the harness."""
    if options.out is not None:
        make_writable("--out", options.out.parent)
    if not options.tasks:
        raise UserError("Nothing to ask: name tasks of lm-evaluation-harness with --tasks.")
    if options.include_path is not None and not options.include_path.is_dir():
        raise UserError(f"--include_path {options.include_path} is not a folder.")
    check_at_least(options, max_length=1, num_fewshot=0)
    if options.limit is not None and not (
        0 < options.limit < 1 or options.limit >= 1 and options.limit == int(options.limit)
    ):
        raise UserError(f"--limit = {options.limit:g} must be a number of documents, or a share between 0 and 1.")


def run(options: argparse.Namespace, config: JobConfig, folder: Path) -> dict[str, Any]:
    """On every rank: loads tasks and model, and answers. On rank 0 the harness' results and ours; elsewhere {}."""
    from lm_eval.evaluator import simple_evaluate

    from torchtitan.extensions.evaluation import loading
    from torchtitan.extensions.evaluation.evaluate import warn_beyond_trained_length
    from torchtitan.extensions.evaluation.lm_eval_model import TorchtitanLM
    from torchtitan.tools.logging import init_logger, logger

    rank, _, world_size = loading.rank_and_world_size()
    init_logger(rank, world_size)
    logging.getLogger("lm_eval").setLevel(logging.WARNING if rank == 0 else logging.ERROR)
    on_disk = loading.inspect_model(folder, config, options.max_length, options.tokenizer)
    loading.check_own_results(options, on_disk)
    trained = on_disk.args.rope.max_position_embeddings or (on_disk.manifest or {}).get("seq_len")
    max_length = options.max_length or trained or config.training.seq_len
    manager, tasks = load_tasks(options, {"tokenizer": on_disk.tokenizer.folder} | options.metadata)
    warn_beyond_trained_length(on_disk.args, max_length)
    with loading.model_on_ranks(on_disk, config) as (model, ranks):
        lm = TorchtitanLM(
            model,
            ranks,
            on_disk.tokenizer,
            max_length,
            config.data.add_bos,
            options.truncate,
            silent=rank != 0,
            ends=on_disk.ends_of_turn,
        )
        results = simple_evaluate(
            lm,
            tasks=tasks,
            task_manager=manager,  # else it makes one of all its tasks
            num_fewshot=options.num_fewshot,
            limit=options.limit if options.limit is None or options.limit < 1 else int(options.limit),
            log_samples=options.log_samples,
            apply_chat_template=options.apply_chat_template,
            bootstrap_iters=100_000 if rank == 0 else 0,
        )
    if lm.truncated:
        logger.warning(f"{lm.truncated} requests were cut from the left to max_length = {max_length:,}")
    if rank != 0 or results is None:
        return {}
    description = {
        "label": on_disk.label,
        "model": str(folder),
        "dtype": config.training.mixed_precision_param,
        "add_bos": config.data.add_bos,
        "max_length": max_length,
        "truncated": lm.truncated,
        "world_size": world_size,
    }
    return description | results


def load_tasks(options: argparse.Namespace, metadata: dict[str, Any]) -> tuple[Any, list[Any]]:
    """A TaskManager, and what --tasks names, with its documents.

    UserError, with the task's name, if it is not known or cannot be loaded.
    """
    import numpy as np
    from lm_eval.tasks import TaskManager

    # the seeds of simple_evaluate, which loads tasks by name only after it has set them: every rank must ask the same
    random.seed(0)
    np.random.seed(1234)
    asked = [name.strip() for name in options.tasks.split(",") if name.strip()]
    manager = None
    if options.include_path is not None:
        manager = TaskManager(include_path=str(options.include_path), include_defaults=False, metadata=metadata)
    if manager is None or not set(asked) <= set(manager.all_subtasks):
        # reading the files of the harness' 14,000 tasks takes half a minute: only if they are needed
        manager = TaskManager(include_path=str(options.include_path or "") or None, metadata=metadata)
    chosen: dict[str, Any] = {}
    for pattern in asked:
        names = manager.match_tasks([pattern])
        if not names:
            near = ", ".join(difflib.get_close_matches(pattern, manager.all_tasks, 3)) or "none"
            raise UserError(
                f"--tasks {pattern}: lm-eval has no task, group or tag of this name; near it: {near}. Tasks of your "
                "own are found with --include_path."
            )
        for name in names:
            try:
                loaded = manager.load([name])
            except Exception as error:  # a task's code and a download can raise anything
                why = f"{type(error).__name__}: {' '.join(str(error).split())}"
                raise UserError(
                    f"--tasks {name} could not be loaded ({why}). If its documents come over the network: load it "
                    "once on a machine with a network, and keep the folder HF_HOME."
                ) from error
            for task_name, task in loaded["tasks"].items():
                if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
                    raise UserError(f"--tasks {name}: {task_name} runs code of a model, or shows pictures to it.")
            top = {name: loaded["groups"][name]} if name in loaded["groups"] else loaded["tasks"]
            chosen |= top
    return manager, list(chosen.values())


def report(result: dict[str, Any], out: Path | None) -> None:
    """Print tables, and write the file."""
    from lm_eval.utils import handle_non_serializable, make_table

    print(f"{result['label']}, max_length {result['max_length']:,}, {result['truncated']} requests cut")
    print(make_table(result))
    if result.get("groups"):
        print(make_table(result, "groups"))
    if out is not None:
        write_text(out, json.dumps(result, indent=1, default=handle_non_serializable, ensure_ascii=False) + "\n")
        print(out)


if __name__ == "__main__":
    # Python looks in this folder first, where `lm_eval` would be this file, and `evaluate`, which lm_eval imports, the
    # script beside it
    here = Path(__file__).resolve().parent
    sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != here]
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # as torchtitan/train.py ends
