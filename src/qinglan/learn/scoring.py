"""Asking a scorer, which may be anybody's function: every answer is checked before it can reach the policy.

A scorer that raises, gives too few or too many numbers, or None, text, NaN or infinity stops the run with one line
that names the prompt. A gold scorer only measures: what it could not score (NaN) is counted and left out, never read
as wrong.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

from qinglan.core.errors import InputError
from qinglan.core.records import Completion, FinishReason, Prompt, Scorer

MissingEOS = Literal["subtract", "replace", "keep"]


def ask_scorer(
    scorer: Scorer,
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    *,
    what: str = "the scorer",
    allow_unscored: bool = False,
) -> list[float]:
    """Return one finite number for each (prompt, completion); NaN passes only with `allow_unscored`.

    Raises `InputError` naming the first prompt whose score is unusable.
    """
    try:
        answers = list(scorer(prompts, completions))
    except InputError:
        raise
    except Exception as error:  # the scorer is the user's own code: whatever it raises is for the user to read
        guilty = _first_that_raises(scorer, prompts, completions)
        raise InputError(
            f"{what}: raised {type(error).__name__}: {error} at {_name(guilty)}; expected one number for each "
            "completion; correct the function"
        ) from error
    if len(answers) != len(prompts):
        missing = prompts[min(len(answers), len(prompts) - 1)]
        raise InputError(
            f"{what}: gave {len(answers)} scores for {len(prompts)} completions, so {_name(missing)} and those after "
            "it have none of their own; expected one number for each"
        )
    return [_number(answer, prompt, what, allow_unscored) for answer, prompt in zip(answers, prompts, strict=True)]


def _number(answer: Any, prompt: Prompt, what: str, allow_unscored: bool) -> float:
    try:
        number = None if isinstance(answer, str | bytes) else float(answer)
    except (TypeError, ValueError):
        number = None
    if number is None or math.isinf(number) or (math.isnan(number) and not allow_unscored):
        raise InputError(f"{what}: gave {answer!r} for {_name(prompt)}; expected a finite number")
    return number


def _first_that_raises(scorer: Scorer, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Prompt | None:
    """Return the first prompt at which the scorer raises when it is asked one by one; None if only the batch fails."""
    for prompt, completion in zip(prompts, completions, strict=True):
        try:
            list(scorer([prompt], [completion]))
        except Exception:  # any error at all marks the prompt; the first one is reported by the caller
            return prompt
    return None


def _name(prompt: Prompt | None) -> str:
    if prompt is None:
        return "a whole batch (no single prompt fails on its own)"
    text = prompt.messages[-1].content
    return f"prompt {prompt.id} ({text[:40]!r}{'...' if len(text) > 40 else ''})"


def charge_missing_eos(
    scores: Sequence[float], finish_reasons: Sequence[FinishReason], rule: MissingEOS, penalty: float
) -> list[float]:
    """Return the scores after the rule for completions that were cut at the length limit.

    "subtract" takes `penalty` off the score, "replace" puts `-penalty` in its place (Stiennon et al. 2020: -1),
    "keep" does nothing. Whether a completion ended is what the sampler said, never inferred from its length or last
    id."""
    if rule == "keep":
        return list(scores)
    return [
        score if reason != "length" else (score - penalty if rule == "subtract" else -penalty)
        for score, reason in zip(scores, finish_reasons, strict=True)
    ]
