"""What the tests with several ranks share: a tiny stage on ragged text, and a way to run functions on real ranks.

Importing PyTorch takes seconds a process. So one spawn runs many cases, each of which makes its own process group and
ends it, and the ranks are forks of a server that has imported it (preload.py).
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import socket
import sys
from collections import Counter
from collections.abc import Callable
from multiprocessing import reduction
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.utils._python_dispatch import TorchDispatchMode

ASSETS = Path(__file__).parents[2] / "assets" / "tokenizer"

TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 4096,
    "rope_theta": 10000.0,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": TINY,
    "qwen2": TINY | {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": TINY | {"model_type": "qwen3"},
    "tied": TINY | {"tie_word_embeddings": True},
    # two layers with a window, shorter than the documents and than a block, one without and with another RoPE
    "olmo3": TINY
    | {
        "model_type": "olmo3",
        "num_hidden_layers": 3,
        "sliding_window": 30,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    },
    "mistral": TINY | {"model_type": "mistral", "sliding_window": 30},  # nothing but windows
}


def write_text(folder: Path, documents: int = 120) -> Path:
    """Ragged documents of 1 to some 400 words."""
    rng = random.Random(0)
    words = [f"{a}{b}" for a in ("red", "green", "blue", "old", "new") for b in ("stone", "river", "house", "bird")]
    lines = []
    for _ in range(documents):
        count = int(400 ** rng.random())
        lines.append(json.dumps({"text": " ".join(rng.choices(words, k=count))}))
    path = folder / "text.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def write_assets(folder: Path, model: str = "llama") -> Path:
    """A Hugging Face style folder: our tokenizer and the config.json of a tiny model."""
    assets = folder / f"assets-{model}"
    shutil.copytree(ASSETS, assets)
    (assets / "config.json").write_text(json.dumps(MODELS[model]))
    return assets


def flags(folder: Path, assets: Path, **overrides: Any) -> list[str]:
    """Command line of the tiny stage; overrides as table__key=value. Without the self-check: it takes longer than the
    steps."""
    config = folder / "stage.toml"
    if not config.exists():
        text = folder / "text.jsonl" if (folder / "text.jsonl").exists() else write_text(folder)
        config.write_text(
            f"""
[model]
flavor = "auto"
[training]
seq_len = 128
global_batch_size = 8
local_batch_size = 2
steps = 4
mixed_precision_param = "float32"
[parallelism]
self_check = false
[optimizer]
lr = 1e-3
[lr_scheduler]
warmup_steps = 2
[metrics]
log_freq = 1
enable_tensorboard = false
[checkpoint]
enable = false
[data]
cache_folder = "{folder}/cache"
num_workers = 0
[[data.sources]]
name = "text"
path = "{text}"
"""
        )
    values = {"model__hf_assets_path": assets, "job__dump_folder": folder / "out"} | overrides
    result = ["--job.config_file", str(config)]
    for key, value in values.items():
        result += ["--" + key.replace("__", "."), str(value)]
    return result


def run_stage(args: list[str], rank: int, world_size: int) -> list[dict[str, Any]]:
    """Train in this process; the numbers of every step."""
    from torchtitan.config import load_config
    from torchtitan.extensions.wiring import build_trainer

    config = load_config(args)
    trainer = build_trainer(config, rank, rank, world_size)
    numbers: list[dict[str, Any]] = []
    step = trainer.train_step

    def recorded() -> Any:
        result = step()
        numbers.append(result)
        return result

    trainer.train_step = recorded  # type: ignore[method-assign]
    try:
        trainer.train()
    finally:
        trainer.close()
    return numbers


class Collectives(TorchDispatchMode):
    """Counts the collectives that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        name = function.name()
        if name.startswith(("c10d::", "_c10d_functional::")) and "wait" not in name:
            self.counts[name.split("::")[1].split(".")[0]] += 1
        return function(*args, **(kwargs or {}))


def spawn(world_size: int, function: Callable[..., Any], cases: list[Any], folder: Path) -> list[Any]:
    """Runs function(case, rank, world_size) for every case on world_size ranks; rank 0's results, in order."""
    ports = _free_ports(len(cases))
    results = folder / f"results-{random.getrandbits(64):x}"
    surroundings = dict(os.environ), [Descriptor(1), Descriptor(2)]
    arguments = (world_size, function, cases, ports, str(results), surroundings)
    multiprocessing.set_forkserver_preload(["tests.distributed.preload"])
    ranks = mp.start_processes(_worker, arguments, world_size, join=False, start_method="forkserver")  # type: ignore
    try:
        while not ranks.join():
            pass
    finally:  # a test that took too long, say, must not leave them running beside those after it
        for process in ranks.processes:
            process.kill()
    return torch.load(results, weights_only=False)


class Descriptor:
    """A file descriptor among a new process' arguments: the same file there. The server's are those of the test that
    started it."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> Any:
        return _take_over, (reduction.DupFd(self.number), self.number)


def _take_over(duplicate: Any, number: int) -> None:
    os.dup2(duplicate.detach(), number)


def _worker(
    rank: int,
    world_size: int,
    function: Callable[..., Any],
    cases: list[Any],
    ports: list[int],
    results: str,
    surroundings: tuple[dict[str, str], Any],
) -> None:
    torch.set_num_threads(1)
    os.environ.clear()
    os.environ.update(surroundings[0])
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # these tests are of gloo ranks, also on a machine with a GPU
    outcome = []
    for case, port in zip(cases, ports, strict=True):
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        outcome.append(function(case, rank, world_size))
        # DTensor remembers how it has cut tensors, with the mesh of then; a block compiled in a later case would meet
        # both that mesh and its own, which PyTorch (2.13) does not tell apart
        _clear_sharding_prop_cache()
    if rank == 0:
        torch.save(outcome, results)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # as train.py ends: gloo's threads may outlive the interpreter's


def _free_ports(count: int) -> list[int]:
    """Below the ports that the system gives to connections: those of earlier cases must not take one meanwhile."""
    range_file = Path("/proc/sys/net/ipv4/ip_local_port_range")
    first = int(range_file.read_text().split()[0]) if range_file.exists() else 32768
    ports: list[int] = []
    # and those of tests that run beside these neither
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    below = range(max(first - 12000, 1024) + worker, first, workers)
    for port in random.sample(below, len(below)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            ports.append(port)
        if len(ports) == count:
            return ports
    raise RuntimeError(f"no {count} free ports below {first}")
