"""The rules by which a weak-to-strong task counts, one at a time, on answers with known accuracies."""

import numpy as np
import pytest

from qinglan.evals.weak_to_strong import AdmissionConfig, Trial, judge_admission

TRUTH = np.tile([0.0, 1.0], 100)


def answers(num_right: int) -> np.ndarray:
    """Return logits [1, 200] that are right in the first `num_right` cases of a fixed shuffling and wrong in others."""
    order = np.random.default_rng(0).permutation(200)
    right = np.where(order < num_right, 1.0, -1.0)
    return (np.where(TRUTH > 0.5, 1.0, -1.0) * right)[None]


@pytest.mark.parametrize(
    ("weak", "ceiling", "probe", "reason"),
    [
        (140, 196, 190, None),  # 0.70, 0.98, 0.95
        (116, 196, 190, "the weak supervisor is right in 0.580"),  # below 0.60
        (140, 164, 190, "the strong ceiling is too close"),  # 0.12 above, but its interval begins below 0.10
        (150, 130, 190, "the strong ceiling is weaker than the weak one"),
        (150, 196, 152, "the strong base model does not clearly know it"),  # one point above: noise
    ],
)
def test_each_rule_keeps_a_task_out_by_itself(weak: int, ceiling: int, probe: int, reason: str | None) -> None:
    trial = Trial(TRUTH, None, answers(weak), {"probe": answers(probe)}, answers(ceiling))
    found = judge_admission(("task", "small", "large"), trial, AdmissionConfig(), seed=0)
    assert found.is_admitted == (reason is None)
    if reason is not None:
        assert len(found.reasons) == 1 and reason in found.reasons[0]
    assert found.measured["weak"].value == pytest.approx(weak / 200)
    assert found.measured["gap"].value == pytest.approx((ceiling - weak) / 200)


def test_the_better_of_zero_shot_and_probe_decides() -> None:
    base = {"zero_shot": answers(100), "zero_shot_balanced": answers(150), "probe": answers(190)}
    found = judge_admission(("t", "s", "l"), Trial(TRUTH, None, answers(140), base, None), AdmissionConfig(), seed=0)
    assert found.is_admitted and found.measured["base_above_weak"].value == pytest.approx(0.25)  # (190 - 140) / 200
    assert "ceiling" not in found.measured and "gap" not in found.measured
