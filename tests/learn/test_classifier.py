"""Classifiers: gradients of the plain loop, the confidence loss, resume, checkpoints by weak labels, and learning."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_world import LETTERS, make_lm, make_stage

from qinglan.core.errors import InputError
from qinglan.core.records import Case
from qinglan.core.rng import numpy_stream
from qinglan.learn import classifier as classifier_module
from qinglan.learn.classifier import Buffer, ClassifierConfig, example_logits, micro_batches, train_classifier, update
from qinglan.learn.confidence import balanced_threshold, confidence_targets, confidence_weight, product_targets
from qinglan.learn.labelled import Labelled, encode_examples, is_shown_second_first
from qinglan.learn.optimize import OptimizerConfig
from qinglan.learn.probe import fit_probe
from qinglan.models.cases import case_features, encode_case
from qinglan.models.classifier import TextClassifier, case_logits, classifier_from, load_classifier


def case(text: str, *more: str, number: int = 0) -> Case:
    return Case(f"case-{number}-{text}", text, (text, *more))


def words_with_q(count: int, seed: int = 0) -> Labelled:
    """Texts of 4 to 12 letters; class 1 if the text holds a "q"."""
    draw = numpy_stream(seed, "texts")
    cases, targets = [], []
    for number in range(count):
        letters = list(draw.choice([letter for letter in LETTERS[:26] if letter != "q"], draw.integers(4, 12)))
        if number % 2:
            letters[int(draw.integers(len(letters)))] = "q"
        cases.append(case("".join(letters), number=number))
        targets.append(float(number % 2))
    return Labelled(cases, targets)


def pairs(count: int, seed: int = 0) -> Labelled:
    """Pairs of texts in which the first is always the better one, the one with a "q"."""
    made = words_with_q(2 * count, seed).cases
    cases = [case(made[2 * k + 1].texts[0], made[2 * k].texts[0], number=k) for k in range(count)]
    return Labelled(cases, [1.0] * count)


def soft(labelled: Labelled, seed: int = 0) -> Labelled:
    draw = numpy_stream(seed, "soft")
    return Labelled(labelled.cases, [float(0.7 * t + 0.3 * draw.random()) for t in labelled.targets])


def accuracy(student: TextClassifier, labelled: Labelled) -> float:
    logits = case_logits(student, labelled.cases)
    return float(((logits > 0) == (torch.tensor(labelled.targets) > 0.5)).float().mean())


def settings(**changes: Any) -> ClassifierConfig:
    usual = {"optimizer": OptimizerConfig(learning_rate=3e-3), "keep": "last", "batch_size": 8, "num_epochs": 8}
    usual |= {"head": "normal"}  # from random weights there is nothing that a probe could read
    return ClassifierConfig(**(usual | changes))


def train(directory: Path, labelled: Labelled, config: ClassifierConfig, **more: Any) -> TextClassifier:
    stage = make_stage(directory, "classifier")
    return train_classifier(make_lm(), labelled, config, stage=stage, seed=0, **more)


def assert_equal_weights(one: TextClassifier, other: TextClassifier) -> None:
    for (name, a), (_, b) in zip(one.model.named_parameters(), other.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


# ------------------------------------------------------------------------------------------------------- pure functions


def test_weight_rises_linearly_and_reaches_its_largest_after_a_fifth() -> None:
    # 100 steps, a_max 0.5: step 10 is half-way up the ramp of 20 steps.
    found = [confidence_weight(step, 100, 0.5, 0.2, "linear") for step in (0, 10, 19, 20, 99)]
    assert found == pytest.approx([0.0, 0.25, 0.475, 0.5, 0.5])
    assert confidence_weight(0, 100, 0.5, 0.0, "linear") == 0.5


def test_the_released_ramp_jumps() -> None:
    # The coefficient is the share of training done (0.09 at step 9), times 0.5, until a tenth of training; then 0.5.
    found = [confidence_weight(step, 100, 0.5, 0.1, "jump") for step in (0, 9, 10, 11)]
    assert found == pytest.approx([0.0, 0.045, 0.05, 0.5])


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.6, 1.0])
def test_the_hardened_share_is_the_wanted_one_within_one_item(share: float) -> None:
    logits = torch.randn(37, generator=torch.Generator().manual_seed(1)) + 3.0  # all on one side of 0
    above = float((logits > balanced_threshold(logits, share)).float().mean())
    assert abs(above - share) <= 1 / 37


def test_confidence_targets_by_hand() -> None:
    # a = 0.5, t = 1: z = 2 is hardened to 1, z = 0 to 0: 0.5 * 0.6 + 0.5 * 1 = 0.8 and 0.5 * 0.6 + 0 = 0.3
    weak, logits = torch.tensor([0.6, 0.6]), torch.tensor([2.0, 0.0], requires_grad=True)
    targets = confidence_targets(weak, logits, threshold=1.0, weight=0.5)
    assert targets.tolist() == pytest.approx([0.8, 0.3])
    assert not targets.requires_grad
    assert torch.equal(confidence_targets(weak, logits, 1.0, 0.0), weak)


def test_product_targets_by_hand() -> None:
    # p = 0.5 leaves q as it is; p = q = 0.8: 0.64 / (0.64 + 0.04) = 16/17. A hard label stays hard.
    logits = torch.logit(torch.tensor([0.5, 0.8, 0.3]))
    assert product_targets(torch.tensor([0.7, 0.8, 1.0]), logits).tolist() == pytest.approx([0.7, 16 / 17, 1.0])


# ---------------------------------------------------------------------------------------------------------- one update


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "gemma3"])
@pytest.mark.parametrize("make", [words_with_q, pairs])
@pytest.mark.parametrize("loss", ["naive", "confidence", "product"])
def test_gradients_equal_those_of_one_case_at_a_time(kind: str, make: Any, loss: str) -> None:
    config = settings(loss=loss, buffer_size=8)
    examples = encode_examples(make_lm(kind), soft(make(6)), 0, "test")
    buffer = Buffer(torch.tensor([0.3, -0.2, 4.0]), torch.tensor([0.5, 0.5, 0.9]))

    def gradients(config: ClassifierConfig) -> dict[str, torch.Tensor]:
        model = classifier_from(make_lm(kind), num_outputs=1, head="normal", seed=1)
        optimizer = OptimizerConfig(learning_rate=0.0, max_grad_norm=float("inf")).make(model.model)
        update(model, optimizer, examples, buffer, 0.4, config, "test")
        return {name: p.grad for name, p in model.model.named_parameters() if p.grad is not None}

    model = classifier_from(make_lm(kind), num_outputs=1, head="normal", seed=1)
    alone = torch.cat([example_logits(model, part, config) for part in micro_batches(examples, 1)])
    order = [place for part in micro_batches(examples, 1) for place in part.places]
    weak = torch.tensor([examples[place].target for place in order])
    pool = torch.cat([buffer.logits, alone.detach()])[-8:]
    targets = {
        "naive": weak,
        "confidence": confidence_targets(weak, alone, balanced_threshold(pool, 0.5), 0.4),
        "product": product_targets(weak, alone),
    }[loss]
    p = torch.sigmoid(alone)
    (-(targets * p.log() + (1 - targets) * (1 - p).log()).mean()).backward()
    free = OptimizerConfig(max_grad_norm=float("inf"))
    for max_tokens in (1, 30, 8192):
        found = gradients(config.model_copy(update={"max_tokens": max_tokens, "optimizer": free}))
        for name, parameter in model.model.named_parameters():
            scale = parameter.grad.abs().max().clamp(min=0.1)
            torch.testing.assert_close(found[name] / scale, parameter.grad / scale, atol=2e-5, rtol=1e-4)


def test_the_buffer_keeps_the_latest() -> None:
    buffer = Buffer(torch.tensor([1.0, 2.0]), torch.tensor([0.1, 0.2]))
    grown = buffer.with_batch(torch.tensor([3.0, 4.0]), torch.tensor([0.3, 0.4]), size=3)
    assert grown.logits.tolist() == [2.0, 3.0, 4.0]
    assert grown.weak.tolist() == pytest.approx([0.2, 0.3, 0.4])
    # A buffer shorter than a batch holds the batch: the threshold of one batch, as in the released code.
    assert len(buffer.with_batch(torch.arange(5.0), torch.zeros(5), size=2).logits) == 5


def test_padding_and_company_do_not_change_a_logit() -> None:
    model = classifier_from(make_lm(), num_outputs=2, head="normal", seed=0)
    cases = [case("a"), case("a much longer text!"), case("?")]
    alone = torch.cat([case_logits(model, [one]) for one in cases])
    torch.testing.assert_close(case_logits(model, cases), alone, atol=1e-6, rtol=1e-5)


def test_heads() -> None:
    lm = make_lm()
    assert not classifier_from(lm, num_outputs=2, head="zero", seed=0).model.score.weight.any()
    two = classifier_from(lm, num_outputs=2, head="words", seed=0, words=("n", "y"))
    one = classifier_from(lm, num_outputs=1, head="words", seed=0, words=("n", "y"))
    cases = words_with_q(4).cases
    torch.testing.assert_close(case_logits(two, cases), case_logits(one, cases), atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="have the same tokens"):
        classifier_from(lm, num_outputs=2, head="words", seed=0, words=("no", "no"))
    with pytest.raises(InputError, match="needs a task with words"):
        classifier_from(lm, num_outputs=2, head="words", seed=0)


# ------------------------------------------------------------------------------------------------------------ training


def test_weight_zero_is_the_naive_loss_bit_for_bit(tmp_path: Path) -> None:
    labelled = soft(words_with_q(24))
    naive = train(tmp_path / "naive", labelled, settings(num_epochs=2))
    for max_tokens in (8192, 40):
        changed = settings(num_epochs=2, loss="confidence", confidence=0.0, max_tokens=max_tokens)
        plain = settings(num_epochs=2, max_tokens=max_tokens)
        one = train(tmp_path / f"zero-{max_tokens}", labelled, changed)
        other = train(tmp_path / f"plain-{max_tokens}", labelled, plain)
        assert_equal_weights(one, other)
    assert_equal_weights(train(tmp_path / "again", labelled, settings(num_epochs=2)), naive)


@pytest.mark.parametrize(("make", "loss"), [(words_with_q, "naive"), (words_with_q, "confidence"), (pairs, "naive")])
def test_it_learns_and_repeats(tmp_path: Path, make: Any, loss: str) -> None:
    # From random weights there is nothing to be confident of at first, so the ramp is long here.
    gently = {"confidence": 0.3, "ramp_fraction": 1.0}
    config = settings(loss=loss, num_epochs=14 if make is words_with_q else 6, **gently)
    labelled, unseen = soft(make(120)), make(80, seed=9)
    first = train(tmp_path / "one", labelled, config)
    assert accuracy(first, unseen) > 0.9
    assert_equal_weights(first, train(tmp_path / "two", labelled, config))
    loaded = load_classifier(tmp_path / "one" / "stages" / "classifier" / "model", first.device)
    torch.testing.assert_close(case_logits(loaded, unseen.cases), case_logits(first, unseen.cases))


@pytest.mark.parametrize("make", [words_with_q, pairs])
def test_training_starts_at_a_linear_probe_of_the_labels(tmp_path: Path, make: Any) -> None:
    labelled, unseen = soft(make(40)), make(10, seed=3).cases
    still = settings(head="probe", num_epochs=1, optimizer=OptimizerConfig(learning_rate=0.0))
    student = train(tmp_path, labelled, still)
    states = case_features(make_lm(), labelled.cases)
    probe = fit_probe(states, np.array(labelled.targets), with_bias=False)
    expected = torch.tensor(probe.logits(case_features(make_lm(), unseen)), dtype=torch.float32)
    torch.testing.assert_close(case_logits(student, unseen), expected, atol=1e-4, rtol=1e-3)


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("killed_at", [1, 3, 6])
@pytest.mark.parametrize("loss", ["naive", "confidence"])
def test_a_killed_stage_resumes_bit_identical(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int, loss: str
) -> None:
    config = settings(loss=loss, num_epochs=2, checkpoint_every=2, evaluate_every=3, keep="best", buffer_size=12)
    labelled, valid = soft(words_with_q(32)), soft(words_with_q(12, seed=4))
    whole = train(tmp_path / "whole", labelled, config, valid=valid)
    inner, steps = classifier_module.update, []

    def killing(*args: Any) -> Any:
        steps.append(1)
        if len(steps) > killed_at:
            raise Killed
        return inner(*args)

    monkeypatch.setattr(classifier_module, "update", killing)
    with pytest.raises(Killed):
        train(tmp_path / "killed", labelled, config, valid=valid)
    monkeypatch.setattr(classifier_module, "update", inner)
    resumed = train(tmp_path / "killed", labelled, config, valid=valid)
    assert_equal_weights(whole, resumed)
    rows = [make_stage(tmp_path / name, "classifier").run.metrics("classifier") for name in ("whole", "killed")]
    assert rows[0] == rows[1]


def rows_of(directory: Path) -> list[dict[str, float]]:
    return make_stage(directory, "classifier").run.metrics("classifier")


def test_the_checkpoint_is_chosen_by_the_labels_of_the_validation_cases(tmp_path: Path) -> None:
    """The labels of the validation cases say the opposite, so the best checkpoint is one of the first."""
    labelled, valid = words_with_q(48), words_with_q(20, seed=5)
    opposite = Labelled(valid.cases, [1.0 - target for target in valid.targets])
    config = settings(keep="best", evaluate_every=6, num_epochs=12)
    kept = train(tmp_path / "best", labelled, config, valid=opposite)
    looks = [row for row in rows_of(tmp_path / "best") if row["step"] and "valid_agreement" in row]
    best = max(looks, key=lambda row: (row["valid_agreement"], -row["valid_loss"]))
    assert looks[-1]["kept_step"] == best["step"] < looks[-1]["step"]
    assert accuracy(kept, opposite) == pytest.approx(best["valid_agreement"])


def test_the_oracle_is_what_the_recipe_measures_and_nothing_else(tmp_path: Path) -> None:
    labelled, seen = words_with_q(32), []

    def measure(student: TextClassifier) -> dict[str, float]:
        seen.append(student)
        return {"oracle": -abs(len(seen) - 3.0), "true_accuracy": 0.5}  # largest at the third look (the 1st is step 0)

    config = settings(keep="oracle", evaluate_every=4, num_epochs=3)
    train(tmp_path, labelled, config, measure=measure)
    assert rows_of(tmp_path)[-1]["kept_step"] == 8
    plain = train(tmp_path / "last", labelled, settings(evaluate_every=4, num_epochs=3), measure=measure)
    assert_equal_weights(plain, train(tmp_path / "blind", labelled, settings(evaluate_every=4, num_epochs=3)))


def test_pairs_are_shown_in_random_order() -> None:
    labelled = pairs(200)
    examples = encode_examples(make_lm(), labelled, 3, "test")
    turned = [example.target == 0.0 for example in examples]
    assert turned == [is_shown_second_first(3, one) for one in labelled.cases]
    assert 70 < sum(turned) < 130  # 100 +- 4 standard deviations of 7.1
    lm = make_lm()
    for one, example, is_turned in zip(labelled.cases, examples, turned, strict=True):
        assert list(example.sequences) == encode_case(lm, one)[:: -1 if is_turned else 1]


# ------------------------------------------------------------------------------------------------------------ bad input


def problem(directory: Path, cases: Sequence[Case], targets: Sequence[float], **changes: Any) -> str:
    stage = make_stage(directory, "student")
    with pytest.raises(InputError) as caught:
        train_classifier(make_lm(), Labelled(cases, targets), settings(**changes), stage=stage, seed=0)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_bad_input_is_one_clear_line(tmp_path: Path) -> None:
    cases = [case("ab"), case("cd")]
    assert "all 2 labels say class 1; expected both" in problem(tmp_path, cases, [1.0, 1.0])
    assert "all 2 labels say no class at all" in problem(tmp_path, cases, [0.5, 0.5])
    assert "case case-0-cd: label 1.5; expected a number from 0 to 1" in problem(tmp_path, cases, [0.0, 1.5])
    assert "label nan" in problem(tmp_path, cases, [0.0, float("nan")])
    assert "1 labels for 2 cases" in problem(tmp_path, cases, [1.0])
    assert "no cases to train on" in problem(tmp_path, [], [])
    assert "are mixed" in problem(tmp_path, [case("ab"), case("cd", "ef")], [1.0, 0.0])
    long = problem(tmp_path, [case("ab"), case("x" * 200)], [1.0, 0.0])
    assert "a text of 201 tokens; the context of tiny-llama is 128 tokens" in long
    assert "keep is 'best', but there are no validation cases" in problem(tmp_path, cases, [1.0, 0.0], keep="best")
    assert "keep is 'oracle', but nothing measures the truth" in problem(tmp_path, cases, [1.0, 0.0], keep="oracle")


def test_a_loss_that_is_not_finite_names_stage_and_step(tmp_path: Path) -> None:
    config = settings(optimizer=OptimizerConfig(learning_rate=1e30, max_grad_norm=1e30))
    with pytest.raises(InputError, match=r"^classifier, step \d+: "):
        train(tmp_path, words_with_q(16), config)
    assert not (tmp_path / "stages" / "classifier" / "model").exists()


def test_paper_and_released_settings() -> None:
    paper, released = ClassifierConfig.paper(), ClassifierConfig.released()
    assert (paper.num_epochs, paper.batch_size, paper.ramp, paper.ramp_fraction) == (2, 32, "linear", 0.2)
    assert (released.head, released.ramp, released.ramp_fraction, released.keep) == ("zero", "jump", 0.1, "last")
    assert (released.buffer_size, released.hardened_share, released.same_order) == (32, "weak", True)
    assert released.optimizer.lr_at(99, 100) == 0.0
