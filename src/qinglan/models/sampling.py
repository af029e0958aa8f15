"""One draw from a next-token distribution: temperature, top-k, top-p, an allowed set, and the log-probability of the draw.

The distribution that is drawn from is the one whose log-probabilities are returned, renormalised over what the filters
leave (ppo_checklist rule 8). A row's draw depends on its own logits and its own uniform number only.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Draw(NamedTuple):
    """One token for each row."""

    token_ids: Int[Tensor, " rows"]
    logprobs: Float[Tensor, " rows"]
    """fp32, nats, under the distribution that was drawn from (greedy: under the model's own, at temperature 1)."""


def draw(
    logits: Float[Tensor, "rows vocab"],
    uniforms: Float[Tensor, " rows"],
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    allowed: Bool[Tensor, "rows vocab"] | None = None,
) -> Draw:
    """Draw one token per row by inverting the cumulative distribution at `uniforms` (fp64, in [0, 1)).

    Temperature 0 takes the most probable token. Filters apply in this order: allowed set, temperature, top-k, top-p.
    """
    logits = logits.float()
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -torch.inf)
    if temperature == 0:
        token_ids = logits.argmax(-1)
        return Draw(token_ids, taken(logits.log_softmax(-1), token_ids))
    logprobs = (filtered(logits / temperature, top_k, top_p)).log_softmax(-1)
    # The sum runs in fp64: in fp32 it would lose the tail of a large vocabulary.
    cumulative = logprobs.exp().cumsum(-1, dtype=torch.float64)
    target = uniforms[:, None] * cumulative[:, -1:]
    # The first token whose cumulative probability exceeds the target; one of probability 0 never does so first.
    token_ids = torch.searchsorted(cumulative, target, right=True)[:, 0]
    return Draw(token_ids, taken(logprobs, token_ids.clamp(max=logits.shape[-1] - 1)))


def filtered(logits: Float[Tensor, "rows vocab"], top_k: int, top_p: float) -> Float[Tensor, "rows vocab"]:
    """Return logits with -inf outside the `top_k` largest (0: all), then outside the smallest set of mass `top_p`."""
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(-1)
        outside = (
            probabilities.cumsum(-1) - probabilities >= top_p
        )  # the mass before a token decides, so one always stays
        logits = logits.masked_fill(outside.scatter(-1, order, outside), -torch.inf)
    return logits


def taken(logprobs: Float[Tensor, "rows vocab"], token_ids: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """Return the entry of `token_ids` in each row."""
    return logprobs.gather(-1, token_ids[:, None])[:, 0]
