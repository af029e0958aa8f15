"""The facts of the built-in world: about 1,200, drawn once from a fixed seed, and how they are said and asked.

Every relation has several wordings for statements and questions. The last question wording is held out: it occurs in
test prompts only, never in pretraining or training. Every fifth entity is held out too: its facts are in the
encyclopaedia, but nobody asks about it before the test.
"""

import random
from functools import cache
from typing import NamedTuple

from qinglan.core.rng import stream_seed
from qinglan.tasks import lexicon as lx


class Relation(NamedTuple):
    """One property of a kind of entity and its wordings; `{e}` is the entity, `{v}` the value."""

    name: str
    kind: str
    values: str
    """Name of the pool of values, which is also the kind of the value where that kind has facts of its own."""
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    """The last one is held out for test prompts."""
    noun_phrase: str
    """How the value is named through its entity, for questions of two hops."""


RELATIONS: tuple[Relation, ...] = (
    Relation(
        "town",
        "person",
        "town",
        ("{e} lives in {v}.", "{e} has a house in {v}.", "The home of {e} is in {v}."),
        (
            "Where does {e} live?",
            "Which town does {e} live in?",
            "Where is the home of {e}?",
            "In which town is the home of {e}?",
        ),
        "the town where {e} lives",
    ),
    Relation(
        "job",
        "person",
        "job",
        ("{e} works as a {v}.", "{e} is a {v}.", "The job of {e} is {v}."),
        ("What is the job of {e}?", "What does {e} work as?", "What job does {e} have?", "As what does {e} work?"),
        "the job of {e}",
    ),
    Relation(
        "pet",
        "person",
        "animal",
        ("{e} has a pet {v}.", "{e} keeps a {v}.", "The pet of {e} is a {v}."),
        (
            "What pet does {e} have?",
            "Which animal does {e} keep?",
            "What is the pet of {e}?",
            "Which pet does {e} keep?",
        ),
        "the pet of {e}",
    ),
    Relation(
        "food",
        "person",
        "food",
        ("{e} likes to eat {v}.", "{e} loves {v}.", "The favourite food of {e} is {v}."),
        (
            "What does {e} like to eat?",
            "What food does {e} love?",
            "What is the favourite food of {e}?",
            "Which food does {e} like?",
        ),
        "the favourite food of {e}",
    ),
    Relation(
        "instrument",
        "person",
        "instrument",
        ("{e} plays the {v}.", "{e} owns a {v}.", "The instrument of {e} is the {v}."),
        (
            "What does {e} play?",
            "Which instrument does {e} play?",
            "What is the instrument of {e}?",
            "What instrument does {e} own?",
        ),
        "the instrument of {e}",
    ),
    Relation(
        "friend",
        "person",
        "person",
        ("{e} is a friend of {v}.", "{e} often meets {v}.", "The best friend of {e} is {v}."),
        (
            "Who is the best friend of {e}?",
            "Who does {e} often meet?",
            "Who is the friend of {e}?",
            "Whom does {e} often meet?",
        ),
        "the best friend of {e}",
    ),
    Relation(
        "river",
        "town",
        "river",
        ("{e} lies on the river {v}.", "The river {v} runs through {e}.", "The river of {e} is the {v}."),
        (
            "Which river runs through {e}?",
            "On which river does {e} lie?",
            "What is the river of {e}?",
            "What river does {e} lie on?",
        ),
        "the river of {e}",
    ),
    Relation(
        "country",
        "town",
        "country",
        ("{e} is a town in {v}.", "{e} belongs to {v}.", "The country of {e} is {v}."),
        (
            "In which country is {e}?",
            "Which country does {e} belong to?",
            "What is the country of {e}?",
            "To which country does {e} belong?",
        ),
        "the country of {e}",
    ),
    Relation(
        "crop",
        "town",
        "food",
        ("{e} is known for its {v}.", "The farms near {e} grow {v}.", "People in {e} sell {v}."),
        (
            "What is {e} known for?",
            "What do the farms near {e} grow?",
            "What do people in {e} sell?",
            "For what is {e} known?",
        ),
        "the famous food of {e}",
    ),
    Relation(
        "mayor",
        "town",
        "person",
        ("The mayor of {e} is {v}.", "{e} has a mayor called {v}.", "{v} leads the town of {e}."),
        (
            "Who is the mayor of {e}?",
            "Who leads the town of {e}?",
            "What is the mayor of {e} called?",
            "Who leads {e} as mayor?",
        ),
        "the mayor of {e}",
    ),
    Relation(
        "habitat",
        "animal",
        "habitat",
        ("The {e} lives in the {v}.", "You find the {e} in the {v}.", "The home of the {e} is the {v}."),
        (
            "Where does the {e} live?",
            "Where do you find the {e}?",
            "What is the home of the {e}?",
            "In what place do you find the {e}?",
        ),
        "the home of the {e}",
    ),
    Relation(
        "diet",
        "animal",
        "food",
        ("The {e} eats {v}.", "The {e} feeds on {v}.", "The food of the {e} is {v}."),
        (
            "What does the {e} eat?",
            "What does the {e} feed on?",
            "What is the food of the {e}?",
            "On what does the {e} feed?",
        ),
        "the food of the {e}",
    ),
    Relation(
        "colour",
        "animal",
        "colour",
        ("The {e} is {v}.", "The {e} has {v} skin.", "The colour of the {e} is {v}."),
        (
            "What colour is the {e}?",
            "Which colour does the {e} have?",
            "What is the colour of the {e}?",
            "Of what colour is the {e}?",
        ),
        "the colour of the {e}",
    ),
)

POOLS: dict[str, tuple[str, ...]] = {
    "person": lx.PEOPLE,
    "town": lx.TOWNS,
    "animal": lx.ANIMALS,
    "job": lx.JOBS,
    "food": lx.FOODS,
    "river": lx.RIVERS,
    "instrument": lx.INSTRUMENTS,
    "country": lx.COUNTRIES,
    "habitat": lx.HABITATS,
    "colour": lx.COLOURS,
}


class Fact(NamedTuple):
    """One true statement of the world."""

    relation: Relation
    entity: str
    value: str

    def statement(self, rng: random.Random) -> str:
        """Return the fact in one of its wordings."""
        return capital(rng.choice(self.relation.statements).format(e=self.entity, v=self.value))

    def question(self, rng: random.Random, held_out: bool) -> str:
        """Return a question for the value; the wording is the held-out one, or one of the others."""
        wordings = self.relation.questions[-1:] if held_out else self.relation.questions[:-1]
        return capital(rng.choice(wordings).format(e=self.entity))


@cache
def facts() -> tuple[Fact, ...]:
    """Return all facts, in an order that never changes."""
    rng = random.Random(stream_seed(0, "world", "facts"))
    made = []
    for relation in RELATIONS:
        for entity in POOLS[relation.kind]:
            value = rng.choice([value for value in POOLS[relation.values] if value != entity])
            made.append(Fact(relation, entity, value))
    return tuple(made)


@cache
def facts_of() -> dict[str, tuple[Fact, ...]]:
    """Return the facts of each entity."""
    table: dict[str, list[Fact]] = {}
    for fact in facts():
        table.setdefault(fact.entity, []).append(fact)
    return {entity: tuple(found) for entity, found in table.items()}


@cache
def value_of() -> dict[tuple[str, str], str]:
    """Return the value by (entity, relation name)."""
    return {(fact.entity, fact.relation.name): fact.value for fact in facts()}


@cache
def is_held_out(entity: str) -> bool:
    """True for every fifth entity: asked about in test prompts only."""
    return stream_seed(0, "held out", entity) % 5 == 0


@cache
def two_hop_facts() -> tuple[Fact, ...]:
    """Return questions of two hops as facts whose entity is a noun phrase ("the town where Arlo lives")."""
    made = []
    for first in facts():
        if first.relation.kind != "person" or first.relation.values not in ("person", "town", "animal"):
            continue
        for second in facts_of()[first.value]:
            if second.relation.name == first.relation.name:
                continue
            phrase = first.relation.noun_phrase.format(e=first.entity)
            relation = second.relation
            if relation.kind == "animal":
                unarticled = tuple(wording.replace("the {e}", "{e}") for wording in relation.questions)
                relation = relation._replace(
                    questions=unarticled,
                    statements=tuple(
                        wording.replace("The {e}", "{e}").replace("the {e}", "{e}") for wording in relation.statements
                    ),
                )
            made.append(Fact(relation, phrase, second.value))
    return tuple(made)


@cache
def first_hops() -> dict[str, Fact]:
    """Return the fact that each noun phrase of a two-hop question rests on ("the town where Arlo lives")."""
    return {fact.relation.noun_phrase.format(e=fact.entity): fact for fact in facts() if fact.relation.kind == "person"}


def held_out_phrase(fact: Fact) -> bool:
    """True if a one- or two-hop question is about a held-out entity (its last word names the entity for one hop)."""
    names = fact.entity.split()
    return any(is_held_out(name) for name in names if name in facts_of())


def capital(text: str) -> str:
    """Return the text with its first letter in upper case."""
    return text[:1].upper() + text[1:]
