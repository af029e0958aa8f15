"""Cells of answering tasks (chess, facts): hard labels are what the supervisor writes greedily; exact match counts.

Training is language modelling on the answers (Burns et al. 2023, section 3, chess): the supervisor on true answers of
half A, the student on the supervisor's answers to half B, the ceiling on the true answers to half B.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from qinglan.core.errors import InputError
from qinglan.core.records import Case
from qinglan.core.rng import permutation, stream_seed
from qinglan.core.run import Run
from qinglan.learn.texts import train_on_texts
from qinglan.models.cases import plain_ids
from qinglan.models.generate import SamplingConfig, generate
from qinglan.models.language_model import LanguageModel, TokenSequence
from qinglan.recipes.weak_to_strong_config import WeakToStrongConfig
from qinglan.recipes.weak_to_strong_data import labeller_of, open_model, sides_of
from qinglan.recipes.weak_to_strong_grid import Cell, finish, open_stage
from qinglan.supervisors.weak import labels_of_answers, load_labels, save_labels
from qinglan.tasks.answering import TASKS, AnsweredCase, draw_answers

ANSWERING_METHODS = ("naive", "bootstrap")
"""What makes sense with hard labels that are texts."""
GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=24, stop=(".",))


class AnswerSides(NamedTuple):
    """The cases of each side."""

    half_a: list[AnsweredCase]
    half_b: list[AnsweredCase]
    test: list[AnsweredCase]


def is_answering(task: str) -> bool:
    """Return whether a task's labels are texts."""
    return task in TASKS or task == "lichess"


@lru_cache(maxsize=4)
def answer_sides(config: WeakToStrongConfig, task: str, run_seed: int, seed: int) -> AnswerSides:
    """Return halves drawn for one fine-tuning seed, and the test side that all share. Raises `InputError` if tiny."""
    pools = draw_answers(task, 2 * config.num_half, config.num_test, run_seed, config.puzzles)
    count = min(config.num_half, len(pools.train) // 2)
    if count < 8 or len(pools.test) < 16:
        raise InputError(f"{task}: {len(pools.train)} cases to train on and {len(pools.test)} to test; expected more")
    order = permutation(len(pools.train), stream_seed(run_seed, "halves", seed))
    return AnswerSides(
        [pools.train[i] for i in order[:count]], [pools.train[i] for i in order[count : 2 * count]], pools.test
    )


def truth_of(run: Run, config: WeakToStrongConfig, task: str) -> tuple[np.ndarray, list[str]]:
    """Return the test side's classes [N] and groups; for answers "class 1" is being right."""
    if is_answering(task):
        test = answer_sides(config, task, run.seed, 0).test
        return np.ones(len(test)), [one.case.prompt_group_id for one in test]
    sides = sides_of(config, task, run.seed, 0)
    return np.array([float(one.label) for one in sides.test]), [one.case.prompt_group_id for one in sides.test]


def answering_cell(run: Run, config: WeakToStrongConfig, cell: Cell) -> None:
    """Do one cell; its result is +1 for each test case answered rightly and -1 for the others."""
    stage = open_stage(run, config, cell)
    sides, lm = answer_sides(config, cell.task, run.seed, cell.seed), open_model(config, cell.model)
    seed = stream_seed(run.seed, "fit", cell.task, cell.seed)
    half_b = [one.case for one in sides.half_b]
    if cell.role == "base":
        finish(stage, config, {"zero_shot": _marks(lm, sides.test)})
        return
    if cell.role in ("supervisor", "ceiling"):
        taught = sides.half_a if cell.role == "supervisor" else sides.half_b
        examples = [_example(lm, one.case, one.answer) for one in taught]
    else:
        labels = load_labels(run.dir / "stages" / labeller_of(config, cell).name / "half_b.jsonl", half_b)
        examples = [_example(lm, case, one.text or "") for case, one in zip(half_b, labels, strict=True)]
    result: dict[str, Any] = {}
    if cell.role == "link":  # each half of half B is answered by a model that learnt the other
        middle, answers = len(half_b) // 2, []
        for part, (known, asked) in enumerate(
            ((examples[middle:], half_b[:middle]), (examples[:middle], half_b[middle:]))
        ):
            part_stage = run.stage(f"{cell.name}/part{part}", run.config_hash)
            model = train_on_texts(lm, known, config.texts, stage=part_stage, seed=seed)
            answers += write_answers(model, asked)
    else:
        model = train_on_texts(lm, examples, config.texts, stage=stage, seed=seed)
        answers = write_answers(model, half_b) if cell.role == "supervisor" else []
    if answers:
        half = f"half {'A' if cell.role == 'supervisor' else 'B, other part,'} of {cell.task}, seed {cell.seed}"
        save_labels(stage.dir / "half_b.jsonl", labels_of_answers(answers, half_b, name=cell.name, half=half))
    result["test"] = _marks(model, sides.test)
    finish(stage, config, result)


def write_answers(lm: LanguageModel, cases: Sequence[Case]) -> list[str]:
    """Return what a model writes greedily after each case, up to a full stop or its end token."""
    rows = generate(lm, [plain_ids(lm, case.texts[0]) for case in cases], GREEDY, seed=0)
    return [row[0].text.strip() for row in rows]


def _marks(lm: LanguageModel, test: Sequence[AnsweredCase]) -> list[float]:
    written = write_answers(lm, [one.case for one in test])
    return [1.0 if one.is_right(text) else -1.0 for one, text in zip(test, written, strict=True)]


def _example(lm: LanguageModel, case: Case, answer: str) -> TokenSequence:
    """Return case, answer and a full stop, the last two being targets."""
    ids = plain_ids(lm, case.texts[0])
    joint = plain_ids(lm, f"{case.texts[0]} {answer}.")
    if joint[: len(ids)] == ids and len(joint) > len(ids):
        return TokenSequence(joint, len(ids))
    return TokenSequence(ids + lm.tokenizer.encode(f" {answer}.", add_special_tokens=False), len(ids))
