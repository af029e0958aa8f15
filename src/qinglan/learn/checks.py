"""Checks before the first update: each stops a run that would train on something other than what it seems to.

All are runtime checks that fail loudly with an `InputError` and return the number they measured, which is logged.
They cost one forward pass over a few sequences.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qinglan.core.errors import InputError
from qinglan.core.records import Prompt
from qinglan.models.chat import ChatFormat, check_round_trip
from qinglan.models.heads import ScalarModel, score_sequences
from qinglan.models.language_model import (
    LanguageModel,
    TokenBatch,
    TokenSequence,
    check_batching,
    completion_logprobs,
)
from qinglan.models.tokens import collate

MAX_RATIO_ERROR = {torch.float32: 1e-4, torch.bfloat16: 2.0}
"""How far a token's probability ratio may be from 1 under the same weights, by the dtype of the matmuls."""
MAX_MEAN_RATIO_ERROR = {torch.float32: 1e-5, torch.bfloat16: 0.1}
"""The same for the mean over all tokens; in bf16, where single tokens stray far, it tells mistakes from rounding."""
MAX_PADDING_ERROR = {torch.float32: 1e-3, torch.bfloat16: 0.2}
"""How far a score or log-probability may move with the company in its batch."""


NUM_PROBES = 4
"""Sequences on which padding invariance is tried."""


def check_start(
    policy: LanguageModel, scalar: ScalarModel | None, sequences: Sequence[TokenSequence], where: str
) -> dict[str, float]:
    """Run the checks that want no training on the first rollout's `sequences`; return what they measured, to be logged.

    Template round trip, end token taught, padding and packing invariance of the policy and, if given, of the reward or
    value model, and the share of sequences without a target. Raises `InputError` at the first that fails.
    """
    check_round_trip(policy.chat)
    prompt_ids = sequences[0].token_ids[: sequences[0].num_prompt_tokens]
    taught = TokenSequence([*prompt_ids, *policy.chat.completion_ids("Yes.")], len(prompt_ids))
    check_end_token_supervised(policy.chat, collate([taught]), where)
    check_batching(policy.model)
    masked_share = masked_row_share([collate(sequences)])
    if masked_share == 1.0:
        raise InputError(f"{where}: no sequence has a token to learn from; expected completions; raise max_new_tokens")
    probes = sequences[:: max(1, len(sequences) // NUM_PROBES)][:NUM_PROBES]  # samples of one prompt stand together
    return {
        "start/padding_error": check_padding_invariance(policy, scalar, probes, where),
        "start/masked_row_share": masked_share,
    }


def ratio_errors(logprobs: Tensor, old_logprobs: Tensor) -> tuple[float, float]:
    """Return the largest and the mean |ratio - 1| of the tokens; both are 0 for the same weights, up to rounding."""
    errors = ((logprobs.double() - old_logprobs.double()).exp() - 1).abs()
    return float(errors.max()), float(errors.mean())


def check_ratio(largest: float, mean: float, dtype: torch.dtype, where: str) -> None:
    """Raise `InputError` if the ratio of two scorings of the same tokens by the same weights is not 1 up to rounding.

    `largest` and `mean` are over |ratio - 1| of the tokens, `dtype` is that of the matmuls. A wrong temperature, mask
    or template, or dropout left on, shows here before it costs anything.
    """
    if not (largest <= MAX_RATIO_ERROR[dtype] and mean <= MAX_MEAN_RATIO_ERROR[dtype]):
        raise InputError(
            f"{where}: before any update the ratio of new to old probabilities must be 1; the largest error is "
            f"{largest:.1e} (at most {MAX_RATIO_ERROR[dtype]:.0e}), the mean error {mean:.1e} (at most "
            f"{MAX_MEAN_RATIO_ERROR[dtype]:.0e}); sampler and trainer disagree; set old_logprobs to "
            "recompute and report it"
        )


def check_padding_invariance(
    lm: LanguageModel, scalar: ScalarModel | None, sequences: Sequence[TokenSequence], where: str
) -> float:
    """Return how far log-probabilities, and scores if a scalar model is given, move with the company in the batch.

    Raises `InputError` if they move by more than rounding: then padding or positions leak into the model.
    """
    dtype = lm.device.compute_dtype
    together = torch.cat(completion_logprobs(lm, sequences))
    alone = torch.cat([completion_logprobs(lm, [sequence])[0] for sequence in sequences])
    error, what = float((together - alone).abs().max()), f"log-probabilities of {lm.name}"
    if scalar is not None:
        scores = score_sequences(scalar, sequences)
        lone_scores = torch.cat([score_sequences(scalar, [sequence]) for sequence in sequences])
        score_error = float((scores - lone_scores).abs().max())
        if score_error > error:
            error, what = score_error, f"scores of {scalar.name}"
    if not error <= MAX_PADDING_ERROR[dtype]:
        raise InputError(
            f"{where}: {what} change by {error:.2e} with the other rows of a batch (at most "
            f"{MAX_PADDING_ERROR[dtype]:.0e}); padding or positions leak; this architecture is not supported as it is"
        )
    return error


def check_end_token_supervised(chat: ChatFormat, batch: TokenBatch, where: str) -> None:
    """Raise `InputError` unless every completed sequence of `batch` ends in an end token that is a target.

    A model whose end token is masked from the loss never learns to stop.
    """
    for _, row, _, end in batch.sequence_rows:
        last = int(batch.input_ids[row, end - 1])
        is_target = bool(batch.target_mask[row, end - 1])
        if last not in chat.end_ids or not is_target:
            raise InputError(
                f"{where}: a completion ends in token {last} (a target: {is_target}); expected one of "
                f"{sorted(chat.end_ids)} among the targets; correct the end of the chat template"
            )


def check_same_rendering(lm: LanguageModel, others: Sequence[LanguageModel | ScalarModel], where: str) -> None:
    """Raise `InputError` if a model that reads the policy's token ids has another tokenizer or template than `lm`."""
    for other in others:
        if other.chat.render_hash != lm.chat.render_hash:
            raise InputError(
                f"{where}: {other.name} writes conversations otherwise than {lm.name} (render hash "
                f"{other.chat.render_hash}, not {lm.chat.render_hash}); expected the same tokenizer and chat template; "
                "start both from one model"
            )


def masked_row_share(batches: Sequence[TokenBatch]) -> float:
    """Return the share of sequences without a single target, on which a run trains nothing."""
    has_target = [
        bool(batch.target_mask[row, start:end].any()) for batch in batches for _, row, start, end in batch.sequence_rows
    ]
    return 1.0 - sum(has_target) / max(len(has_target), 1)


def check_disjoint_splits(parts: Mapping[str, Sequence[Prompt]]) -> None:
    """Raise `InputError` if a prompt group (user, question, document) stands in two of the named parts."""
    owners: dict[str, str] = {}
    for name, prompts in parts.items():
        for prompt in prompts:
            owner = owners.setdefault(prompt.prompt_group_id, name)
            if owner != name:
                raise InputError(
                    f"prompt group {prompt.prompt_group_id} stands in both {owner} and {name} (prompt {prompt.id}); "
                    "expected each group on one side; split by prompt_group_id"
                )
