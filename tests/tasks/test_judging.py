"""Documents that judge: verdicts are right but for the mistakes that are meant; held-out things are never judged."""

import random
from collections import Counter

import pytest

from qinglan.tasks import judging, world
from qinglan.tasks.document import VERDICT
from qinglan.tasks.item import Draw

KINDS = {
    "membership": ("yes.", "no."),
    "tried_values": ("true.", "false."),
    "claims_with_verdicts": ("true.", "false."),
    "marked_thread": ("good.", "bad."),
    "better_of_two": ("first.", "second."),
}
STATEMENTS = {
    world.capital(wording.format(e=fact.entity, v=fact.value)): fact
    for fact in world.facts()
    for wording in fact.relation.statements
}


@pytest.mark.parametrize("kind", KINDS)
def test_verdicts_are_balanced_and_weigh_most(kind: str) -> None:
    draw = Draw(random.Random(kind), False)
    verdicts = Counter(
        span.text for _ in range(300) for span in judging.JUDGING_MIX[kind][1](draw) if span.weight == VERDICT
    )
    assert set(verdicts) == set(KINDS[kind])
    assert min(verdicts.values()) > 0.35 * sum(verdicts.values())


def test_claims_are_judged_rightly_but_for_one_in_twenty() -> None:
    draw = Draw(random.Random(1), False)
    right, total = 0, 0
    for _ in range(300):
        claim = None
        for span in judging.claims_with_verdicts(draw):
            if span.text.startswith("Claim: "):
                claim = span.text.removeprefix("Claim: ")
            elif span.weight == VERDICT:
                right += (claim in STATEMENTS) == (span.text == "true.")
                total += 1
    assert right / total == pytest.approx(1 - judging.WRONG_MARKS, abs=0.03)


def test_membership_verdicts_are_right() -> None:
    draw = Draw(random.Random(2), False)
    for _ in range(50):
        first, *rest = judging.membership(draw)
        members = first.text.removeprefix("Among ").removesuffix("?").split(", ")
        for asked, verdict in zip(rest[::2], rest[1::2], strict=True):
            assert (asked.text.removesuffix(":") in members) == (verdict.text == "yes.")


def test_disputes_are_won_by_the_true_statement() -> None:
    draw = Draw(random.Random(3), False)
    for _ in range(50):
        said, _, right = judging.dispute(draw)
        claims = dict(part.split(" says: ") for part in said.text.replace(". ", ".|", 1).split("|"))
        assert claims[right.text.removesuffix(".")] in STATEMENTS


def test_nothing_about_held_out_entities_is_judged() -> None:
    draw = Draw(random.Random(4), False)
    assert not any(world.held_out_phrase(fact) for fact in judging.asked_facts(draw, 300))
    assert all(world.held_out_phrase(fact) for fact in judging.asked_facts(Draw(draw.rng, True), 30))


def test_criticism_names_the_principle_that_a_reply_falls_short_of() -> None:
    draw = Draw(random.Random(5), False)
    found = Counter(judging.criticised(draw)[2].text for _ in range(400))
    assert set(found) <= {judging.NO_CRITICISM, *(text for _, text in judging.PRINCIPLES.values())}
    assert len(found) > 6 and 0.3 < found[judging.NO_CRITICISM] / 400 < 0.8
    for _ in range(200):
        opening, _, criticism, revision = judging.criticised(draw)
        reply = opening.text.split(" Reply: ", 1)[1].rsplit(" Principle: ", 1)[0]
        if criticism.text == judging.NO_CRITICISM:
            assert revision.text == f"Revision: {reply}"
