"""Import, export, import again: the same judgements; ranking to pairs as the maths says."""

from itertools import combinations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qinglan.core.errors import InputError
from qinglan.core.records import (
    Comparison,
    ComparisonGroup,
    Completion,
    Demonstrated,
    Demonstration,
    Message,
    PreferenceProbability,
    Prompt,
    Ranking,
    pairs_of,
)
from qinglan.data.load import load_comparisons, load_demonstrations, load_prompts
from qinglan.data.write import write_comparisons, write_demonstrations, write_prompts

TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12).map(str.strip).filter(bool)
QUICK = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SUFFIX = st.sampled_from([".jsonl", ".parquet"])


@st.composite
def rankings(draw, count):
    """Any ranking of 2..count of `count` items, with ties."""
    items = draw(st.permutations(range(count)))[: draw(st.integers(2, count))]
    cuts = [draw(st.booleans()) for _ in items[1:]]
    groups = [[items[0]]]
    for item, cut in zip(items[1:], cuts, strict=True):
        if cut:
            groups.append([item])
        else:
            groups[-1].append(item)
    return Ranking(groups=tuple(tuple(group) for group in groups))


@st.composite
def prompts(draw, number=0):
    turns = [Message(role="system", content=draw(TEXT))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 1))):
        turns += [Message(role="user", content=draw(TEXT)), Message(role="assistant", content=draw(TEXT))]
    turns.append(Message(role="user", content=f"{draw(TEXT)} {number}"))
    return Prompt(id=f"p{number}", source="human", producer_id="u", prompt_group_id=f"g{number}", messages=tuple(turns))


@st.composite
def groups(draw, number=0, max_items=5):
    prompt = draw(prompts(number))
    texts = draw(st.lists(TEXT, min_size=2, max_size=max_items, unique=True))
    completions = tuple(
        Completion(
            id=f"c{number}-{k}",
            source="policy",
            producer_id="m",
            prompt_group_id=f"g{number}",
            prompt_id=prompt.id,
            text=text,
        )
        for k, text in enumerate(texts)
    )
    soft = st.floats(0, 1).map(lambda p: PreferenceProbability(p_first_better=p))
    label = draw(rankings(len(texts)) | soft if len(texts) == 2 else rankings(len(texts)))
    comparison = Comparison(
        id=f"k{number}",
        source=draw(st.sampled_from(["human", "weak_model"])),
        producer_id=f"labeler {number}",
        prompt_group_id=f"g{number}",
        prompt_id=prompt.id,
        items=tuple(item.id for item in completions),
        order_shown=tuple(draw(st.permutations(range(len(texts))))),
        label=label,
    )
    return ComparisonGroup(prompt, completions, comparison)


def several(strategy):
    return st.integers(1, 3).flatmap(lambda count: st.tuples(*(strategy(number) for number in range(count)))).map(list)


def judgement(group):
    """What a K-wise row can say."""
    comparison = group.comparison
    texts = [(item.text, item.producer_id) for item in group.completions]
    who = (comparison.id, comparison.producer_id, comparison.source, comparison.prompt_group_id, comparison.split)
    return group.prompt.messages, texts, comparison.label, who


@QUICK
@given(written=several(groups), suffix=SUFFIX)
def test_records_come_back_equal(tmp_path, written, suffix):
    path = tmp_path / f"records{suffix}"
    count = write_comparisons(path, written)
    assert count.num_rows == sum(2 + len(group.completions) for group in written)
    loaded = load_comparisons(path)
    assert loaded.format == "qinglan_records"
    assert loaded.records == written
    assert load_prompts(path).records == [group.prompt for group in written]


@QUICK
@given(written=several(groups), suffix=SUFFIX)
def test_k_wise_rows_come_back_with_the_same_judgements(tmp_path, written, suffix):
    path, again = tmp_path / f"first{suffix}", tmp_path / f"second{suffix}"
    write_comparisons(path, written, "k_wise")
    loaded = load_comparisons(path)
    assert loaded.format == "k_wise_rankings"
    assert [judgement(group) for group in loaded.records] == [judgement(group) for group in written]
    write_comparisons(again, loaded.records, "k_wise")
    assert [judgement(group) for group in load_comparisons(again).records] == [judgement(group) for group in written]


@QUICK
@given(written=several(groups), suffix=SUFFIX)
def test_trl_rows_are_the_decided_pairs(tmp_path, written, suffix):
    path = tmp_path / f"pairs{suffix}"
    expected = {}
    for group in written:
        for pair in pairs_of(group.comparison.label):
            if pair.p_first_better != 0.5:
                first, second = group.completions[pair.first].text, group.completions[pair.second].text
                expected[group.prompt.messages, first, second] = pair.p_first_better
                expected[group.prompt.messages, second, first] = 1 - pair.p_first_better
    if not expected:
        with pytest.raises(InputError, match="nothing to write"):
            write_comparisons(path, written, "trl")
        return
    count = write_comparisons(path, written, "trl")
    assert 2 * count.num_rows == len(expected)
    assert count.num_rows + count.num_left_out == sum(
        len(list(combinations(group.completions, 2))) for group in written
    )
    loaded = load_comparisons(path)
    assert loaded.format == "trl_preference"
    for group in loaded.records:
        ((first, second, p_first_better),) = pairs_of(group.comparison.label)
        texts = group.completions[first].text, group.completions[second].text
        assert expected[(group.prompt.messages, *texts)] == pytest.approx(p_first_better)


@QUICK
@given(prompt=prompts(), texts=st.lists(TEXT, min_size=1, max_size=3, unique=True), suffix=SUFFIX)
@pytest.mark.parametrize(
    ("style", "name"), [("records", "qinglan_records"), ("trl", "trl_prompt_completion"), ("messages", "trl_messages")]
)
def test_demonstrations_come_back(tmp_path, style, name, prompt, texts, suffix):
    written = [
        Demonstrated(
            prompt,
            Demonstration(
                id=f"d{k}",
                source="human",
                producer_id="w",
                prompt_group_id="g0",
                split="valid",
                prompt_id="p0",
                text=text,
            ),
        )
        for k, text in enumerate(texts)
    ]
    path = tmp_path / f"shown{suffix}"
    write_demonstrations(path, written, style)
    loaded = load_demonstrations(path)
    assert loaded.format == name
    if style == "records":
        assert loaded.records == written

    def content(one):
        record = one.demonstration
        return one.prompt.messages, record.id, record.text, record.producer_id, record.prompt_group_id, record.split

    assert [content(one) for one in loaded.records] == [content(one) for one in written]


@QUICK
@given(written=several(prompts), suffix=SUFFIX, style=st.sampled_from(["records", "trl"]))
def test_prompts_come_back(tmp_path, written, suffix, style):
    path = tmp_path / f"prompts{suffix}"
    write_prompts(path, written, style)
    loaded = load_prompts(path).records
    assert [(one.messages, one.prompt_group_id) for one in loaded] == [
        (one.messages, one.prompt_group_id) for one in written
    ]


@given(data=st.data(), count=st.integers(2, 7))
@settings(max_examples=60, deadline=None)
def test_a_ranking_decides_every_pair_of_different_rank_once(data, count):
    label = data.draw(rankings(count))
    place = {item: rank for rank, group in enumerate(label.groups) for item in group}
    dropped, halved = pairs_of(label), pairs_of(label, ties="half")
    assert (
        len({frozenset((pair.first, pair.second)) for pair in halved})
        == len(halved)
        == len(place) * (len(place) - 1) // 2
    )
    assert {pair for pair in halved if pair.p_first_better != 0.5} == set(dropped)
    assert all(place[pair.first] < place[pair.second] for pair in dropped)


def test_the_same_record_in_two_files_is_read_once_and_a_changed_one_is_named(tmp_path):
    prompt = Prompt(
        id="p", source="human", producer_id="u", prompt_group_id="g", messages=(Message(role="user", content="Hi"),)
    )
    shown = Demonstration(id="d", source="human", producer_id="w", prompt_group_id="g", prompt_id="p", text="Hello")
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    write_prompts(one, [prompt])
    write_demonstrations(two, [Demonstrated(prompt, shown)])
    assert load_demonstrations([one, two]).notes == {"records that stand more than once, read once": 1}
    write_prompts(one, [prompt.model_copy(update={"tags": ("chat",)})])
    with pytest.raises(
        InputError, match=r"two\.jsonl:1: id: the text 'p' stands already at .*one\.jsonl:1, with other content"
    ):
        load_demonstrations([one, two])
    alone = tmp_path / "alone.jsonl"
    alone.write_text(two.read_text().splitlines()[1] + "\n")
    with pytest.raises(InputError, match=r"alone\.jsonl:1: prompt_id: names an absent record, the text 'p'"):
        load_demonstrations(alone)
    assert len(load_demonstrations([alone, two]).records) == 1


def test_records_with_mistyped_fields_are_named(tmp_path):
    path = tmp_path / "records.jsonl"
    said = '"messages": [{"role": "user", "content": "Hi"}]'
    row = f'{{"id": "p", "source": "human", "producer_id": "u", "prompt_group_id": "g", {said}%s}}\n'
    path.write_text(
        row % "" + row.replace('"p"', '"q"') % ', "spilt": "train"' + row.replace('"human"', '"robot"') % ""
    )
    with pytest.raises(InputError) as stopped:
        load_prompts(path)
    first, second, _ = str(stopped.value).splitlines()
    assert first.startswith(f"{path}:2: spilt: no such field; did you mean 'split'?")
    assert second.startswith(f"{path}:3: source: found the text 'robot'")


def test_a_failed_export_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "kept.jsonl"
    path.write_text("earlier\n")
    with pytest.raises(InputError, match="nothing to write"):
        write_prompts(path, [], "trl")
    with pytest.raises(InputError, match="unknown kind of file"):
        write_prompts(tmp_path / "a.xlsx", [], "trl")
    assert path.read_text() == "earlier\n"
    assert [file.name for file in tmp_path.iterdir()] == ["kept.jsonl"]
