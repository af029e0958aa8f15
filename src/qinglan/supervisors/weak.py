"""Weak supervisors: small models, people, simulated people and rules, all through the same records (`WeakLabel`).

A label keeps what the supervisor gave (logits of a model, votes of people as parents) beside the probability derived
from it, and names the data that the supervisor was trained on (Burns et al. 2023, section 3; soft labels).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from qinglan.core.errors import InputError
from qinglan.core.files import read_jsonl, write_jsonl
from qinglan.core.records import Case, Completion, Message, Prompt, Ranking, Source, WeakLabel, record_id
from qinglan.models.classifier import TextClassifier, text_logits
from qinglan.supervisors.simulated import Attributes, Labeler, compare

Rule = Callable[[Case, Mapping[str, object]], float]
"""From a case and the columns of its row to the probability of class 1."""


def labels_of_model(model: TextClassifier, cases: Sequence[Case], *, half: str) -> list[WeakLabel]:
    """Return a fine-tuned weak model's soft labels; of a pair sigmoid(score of the first - score of the second).

    `half` names the data the model was trained on. Pairs are labels "the first text is better".
    """
    found = []
    for case, logits in zip(cases, text_logits(model, cases), strict=True):
        margin = logits[0] if len(logits) == 1 else logits[0] - logits[1]
        probability = float(torch.sigmoid(torch.tensor(margin)))
        found.append(_label(case, probability, model.name, "weak_model", logits=logits, training_half=half))
    return found


def labels_of_answers(answers: Sequence[str], cases: Sequence[Case], *, name: str, half: str) -> list[WeakLabel]:
    """Return what a weak model wrote greedily as hard labels: the label is an answer (the paper's chess setting)."""
    return [
        _label(case, 1.0, name, "weak_model", text=text, training_half=half)
        for case, text in zip(cases, answers, strict=True)
    ]


def labels_of_rule(
    rule: Rule, cases: Sequence[Case], rows: Sequence[Mapping[str, object]], *, name: str
) -> list[WeakLabel]:
    """Return the labels of a rule that was trained on nothing (a word list, one column of the file)."""
    return [_label(case, rule(case, row), f"rule:{name}", "weak_model") for case, row in zip(cases, rows, strict=True)]


def labels_of_people(
    labelers: Sequence[Labeler], cases: Sequence[Case], is_one: Sequence[float], *, seed: int
) -> list[WeakLabel]:
    """Return the share of simulated labelers who say class 1; ties and unread items count one half.

    Each labeler compares the two possible verdicts as two completions of the text, with the faults of
    `supervisors/simulated.py`. `is_one` is the answer key, which arrives as an argument and is seen through those
    faults only. Labelers do all cases in the given order.
    """
    found = []
    for number, (case, truth) in enumerate(zip(cases, is_one, strict=True)):
        prompt, verdicts = _as_comparison(case)
        key = {verdicts[0].id: 1.0 - truth, verdicts[1].id: truth}

        def quality(_: Prompt, verdict: Completion, key: dict[str, float] = key) -> Attributes:
            return Attributes(*[key[verdict.id]] * 3)

        judged = [compare(who, prompt, *verdicts, quality, seed=seed, position=number) for who in labelers]
        votes = [_vote(one.label) for one in judged if isinstance(one.label, Ranking)]
        names = tuple(one.id for one in judged)
        label = _label(case, sum(votes) / len(votes), "+".join(who.pseudonym for who in labelers), "human")
        found.append(label.model_copy(update={"parents": (case.id, *names)}))
    return found


def _vote(label: Ranking) -> float:
    if len(label.groups) == 1:
        return 0.5
    return 1.0 if label.groups[0] == (1,) else 0.0


def _as_comparison(case: Case) -> tuple[Prompt, tuple[Completion, Completion]]:
    """Return the case as a prompt whose two completions say class 0 and class 1."""
    text = "\n".join((*(message.content for message in case.messages), *case.texts))
    group = case.prompt_group_id
    asked = (Message(role="user", content=text),)
    prompt = Prompt(id=case.id, source="policy", producer_id="case", prompt_group_id=group, messages=asked)
    zero, one = (
        Completion(
            id=f"{case.id}-{k}",
            source="policy",
            producer_id="case",
            prompt_group_id=group,
            prompt_id=case.id,
            text=word,
        )
        for k, word in enumerate(case.verdicts or ("no", "yes"))
    )
    return prompt, (zero, one)


def _label(
    case: Case,
    p_one: float,
    producer: str,
    source: Source,
    *,
    logits: tuple[float, ...] | None = None,
    text: str | None = None,
    training_half: str | None = None,
) -> WeakLabel:
    if not 0.0 <= p_one <= 1.0 or math.isnan(p_one):
        raise InputError(f"weak label of {producer} for case {case.id}: {p_one!r}; expected a probability from 0 to 1")
    return WeakLabel(
        id=record_id("weak", case.id, producer, training_half, p_one, text),
        source=source,
        producer_id=producer,
        prompt_group_id=case.prompt_group_id,
        parents=(case.id,),
        case_id=case.id,
        p_one=p_one,
        logits=logits,
        text=text,
        training_half=training_half,
    )


# ----------------------------------------------------------------------------------------------------------- files


def save_labels(path: Path, labels: Sequence[WeakLabel]) -> None:
    """Write labels as JSON lines."""
    write_jsonl(path, labels)


def load_labels(path: Path, cases: Sequence[Case], *, groups_seen: frozenset[str] = frozenset()) -> list[WeakLabel]:
    """Return the label of each case out of a file of records, from whoever made them.

    Raises `InputError` for a line that is no weak label, a case without label or with two, and where the supervisor's
    training groups (`groups_seen`) hold the group of a case: it would label what it was trained on.
    """
    by_case: dict[str, WeakLabel] = {}
    for number, value in read_jsonl(path):
        try:
            label = WeakLabel.model_validate(value)
        except ValueError as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{path}:{number}: no weak label ({reason}); expected one record a line") from error
        if label.case_id in by_case:
            raise InputError(f"{path}:{number}: a second label for case {label.case_id}; expected one")
        by_case[label.case_id] = label
    for case in cases:
        if case.id not in by_case:
            raise InputError(f"{path}: no label for case {case.id} ({case.texts[0][:40]!r}); expected one for each")
        if case.prompt_group_id in groups_seen:
            raise InputError(f"{path}: case {case.id}: its group was in the supervisor's training half")
    return [by_case[case.id] for case in cases]
