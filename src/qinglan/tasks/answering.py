"""Tasks whose label is a short text and not a class, judged by exact match: facts of the world, and chess puzzles.

The generative setting of weak-to-strong (Burns et al. 2023, section 3, chess): the supervisor's hard labels are what it
writes greedily. The prompt is plain text that ends where the answer begins. Chess needs the extra `chess`.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from qinglan.core.errors import InputError, nearest
from qinglan.core.records import Case, record_id
from qinglan.core.rng import stream_seed
from qinglan.tasks import world
from qinglan.tasks.chess_puzzles import draw_puzzles, grade_puzzle, load_lichess_puzzles
from qinglan.tasks.item import Item
from qinglan.tasks.reading import words


class AnsweredCase(NamedTuple):
    """A case with its answer, and the test of what somebody wrote."""

    case: Case
    answer: str
    is_right: Callable[[str], bool]


class AnswerPools(NamedTuple):
    """Cases for training and for measuring; they share no group."""

    train: list[AnsweredCase]
    test: list[AnsweredCase]


def _facts(num_train: int, num_test: int, seed: int) -> AnswerPools:
    """Questions for a fact, in plain text; every fact is a group."""
    rng = random.Random(stream_seed(seed, "answering", "facts"))
    known = list(world.facts())
    rng.shuffle(known)
    made = []
    for fact in known[: num_train + num_test]:
        text = f"Question: {fact.question(rng, held_out=False)} Answer:"
        answer = f"{world.capital(rng.choice(fact.relation.statements).format(e=fact.entity, v=fact.value))}"
        case = Case(record_id("case", text), f"{fact.relation.name} of {fact.entity}", (text,))
        made.append(AnsweredCase(case, answer.removesuffix("."), _says(fact)))
    share = min(1.0, len(made) / (num_train + num_test))
    cut = int(share * num_test)
    return AnswerPools(made[cut:], made[:cut])


def _says(fact: world.Fact) -> Callable[[str], bool]:
    """Return the test that a text names the fact's value and no other of its kind, beside the entity itself."""
    pool = {value.lower() for value in world.POOLS[fact.relation.values]}
    entity = set(words(fact.entity))
    return lambda text: {word for word in words(text) if word in pool} - entity == {fact.value.lower()}


def _chess(*kinds: str) -> Callable[[int, int, int], AnswerPools]:
    def make(num_train: int, num_test: int, seed: int) -> AnswerPools:
        sides = []
        for split, count in (("train", num_train), ("test", num_test)):
            items: list[Item] = []
            for kind in kinds:
                items += draw_puzzles(kind, -(-count // len(kinds)), seed, split)  # type: ignore[arg-type]
            sides.append([_puzzle(item) for item in items][:count])
        return AnswerPools(*sides)

    return make


def _puzzle(item: Item) -> AnsweredCase:
    text = item.messages[-1].content
    case = Case(record_id("case", text), item.key["position"], (text,))
    return AnsweredCase(case, item.key["answer"], lambda written: grade_puzzle(item.key, written).is_exact)


TASKS: dict[str, Callable[[int, int, int], AnswerPools]] = {
    "facts": _facts,
    "mate_in_one": _chess("mate_in_one"),
    "mate_in_two": _chess("mate_in_two"),
    "chess": _chess("mate_in_one", "mate_in_two"),
}
"""Every answering task by name."""


def draw_answers(name: str, num_train: int, num_test: int, seed: int, puzzles: Path | None = None) -> AnswerPools:
    """Return cases of a task, or, as "lichess", of a file of Lichess puzzles, the test side taken by a hash.

    Raises `InputError` for an unknown task, and for chess without its library.
    """
    if name == "lichess":
        if puzzles is None:
            raise InputError("task lichess: no file of puzzles; give it as --puzzles")
        found = [_puzzle(item) for item in load_lichess_puzzles(puzzles)]
        is_test = [stream_seed(0, "lichess side", one.case.prompt_group_id) % 4 == 0 for one in found]
        return AnswerPools(
            [one for one, test in zip(found, is_test, strict=True) if not test][:num_train],
            [one for one, test in zip(found, is_test, strict=True) if test][:num_test],
        )
    if name not in TASKS:
        raise InputError(f"task {name}: no such task{nearest(name, TASKS)}; expected one of {', '.join(TASKS)}")
    return TASKS[name](num_train, num_test, seed)
