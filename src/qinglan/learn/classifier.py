"""Fine-tuning of a binary classifier on hard, soft or weak labels (Burns et al. 2023, sections 3 and 4, appendix A).

One loop trains the weak supervisor (labels: the truth), the student (labels: what the supervisor says) and the ceiling
(labels: the truth, on the student's own texts); they differ in what the recipe hands in. Pairs of texts, for reward
models, are cases with two texts: p = sigmoid(z(first) - z(second)), in an order drawn at random, without which "half of
the batch above the threshold" would mean nothing.

The checkpoint is the last one, or the best by *these* labels on validation cases (the paper's early stopping, on weak
labels), or, named "oracle", the best by the recipe's `measure`, which may know the truth. `measure` is otherwise only
logged: the answer key never enters this file.

Departures from the paper: the confidence loss takes its threshold over a rolling buffer of predictions and not over one
small batch; gradients are clipped. `ClassifierConfig.released()` has the choices of the released code, each a setting.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from qinglan.core.config import Config
from qinglan.core.errors import InputError
from qinglan.core.rng import permutation, stream_seed
from qinglan.core.run import Stage
from qinglan.learn.batch import make_batches
from qinglan.learn.compiling import compile_trunks
from qinglan.learn.confidence import (
    Ramp,
    balanced_threshold,
    confidence_targets,
    confidence_weight,
    product_targets,
)
from qinglan.learn.gradients import Backward, accumulate
from qinglan.learn.head_start import Start, choose_start
from qinglan.learn.labelled import Example, Labelled, check_labelled, encode_examples
from qinglan.learn.losses import pairwise_loss
from qinglan.learn.optimize import (
    Checkpointer,
    OptimizerConfig,
    TrainingState,
    check_finite,
    clip_gradients,
    restore_training,
    set_lr,
    training_tensors,
)
from qinglan.models.adapters import LoRAConfig, end_of_training
from qinglan.models.classifier import (
    HeadStart,
    TextClassifier,
    classifier_from,
    load_classifier,
    logits_of_batch,
    save_classifier,
    sequence_logits,
    set_direction,
)
from qinglan.models.language_model import LanguageModel
from qinglan.models.trunk import num_at_once, share_of_budget

MeasureTruth = Callable[[TextClassifier], Mapping[str, float]]
"""What the recipe measures along training, by name; with `keep` "oracle" the largest "oracle" decides."""


class ClassifierConfig(Config):
    """Fine-tuning of a classifier; the defaults suit 0.2 to 2 million parameters and hundreds of short texts."""

    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=3e-4, warmup_fraction=0.1)
    """AdamW and its cosine schedule; at 1e-3 models of 2 million parameters forget what they know (`LOG.md`)."""
    num_epochs: int = Field(default=2, ge=1)
    """Passes over the cases (paper: 2 for NLP tasks, 1 for reward models)."""
    batch_size: int = Field(default=8, ge=1)
    """Cases per update (paper: 32; small here, so that few cases still make 200 updates and more)."""
    num_outputs: int = Field(default=2, ge=1, le=2)
    """Units of the head: one for each class, or a single logit; pairs of texts always have one."""
    head: Literal["auto"] | HeadStart = "auto"
    """First weights of the head: a linear probe of the same labels (Kumar et al. 2022: a random head first distorts
    what the model knows), the unembedding rows of the verdict words (paper: of "0" and "1"), N(0, 1/(D+1)), or zero.
    "auto": the words where the model is sure of its zero-shot verdicts (`learn/head_start.py`), else a probe."""
    loss: Literal["naive", "confidence", "product"] = "naive"
    """Cross-entropy against the labels, with the auxiliary confidence loss, or against the product with own
    predictions (released code only)."""
    confidence: float = Field(default=0.5, ge=0, le=1)
    """Largest weight of the hardened predictions, a_max (paper: 0.75 for the largest students, 0.5 otherwise)."""
    ramp_fraction: float = Field(default=0.2, ge=0, le=1)
    """Share of training over which that weight rises (paper: 0.2)."""
    ramp: Ramp = "linear"
    """It rises linearly to its largest, or as in the released code: slowly, then with a jump."""
    buffer_size: int = Field(default=128, ge=1)
    """Latest predictions over which the threshold is taken; the batch's size gives the threshold of one batch."""
    hardened_share: Literal["half", "weak"] = "half"
    """Share of predictions that the threshold makes class 1: half (paper, balanced data) or the mean weak label
    (released code)."""
    keep: Literal["last", "best", "oracle"] = "best"
    """Weights that are returned: the last ones, the best by these labels on validation cases (paper), or the best by
    the truth, which no honest supervisor has."""
    evaluate_every: int = Field(default=25, ge=1)
    """Updates between two looks at the validation cases and at what the recipe measures."""
    same_order: bool = False
    """Take the cases in the same order in every epoch, as the released code does."""
    max_tokens: int = Field(default=8192, ge=1)
    """Tokens in one forward pass, padding included. Changes speed and memory, never the gradient."""
    lora: LoRAConfig = LoRAConfig()
    """Train a low-rank adapter in place of every weight; without dropout."""
    compile: bool = False
    """Compile the trunk's training step with `torch.compile`; a run is then repeatable, but not to the last bit."""
    checkpoint_every: int = Field(default=100, ge=1)
    """Updates between two checkpoints."""

    @model_validator(mode="after")
    def _predicts_twice_the_same(self) -> Self:
        if self.lora.dropout > 0:
            raise ValueError("lora.dropout: the confidence loss reads the same predictions twice; set it to 0")
        return self

    @classmethod
    def paper(cls) -> Self:
        """Return the paper's NLP setting: 2 epochs, batch 32, head from words; its learning rates are not published."""
        return cls(optimizer=OptimizerConfig(learning_rate=1e-5), num_epochs=2, batch_size=32, head="words")

    @classmethod
    def released(cls) -> Self:
        """Return the choices of the code released with the paper, its jump included; learning rate for small GPT-2."""
        optimizer = OptimizerConfig(learning_rate=5e-5, final_lr_fraction=0.0, betas=(0.9, 0.999))
        return cls(optimizer=optimizer, num_epochs=2, batch_size=32).as_released()

    def as_released(self) -> Self:
        """Return these settings with what the released code does otherwise than the paper says, at any size and rate:
        head from zero, a ramp that jumps, a threshold of one batch at the mean weak label, last weights, one order."""
        return self.model_copy(
            update={
                "head": "zero",
                "ramp": "jump",
                "ramp_fraction": 0.1,
                "buffer_size": self.batch_size,
                "hardened_share": "weak",
                "keep": "last",
                "same_order": True,
            }
        )


def train_classifier(
    start: LanguageModel,
    labelled: Labelled,
    config: ClassifierConfig,
    *,
    stage: Stage,
    seed: int,
    valid: Labelled | None = None,
    measure: MeasureTruth | None = None,
) -> TextClassifier:
    """Return a classifier fitted to `labelled`, also saved as a model directory in `stage.dir/"model"`.

    Args:
        start: the model whose trunk is copied.
        labelled: cases of one text each, or of two each, with their labels; own records are written already.
        config: settings.
        stage: folder for checkpoints and result; a killed stage goes on from its last checkpoint, bit-identical on CPU.
        seed: decides head, order of the cases and order inside pairs.
        valid: held-out cases with labels of the same making; they choose the checkpoint where `keep` is "best".
        measure: called now and then with the model; what it returns is logged, and decides where `keep` is "oracle".

    Raises:
        InputError: labels of one class only or outside [0, 1], texts over the context, a loss that is not finite.
    """
    directory = stage.dir / "model"
    if directory.is_dir():  # written whole, after the last update: an earlier start of this stage came to its end
        return load_classifier(directory, start.device)._replace(chat=start.chat, name=stage.name)

    # 1. Data
    check_labelled(labelled, stage.name)
    examples = encode_examples(start, labelled, seed, stage.name)
    valid_examples = encode_examples(start, valid, seed, f"{stage.name} (validation)") if valid else []
    _check_keep(config, valid_examples, measure, stage.name)
    steps_per_epoch = -(-len(examples) // config.batch_size)
    num_steps = config.num_epochs * steps_per_epoch

    # 2. Student and state
    checkpointer = Checkpointer(stage.dir / "checkpoints")
    state = checkpointer.load()
    first = choose_start(start, labelled, config.head) if state is None else Start("zero")
    is_pair = len(examples[0].sequences) == 2
    student = classifier_from(
        start,
        num_outputs=1 if is_pair else config.num_outputs,
        head=first.head,
        seed=stream_seed(seed, "classifier", "head"),
        words=labelled.cases[0].verdicts,
        lora=config.lora,
    )._replace(name=stage.name)
    optimizer = config.optimizer.make(student.model)
    if state is None:
        if first.direction is not None:
            set_direction(student, first.direction)
        steps_done, best, buffer = 0, Best(None, 0, {}), Buffer(torch.empty(0), torch.empty(0))
        stage.log(0, look(student, valid_examples, measure, config) | {"starts_at_words": float(first.head == "words")})
    else:
        restore_training(state.tensors, student.model, optimizer)
        steps_done, best = state.step, Best.restored(state)
        buffer = Buffer(state.tensors["buffer.logits"], state.tensors["buffer.weak"])

    # 3. Loop
    compiled = compile_trunks([student.model], config.compile, student.device, stage.name)
    progress = stage.progress(num_steps)
    for step in range(steps_done, num_steps):
        epoch, place = divmod(step, steps_per_epoch)
        order = permutation(len(examples), seed, "classifier", "order", 0 if config.same_order else epoch)
        chosen = [examples[i] for i in order[place * config.batch_size :][: config.batch_size]]
        set_lr(optimizer, config.optimizer.lr_at(step, num_steps))
        weight = confidence_weight(step, num_steps, config.confidence, config.ramp_fraction, config.ramp)
        with compiled():
            metrics, buffer = update(
                student, optimizer, chosen, buffer, weight, config, f"{stage.name}, step {step + 1}"
            )
        metrics["epoch"] = (step + 1) / steps_per_epoch
        if (step + 1) % config.evaluate_every == 0 or step + 1 == num_steps:
            found = look(student, valid_examples, measure, config)
            metrics |= found
            best = best.or_this(ranking(found, config), step + 1, student)
            metrics["kept_step"] = step + 1 if best.score is None else best.step
        stage.log(step + 1, metrics)
        if (step + 1) % config.checkpoint_every == 0:
            tensors = training_tensors(student.model, optimizer) | best.tensors | buffer.tensors
            checkpointer.save(step + 1, tensors, {"best": best.score, "best_step": best.step})
        progress.show(step + 1, f"loss {metrics['loss']:.3f}")

    # 4. Result
    if best.score is not None:
        restore_training(best.tensors, student.model, prefix="best.")
    student = student._replace(model=end_of_training(student.model, config.lora))
    save_classifier(student, directory)
    checkpointer.clear()
    return student


def _check_keep(config: ClassifierConfig, valid: Sequence[Example], measure: MeasureTruth | None, where: str) -> None:
    if config.keep == "best" and not valid:
        raise InputError(f"{where}: keep is 'best', but there are no validation cases; give some, or keep 'last'")
    if config.keep == "oracle" and measure is None:
        raise InputError(f"{where}: keep is 'oracle', but nothing measures the truth; keep 'best' or 'last'")


# ----------------------------------------------------------------------------------------------------- one update


class Buffer(NamedTuple):
    """The latest predictions of the student with the weak labels of the same cases, both [m]."""

    logits: Tensor
    weak: Tensor

    def with_batch(self, logits: Tensor, weak: Tensor, size: int) -> "Buffer":
        """Return the buffer with a batch added at its end, cut to the last `size` (at least the batch)."""
        kept = max(size, len(logits))
        return Buffer(torch.cat([self.logits, logits])[-kept:], torch.cat([self.weak, weak])[-kept:])

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The buffer as a checkpoint keeps it."""
        return {"buffer.logits": self.logits, "buffer.weak": self.weak}


def update(
    classifier: TextClassifier,
    optimizer: torch.optim.Optimizer,
    examples: Sequence[Example],
    buffer: Buffer,
    weight: float,
    config: ClassifierConfig,
    where: str,
) -> tuple[dict[str, float], Buffer]:
    """Take one optimizer step at the rate that is set; return metrics and buffer. Raises `InputError` if not finite."""
    optimizer.zero_grad()
    weak = torch.tensor([example.target for example in examples])
    units = [_num_tokens(example) for example in examples]
    at_once = num_at_once([classifier.model], classifier.device, units, config.max_tokens)
    parts = micro_batches(examples, share_of_budget(units, config.max_tokens, at_once))
    metrics: dict[str, float] = {}
    threshold, predictions = 0.0, []
    if config.loss == "confidence":
        # The threshold needs the whole batch's predictions before any part of it has a target.
        with torch.set_grad_enabled(len(parts) == 1):
            predictions = [example_logits(classifier, part, config) for part in parts]
        logits = torch.cat(predictions).detach().cpu()
        buffer = buffer.with_batch(logits, weak[[i for part in parts for i in part.places]], config.buffer_size)
        share = 0.5 if config.hardened_share == "half" else float(buffer.weak.mean())
        threshold = balanced_threshold(buffer.logits, share)
        metrics |= {"confidence_weight": weight, "hardened_share": float((logits > threshold).float().mean())}

    def of_part(part: Part, backward: Backward) -> tuple[float, float]:
        logits = predictions[0] if predictions and len(parts) == 1 else example_logits(classifier, part, config)
        labels = weak[part.places].to(logits.device)
        if config.loss == "confidence":
            targets = confidence_targets(labels, logits, threshold, weight)
        else:
            targets = labels if config.loss == "naive" else product_targets(labels, logits)
        part_loss = pairwise_loss(logits, targets).sum() / len(examples)  # -[q log p + (1 - q) log(1 - p)]
        backward(part_loss)
        return part_loss.item(), float(((logits > 0) == (labels > 0.5)).sum())

    found = accumulate([classifier.model], parts, of_part, at_once)
    loss, num_agreeing = sum(one for one, _ in found), sum(agreeing for _, agreeing in found)
    check_finite(loss, "the loss", where)
    grad_norm = check_finite(
        clip_gradients(classifier.model, config.optimizer.max_grad_norm), "the gradient's norm", where
    )
    optimizer.step()
    metrics |= {"loss": loss, "agreement": num_agreeing / len(examples), "grad_norm": grad_norm}
    return metrics | {"lr": optimizer.param_groups[0]["lr"]}, buffer


class Part(NamedTuple):
    """Some examples of a batch, and their places in it."""

    examples: list[Example]
    places: list[int]


def micro_batches(examples: Sequence[Example], max_tokens: int) -> list[Part]:
    """Return the examples in parts of at most `max_tokens` tokens, shortest first; a pair is never cut."""
    parts: list[Part] = []
    for place in sorted(range(len(examples)), key=lambda i: _num_tokens(examples[i])):
        if not parts or (len(parts[-1].examples) + 1) * _num_tokens(examples[place]) > max_tokens:
            parts.append(Part([], []))
        parts[-1].examples.append(examples[place])
        parts[-1].places.append(place)
    return parts


def _num_tokens(example: Example) -> int:
    return len(example.sequences) * max(len(sequence.token_ids) for sequence in example.sequences)


def example_logits(classifier: TextClassifier, part: Part, config: ClassifierConfig) -> Tensor:
    """Return the logit of each example of a part, fp32 [n]; gradients flow."""
    flat = [sequence for example in part.examples for sequence in example.sequences]
    found, places = [], []
    with classifier.device.autocast():
        for batch in make_batches(flat, max_tokens=config.max_tokens, pack=True):
            found.append(logits_of_batch(classifier, batch))
            places += [sequence.original for sequence in batch.sequence_rows]
    logits = torch.cat(found)[torch.tensor(places).argsort().to(found[0].device)]
    return logits if len(part.examples[0].sequences) == 1 else logits[0::2] - logits[1::2]


# ------------------------------------------------------------------------------------------- looking along the way


def look(
    classifier: TextClassifier, valid: Sequence[Example], measure: MeasureTruth | None, config: ClassifierConfig
) -> dict[str, float]:
    """Return loss and agreement with the labels of the validation cases, and what the recipe measures."""
    found: dict[str, float] = {}
    if valid:
        flat = [sequence for example in valid for sequence in example.sequences]
        logits = sequence_logits(classifier, flat, config.max_tokens)
        logits = logits if len(valid[0].sequences) == 1 else logits[0::2] - logits[1::2]
        targets = torch.tensor([example.target for example in valid])
        agreement = float(((logits > 0) == (targets > 0.5)).float().mean())
        found = {"valid_loss": float(pairwise_loss(logits, targets).mean()), "valid_agreement": agreement}
    return found | (dict(measure(classifier)) if measure is not None else {})


def ranking(found: Mapping[str, float], config: ClassifierConfig) -> tuple[float, float] | None:
    """Return what the checkpoint is chosen by, larger being better: agreement, then loss; None keeps the last."""
    if config.keep == "best":
        return found["valid_agreement"], -found["valid_loss"]
    return (found["oracle"], 0.0) if config.keep == "oracle" else None


class Best(NamedTuple):
    """The best look so far; no score before the first, or where the last weights are kept."""

    score: tuple[float, float] | None
    step: int
    tensors: dict[str, Tensor]

    def or_this(self, score: tuple[float, float] | None, step: int, classifier: TextClassifier) -> "Best":
        """Return the weights at hand if they rank higher, else what was best before (the first of equals)."""
        if score is None or (self.score is not None and score <= self.score):
            return self
        tensors = training_tensors(classifier.model, prefix="best.")
        return Best(score, step, {name: tensor.clone() for name, tensor in tensors.items()})

    @staticmethod
    def restored(state: TrainingState) -> "Best":
        """Return the best look that a checkpoint holds."""
        kept = {name: tensor for name, tensor in state.tensors.items() if name.startswith("best.")}
        score = state.values["best"]
        return Best(None if score is None else (score[0], score[1]), state.values["best_step"], kept)
