"""scripts/benchmarks/trace_memory.py: the planner's peak beside the trainer's own code on tensors without memory."""

from __future__ import annotations

import re

from tests.scripts import SCRIPTS, run_script

DEMO = ("--job.config_file", SCRIPTS.parent / "train_configs/demo/1k.toml", "--world-size", 2)


def test_the_planner_is_near_the_trace():
    done = run_script("benchmarks/trace_memory", *DEMO, "--activation_checkpoint.mode", "full")
    assert done.returncode == 0, done.stderr
    apart = re.search(r"GiB at .*: ([+-]\d+\.\d)%", done.stdout)
    assert apart and abs(float(apart[1])) < 15


def test_what_cannot_be_traced_is_said():
    done = run_script("benchmarks/trace_memory", *DEMO, "--optimizer.implementation", "foreach")
    assert done.returncode == 1 and 'only "fused" can be traced' in done.stderr and "Traceback" not in done.stderr
