"""What the head of a classifier starts from: decided by the model and the labels that it is given, never by the truth.

A random head first distorts what a pretrained model knows (Kumar et al. 2022). Two starts do not: the unembedding rows
of the verdict words, so that training begins at the model's own zero-shot verdict (Burns et al. 2023, appendix A, take
the rows of "0" and "1"), and a linear probe of the labels, which needs no words but begins at whatever the labels say.

Shapes: n cases, D hidden units.
"""

from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from qinglan.learn.labelled import Labelled
from qinglan.learn.probe import fit_probe
from qinglan.models.cases import case_features
from qinglan.models.classifier import HeadStart, word_rows
from qinglan.models.language_model import LanguageModel

SURE = 0.9
"""Mean probability of its own verdicts from which a model counts as knowing what the words are about: what a calibrated
one is right in."""


class Start(NamedTuple):
    """How a head starts; `direction` [D] is the probe's, which the head takes over (`set_direction`)."""

    head: HeadStart
    direction: Float[Tensor, " D"] | None = None


def choose_start(lm: LanguageModel, labelled: Labelled, wanted: HeadStart | Literal["auto"]) -> Start:
    """Return the wanted start; for "auto" the verdict words where the model is sure of them, else a probe.

    Raises `InputError` where a probe cannot be fitted: labels of one class, features that are not finite.
    """
    if wanted != "auto" and wanted != "probe":
        return Start(wanted)
    features = case_features(lm, labelled.cases)
    if wanted == "auto" and is_sure_of_words(lm, labelled, features):
        return Start("words")
    probe = fit_probe(features, np.array(labelled.targets), with_bias=False)  # heads have no bias
    return Start("probe", torch.tensor(probe.weights, dtype=torch.float32))


def is_sure_of_words(lm: LanguageModel, labelled: Labelled, features: Float[Tensor, "n D"]) -> bool:
    """Return True if the verdicts at which a head of the words would start are sure, and labels do not say otherwise.

    Cut at their median, since classes are balanced, they need a mean probability of at least `SURE`, and must agree
    with more labels than 97.5% of coin tosses would: words can also be used the other way round. Soft labels are cut at
    their median too. A model unsure of its words starts poorly from them (`LOG.md`).
    """
    words = {case.verdicts for case in labelled.cases}
    [chosen] = words if len(words) == 1 else [None]
    rows = None if chosen is None or len(labelled.cases[0].texts) != 1 else word_rows(lm, chosen)
    if rows is None:
        return False
    verdicts = features.double() @ (rows[1] - rows[0]).double()
    margins = verdicts - verdicts.quantile(0.5)
    labels = np.array(labelled.targets)
    is_one = labels > (0.5 if set(labels) <= {0.0, 0.5, 1.0} else np.median(labels))
    sureness = float(torch.sigmoid(margins.abs()).mean())
    agreement = float(np.mean((margins > 0).numpy() == is_one))
    return sureness >= SURE and agreement > 0.5 + 1.96 * (0.25 / len(labels)) ** 0.5
