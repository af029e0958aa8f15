"""What a base model can do: rates of every probe of the built-in world, decoded greedily or chosen by probability."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from qinglan.core.run import Measure
from qinglan.evals.metrics import calibration, mean_with_interval
from qinglan.models.generate import SamplingConfig, generate
from qinglan.models.language_model import LanguageModel, TokenSequence, completion_logprobs
from qinglan.tasks.chess_probes import CHESS_PROBES
from qinglan.tasks.code_probes import CODE_PROBES
from qinglan.tasks.judging_probes import CHOICES, Choice
from qinglan.tasks.probes import PROBES, draw_items

TAXED = ("copying", "recall", "two_hops", "closed_qa", "extraction", "sorting", "sums", "judging_claims")
"""The probes of closed tasks with which an alignment tax is measured before and after."""
WITHOUT_EXTRAS = (*PROBES, *CODE_PROBES, *CHOICES)
"""Every probe that needs no extra of the package."""


def probe_capabilities(
    lm: LanguageModel, names: Sequence[str] = WITHOUT_EXTRAS, *, num_items: int = 200, seed: int = 0
) -> dict[str, Measure]:
    """Return the pass rate of every named probe with its 95% interval; where it judges, its calibration error too."""
    written = {**PROBES, **CODE_PROBES, **CHESS_PROBES}
    measures = {}
    judgements: list[Judgement] = []
    for name in names:
        if name in CHOICES:
            judged = judge(lm, draw_items(CHOICES, name, num_items, seed), seed)
            judgements += judged
            passed = [float(one.is_right) for one in judged]
        else:
            probes = draw_items(written, name, num_items, seed)
            config = SamplingConfig(temperature=0.0, max_new_tokens=max(probe.max_new_tokens for probe in probes))
            rows = generate(lm, [document_start(lm, probe.beginning) for probe in probes], config, seed=seed)
            passed = [float(probe.passes(row[0].text)) for probe, row in zip(probes, rows, strict=True)]
        measures[name] = mean_with_interval(passed, seed=seed, unit="rate")
    if judgements:
        confidence, outcomes = [one.confidence for one in judgements], [float(one.is_right) for one in judgements]
        measures["calibration_error"] = calibration(confidence, outcomes, seed=seed).expected_error
    return measures


def document_start(lm: LanguageModel, text: str) -> list[int]:
    """Return the token ids of the beginning of a document."""
    return [lm.tokenizer.bos_token_id, *lm.tokenizer(text, add_special_tokens=False).input_ids]


class Judgement(NamedTuple):
    """A model's choice among the options of an item."""

    probabilities: tuple[float, ...]
    """Of each option, among the options."""
    right: int

    @property
    def is_right(self) -> bool:
        """True if the most probable option is the right one."""
        return int(np.argmax(self.probabilities)) == self.right

    @property
    def confidence(self) -> float:
        """Probability of the chosen option."""
        return max(self.probabilities)


def judge(lm: LanguageModel, choices: Sequence[Choice], seed: int) -> list[Judgement]:
    """Let the model choose: softmax over the options' log-probabilities, after its own record where one is due."""
    starts = [document_start(lm, choice.beginning) for choice in choices]
    recording = [i for i, choice in enumerate(choices) if choice.after_record is not None]
    if recording:
        config = SamplingConfig(temperature=0.0, max_new_tokens=32, stop=(".",))
        for i, row in zip(recording, generate(lm, [starts[i] for i in recording], config, seed=seed), strict=True):
            recalled = f"{row[0].text.strip()}.{choices[i].after_record}"
            starts[i] = starts[i] + lm.tokenizer(recalled, add_special_tokens=False).input_ids
    sequences = [
        TokenSequence([*start, *lm.tokenizer(option, add_special_tokens=False).input_ids], len(start))
        for start, choice in zip(starts, choices, strict=True)
        for option in choice.options
    ]
    scores = iter([float(values.sum()) for values in completion_logprobs(lm, sequences)])
    found = []
    for choice in choices:
        logprobs = np.array([next(scores) for _ in choice.options])
        weights = np.exp(logprobs - logprobs.max())
        found.append(Judgement(tuple((weights / weights.sum()).tolist()), choice.right))
    return found
