"""`qinglan classify`: a binary classifier fine-tuned, or probed linearly, from any model on texts with labels.

The single stage of weak-to-strong generalization. What comes out is an ordinary directory that
`AutoModelForSequenceClassification` opens, with its accuracy and calibration on texts of groups that training did not
see.
"""

from typing import Any, Literal

import numpy as np
from pydantic import Field

from qinglan.cli import CommandResult, Options
from qinglan.commands.stage_inputs import count, open_run
from qinglan.commands.stage_report import Curve, StageFindings, conclude
from qinglan.core.config import Config
from qinglan.core.device import Device, Dtype, prepare_process
from qinglan.core.errors import InputError
from qinglan.core.files import write_json
from qinglan.core.run import Measure
from qinglan.data.labelled import LabelledCase, LabelledFileConfig, Sizes, load_labelled, split_sides
from qinglan.evals import figures
from qinglan.evals.recovery import accuracy, correct_answers, reliability_of
from qinglan.evals.report import Figure, Section
from qinglan.learn.classifier import ClassifierConfig, train_classifier
from qinglan.learn.labelled import Labelled
from qinglan.learn.probe import fit_probe
from qinglan.models.cases import case_features, case_length, verdict_logits
from qinglan.models.chat import TemplateName
from qinglan.models.classifier import case_logits
from qinglan.models.language_model import LanguageModel, load_language_model, max_context
from qinglan.tasks.base_models import resolve_model


class ClassifyCommand(Config):
    """A binary classifier from a model and a file of texts with labels."""

    model: str
    """Where training starts: a Hugging Face causal LM directory, or a size of the built-in family."""
    data: LabelledFileConfig = LabelledFileConfig()
    """The texts and their labels."""
    template: TemplateName = "own"
    """Chat template of the model; texts are written plainly, so it only has to exist."""
    device: str = "auto"
    """cpu, cuda or auto."""
    dtype: Dtype = "auto"
    """Precision of matrix products; auto is bfloat16 on a GPU that has it, else float32. Losses are float32 always."""
    method: Literal["fine-tuning", "probe"] = "fine-tuning"
    """Train all weights, or a linear probe on the frozen model's last state."""
    num_train: int = Field(default=2000, ge=16)
    """Most cases to train on, balanced."""
    num_valid: int = Field(default=200, ge=16)
    """Most cases to choose the checkpoint by."""
    num_test: int = Field(default=500, ge=16)
    """Most cases to measure on."""
    training: ClassifierConfig = ClassifierConfig()
    """The fine-tuning itself."""

    @classmethod
    def presets(cls) -> dict[str, dict[str, Any]]:
        """Return the presets by scale; the first is the default."""
        return {
            "small": {},
            "paper": {
                "training": ClassifierConfig.paper().model_dump(),
                "num_train": 20000,
                "num_valid": 1000,
                "num_test": 5000,
            },
        }


CURVES = (
    Curve("Loss", "nats per case", {"training": "loss", "validation": "valid_loss"}),
    Curve("Agreement with the labels", "accuracy", {"training": "agreement", "validation": "valid_agreement"}),
    Curve("Gradient norm", "", {"norm": "grad_norm"}),
    Curve("Learning rate", "", {"rate": "lr"}),
)


def classify(config: ClassifyCommand, options: Options) -> CommandResult:
    """Train a classifier and measure it on held-out groups."""
    prepare_process()
    seed = options.seed
    lm = load_language_model(
        resolve_model(config.model), Device.detect(config.device, config.dtype), template=config.template
    )
    items = load_labelled(config.data)
    kept = fitting(lm, items, config.data)
    sizes = Sizes(config.num_train // 2, config.num_valid, config.num_test)
    sides = split_sides(kept, sizes, seed=seed, test_seed=seed, where=str(config.data.file))
    train, valid = _labelled(sides.half_a + sides.half_b), _labelled(sides.valid)
    test = [item.case for item in sides.test]
    counts = {
        "rows/training": count(len(train.cases)),
        "rows/validation": count(len(valid.cases)),
        "rows/test": count(len(test)),
        "rows/too_long": count(len(items) - len(kept)),
    }
    with open_run(config, options, "classify", {"data": config.data.file}) as run:
        stage = run.stage("classifier", config.training, config.method, config.model, sizes._asdict(), run.inputs)
        if config.method == "probe":
            probe = fit_probe(case_features(lm, train.cases), np.array(train.targets))
            write_json(stage.dir / "model" / "probe.json", {"weights": probe.weights.tolist(), "bias": probe.bias})
            stage.finish()
            logits = probe.logits(case_features(lm, test))
        else:
            model = train_classifier(lm, train, config.training, stage=stage, seed=seed, valid=valid)
            stage.finish()
            logits = case_logits(model, test).double().numpy()
        return conclude(run, stage, findings_of(lm, sides.test, logits, counts, seed))


def fitting(lm: LanguageModel, items: list[LabelledCase], config: LabelledFileConfig) -> list[LabelledCase]:
    """Return the items that fit into the model's context; longer ones stop the command or are left out."""
    kept = [item for item in items if case_length(lm, item.case) <= max_context(lm.model)]
    if len(kept) < len(items) and (config.on_bad == "stop" or not kept):
        first = next(item for item in items if item not in kept)
        raise InputError(
            f"{config.file}: text {first.case.texts[0][:40]!r}... has {case_length(lm, first.case)} tokens, over the "
            f"context of {max_context(lm.model)}; {len(items) - len(kept)} of {len(items)} texts do; shorten them, or "
            "leave them out with --data.on-bad skip"
        )
    return kept


def _labelled(items: list[LabelledCase]) -> Labelled:
    return Labelled([item.case for item in items], [float(item.label) for item in items])


def findings_of(
    lm: LanguageModel, test: list[LabelledCase], logits: np.ndarray, counts: dict[str, Measure], seed: int
) -> StageFindings:
    """Return accuracy and calibration on the test side, with chance and the base model's zero-shot beside them."""
    truth = np.array([float(item.label) for item in test])
    groups = [item.case.prompt_group_id for item in test]
    right = correct_answers(logits[None], truth)
    measured = {"accuracy": accuracy(right, groups, seed=seed)}
    reliability = reliability_of(logits[None], truth, groups, seed=seed)
    measured |= {"calibration_error": reliability.expected_error, "brier": reliability.brier}
    rows = {"floor": Measure(0.5, None, None, len(test), "accuracy"), "student": measured["accuracy"]}
    if test[0].case.verdicts is not None:
        asked = verdict_logits(lm, [item.case for item in test]).double().numpy()
        measured["zero_shot_accuracy"] = accuracy(correct_answers(asked[None], truth), groups, seed=seed)
        rows["zero_shot"] = measured["zero_shot_accuracy"]
    drawn = Figure(
        "Reliability", figures.reliability(reliability.bins), "Predicted probability against observed share."
    )
    return StageFindings(
        title="Classifier",
        verdict=(f"Right in {measured['accuracy']} of held-out cases; chance is one half.",),
        metrics=measured | counts,
        rows=rows,
        row_names={"floor": "Chance", "student": "Classifier", "zero_shot": "Base model, zero-shot"},
        rows_caption="Share of balanced held-out cases classified rightly; groups are held out whole.",
        curves=CURVES,
        sections=(Section("Is it calibrated?", figures=(drawn,)),),
    )
