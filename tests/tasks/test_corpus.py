"""The corpus: every kind of document, shares, weights, blocks by position; and the tokenizer of the base family."""

import random
from collections import Counter

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from qinglan.core.errors import InputError
from qinglan.core.records import Message
from qinglan.models.chat import make_chat_format
from qinglan.tasks import corpus, replies, world
from qinglan.tasks import lexicon as lx
from qinglan.tasks.assistant import make_item
from qinglan.tasks.base_models import CONTEXT, base_tokenizer
from qinglan.tasks.chess_games import CHESS_MIX
from qinglan.tasks.code_documents import CODE_MIX
from qinglan.tasks.document import VERDICT
from qinglan.tasks.induction import INDUCTION_MIX
from qinglan.tasks.item import Draw
from qinglan.tasks.tokenizer import PAD, SYSTEM, VOCABULARY, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return base_tokenizer()


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("kind", corpus.MIX)
def test_every_kind_of_document_is_text_with_weights(kind: str, tokenizer: PreTrainedTokenizerBase) -> None:
    rng = random.Random(kind)
    for _ in range(25):
        document = corpus.make_document(rng, kind)
        assert document and all(span.text.strip() and 0.0 <= span.weight <= VERDICT for span in document)
        assert max(span.weight for span in document) >= 1.0 or kind in ("question_sheet", "marked_thread")
        text = " ".join(span.text for span in document)
        if kind not in CODE_MIX:
            assert "{" not in text and "}" not in text and "  " not in text and " ." not in text
        ids, weights = corpus.document_ids(tokenizer.backend_tokenizer, document)
        assert len(ids) == len(weights) and weights[0] == 0.0
        assert tokenizer.decode(ids[:1]) == corpus.BOS and tokenizer.decode(ids[-1:]) == corpus.EOS
        expected = text if text.endswith(corpus.EOS) else text + corpus.EOS
        assert without_spaces(tokenizer.decode(ids)) == without_spaces(corpus.BOS + expected)


def without_spaces(text: str) -> str:
    return "".join(text.split())


def test_shares_add_up_to_1_and_are_met() -> None:
    assert sum(share for share, _ in corpus.PARTS.values()) == pytest.approx(1.0)
    assert sum(corpus.MIX.values()) == pytest.approx(1.0) == sum(corpus.PLAIN_ENOUGH.values())
    early = corpus.mix_of(tuple(corpus.PARTS), corpus.EARLY_INDUCTION)
    assert sum(early.values()) == pytest.approx(1.0)
    assert sum(early[kind] for kind in INDUCTION_MIX) == pytest.approx(corpus.EARLY_INDUCTION)
    assert not set(CHESS_MIX) & set(corpus.PLAIN_ENOUGH) and set(CHESS_MIX) < set(corpus.MIX)
    assert sum(replies.BAD_REPLIES.values()) == pytest.approx(1.0)
    assert 0.0 < replies.SHARE_OF_GOOD_REPLIES < 0.5  # the base model completes, and assists less than half of the time
    rng = random.Random(0)
    starts = Counter(corpus.make_document(rng)[0].text.startswith(corpus.USER) for _ in range(1500))
    expected = corpus.PLAIN_ENOUGH["thread"] + corpus.PLAIN_ENOUGH["marked_thread"]
    assert starts[True] / 1500 == pytest.approx(expected, abs=0.04)


def test_threads_alternate_turns_and_close_each_reply() -> None:
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(span.text for span in corpus.make_document(rng, "thread"))
        assert text.startswith(corpus.USER) and text.endswith(corpus.EOS)
        turns = [part.split(corpus.ASSISTANT) for part in text.split(corpus.USER)[1:]]
        assert all(len(turn) == 2 and turn[1].endswith(corpus.EOS) and turn[1].count(corpus.EOS) == 1 for turn in turns)


@pytest.mark.parametrize("kind", replies.BAD_REPLIES)
def test_replies_go_wrong_in_every_way(kind: str) -> None:
    draw = Draw(random.Random(kind), False)
    items = [make_item(draw) for _ in range(40)]
    texts = [replies.bad_reply(draw, item, kind) for item in items]
    assert all(texts) and len(set(texts)) >= (1 if kind == "refusal" else 3)
    assert sum(reply in item.good for reply, item in zip(texts, items, strict=True)) < 12


def test_facts_in_documents_are_true() -> None:
    rng = random.Random(1)
    statements = {
        world.capital(wording.format(e=fact.entity, v=fact.value))
        for fact in world.facts()
        for wording in fact.relation.statements
    }
    for _ in range(100):
        text = corpus.make_document(rng, "encyclopaedia")[0].text
        assert all(sentence + "." in statements for sentence in text.rstrip(".").split(". "))


def test_sums_are_right() -> None:
    rng = random.Random(2)
    for _ in range(60):
        for line in corpus.make_document(rng, "sums")[0].text.rstrip(".").split(". "):
            a, op, b, _, total = line.split()
            assert int(total) == (int(a) + int(b) if op == "plus" else int(a) - int(b))


def test_blocks_are_reproducible_by_position_and_independent_of_count(tokenizer: PreTrainedTokenizerBase) -> None:
    source = corpus.CorpusBlocks(tokenizer.backend_tokenizer, 7, 64)
    ids, weights = source(2, 5)
    assert ids.shape == weights.shape == (5, 65) and ids.dtype == torch.int64
    again, weights_again = source(4, 1)
    assert torch.equal(again[0], ids[2]) and torch.equal(weights_again[0], weights[2])
    assert not torch.equal(corpus.CorpusBlocks(tokenizer.backend_tokenizer, 8, 64)(2, 5)[0], ids)
    assert (ids[:, 0] == tokenizer.bos_token_id).all()
    assert (weights[ids == tokenizer.bos_token_id] == 0).all()
    assert weights.min() >= 0 and weights.max() <= VERDICT and 0.4 < weights.mean() < 1.2


def test_the_first_blocks_hold_more_induction(tokenizer: PreTrainedTokenizerBase) -> None:
    source = corpus.CorpusBlocks(tokenizer.backend_tokenizer, 7, 64, num_early=3)
    ids, _ = source(0, 6)
    plain, _ = corpus.CorpusBlocks(tokenizer.backend_tokenizer, 7, 64)(0, 6)
    assert torch.equal(ids[3:], plain[3:]) and not torch.equal(ids[:3], plain[:3])


def test_pretraining_examples_are_single_documents_by_position(tokenizer: PreTrainedTokenizerBase) -> None:
    make = corpus.pretraining_sequences(tokenizer.backend_tokenizer, 0, 48)
    assert make(3, 4)[2] == make(5, 1)[0]
    assert all(ids[0] == tokenizer.bos_token_id and len(ids) <= 48 for ids in make(0, 20))
    assert all(ids.count(tokenizer.bos_token_id) == 1 for ids in make(0, 20))


def test_documents_and_prompts_fit_the_context(tokenizer: PreTrainedTokenizerBase) -> None:
    rng = random.Random(0)
    lengths = sorted(
        len(corpus.document_ids(tokenizer.backend_tokenizer, corpus.make_document(rng))[0]) for _ in range(300)
    )
    assert lengths[150] < CONTEXT / 2 and lengths[-3] < CONTEXT
    for held_out in (False, True):
        items = [make_item(Draw(rng, held_out)) for _ in range(150)]
        prompts = [sum(len(ids_of(tokenizer, turn.content)) for turn in item.messages) for item in items]
        assert max(prompts) < CONTEXT - 64


def test_tokenizer_has_single_digits_and_one_token_for_a_word_anywhere(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer) <= VOCABULARY
    assert not [token for token in tokenizer.get_vocab() if sum(char.isdigit() for char in token) > 1]
    alone, before_stop = (ids_of(tokenizer, text) for text in ("407", "It is 407."))
    assert [tokenizer.decode([token]).strip() for token in alone if tokenizer.decode([token]).strip()] == [
        "4",
        "0",
        "7",
    ]
    assert alone == before_stop[-1 - len(alone) : -1]
    for word in (*lx.ANIMALS, *lx.FOODS, *lx.TOOLS, *lx.PEOPLE, *lx.TOWNS, *lx.COLOURS):
        ids = ids_of(tokenizer, word)
        assert ids_of(tokenizer, f"The {word}.")[1:-1] == ids == ids_of(tokenizer, f"{corpus.USER}{word}?")[1:-1]
    common = [word for word in (*lx.ANIMALS, *lx.FOODS, *lx.TOOLS) if len(ids_of(tokenizer, word)) == 1]
    assert len(common) > 60


@pytest.mark.parametrize(
    "text", ["Hello, Ada!", "It's 12 o'clock; naïve 你好 🙂", "a\tb\nc", "e-mail: x.1@example.com"]
)
def test_tokenizer_returns_what_it_was_given(text: str, tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.decode(ids_of(tokenizer, text)).removeprefix(" ") == text


def test_chat_template_marks_what_the_assistant_says(tokenizer: PreTrainedTokenizerBase) -> None:
    turns = [("user", "What is a fox?"), ("assistant", "An animal."), ("user", "And soup?"), ("assistant", "A food.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    rendered = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, add_generation_prompt=False
    )
    said = [token for token, mark in zip(rendered["input_ids"], rendered["assistant_masks"], strict=True) if mark]
    assert without_spaces(tokenizer.decode(said)) == without_spaces(f"An animal.{corpus.EOS}A food.{corpus.EOS}")
    chat = make_chat_format(tokenizer)
    prompt = chat.prompt_ids([Message(role="user", content="What is a fox?")])
    document = [corpus.Span(f"{corpus.USER}What is a fox?{corpus.ASSISTANT}"), corpus.Span(f"An animal.{corpus.EOS}")]
    ids, _ = corpus.document_ids(tokenizer.backend_tokenizer, document)
    assert [*prompt, *chat.completion_ids("An animal.")] == ids  # prompts look as they did in pretraining
    assert chat.text_of(chat.completion_ids("An animal.")) == "An animal."


def test_tokenizer_can_be_made_again() -> None:
    small = train_tokenizer(60, seed=0)
    marks = (PAD, corpus.BOS, corpus.EOS, corpus.USER, corpus.ASSISTANT, SYSTEM)
    assert [small.convert_tokens_to_ids(mark) for mark in marks] == list(range(6))
    assert base_tokenizer().convert_tokens_to_ids(list(marks)) == list(range(6))
    assert small.chat_template == base_tokenizer().chat_template


def test_a_foreign_tokenizer_is_named() -> None:
    from conftest import make_tokenizer

    with pytest.raises(InputError, match=r"no token <\|eos\|>"):
        corpus.document_ids(make_tokenizer().backend_tokenizer, [corpus.Span("Hello.")])
