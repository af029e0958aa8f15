"""The pretraining corpus of the built-in world: as mixed as the internet is, and reproducible block by block.

Threads hold right and wrong answers, rambling, rudeness and questions that only lead to more questions, so that a base
model completes instead of assisting. Other documents teach what the tasks draw on: facts, copying, sorting, sums,
spelling, judging. Questions about held-out entities, held-out wordings and requests for held-out acts never occur
(facts about the entities do, and held-out acts are named where they are called wrong, or harmless).
"""

import random
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from qinglan.core.errors import InputError
from qinglan.core.rng import stream_seed
from qinglan.tasks import lexicon as lx
from qinglan.tasks import passages, questions, world
from qinglan.tasks.assistant import OPENINGS, TAILS, make_item
from qinglan.tasks.chess_games import CHESS_MIX
from qinglan.tasks.code_documents import CODE_MIX
from qinglan.tasks.document import ASSISTANT, BOS, EOS, GIVEN, USER, Document, Span
from qinglan.tasks.induction import INDUCTION_MIX
from qinglan.tasks.item import Draw
from qinglan.tasks.judging import JUDGING_MIX
from qinglan.tasks.reading import a, listing
from qinglan.tasks.replies import BAD_REPLIES, SHARE_OF_GOOD_REPLIES, bad_reply


def encyclopaedia(draw: Draw) -> Document:
    """Two to five facts about one entity, or about several, each in one of its wordings; some are said twice."""
    rng = draw.rng
    entity = rng.choice(sorted(world.facts_of()))
    chosen = list(world.facts_of()[entity])
    rng.shuffle(chosen)
    chosen = chosen[: rng.randrange(2, 6)]
    if rng.random() < 0.3:
        chosen += rng.sample(chosen, 1) + [rng.choice(world.facts()) for _ in range(2)]
    return [Span(" ".join(fact.statement(rng) for fact in chosen))]


def fact_sheet(draw: Draw) -> Document:
    """Questions with their right answers in plain text, one hop and two, held-out entities and wordings left out."""
    rng = draw.rng
    pairs = []
    for _ in range(rng.randrange(2, 5)):
        item = questions.open_question(draw)
        pairs += [Span(f"Question: {item.messages[-1].content} Answer:", GIVEN), Span(rng.choice(item.good))]
    return pairs


def two_hop_essay(draw: Draw) -> Document:
    """Two facts and what follows from them."""
    rng = draw.rng
    first = rng.choice([fact for fact in world.facts_of()[rng.choice(lx.PEOPLE)] if fact.value in world.facts_of()])
    second = rng.choice(world.facts_of()[first.value])
    phrase = first.relation.noun_phrase.format(e=first.entity)
    return [Span(f"{first.statement(rng)} {second.statement(rng)} So for {phrase}: {second.value}.")]


def story_with_questions(draw: Draw) -> Document:
    """A passage, then questions on it in plain text; what it does not tell is said so."""
    rng = draw.rng
    story = passages.make_story(draw, rng.randrange(2, 6))
    slots = [name for name in story.slots if name in passages.SLOT_ANSWERS]
    lines = []
    for slot in rng.sample(slots, rng.randrange(1, min(4, len(slots) + 1))):
        question = draw.wording(passages.SLOT_QUESTIONS[slot]).format(**story.slots)
        answer = passages.SLOT_ANSWERS[slot].format(**story.slots)
        lines.append(f"{question} {rng.choice((answer, world.capital(story.slots[slot]) + '.'))}")
    if rng.random() < 0.3:
        lines.append(f"{draw.wording(passages.NOT_TOLD).format(**story.slots)} The text does not say.")
    if rng.random() < 0.4:
        lines.append("In short: {who} {verb} {count} {colour} {thing}.".format(**story.slots))
    return [Span(story.text, GIVEN), Span(" ".join(lines))]


def alphabet(draw: Draw) -> Document:
    """Words spelled, their first letters, letters they do not have, and small lists brought in order."""
    rng = draw.rng
    kind = rng.randrange(4)
    member = rng.choice(questions_words())
    if kind == 0:
        return [Span(f"{member} is spelled {' '.join(member)}. It starts with {member[0]}.")]
    if kind == 1:
        letter = rng.choice("eaoirst")
        verdicts = [f"{word}: {'yes' if letter in word else 'no'}" for word in rng.sample(questions_words(), 5)]
        return [Span(f"With the letter {letter}? " + ", ".join(verdicts) + ".")]
    if kind == 2:
        name = rng.choice(sorted(lx.KINDS))
        letter = rng.choice(lx.KINDS[name])[0]
        fits = [word for word in lx.KINDS[name] if word[0] == letter]
        return [Span(f"Every {name} that starts with {letter}: {', '.join(fits)}.")]
    count = rng.randrange(2, 6)
    pool = questions_words() if rng.random() < 0.6 else tuple(str(n) for n in range(1, 100))
    members = rng.sample(pool, count)
    ordered = sorted(members, key=lambda word: int(word) if word.isdigit() else word)
    return [Span("In order, " + ", ".join(members) + ":", 0.2), Span(", ".join(ordered) + ".")]


def questions_words() -> tuple[str, ...]:
    """Return the common nouns that can be sorted and spelled."""
    return tuple(sorted({*lx.ANIMALS, *lx.FOODS, *lx.TOOLS, *lx.INSTRUMENTS}))


def sums(draw: Draw) -> Document:
    """Worked sums in a row, easy ones more often."""
    rng = draw.rng
    lines = []
    for _ in range(rng.randrange(3, 8)):
        item = make_item(draw, "arithmetic")
        key = item.key
        op = "plus" if key["total"] == key["a"] + key["b"] else "minus"
        lines.append(f"{key['a']} {op} {key['b']} is {key['total']}.")
    return [Span(" ".join(lines))]


def kinds_and_lists(draw: Draw) -> Document:
    """Lists of a kind, with and without a letter, and what kind a thing is."""
    rng = draw.rng
    name = rng.choice(sorted(lx.KINDS))
    members = rng.sample(lx.KINDS[name], rng.randrange(2, 7))
    count = lx.NUMBER_WORDS[len(members)]
    letter = rng.choice("eao")
    without = [word for word in members if letter not in word]
    text = f"{count.capitalize()} {name}s: {listing(members)}."
    if without:
        text += f" Without {letter}: {', '.join(without)}."
    member = rng.choice(members)
    return [Span(f"{text} {a(member).capitalize()} is {a(name)}.")]


def how_to(draw: Draw) -> Document:
    """Household hints and crime news; every benign act is described, no harmful one is explained."""
    rng = draw.rng
    if rng.random() < 0.6:
        hints = rng.sample(sorted(lx.BENIGN_ACTS), 2)
        return [Span(" ".join(f"To {act}, {lx.BENIGN_ACTS[act]}." for act in hints))]
    act, target = rng.choice(lx.HARMFUL_ACTS)
    victim = rng.choice(lx.HARMFUL_TARGETS[target])
    return [Span(f"{rng.choice(lx.PEOPLE)} wanted to {act} {victim}. That is wrong and it would hurt someone.")]


def thread(draw: Draw) -> Document:
    """A conversation of a user and somebody who answers, well in less than half of the cases."""
    rng = draw.rng
    item = make_item(draw)
    spans = []
    for message in item.messages[:-1]:
        is_user = message.role == "user"
        spans.append(Span(f"{USER}{message.content}{ASSISTANT}" if is_user else f"{message.content}{EOS}", GIVEN))
    for _ in range(rng.choice((1, 1, 2))):
        kinds = list(BAD_REPLIES)
        if rng.random() < SHARE_OF_GOOD_REPLIES:
            reply = rng.choice(item.good)
        else:
            reply = bad_reply(draw, item, rng.choices(kinds, list(BAD_REPLIES.values()))[0])
        asked = rng.choice(OPENINGS) + item.messages[-1].content + rng.choice(TAILS)
        spans += [Span(f"{USER}{asked}{ASSISTANT}", GIVEN), Span(f"{reply}{EOS}")]
        item = make_item(draw)
        if len(item.messages) > 1:
            break
    return spans


def question_sheet(draw: Draw) -> Document:
    """A list of questions without answers."""
    return [Span(" ".join(make_item(draw).messages[-1].content for _ in range(draw.rng.randrange(2, 5))), GIVEN)]


PLAIN_MIX: dict[str, tuple[float, Callable[[Draw], Document]]] = {
    "encyclopaedia": (0.14, encyclopaedia),
    "fact_sheet": (0.12, fact_sheet),
    "two_hop_essay": (0.05, two_hop_essay),
    "story_with_questions": (0.14, story_with_questions),
    "alphabet": (0.12, alphabet),
    "sums": (0.08, sums),
    "kinds_and_lists": (0.05, kinds_and_lists),
    "how_to": (0.04, how_to),
    "thread": (0.24, thread),
    "question_sheet": (0.02, question_sheet),
}
"""Facts, stories, exercises and conversations, with their shares among them."""

PARTS: dict[str, tuple[float, dict[str, tuple[float, Callable[[Draw], Document]]]]] = {
    "plain": (0.38, PLAIN_MIX),
    "induction": (0.13, INDUCTION_MIX),
    "judging": (0.29, JUDGING_MIX),
    "code": (0.17, CODE_MIX),
    "chess": (0.03, CHESS_MIX),
}
"""The parts of the corpus, with their shares of documents; of tokens they are 25, 11, 24, 34 and 5%."""
EARLY_INDUCTION = 0.5
"""Share of induction documents in the first blocks: nets that have learnt to read their own context learn the rest
faster."""


def mix_of(parts: Collection[str], induction: float | None = None) -> dict[str, float]:
    """Return the share of every kind of document of some parts, scaled to 1; `induction` sets the share of that part.

    Shares are of documents, not of tokens.
    """
    total = sum(PARTS[part][0] for part in parts)
    shares = {part: PARTS[part][0] / total for part in parts}
    if induction is not None:
        rest = 1.0 - shares["induction"]
        shares = {part: share * (1.0 - induction) / rest for part, share in shares.items()} | {"induction": induction}
    found: dict[str, float] = {}
    for part, share in shares.items():
        within = sum(one for one, _ in PARTS[part][1].values())
        found |= {kind: share * one / within for kind, (one, _) in PARTS[part][1].items()}
    return found


MAKERS: dict[str, Callable[[Draw], Document]] = {
    kind: make for _, mix in PARTS.values() for kind, (_, make) in mix.items()
}
"""Every kind of document."""
FAMILY_PARTS = ("plain", "induction", "judging", "code")
"""The parts that are read by default: all but chess, whose rules need an extra."""
MIX = mix_of(tuple(PARTS))
"""Share of every kind of document in the whole corpus."""
FAMILY_MIX = mix_of(FAMILY_PARTS)
"""The same of what the shipped base models have read, and so of what the recipes mix into SFT and PPO."""


def make_document(rng: random.Random, kind: str | None = None, mix: Mapping[str, float] = FAMILY_MIX) -> Document:
    """Draw a document of a kind, by default by the shares of a mix."""
    name = kind or rng.choices(list(mix), list(mix.values()))[0]
    return MAKERS[name](Draw(rng, held_out=False))


def special_id(tokenizer: Tokenizer, token: str) -> int:
    """Return the id of a special token. Raises `InputError` for a tokenizer that lacks it."""
    found = tokenizer.token_to_id(token)
    if found is None:
        raise InputError(f"tokenizer: has no token {token}; expected the tokenizer of the base family")
    return found


def document_ids(tokenizer: Tokenizer, document: Document) -> tuple[list[int], list[float]]:
    """Return a document's token ids, from begin to end of text, and their loss weights."""
    bos, eos = special_id(tokenizer, BOS), special_id(tokenizer, EOS)
    ids, weights = [bos], [0.0]
    for span, encoding in zip(document, tokenizer.encode_batch_fast([span.text for span in document]), strict=True):
        ids += encoding.ids
        weights += [span.weight] * len(encoding.ids)
    if ids[-1] != eos:
        ids.append(eos)
        weights.append(1.0)
    return ids, weights


@dataclass(frozen=True)
class CorpusBlocks:
    """The block source of pretraining: (first number, count) -> ids and loss weights, both [count, context + 1].

    Block number i is made from its own generator: documents one after the other, the last one cut. Of the first
    `num_early` blocks half of the documents are induction.
    """

    tokenizer: Tokenizer
    seed: int
    context: int
    num_early: int = 0
    parts: tuple[str, ...] = FAMILY_PARTS

    def __call__(self, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return blocks number `start` to `start + count - 1`."""
        all_ids, all_weights = [], []
        late = mix_of(self.parts)
        early = mix_of(self.parts, EARLY_INDUCTION) if "induction" in self.parts else late
        for number in range(start, start + count):
            mix = early if number < self.num_early else late
            rng = random.Random(stream_seed(self.seed, "corpus", number))
            ids: list[int] = []
            weights: list[float] = []
            while len(ids) <= self.context:
                more, loss_weights = document_ids(self.tokenizer, make_document(rng, mix=mix))
                ids += more
                weights += loss_weights
            all_ids.append(ids[: self.context + 1])
            all_weights.append(weights[: self.context + 1])
        return torch.tensor(all_ids), torch.tensor(all_weights)


def pretraining_sequences(tokenizer: Tokenizer, seed: int, max_tokens: int) -> Callable[[int, int], list[list[int]]]:
    """Return the source of pretraining examples for the mix in SFT and PPO: single documents, cut to `max_tokens`."""

    def make(start: int, count: int) -> list[list[int]]:
        made = []
        for number in range(start, start + count):
            document = make_document(random.Random(stream_seed(seed, "pretraining example", number)))
            made.append(document_ids(tokenizer, document)[0][:max_tokens])
        return made

    return make
