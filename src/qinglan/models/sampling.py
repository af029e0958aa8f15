"""One draw from a next-token distribution: temperature, top-k, top-p, an allowed set, and the draw's log-probability.

Two log-probabilities are returned. `logprobs` is that of the distribution drawn from, renormalised over what the
filters and the allowed set leave: with any other, the ratio of a policy-gradient step would not be 1 at its start.
`raw_logprobs` is that of the model's whole distribution at the same temperature, which a forward pass over the text
gives as well. They differ only where something was left out. A row's draw depends on its own logits and its own
uniform number only.
"""

from typing import NamedTuple, Self

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from qinglan.core.config import Config


class SamplingConfig(Config):
    """How completions are drawn."""

    temperature: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Divides the logits; 0 is greedy; 1 draws from the model itself, as PPO does (Ouyang et al. 2022, C.4)."""
    top_k: int = Field(default=0, ge=0)
    """Keep the k most probable tokens; 0 keeps all."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Keep the smallest set of tokens with this probability (Holtzman et al. 2020); 1 keeps all."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Longest completion in tokens, the end token included."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion; the first one that appears, and what follows, is cut from the text."""
    memory_budget_mib: int = Field(default=1024, ge=1)
    """Memory for the rows that are being written (keys, values and logits), in MiB; decides how many go together. What
    they leave may hold a copy of the weights that is faster to read."""
    max_rows: int = Field(default=512, ge=1)
    """Most rows written together, whatever the memory."""
    cuda_graphs: bool = True
    """On a GPU, launch the kernels of a step once for each shape and replay them; changes no result but rounding."""

    @model_validator(mode="after")
    def _stops_have_text(self) -> Self:
        if any(not stop for stop in self.stop):
            raise ValueError("stop: an empty text would end a completion before it begins; give at least one character")
        return self


class Draw(NamedTuple):
    """One token for each row."""

    token_ids: Int[Tensor, " rows"]
    logprobs: Float[Tensor, " rows"]
    """fp32, nats, under the distribution that was drawn from (greedy: under the model's own, at temperature 1)."""
    raw_logprobs: Float[Tensor, " rows"]
    """fp32, nats, before the filters and the allowed set."""


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

    Temperature 0 takes the most probable token. Filters come in this order: allowed set, temperature, top-k, top-p.
    """
    # At 0 and 1 no copy is made: `tempered` may be `logits` itself.
    tempered = logits.float() if temperature in (0, 1) else logits.float() / temperature
    bound = tempered if allowed is None else tempered.masked_fill(~allowed, -torch.inf)
    if temperature == 0:
        token_ids, logprobs = bound.argmax(-1), bound.log_softmax(-1)
    else:
        logprobs = filtered(bound, top_k, top_p).log_softmax(-1)
        # The sum runs in fp64: in fp32 it would lose the tail of a large vocabulary.
        cumulative = logprobs.exp().double().cumsum_(-1)
        target = uniforms[:, None] * cumulative[:, -1:]
        # The first token whose cumulative probability exceeds the target; a token of probability 0 never does so first.
        token_ids = torch.searchsorted(cumulative, target, right=True)[:, 0]
    places = token_ids.clamp(max=logits.shape[-1] - 1)  # NaN finds no token at all
    drawn_from = taken(logprobs, places)
    is_whole = allowed is None and (temperature == 0 or (top_k == 0 and top_p == 1))
    return Draw(token_ids, drawn_from, drawn_from if is_whole else taken(tempered.log_softmax(-1), places))


def filtered(logits: Float[Tensor, "rows vocab"], top_k: int, top_p: float) -> Float[Tensor, "rows vocab"]:
    """Return logits with -inf outside the `top_k` largest (0: all), then outside the smallest set of mass `top_p`."""
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(-1)
        # The mass in front of a token decides, so that the most probable one always stays.
        is_outside = probabilities.cumsum(-1) - probabilities >= top_p
        logits = logits.masked_fill(torch.empty_like(is_outside).scatter(-1, order, is_outside), -torch.inf)
    return logits


def taken(logprobs: Float[Tensor, "rows vocab"], token_ids: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """Return the entry of `token_ids` in each row."""
    return logprobs.gather(-1, token_ids[:, None])[:, 0]
