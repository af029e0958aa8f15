"""Weak supervisors: records with logits and provenance, people, rules, files of labels."""

import zipfile
from pathlib import Path

import pytest
import torch

from qinglan.core.errors import InputError
from qinglan.core.records import Case, WeakLabel
from qinglan.models.classifier import case_logits, classifier_from
from qinglan.supervisors.rules import is_rule, load_rule
from qinglan.supervisors.simulated import LabelerConfig, make_labelers
from qinglan.supervisors.weak import (
    labels_of_answers,
    labels_of_model,
    labels_of_people,
    labels_of_rule,
    load_labels,
    save_labels,
)


def case(text: str, *more: str) -> Case:
    return Case(f"case-{text}", f"group-{text}", (text, *more))


def test_a_models_labels_keep_logits_and_say_what_it_was_trained_on(tiny_lm) -> None:
    model = classifier_from(tiny_lm(), num_outputs=1, head="normal", seed=0)._replace(name="weak")
    cases = [case("the one"), case("another"), case("first of a pair", "second of a pair")]
    labels = labels_of_model(model, cases, half="half A")
    logits = torch.cat([case_logits(model, [one]) for one in cases])
    for one, label, logit in zip(cases, labels, logits, strict=True):
        assert label.p_one == pytest.approx(float(torch.sigmoid(logit)), abs=1e-6)
        assert (label.case_id, label.producer_id, label.source) == (one.id, "weak", "weak_model")
        assert (label.training_half, label.prompt_group_id) == ("half A", one.prompt_group_id)
    assert len(labels[0].logits or ()) == 1 and len(labels[2].logits or ()) == 2
    first, second = labels[2].logits or (0.0, 0.0)
    assert labels[2].p_one == pytest.approx(float(torch.sigmoid(torch.tensor(first - second))), abs=1e-6)


def test_answers_as_hard_labels() -> None:
    (label,) = labels_of_answers(["Qh7#"], [case("position")], name="weak", half="half A")
    assert (label.text, label.p_one, label.training_half) == ("Qh7#", 1.0, "half A")


def test_people_vote_through_their_faults() -> None:
    cases = [case(f"text {number}") for number in range(300)]
    truth = [float(number % 2) for number in range(300)]
    careful = make_labelers(3, LabelerConfig(accuracy=1.0, noise=0.0, laziness=0.0, spread=0.0), seed=0)
    assert [label.p_one for label in labels_of_people(careful, cases, truth, seed=0)] == truth
    # Each of the two verdicts is misunderstood, and looks anyhow, with probability 1/2. If both are (1/4), the labeler
    # is right by chance; if one is, its quality is drawn between the two and the order stays: 3/4 + 1/8 = 0.875.
    careless = make_labelers(3, LabelerConfig(accuracy=0.5, noise=0.0, tie_band=0.0, laziness=0.0, spread=0.0), seed=0)
    labels = labels_of_people(careless, cases, truth, seed=0)
    votes = [label.p_one if one else 1 - label.p_one for label, one in zip(labels, truth, strict=True)]
    assert sum(votes) / 300 == pytest.approx(0.875, abs=0.035)  # 3 standard errors
    assert labels[0].source == "human"
    assert labels[0].producer_id == "simulated-labeler-00+simulated-labeler-01+simulated-labeler-02"
    assert len(labels[0].parents) == 4  # the case and three comparisons


def words(tmp_path: Path) -> Path:
    path = tmp_path / "lexicon.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("opinion/positive-words.txt", "; comment\ngood\nfine\n")
        archive.writestr("opinion/negative-words.txt", "; comment\nbad\n")
    return path


def label_of(name: str, text: str, **row: object) -> float:
    (label,) = labels_of_rule(load_rule(name), [case(text)], [row], name=name)
    assert label.producer_id == f"rule:{name}" and label.training_half is None
    return label.p_one


def test_rules(tmp_path: Path) -> None:
    lexicon = f"lexicon:{words(tmp_path)}"
    # two good words and one bad one: sigmoid(2 - 1) = 0.731
    assert label_of(lexicon, "Good, fine; bad!") == pytest.approx(0.7311, abs=1e-4)
    assert label_of(lexicon, "nothing") == 0.5
    vader = tmp_path / "vader.txt"
    vader.write_text("good\t1.9\t0.9\t[2, 1]\n:(\t-2.0\t0.5\t[-2]\nbad\t-2.5\t0.6\t[-3]\n")
    assert label_of(f"vader:{vader}", "bad bad") == pytest.approx(1 / (1 + 2.718281828**5), rel=1e-4)
    keywords = tmp_path / "refusals.txt"
    keywords.write_text("cannot help\nsorry\n")
    assert label_of(f"keywords:{keywords}", "I am sorry, no.") == 1.0
    assert label_of(f"keywords:{keywords}", "A sorryness.") == 0.0
    assert label_of("column:annotator", "x", annotator="True") == 1.0
    assert label_of("column:annotator", "x", annotator=0.25) == 0.25
    of_words = load_rule("column:annotator", ("complies", "refuses"))  # the words of the file's own classes
    assert [of_words(case("x"), {"annotator": said}) for said in ("refuses", "complies", "half")] == [1.0, 0.0, 0.5]
    assert is_rule("column:annotator") and not is_rule("nano") and not is_rule("labelers")


def test_rules_that_cannot_be_used(tmp_path: Path) -> None:
    text = tmp_path / "plain.txt"
    text.write_text("good\n")
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    with pytest.raises(InputError, match="no such file"):
        load_rule("lexicon:nowhere.zip")
    with pytest.raises(InputError, match="no zip file"):
        load_rule(f"lexicon:{text}")
    with pytest.raises(InputError, match="expected lines of word, tab, valence"):
        load_rule(f"vader:{text}")
    with pytest.raises(InputError, match="holds none"):
        load_rule(f"keywords:{empty}")
    with pytest.raises(InputError, match="no such column; expected one of annotator"):
        label_of("column:annotatr", "x", annotator=1)
    with pytest.raises(InputError, match="expected a number from 0 to 1, true or false"):
        label_of("column:annotator", "x", annotator="yes")
    with pytest.raises(InputError, match="expected a probability from 0 to 1"):
        label_of("column:annotator", "x", annotator=3)


def test_labels_in_files(tmp_path: Path) -> None:
    cases = [case("a"), case("b")]
    labels = labels_of_rule(lambda one, _: 0.7, cases, [{}, {}], name="constant")
    path = tmp_path / "labels.jsonl"
    save_labels(path, labels)
    assert load_labels(path, cases[::-1]) == labels[::-1]
    assert all(isinstance(one, WeakLabel) for one in load_labels(path, cases))
    with pytest.raises(InputError, match=r"no label for case case-c \('c'\)"):
        load_labels(path, [*cases, case("c")])
    with pytest.raises(InputError, match="case case-b: its group was in the supervisor's training half"):
        load_labels(path, cases, groups_seen=frozenset({"group-b"}))
    save_labels(path, [*labels, labels[0]])
    with pytest.raises(InputError, match=r"labels\.jsonl:3: a second label for case case-a"):
        load_labels(path, cases)
    path.write_text('{"id": 1}\n')
    with pytest.raises(InputError, match=r"labels\.jsonl:1: no weak label"):
        load_labels(path, cases)
