"""Where a head starts: decided by the given labels and the model's zero-shot verdicts, never by the truth."""

from pathlib import Path

import pytest
import torch
from test_classifier import settings, train, words_with_q
from tiny_world import make_lm

from qinglan.learn.head_start import choose_head
from qinglan.learn.labelled import Labelled
from qinglan.learn.optimize import OptimizerConfig
from qinglan.models.cases import verdict_logits
from qinglan.models.classifier import case_logits, classifier_from


def asked(count: int = 60) -> Labelled:
    """Cases with verdict words, labelled by what the tiny model itself says of them zero-shot, cut at its median."""
    cases = [case._replace(verdicts=("n", "y")) for case in words_with_q(count).cases]
    verdicts = verdict_logits(make_lm(), cases)
    return Labelled(cases, [float(verdict > verdicts.median()) for verdict in verdicts])


def test_the_words_are_taken_where_zero_shot_verdicts_agree_with_the_labels() -> None:
    lm, labelled = make_lm(), asked()
    assert choose_head(lm, labelled, "auto") == "words"
    turned = Labelled(labelled.cases, [1.0 - target for target in labelled.targets])
    assert choose_head(lm, turned, "auto") == "probe"
    assert choose_head(lm, turned, "words") == "words"  # what is asked for by name is not questioned


@pytest.mark.parametrize(("num_wrong", "expected"), [(22, "words"), (23, "probe")])
def test_the_agreement_must_be_more_than_chance(num_wrong: int, expected: str) -> None:
    # n = 60: 0.5 + 1.96 sqrt(0.25 / 60) = 0.6265. With 22 labels turned 38 verdicts agree (0.633), with 23 37 (0.617).
    cases, targets = asked()
    labelled = Labelled(cases, [1.0 - t if i < num_wrong else t for i, t in enumerate(targets)])
    assert choose_head(make_lm(), labelled, "auto") == expected


def test_without_words_or_with_two_texts_it_is_a_probe() -> None:
    lm, (cases, targets) = make_lm(), asked()
    assert choose_head(lm, Labelled([case._replace(verdicts=None) for case in cases], targets), "auto") == "probe"
    pairs = [case._replace(texts=(case.texts[0], "a")) for case in cases]
    assert choose_head(lm, Labelled(pairs, targets), "auto") == "probe"


def test_training_starts_where_the_choice_says(tmp_path: Path) -> None:
    labelled = asked()
    still = settings(head="auto", num_epochs=1, optimizer=OptimizerConfig(learning_rate=0.0))
    student = train(tmp_path, labelled, still)
    by_words = classifier_from(make_lm(), num_outputs=2, head="words", seed=0, words=("n", "y"))
    torch.testing.assert_close(case_logits(student, labelled.cases), case_logits(by_words, labelled.cases))
