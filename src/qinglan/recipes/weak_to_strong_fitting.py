"""What the cells of weak-to-strong learning share: settings, fine-tuning with its measures, probes, weak labels."""

from typing import Any

import numpy as np

from qinglan.core.records import Case
from qinglan.core.rng import permutation, stream_seed
from qinglan.core.run import Run, Stage
from qinglan.evals.recovery import correct_answers
from qinglan.learn.classifier import ClassifierConfig, train_classifier
from qinglan.learn.labelled import Labelled
from qinglan.learn.probe import fit_probe
from qinglan.models.cases import case_features, encode_case
from qinglan.models.classifier import TextClassifier, case_logits, encoded_logits, margins
from qinglan.models.language_model import LanguageModel
from qinglan.recipes.weak_to_strong_config import WeakToStrongConfig
from qinglan.recipes.weak_to_strong_data import Reading, labeller_of, num_parameters
from qinglan.recipes.weak_to_strong_grid import Cell
from qinglan.supervisors.weak import load_labels

UNSCALED = 2_000_000
"""Parameters up to which the learning rate is as it is given."""
NUM_CURVE = 200
"""Test cases on which the curve of true accuracy is drawn; the first half also chooses the oracle's checkpoint."""


def training_of(config: WeakToStrongConfig, cell: Cell) -> ClassifierConfig:
    """Return the settings of a cell's fine-tuning, with the rate for its model's size."""
    optimizer = config.training.optimizer
    factor = min(1.0, UNSCALED / num_parameters(config, cell.model)) ** config.rate_exponent
    optimizer = optimizer.model_copy(update={"learning_rate": optimizer.learning_rate * factor})
    if cell.method.startswith("released"):
        loss = "confidence" if cell.method == "released_confidence" else "naive"
        return config.training.as_released().model_copy(update={"loss": loss, "optimizer": optimizer})
    loss = cell.method if cell.method in ("confidence", "product") else "naive"
    return config.training.model_copy(update={"loss": loss, "optimizer": optimizer})


def fit_seed(run: Run, cell: Cell) -> int:
    """Return the seed of heads and orders: one for student and ceiling, whatever the method."""
    return stream_seed(run.seed, "fit", cell.task, cell.seed)


def fine_tuned(
    run: Run,
    cell: Cell,
    stage: Stage,
    lm: LanguageModel,
    read: Reading,
    *,
    taught: Labelled,
    valid: Labelled,
    training: ClassifierConfig,
) -> dict[str, Any]:
    """Train, log the true accuracy along the way, and return logits on the test side and the saliency probe's."""
    shown = [encode_case(lm, case) for case in read.cases["test"][:NUM_CURVE]]
    truth = np.array(read.truth["test"][:NUM_CURVE])

    def measure(model: TextClassifier) -> dict[str, float]:
        right = correct_answers(np.array(margins(encoded_logits(model, shown))), truth)
        half = len(right) // 2
        return {"true_accuracy": right.mean(), "oracle": right[:half].mean(), "oracle_measured": right[half:].mean()}

    seed = fit_seed(run, cell)
    model = train_classifier(lm, taught, training, stage=stage, seed=seed, valid=valid, measure=measure)
    trunk = lm._replace(model=model.model)
    return {
        "test": case_logits(model, read.cases["test"]).tolist(),
        "saliency": probe_logits(trunk, read, read.truth["half_b"]),
    }


def probe_logits(lm: LanguageModel, read: Reading, targets: Any) -> list[float]:
    """Return the test logits of a linear probe on a model's states of half B, fitted to `targets`."""
    is_pair = len(read.cases["test"][0].texts) == 2
    probe = fit_probe(case_features(lm, read.cases["half_b"]), np.array(targets), with_bias=not is_pair)
    return list(probe.logits(case_features(lm, read.cases["test"])))


def weak_labels(run: Run, config: WeakToStrongConfig, cell: Cell, read: Reading) -> tuple[Labelled, Labelled]:
    """Return half B and the validation cases with the labels of the cell's supervisor, or of the link before it."""
    directory = run.dir / "stages" / labeller_of(config, cell).name
    seen = frozenset(case.prompt_group_id for case in read.cases["half_a"])
    labels = {
        name: load_labels(directory / f"{name}.jsonl", read.cases[name], groups_seen=seen)
        for name in ("half_b", "valid")
    }
    half_b, valid = (Labelled(read.cases[name], [one.p_one for one in given]) for name, given in labels.items())
    return half_b, valid


def shots(config: WeakToStrongConfig, weak: Labelled, seed: int) -> list[tuple[Case, int]]:
    """Return examples for prompting with their weak labels, by turns of class 0 and class 1.

    Classes are balanced, so class 1 is the half with the larger weak labels, even where a supervisor leans to one side.
    """
    ranked = sorted(range(len(weak.cases)), key=lambda i: weak.targets[i])
    halves = (ranked[: len(ranked) // 2], ranked[len(ranked) // 2 :])
    drawn = [[half[i] for i in permutation(len(half), seed, "shots", label)] for label, half in enumerate(halves)]
    return [(weak.cases[drawn[number % 2][number // 2]], number % 2) for number in range(config.num_shots)]
