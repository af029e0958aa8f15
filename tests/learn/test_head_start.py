"""Where a head starts: decided by the model's zero-shot verdicts and the given labels, never by the truth."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_classifier import settings, words_with_q
from tiny_world import make_lm, make_stage

from qinglan.learn.classifier import train_classifier
from qinglan.learn.head_start import choose_start
from qinglan.learn.labelled import Labelled
from qinglan.learn.optimize import OptimizerConfig
from qinglan.models.cases import case_length
from qinglan.models.classifier import case_logits, classifier_from
from qinglan.models.language_model import LanguageModel, max_context


def lm_times(factor: float) -> LanguageModel:
    """The tiny model with its vocabulary logits multiplied: with a large factor it is sure of whatever it says."""
    lm = make_lm()
    with torch.no_grad():
        head: Any = lm.model.get_output_embeddings()
        head.weight.mul_(factor)
    return lm


def own_verdicts(lm: LanguageModel, count: int = 60) -> Labelled:
    """Cases with verdict words, labelled by what a head of the words says of them, cut at its median."""
    cases = [case._replace(verdicts=("n", "y")) for case in words_with_q(count).cases]
    verdicts = case_logits(classifier_from(lm, num_outputs=2, head="words", seed=0, words=("n", "y")), cases)
    return Labelled(cases, [float(verdict > verdicts.quantile(0.5)) for verdict in verdicts])


def test_the_words_are_taken_by_a_model_that_is_sure_of_them() -> None:
    unsure, sure = lm_times(1.0), lm_times(1000.0)
    assert choose_start(unsure, own_verdicts(unsure), "auto").head == "probe"
    assert choose_start(sure, own_verdicts(sure), "auto").head == "words"
    assert (
        choose_start(unsure, own_verdicts(unsure), "words").head == "words"
    )  # what is asked for by name is not questioned


def test_labels_that_say_the_opposite_speak_against_the_words() -> None:
    sure = lm_times(1000.0)
    cases, targets = own_verdicts(sure)
    assert choose_start(sure, Labelled(cases, [1.0 - target for target in targets]), "auto").head == "probe"


@pytest.mark.parametrize(("num_wrong", "expected"), [(22, "words"), (23, "probe")])
def test_the_agreement_must_be_more_than_chance(num_wrong: int, expected: str) -> None:
    # n = 60: 0.5 + 1.96 sqrt(0.25 / 60) = 0.6265. With 22 labels turned 38 verdicts agree (0.633), with 23 37 (0.617).
    sure = lm_times(1000.0)
    cases, targets = own_verdicts(sure)
    labelled = Labelled(cases, [1.0 - t if i < num_wrong else t for i, t in enumerate(targets)])
    assert choose_start(sure, labelled, "auto").head == expected


def test_without_words_or_with_two_texts_it_is_a_probe() -> None:
    sure = lm_times(1000.0)
    cases, targets = own_verdicts(sure)
    assert (
        choose_start(sure, Labelled([case._replace(verdicts=None) for case in cases], targets), "auto").head == "probe"
    )
    pairs = [case._replace(texts=(case.texts[0], "a")) for case in cases]
    assert choose_start(sure, Labelled(pairs, targets), "auto").head == "probe"


def test_texts_that_fill_the_context_can_be_asked() -> None:
    sure = lm_times(1000.0)
    cases, targets = own_verdicts(sure)
    full = cases[0]._replace(texts=("a" * (max_context(sure.model) - 1),))  # behind the token that begins every text
    assert case_length(sure, full) == max_context(sure.model)
    assert choose_start(sure, Labelled([full, *cases[1:]], targets), "auto").head == "words"


def test_words_that_no_token_tells_apart_or_that_change_from_case_to_case_are_not_taken() -> None:
    sure = lm_times(1000.0)
    cases, targets = own_verdicts(sure)
    for verdicts in (("y", "yy"), ("y", "y")):  # of letters as tokens: "y" begins "yy"
        alike = [case._replace(verdicts=verdicts) for case in cases]
        assert choose_start(sure, Labelled(alike, targets), "auto").head == "probe"
    mixed = [cases[0]._replace(verdicts=None), *cases[1:]]
    assert choose_start(sure, Labelled(mixed, targets), "auto").head == "probe"


def test_soft_labels_that_lean_to_one_class_still_order_the_cases() -> None:
    sure = lm_times(1000.0)
    cases, targets = own_verdicts(sure)
    leaning = Labelled(cases, [0.7 + 0.2 * target for target in targets])
    assert choose_start(sure, leaning, "auto").head == "words"


def test_training_starts_where_the_choice_says(tmp_path: Path) -> None:
    sure = lm_times(1000.0)
    labelled = own_verdicts(sure)
    still = settings(head="auto", num_epochs=1, optimizer=OptimizerConfig(learning_rate=0.0))
    student = train_classifier(sure, labelled, still, stage=make_stage(tmp_path, "classifier"), seed=0)
    by_words = classifier_from(sure, num_outputs=2, head="words", seed=0, words=("n", "y"))
    torch.testing.assert_close(case_logits(student, labelled.cases), case_logits(by_words, labelled.cases))
