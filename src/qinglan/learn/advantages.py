"""Advantages: from scores and log-probabilities to how much better each sampled token was than expected.

Generalised advantage estimation (Schulman et al. 2016, eq. 16) as InstructGPT uses it, and three estimators without a
value model: RLOO (Ahmadian et al. 2024), GRPO (Shao et al. 2024) and REINFORCE++ (Hu 2025). Also the KL estimators, the
adaptive KL controller (Ziegler et al. 2019, section 2.2) and masked whitening.

Departures: the KL penalty is k1 inside the reward for every estimator, GRPO's included, whose paper adds k3 to the
loss: the expected gradient of k1 in the reward is that of the KL-regularised objective, that of k3 in the loss is the
gradient of the opposite direction, KL(reference || policy).

Legend: E episodes (sampled completions), T tokens of the longest completion. `completion_mask` is True where a sampled
token stands; what lies under False is never read, so it may hold anything, NaN included.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Estimator = Literal["gae", "rloo", "grpo", "reinforce_pp"]


class Advantages(NamedTuple):
    """What the policy and the value model learn from; zero where the completion mask is False."""

    advantages: Float[Tensor, "E T"]
    returns: Float[Tensor, "E T"]


class Moments(NamedTuple):
    """How many, mean and sum of squared deviations of a set of numbers; two sets merge exactly (Chan et al. 1979)."""

    num_values: float
    mean: float
    squares: float

    @property
    def variance(self) -> float:
        """Population variance; 0 for an empty set."""
        return self.squares / self.num_values if self.num_values else 0.0

    @property
    def std(self) -> float:
        """Population standard deviation."""
        return self.variance**0.5

    def merge(self, other: "Moments") -> "Moments":
        """Return the moments of both sets together."""
        count = self.num_values + other.num_values
        if not count:
            return self
        gap = other.mean - self.mean
        mean = self.mean + gap * other.num_values / count
        return Moments(
            count, mean, self.squares + other.squares + gap * gap * self.num_values * other.num_values / count
        )


NO_MOMENTS = Moments(0.0, 0.0, 0.0)


def mask_of_lengths(lengths: Int[Tensor, " E"], width: int) -> Bool[Tensor, "E width"]:
    """Return the mask whose row e is True at the first `lengths[e]` places: masks come from lengths, never a pad id."""
    return torch.arange(width, device=lengths.device)[None, :] < lengths[:, None]


def pad_rows(rows: list[Tensor]) -> tuple[Float[Tensor, "E T"], Bool[Tensor, "E T"]]:
    """Return 1-D tensors as one zero-padded matrix with its mask."""
    lengths = torch.tensor([len(row) for row in rows])
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return padded, mask_of_lengths(lengths, padded.shape[1]).to(padded.device)


# KL estimators (Schulman, "Approximating KL divergence", 2020). The tokens are drawn from the policy;
# d = log pi(a|s) - log pi_ref(a|s).


def kl_k1(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Return k1 = d per token: unbiased, may be negative. In nats."""
    return logprobs - reference_logprobs


def kl_k2(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Return k2 = d^2 / 2 per token: biased as a value; as a loss its expected gradient is that of the KL. In nats."""
    return (logprobs - reference_logprobs).square() / 2


def kl_k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Return k3 = exp(-d) - 1 + d per token: unbiased as a value, never negative; for reporting. In nats."""
    difference = logprobs - reference_logprobs
    return torch.expm1(-difference) + difference


def adapt_kl_coef(coef: float, kl: float, *, target: float, horizon: float, num_episodes: int) -> float:
    """Return the KL coefficient after a batch of `num_episodes` with mean `kl`.

    `kl` and `target` are in nats per completion, `horizon` in episodes. Ziegler et al. 2019, section 2.2.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)  # proportional error, clipped to 20%
    return coef * (1.0 + error * num_episodes / horizon)


def token_rewards(
    logprobs: Float[Tensor, "E T"],
    reference_logprobs: Float[Tensor, "E T"],
    scores: Float[Tensor, " E"],
    completion_mask: Bool[Tensor, "E T"],
    kl_coef: float,
) -> Float[Tensor, "E T"]:
    """Return r_t = -beta * (log pi - log pi_ref) at every token, plus the score at the last one.

    The last real action gets the score: the end token where the policy sampled one. Zero where the mask is False.
    InstructGPT, section 3.5.
    """
    rewards = torch.where(completion_mask, -kl_coef * kl_k1(logprobs, reference_logprobs), 0.0)
    places = torch.arange(completion_mask.shape[1], device=completion_mask.device)
    last = torch.where(completion_mask, places, -1).amax(dim=1)
    rows = torch.arange(len(scores), device=completion_mask.device)
    rewards[rows, last] += scores.to(rewards.dtype)
    return rewards


def gae(
    rewards: Float[Tensor, "E T"],
    values: Float[Tensor, "E T"],
    completion_mask: Bool[Tensor, "E T"],
    *,
    discount: float = 1.0,
    gae_lambda: float = 0.95,
    end_values: Float[Tensor, " E"] | None = None,
) -> Advantages:
    """Return advantages and lambda-returns (Schulman et al. 2016, eq. 16).

    `values[e, t]` is the value of the state *before* token t. `end_values` is the value after the last token: 0
    (default) where the episode ended there, the value model's estimate where it was only cut short. Tokens that the
    policy did not sample (False inside a row) are stepped over, as if the row were compacted.
    """
    rewards = torch.where(completion_mask, rewards, 0.0)
    values = torch.where(completion_mask, values, 0.0)
    next_value = torch.zeros_like(rewards[:, 0]) if end_values is None else end_values.to(rewards.dtype)
    running = torch.zeros_like(next_value)
    columns: list[Tensor] = []
    for t in reversed(range(rewards.shape[1])):
        here = completion_mask[:, t]
        delta = rewards[:, t] + discount * next_value - values[:, t]  # delta_t = r_t + gamma V(s_t+1) - V(s_t)
        step = delta + discount * gae_lambda * running  # A_t = delta_t + gamma lambda A_t+1
        running = torch.where(here, step, running)
        next_value = torch.where(here, values[:, t], next_value)
        columns.append(torch.where(here, running, 0.0))
    advantages = torch.stack(columns[::-1], dim=1)
    return Advantages(advantages, torch.where(completion_mask, advantages + values, 0.0))


def returns_to_go(
    rewards: Float[Tensor, "E T"], completion_mask: Bool[Tensor, "E T"], discount: float = 1.0
) -> Float[Tensor, "E T"]:
    """Return G_t = sum over s >= t of gamma^(s-t) r_s: GAE with lambda 1 and a value of 0 everywhere."""
    zeros = torch.zeros_like(rewards)
    return gae(rewards, zeros, completion_mask, discount=discount, gae_lambda=1.0).advantages


def rloo_advantages(returns: Float[Tensor, " E"], num_samples: int) -> Float[Tensor, " E"]:
    """Return R_i minus the mean return of the other completions of the same prompt (Ahmadian et al. 2024, section 3).

    Completions of one prompt stand side by side, `num_samples` (two or more) of each.
    """
    groups = returns.view(-1, num_samples)
    others = (groups.sum(dim=1, keepdim=True) - groups) / (num_samples - 1)
    return (groups - others).view(-1)


def grpo_advantages(returns: Float[Tensor, " E"], num_samples: int, eps: float = 1e-6) -> Float[Tensor, " E"]:
    """Return (R_i - mean) / (std + eps) within the completions of a prompt (Shao et al. 2024, section 4.1).

    The standard deviation is the population's; a group with equal returns gets zeros.
    """
    groups = returns.view(-1, num_samples)
    centred = groups - groups.mean(dim=1, keepdim=True)
    return (centred / (groups.std(dim=1, keepdim=True, correction=0) + eps)).view(-1)


def moments_of(values: Tensor, mask: Bool[Tensor, "..."] | None = None) -> Moments:
    """Return the moments of `values` where `mask` is True (everywhere without one), summed in fp64."""
    chosen = (values if mask is None else values[mask]).double()
    if not chosen.numel():
        return NO_MOMENTS
    mean = chosen.mean()
    return Moments(float(chosen.numel()), float(mean), float((chosen - mean).square().sum()))


def whiten(
    values: Tensor,
    mask: Bool[Tensor, "..."],
    *,
    shift_mean: bool = True,
    moments: Moments | None = None,
    eps: float = 1e-8,
) -> Tensor:
    """Return (x - mean) / sqrt(variance + eps) where `mask` is True and 0 elsewhere, with the population variance.

    `shift_mean=False` puts the mean back, as for rewards. `moments` gives the statistics of a larger set of which
    `values` is a share (another process's moments merged in). One call a rollout batch, never one a minibatch.
    """
    known = moments_of(values, mask) if moments is None else moments
    whitened = (values - known.mean) * (known.variance + eps) ** -0.5
    if not shift_mean:
        whitened = whitened + known.mean
    return torch.where(mask, whitened, 0.0)


def estimate_advantages(
    estimator: Estimator,
    rewards: Float[Tensor, "E T"],
    completion_mask: Bool[Tensor, "E T"],
    *,
    num_samples: int,
    discount: float = 1.0,
    gae_lambda: float = 0.95,
    values: Float[Tensor, "E T"] | None = None,
    end_values: Float[Tensor, " E"] | None = None,
) -> Advantages:
    """Return the advantages by the chosen estimator, not whitened; `values` and `end_values` are read by "gae" only.

    RLOO and GRPO give every token of a completion the same advantage, REINFORCE++ the return from that token on. Their
    `returns` are what a value model would be fitted to, for logging.
    """
    if estimator == "gae":
        if values is None:
            raise ValueError("estimator gae: values [E, T] are missing; train a value model or choose rloo")
        return gae(rewards, values, completion_mask, discount=discount, gae_lambda=gae_lambda, end_values=end_values)
    to_go = returns_to_go(rewards, completion_mask, discount)
    if estimator == "reinforce_pp":
        return Advantages(to_go, to_go)
    whole = torch.where(completion_mask, rewards, 0.0).sum(dim=1)  # R(x, y) = score - beta * KL of the completion
    compare = rloo_advantages if estimator == "rloo" else grpo_advantages
    spread = compare(whole, num_samples)[:, None].expand_as(rewards)
    return Advantages(torch.where(completion_mask, spread, 0.0), to_go)


def explained_variance(values: Tensor, returns: Tensor, mask: Bool[Tensor, "..."]) -> float:
    """Return 1 - Var(returns - values) / Var(returns) where `mask` is True; 0 where the returns do not vary."""
    spread = moments_of(returns, mask).variance
    return 1.0 - moments_of(returns - values, mask).variance / spread if spread > 0 else 0.0
