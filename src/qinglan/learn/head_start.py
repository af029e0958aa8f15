"""What the head of a classifier starts from, decided by the labels that it is given and by nothing else.

A random head first distorts what a pretrained model knows (Kumar et al. 2022). Two starts do not: the unembedding rows
of the verdict words, so that training begins at the model's own zero-shot verdict (Burns et al. 2023, appendix A, take
the rows of "0" and "1"), and a linear probe of the labels, which needs no words but begins at whatever the labels say.
"""

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from qinglan.learn.labelled import Labelled
from qinglan.learn.probe import fit_probe
from qinglan.models.cases import case_features, case_length, verdict_logits
from qinglan.models.classifier import HeadStart
from qinglan.models.language_model import LanguageModel, max_context

SURE = 0.9
"""Mean probability of its own verdicts from which a model counts as knowing what the words are about: what a calibrated
one is right in."""
NUM_ASKED = 600
"""Cases that are asked zero-shot at the most, which is a small part of what training costs."""


def choose_head(lm: LanguageModel, labelled: Labelled, wanted: HeadStart | Literal["auto"]) -> HeadStart:
    """Return the wanted start; for "auto" the verdict words where the model is sure of its verdicts, else a probe.

    It is where its zero-shot verdicts, cut at their median since classes are balanced, have a mean probability of at
    least `SURE` and agree with more labels than 97.5% of coin tosses would: words can also be used the other way round.
    Words that it is unsure of would be a poor start (`LOG.md`). Texts that leave no room for a word are not asked.
    """
    if wanted != "auto":
        return wanted
    words = labelled.cases[0].verdicts
    if words is None or len(labelled.cases[0].texts) != 1:
        return "probe"
    room = max_context(lm.model) - max(len(lm.tokenizer.encode(f" {word}", add_special_tokens=False)) for word in words)
    asked = [i for i, case in enumerate(labelled.cases[:NUM_ASKED]) if case_length(lm, case) <= room]
    if not asked:
        return "probe"
    labels = np.array([labelled.targets[i] for i in asked]) > 0.5
    verdicts = verdict_logits(lm, [labelled.cases[i] for i in asked]).double()
    margins = verdicts - verdicts.quantile(0.5)
    sureness = float(torch.sigmoid(margins.abs()).mean())
    agreement = float(np.mean((margins > 0).numpy() == labels))
    return "words" if sureness >= SURE and agreement > 0.5 + 1.96 * (0.25 / len(labels)) ** 0.5 else "probe"


def probe_direction(lm: LanguageModel, labelled: Labelled) -> Tensor:
    """Return the direction [D] of a linear probe without bias (heads have none), fitted to the labels."""
    probe = fit_probe(case_features(lm, labelled.cases), np.array(labelled.targets), with_bias=False)
    return torch.tensor(probe.weights, dtype=torch.float32)
