"""Which steps are skipped, and when the run stops, for a bad loss."""

from __future__ import annotations

import json
import math
import statistics

import pytest

from torchtitan.components.bad_loss import BadLossError, BadLossPolicy
from torchtitan.config.schema import Training

SPIKES = Training(on_bad_loss="skip", loss_spike_factor=1.5, loss_spike_window=5, max_skipped_steps=3)
LOSSES = [4.0, 3.9, 9.0, 3.8, 3.9, 3.7, 5.5, 5.9, 3.6, 3.7, math.inf, 3.5, 5.0, 3.3]


def judged(policy: BadLossPolicy, losses: list[float], first: int = 1) -> list[int]:
    """Steps that are skipped."""
    return [step for step, loss in enumerate(losses, first) if policy.judge(step, loss, 1.0)]


def test_a_spike_is_measured_by_the_median_of_the_good_losses_before():
    """Against a plain loop: the window must be full, and neither spikes nor infinity enter it."""
    policy, good, expected = BadLossPolicy(SPIKES), [], []
    for step, loss in enumerate(LOSSES, 1):
        spike = len(good) >= 5 and loss > 1.5 * statistics.median(good[-5:])
        (expected if spike or math.isinf(loss) else good).append(step if spike or math.isinf(loss) else loss)
    assert judged(policy, LOSSES) == expected == [8, 11]
    assert policy.losses == good[-5:]
    assert [skipped["step"] for skipped in policy.skipped] == expected
    json.dumps(policy.state(), allow_nan=False)


def test_a_resumed_run_judges_as_the_unbroken_one():
    whole = BadLossPolicy(SPIKES)
    skipped = judged(whole, LOSSES)
    for cut in range(len(LOSSES)):
        before, after = BadLossPolicy(SPIKES), BadLossPolicy(SPIKES)
        first = judged(before, LOSSES[:cut])
        after.load(json.loads(json.dumps(before.state())))
        assert first + judged(after, LOSSES[cut:], cut + 1) == skipped
        assert after.state() == whole.state()
    fresh = BadLossPolicy(SPIKES)
    fresh.load({})  # a manifest from before there was a policy
    assert fresh.state() == {"losses": [], "skipped": []}


def test_after_max_skipped_steps_the_run_stops_and_says_which():
    policy = BadLossPolicy(SPIKES)
    assert judged(policy, [math.nan, 1.0, math.nan, math.nan]) == [1, 3, 4]
    with pytest.raises(BadLossError, match=r"max_skipped_steps = 3 steps have been skipped \(1, 3, 4\)"):
        policy.judge(5, 1.0, math.inf)


def test_the_default_stops_at_what_is_not_finite_and_at_nothing_else():
    policy = BadLossPolicy(Training())
    assert judged(policy, [1.0, 1e30, 1.0]) == []
    for loss, norm in ((math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan)):
        with pytest.raises(BadLossError, match="step 4: loss"):
            policy.judge(4, loss, norm)
    assert policy.state() == {"losses": [], "skipped": []}
