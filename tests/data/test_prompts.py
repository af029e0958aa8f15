"""Filters, splits and personal data."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qinglan.core.errors import InputError
from qinglan.core.records import ComparisonGroup, Completion, Demonstrated, Demonstration, Message, Prompt
from qinglan.data.pii import find_pii, iban_fits, luhn
from qinglan.data.prompts import PromptConfig, check_disjoint, filter_prompts, split_by_group


def prompt(text, number=0, group=None, split="train", system=None):
    messages = ([Message(role="system", content=system)] if system else []) + [Message(role="user", content=text)]
    return Prompt(
        id=f"p{number}",
        source="human",
        producer_id="u",
        prompt_group_id=group or f"g{number}",
        split=split,
        messages=tuple(messages),
    )


def texts(prompts):
    return [one.messages[-1].content for one in prompts]


def test_prompts_with_a_long_shared_prefix_are_dropped():
    given_texts = [
        "Write a poem about the sea",
        "write a POEM, about the land!",
        "Write a poem",
        "Write a poem",
        "Sort these",
    ]
    prompts = [prompt(text, number) for number, text in enumerate(given_texts)]
    found = filter_prompts(prompts, PromptConfig(prefix_words=4))
    assert texts(found.kept) == ["Write a poem about the sea", "Write a poem", "Sort these"]
    assert found.dropped == {"shared prefix": 2}
    assert [(one.prompt.id, one.detail) for one in found.which] == [("p1", "p0"), ("p3", "p2")]
    assert len(filter_prompts(prompts, PromptConfig(prefix_words=0)).kept) == 5


def test_a_common_system_turn_is_no_shared_prefix():
    system = "You are a helpful assistant who answers at once."
    prompts = [
        prompt("Hi", 0, system=system),
        prompt("Bye", 1, system=system),
        prompt("Hi", 2),
        prompt("?!", 3),
        prompt("!!", 4),
    ]
    assert len(filter_prompts(prompts, PromptConfig(prefix_words=3)).kept) == 5


def test_the_cap_counts_what_is_kept_only():
    prompts = [prompt(text, number, group="user") for number, text in enumerate(["a", "a", "b", "c"])]
    found = filter_prompts(prompts, PromptConfig(max_per_group=2))
    assert texts(found.kept) == ["a", "b"]
    assert found.dropped == {"shared prefix": 1, "over the cap of its group": 1}


def test_personal_data_is_filtered_on_the_training_split():
    prompts = [prompt("Mail a@b.org", 0), prompt("Mail me at a@b.org", 1, split="valid")]
    assert [one.id for one in filter_prompts(prompts, PromptConfig()).kept] == ["p1"]
    assert filter_prompts(prompts, PromptConfig(pii="all")).dropped == {"personal data": 2}
    assert len(filter_prompts(prompts, PromptConfig(pii="none")).kept) == 2


def test_length_is_measured_by_the_callers_tokens():
    prompts = [prompt("one two three", 0), prompt("one", 1)]
    config = PromptConfig(max_tokens=2)
    found = filter_prompts(prompts, config, num_tokens=lambda one: len(one.messages[0].content.split()))
    assert (texts(found.kept), found.dropped, found.which[0].detail) == (["one"], {"too long": 1}, "3 tokens")
    assert len(filter_prompts(prompts, config).kept) == 2


WORDS = st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=4).map(" ".join)


@given(st.lists(st.tuples(WORDS, st.sampled_from(["g", "h"])), max_size=12), st.integers(0, 3), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_every_prompt_is_kept_or_counted(rows, prefix_words, cap):
    prompts = [prompt(text, number, group) for number, (text, group) in enumerate(rows)]
    config = PromptConfig(prefix_words=prefix_words, max_per_group=cap)
    found = filter_prompts(prompts, config)
    assert len(found.kept) + sum(found.dropped.values()) == len(prompts)
    assert sum(found.dropped.values()) == len(found.which)
    assert filter_prompts(found.kept, config).kept == found.kept


SHARES = {"train": 0.6, "valid": 0.2, "test": 0.2}


@given(st.lists(st.integers(0, 30), max_size=60), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_splits_are_disjoint_whole_and_stable(numbers, seed):
    prompts = [prompt("Hi", k, group=f"user {number}") for k, number in enumerate(numbers)]
    sides = split_by_group(prompts, SHARES, seed)
    check_disjoint(sides)
    assert sorted(one.id for side in sides.values() for one in side) == sorted(one.id for one in prompts)
    assert all(one.split == name for name, side in sides.items() for one in side)
    more = split_by_group([*prompts, prompt("new", 999, group="newcomer")], SHARES, seed)
    assert all([one for one in more[name] if one.id != "p999"] == side for name, side in sides.items())


def test_shares_are_about_kept_and_the_seed_matters():
    prompts = [prompt("Hi", k) for k in range(2000)]
    sides = split_by_group(prompts, SHARES, 0)
    assert [len(side) for side in sides.values()] == pytest.approx([1200, 400, 400], abs=60)
    assert split_by_group(prompts, SHARES, 1)["test"] != sides["test"]
    assert {
        one.split for side in split_by_group(prompts, {"weak": 0.5, "strong": 0.5}, 0).values() for one in side
    } == {"train"}


def test_demonstrations_and_prompts_fall_on_the_same_side():
    prompts = [prompt("Hi", k) for k in range(50)]
    shown = [
        Demonstrated(
            one,
            Demonstration(
                id="d", source="human", producer_id="w", prompt_group_id=one.prompt_group_id, prompt_id=one.id, text="x"
            ),
        )
        for one in prompts
    ]
    sides, both = split_by_group(prompts, SHARES, 0), split_by_group(shown, SHARES, 0)
    assert all([one.prompt for one in both[name]] == side for name, side in sides.items())
    assert all(one.demonstration.split == name for name, side in both.items() for one in side)


@pytest.mark.parametrize("shares", [{}, {"train": 0.5}, {"train": 1.2, "test": -0.2}, {"train": float("nan")}])
def test_shares_must_sum_to_one(shares):
    with pytest.raises(InputError, match="sum to 1"):
        split_by_group([], shares, 0)


def test_check_disjoint_names_the_group():
    with pytest.raises(InputError, match="prompt group user 7: stands on both train and test"):
        check_disjoint({"train": [prompt("a", 0, group="user 7")], "test": [prompt("b", 1, group="user 7")]})


def test_check_disjoint_looks_into_groups_of_every_kind():
    one = prompt("a", 0, group="g")
    completion = Completion(id="c", source="policy", producer_id="m", prompt_group_id="g", prompt_id="p0", text="x")
    group = ComparisonGroup(one, (completion,), None)
    with pytest.raises(InputError, match="prompt group g"):
        check_disjoint({"train": [group], "test": [completion]})


@pytest.mark.parametrize(
    ("text", "kind", "part"),
    [
        ("write to ann.lee+x@mail.example.co.uk.", "email", "ann.lee+x@mail.example.co.uk"),
        ("call +44 20 7946 0958 now", "phone", "+44 20 7946 0958"),
        ("call (555) 123-4567", "phone", "(555) 123-4567"),
        ("call 1-555-123-4567", "phone", "1-555-123-4567"),
        ("call +8613800138000.", "phone", "+8613800138000"),
        ("card 4111 1111 1111 1111 ok", "card", "4111 1111 1111 1111"),
        ("card 378282246310005", "card", "378282246310005"),
        ("pay GB82 WEST 1234 5698 7654 32 NOW PLEASE", "iban", "GB82 WEST 1234 5698 7654 32"),
        ("pay DE89370400440532013000", "iban", "DE89370400440532013000"),
        ("host 8.8.8.8, port", "ip", "8.8.8.8"),
        ("host 2001:4860:4860::8888 up", "ip", "2001:4860:4860::8888"),
        ("my number is 078-05-1120", "ssn", "078-05-1120"),
    ],
)
def test_personal_data_is_found(text, kind, part):
    ((found, start, end),) = find_pii(text)
    assert (found, text[start:end]) == (kind, part)


@pytest.mark.parametrize(
    "text",
    [
        "in 1990-2000 there were 1234567890 of them",
        "4111 1111 1111 1112 fails the check",
        "0000 0000 0000 0000",
        "GB83 WEST 1234 5698 7654 32 fails the check",
        "local 192.168.0.1, 127.0.0.1 and ::1, 10.0.0.1",
        "version 1.2.3 and 1.2.3.4.5 and 999.1.1.1",
        "at 12:30:45, ratio 3:4:5",
        "000-12-3456, 666-12-3456, 900-12-3456, 123-00-4567",
        "user@localhost @name a@b",
        "3.14159265358979 and 123,456,789.00",
        "2+2=4, +5 points, 10-20-30",
        "std::vector<int> a::b",
    ],
)
def test_other_numbers_are_left_alone(text):
    assert find_pii(text) == []


def test_check_sums():
    assert luhn("4539578763621486")
    assert not luhn("4539578763621487")
    assert iban_fits("FR1420041010050500013M02606")
    assert not iban_fits("FR1420041010050500013M02607")


@given(st.text(max_size=80))
@settings(max_examples=100, deadline=None)
def test_findings_do_not_overlap(text):
    found = find_pii(text)
    assert all(one.end <= two.start for one, two in pairwise(found))
