"""Linear probes: a separable problem, the optimum's own equation, pairs without a bias."""

import numpy as np
import pytest
import torch
from scipy.special import expit

from qinglan.core.errors import InputError
from qinglan.core.rng import numpy_stream
from qinglan.learn.probe import fit_probe


def problem(count: int = 200, width: int = 5) -> tuple[torch.Tensor, np.ndarray]:
    draw = numpy_stream(0, "probe")
    x = draw.normal(size=(count, width)) * np.array([1.0, 5.0, 0.1, 1.0, 1.0]) + 3.0
    return torch.tensor(x, dtype=torch.float32), (x[:, 1] - x[:, 0] > 0).astype(float)


def test_it_separates_what_a_line_separates_at_any_scale() -> None:
    x, y = problem()
    assert np.mean((fit_probe(x, y, l2=1e-4).logits(x) > 0) == (y > 0.5)) > 0.98


def test_the_gradient_of_the_stated_objective_is_zero_at_the_result() -> None:
    x, y = problem()
    soft = 0.1 + 0.8 * y
    probe = fit_probe(x, soft, l2=0.05)
    residual = (expit(probe.logits(x)) - soft) / len(soft)
    mean, spread = x.double().numpy().mean(0), x.double().numpy().std(0)
    z = (x.double().numpy() - mean) / spread
    assert residual.sum() == pytest.approx(0.0, abs=1e-4)
    np.testing.assert_allclose(z.T @ residual + 0.05 * probe.weights * spread, 0.0, atol=1e-4)


def test_without_a_bias_turning_all_differences_round_turns_the_logits_round() -> None:
    x, y = problem()
    one, other = fit_probe(x, y, with_bias=False), fit_probe(-x, 1.0 - y, with_bias=False)
    np.testing.assert_allclose(one.weights, other.weights, atol=1e-6)
    assert one.bias == 0.0


def test_bad_input() -> None:
    x, y = problem()
    with pytest.raises(InputError, match="all 200 labels are of one class"):
        fit_probe(x, np.ones(200))
    x[0, 0] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        fit_probe(x, y)
