"""Alarms while a policy is trained: the ways in which reinforcement learning from a learned score goes wrong.

KL jump, tokens far from the reference policy, length drift, entropy collapse, scores beyond the range of the reward
model's training, and the gold score falling while the proxy score rises (Gao et al. 2022). An alarm is a message, never
a stop: the run goes on and its report shows what happened. Pure functions of the iterations logged so far, so that a
resumed run raises the same alarms.
"""

from collections.abc import Mapping, Sequence

from pydantic import Field

from qinglan.core.config import Config

Row = Mapping[str, float]
"""Metrics of one iteration, as `train_ppo` logs them."""


class AlarmConfig(Config):
    """When to raise an alarm."""

    window: int = Field(default=5, ge=1)
    """Iterations that are averaged before they are compared."""
    kl_jump: float = Field(default=5.0, gt=0)
    """Rise of the KL from one iteration to the next, in nats per completion."""
    length_drift: float = Field(default=0.5, gt=0)
    """Change of the mean length against the first iterations, up or down, as a fraction of it."""
    entropy_collapse: float = Field(default=0.2, gt=0, lt=1)
    """The entropy counts as collapsed below this fraction of the first iterations' entropy."""
    large_kl_share: float = Field(default=0.01, gt=0, le=1)
    """Share of tokens whose log-ratio to the reference exceeds 10 nats; they are counted, never clamped."""
    share_outside_range: float = Field(default=0.25, gt=0, le=1)
    """Share of an iteration's scores outside the range of a sample of what the reward model learnt from."""
    gold_sigma: float = Field(default=3.0, gt=0)
    """Standard errors by which the gold score must have fallen from its best, and the proxy score risen since then."""


def find_alarms(history: Sequence[Row], config: AlarmConfig) -> dict[str, str]:
    """Return the alarms that the newest iteration raises, by kind; `history` holds all iterations, oldest first.

    A check whose metrics are absent (no gold score, no known range), or which wants more iterations, raises nothing.
    """
    found = {
        "kl_jump": _kl_jump(history, config),
        "large_kl_tokens": _large_kl_tokens(history, config),
        "length_drift": _length_drift(history, config),
        "entropy_collapse": _entropy_collapse(history, config),
        "score_out_of_range": _score_out_of_range(history, config),
        "gold_falls": _gold_falls(history, config),
    }
    iteration = len(history) - 1
    return {kind: f"{kind}: iteration {iteration}: {text}" for kind, text in found.items() if text}


def _mean(rows: Sequence[Row], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)


def _kl_jump(history: Sequence[Row], config: AlarmConfig) -> str:
    if len(history) < 2:
        return ""
    before, now = history[-2]["kl"], history[-1]["kl"]
    if now - before <= config.kl_jump:
        return ""
    return f"KL rose from {before:.2f} to {now:.2f} nats per completion in one iteration; lower the learning rate"


def _large_kl_tokens(history: Sequence[Row], config: AlarmConfig) -> str:
    share = history[-1]["large_kl_share"]
    if share < config.large_kl_share:
        return ""
    return f"{share:.1%} of the tokens are over 10 nats from the reference policy; raise kl_coef"


def _length_drift(history: Sequence[Row], config: AlarmConfig) -> str:
    if len(history) < 2 * config.window:
        return ""
    start, now = _mean(history[: config.window], "length"), _mean(history[-config.window :], "length")
    if abs(now / start - 1.0) <= config.length_drift:
        return ""
    return f"mean length went from {start:.1f} to {now:.1f} tokens; compare scores at equal length"


def _entropy_collapse(history: Sequence[Row], config: AlarmConfig) -> str:
    if len(history) < 2 * config.window:
        return ""
    start, now = _mean(history[: config.window], "entropy"), _mean(history[-config.window :], "entropy")
    if now >= config.entropy_collapse * start:
        return ""
    return f"entropy fell from {start:.3f} to {now:.3f} nats per token; raise kl_coef or lower the learning rate"


def _score_out_of_range(history: Sequence[Row], config: AlarmConfig) -> str:
    share = history[-1].get("score_outside_range", 0.0)
    if share < config.share_outside_range:
        return ""
    return f"{share:.0%} of the scores lie outside the range of the reward model's training; do not trust them"


def _gold_falls(history: Sequence[Row], config: AlarmConfig) -> str:
    """The last window against the earlier, whole window with the best gold score."""
    rows = [row for row in history if "gold" in row]
    width = config.window
    if len(rows) < 2 * width or "gold" not in history[-1]:
        return ""
    now = rows[-width:]
    earlier = [rows[i : i + width] for i in range(len(rows) - 2 * width + 1)]
    best = max(earlier, key=lambda window: _mean(window, "gold"))
    fall, fall_error = _rise(now, best, "gold")
    rise, rise_error = _rise(best, now, "score")
    if fall <= config.gold_sigma * fall_error or rise <= config.gold_sigma * rise_error:
        return ""
    return (
        f"the gold score fell from {_mean(best, 'gold'):.3f} to {_mean(now, 'gold'):.3f} while the score rose from "
        f"{_mean(best, 'score'):.3f} to {_mean(now, 'score'):.3f}; the policy exploits the scorer"
    )


def _rise(before: Sequence[Row], after: Sequence[Row], name: str) -> tuple[float, float]:
    """Return the rise of a mean between two windows with its standard error, from the spread over prompts."""
    variance = 0.0
    for rows in (before, after):  # variance of the mean of `len(rows)` means
        variance += sum(row[f"{name}_error"] ** 2 for row in rows) / len(rows) ** 2
    return _mean(after, name) - _mean(before, name), variance**0.5
