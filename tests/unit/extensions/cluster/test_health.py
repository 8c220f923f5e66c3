"""Bad losses, stragglers, the heartbeat and the roll call, without ranks."""

from __future__ import annotations

import json
import math
import statistics
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from torchtitan.config.schema import Training
from torchtitan.extensions.cluster.health import BadLossError, Heartbeat, LossWatch, roll_call, stragglers

SPIKES = Training(on_bad_loss="skip", loss_spike_factor=1.5, loss_spike_window=5, max_skipped_steps=3)
LOSSES = [4.0, 3.9, 9.0, 3.8, 3.9, 3.7, 5.5, 5.9, 3.6, 3.7, math.inf, 3.5, 5.0, 3.3]


def judged(watch: LossWatch, losses: list[float], first: int = 1) -> list[int]:
    """Steps that are skipped."""
    return [step for step, loss in enumerate(losses, first) if watch.judge(step, loss, 1.0)]


def test_a_spike_is_measured_by_the_median_of_the_good_losses_before():
    """Against a plain loop: the window must be full, and neither spikes nor infinity enter it."""
    watch, good, expected = LossWatch(SPIKES), [], []
    for step, loss in enumerate(LOSSES, 1):
        spike = len(good) >= 5 and loss > 1.5 * statistics.median(good[-5:])
        (expected if spike or math.isinf(loss) else good).append(step if spike or math.isinf(loss) else loss)
    assert judged(watch, LOSSES) == expected == [8, 11]
    assert watch.losses == good[-5:]
    assert [skipped["step"] for skipped in watch.skipped] == expected
    json.dumps(watch.state(), allow_nan=False)


def test_a_resumed_run_judges_as_the_unbroken_one():
    whole = LossWatch(SPIKES)
    skipped = judged(whole, LOSSES)
    for cut in range(len(LOSSES)):
        before, after = LossWatch(SPIKES), LossWatch(SPIKES)
        first = judged(before, LOSSES[:cut])
        after.load(json.loads(json.dumps(before.state())))
        assert first + judged(after, LOSSES[cut:], cut + 1) == skipped
        assert after.state() == whole.state()
    fresh = LossWatch(SPIKES)
    fresh.load({})  # a manifest from before there was a watch
    assert fresh.state() == {"losses": [], "skipped": []}


def test_after_so_many_skipped_steps_the_run_stops_and_says_which():
    watch = LossWatch(SPIKES)
    assert judged(watch, [math.nan, 1.0, math.nan, math.nan]) == [1, 3, 4]
    with pytest.raises(BadLossError, match=r"max_skipped_steps = 3 have been skipped \(1, 3, 4\)"):
        watch.judge(5, 1.0, math.inf)


def test_the_default_stops_at_what_is_not_finite_and_at_nothing_else():
    watch = LossWatch(Training())
    assert judged(watch, [1.0, 1e30, 1.0]) == []
    for loss, norm in ((math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan)):
        with pytest.raises(BadLossError, match="step 4: loss"):
            watch.judge(4, loss, norm)
    assert watch.state() == {"losses": [], "skipped": []}


def test_stragglers():
    hosts = ["a", "a", "b", "b"]
    even = [[0.001, 0.1, 0.0]] * 4
    numbers, found = stragglers(even, 1.0, 1.5, hosts)
    assert not found and numbers["compute"] == 1 and numbers["late_seconds"] == 0
    slow = [*even[:2], [0.004, 0.1, 0.0], even[3]]
    numbers, found = stragglers(slow, 1.0, 1.5, hosts)
    assert numbers["compute"] == pytest.approx(4) and numbers["compute_rank"] == 2
    assert len(found) == 1 and "rank 2 on b computes 4.0 times slower" in found[0]
    late = [*even[:3], [0.001, 0.6, 0.5]]
    numbers, found = stragglers(late, 1.0, 1.5, hosts)
    assert numbers["late_rank"] == numbers["data_wait_rank"] == 3 and numbers["data_wait"] == 0.5
    assert len(found) == 1 and "rank 3 on b comes 0.50 s late to every step of 1.00 s" in found[0]
    assert stragglers(late, 2.0, 1.5, hosts)[1] == [], "a step of 2 s would have lasted 1.5 s: not half as long again"
    assert stragglers(even[:1], 1.0, 1.5, hosts) == ({}, [])


def test_heartbeat(tmp_path: Path):
    beats = Heartbeat(tmp_path, 3600, ["a", "a", "b"], 100, True)
    path = tmp_path / "heartbeat.json"
    Heartbeat(tmp_path, 0, ["a"], 100, False).beat(1, "training")
    assert not path.exists(), "only rank 0 writes"
    for step, state, expected in ((1, "training", 1), (2, "training", 1), (3, "saving", 3), (4, "ended", 4)):
        beats.beat(step, state)
        content = json.loads(path.read_text())
        assert content["step"] == expected and abs(content["time"] - time.time()) < 60
    assert content["hosts"] == ["a", "b"] and content["ranks"] == 3 and content["state"] == "ended"
    Heartbeat(tmp_path / "not there", 0, ["a"], 100, True).beat(1, "training")  # warns, and the run goes on


class Silent(dist.Store):
    """A store whose keeper is gone: requests do not return."""

    def set(self, *_: object) -> None:
        time.sleep(60)


def test_roll_call():
    store = dist.HashStore()
    store.set("roll-call/0", "1")
    hosts = ["a", "b", "c"]
    assert roll_call(store, 2, hosts, 0.5) == "no answer from rank 1 on b"
    store.set("roll-call/1", "1")
    assert "all ranks answer" in roll_call(store, 2, hosts, 0.5)
    began = time.monotonic()
    assert "no answer from rank 0's machine, a" in roll_call(Silent(), 2, hosts, 0.5)
    assert time.monotonic() - began < 5
