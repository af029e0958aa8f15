"""Linear probes: logistic regression on frozen features (Burns et al. 2023, appendix D.3, saliency).

    minimise over w, b:  1/n sum_i [-q_i log sigmoid(w x_i + b) - (1 - q_i) log sigmoid(-(w x_i + b))] + l2/2 |w|^2

on standardised features, to the minimum (it is convex), so that neither a seed nor an order enters.
Shapes: n cases, D features.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.optimize import minimize
from scipy.special import expit
from torch import Tensor

from qinglan.core.errors import InputError


class Probe(NamedTuple):
    """A linear classifier of features: logit of class 1 = x @ weights + bias."""

    weights: np.ndarray
    bias: float

    def logits(self, features: Float[Tensor, "n d"]) -> np.ndarray:
        """Return the logits [n] of features [n, D]."""
        return features.double().numpy() @ self.weights + self.bias


def fit_probe(
    features: Float[Tensor, "n d"], targets: np.ndarray, *, l2: float = 0.01, with_bias: bool = True
) -> Probe:
    """Return the probe fitted to targets [n] in [0, 1]; pairs (differences of features) want no bias.

    Raises `InputError` where all targets are alike or a feature is not finite.
    """
    x, q = features.double().numpy(), np.asarray(targets, dtype=float)
    if with_bias and len({bool(target > 0.5) for target in q}) < 2:
        raise InputError(f"linear probe: all {len(q)} labels are of one class; expected both")
    if not np.isfinite(x).all():
        raise InputError("linear probe: a feature is not finite; check the model")
    mean = x.mean(axis=0) if with_bias else np.zeros(x.shape[1])
    spread = np.sqrt(((x - mean) ** 2).mean(axis=0)) + 1e-8
    z = (x - mean) / spread

    def objective(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        w, b = parameters[:-1], parameters[-1] if with_bias else 0.0
        logits = z @ w + b
        loss = np.mean(np.logaddexp(0.0, logits) - q * logits) + 0.5 * l2 * w @ w
        residual = (expit(logits) - q) / len(q)
        return float(loss), np.append(z.T @ residual + l2 * w, residual.sum() if with_bias else 0.0)

    found = minimize(objective, np.zeros(x.shape[1] + 1), jac=True, method="L-BFGS-B", options={"maxiter": 500})
    weights = found.x[:-1] / spread
    return Probe(weights, float(found.x[-1] if with_bias else 0.0) - float(mean @ weights))
