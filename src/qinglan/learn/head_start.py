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
from qinglan.models.cases import case_features
from qinglan.models.classifier import HeadStart, word_rows
from qinglan.models.language_model import LanguageModel

SURE = 0.9
"""Mean probability of its own verdicts from which a model counts as knowing what the words are about: what a calibrated
one is right in."""
NUM_ASKED = 600
"""Cases that are asked at the most, which is a small part of what training costs."""


def choose_head(lm: LanguageModel, labelled: Labelled, wanted: HeadStart | Literal["auto"]) -> HeadStart:
    """Return the wanted start; for "auto" the verdict words where the model is sure of its verdicts, else a probe.

    It is where the verdicts at which a head of the words starts, cut at their median since classes are balanced, have a
    mean probability of at least `SURE` and agree with more labels than 97.5% of coin tosses would: words can also be
    used the other way round. Soft labels are cut at their median too. A model unsure of its words starts poorly from
    them (`LOG.md`).
    """
    if wanted != "auto":
        return wanted
    words = {case.verdicts for case in labelled.cases}
    [chosen] = words if len(words) == 1 else [None]
    rows = None if chosen is None or len(labelled.cases[0].texts) != 1 else word_rows(lm, chosen)
    if rows is None:
        return "probe"
    verdicts = case_features(lm, labelled.cases[:NUM_ASKED]).double() @ (rows[1] - rows[0]).double()
    margins = verdicts - verdicts.quantile(0.5)
    labels = np.array(labelled.targets[:NUM_ASKED])
    is_one = labels > (0.5 if set(labels) <= {0.0, 0.5, 1.0} else np.median(labels))
    sureness = float(torch.sigmoid(margins.abs()).mean())
    agreement = float(np.mean((margins > 0).numpy() == is_one))
    return "words" if sureness >= SURE and agreement > 0.5 + 1.96 * (0.25 / len(labels)) ** 0.5 else "probe"


def probe_direction(lm: LanguageModel, labelled: Labelled) -> Tensor:
    """Return the direction [D] of a linear probe without bias (heads have none), fitted to the labels."""
    probe = fit_probe(case_features(lm, labelled.cases), np.array(labelled.targets), with_bias=False)
    return torch.tensor(probe.weights, dtype=torch.float32)
