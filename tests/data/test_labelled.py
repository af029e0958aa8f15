"""Labelled texts: every way to write a label, what is refused, and sides that share no group and are balanced."""

import json
from pathlib import Path

import pytest

from qinglan.core.errors import InputError
from qinglan.core.records import Case
from qinglan.data.labelled import (
    LabelledCase,
    LabelledFileConfig,
    Sides,
    Sizes,
    balanced,
    check_sides,
    load_labelled,
    split_sides,
)


def item(number: int, label: int, group: str | None = None) -> LabelledCase:
    return LabelledCase(Case(f"c{number}", group or f"g{number}", (f"text {number}",)), label)


def write(tmp_path: Path, name: str, text: str | bytes) -> Path:
    file = tmp_path / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def test_json_lines_with_a_template_a_group_and_words_for_the_labels(tmp_path: Path) -> None:
    rows = [
        {"q": "Is it?", "p": "A passage.", "answer": "yes", "kind": "x"},
        {"q": "Was it?", "p": "A passage.", "answer": "no", "kind": "x"},
        {"q": "Will it?", "p": "Another.", "answer": "no", "kind": "y"},
    ]
    file = write(tmp_path, "rows.jsonl", "\n".join(map(json.dumps, rows)))
    config = LabelledFileConfig(
        file=file, text="{p} {q}", label="answer", classes=("no", "yes"), verdicts=("no", "yes"), group="p",
        where=("kind=x",),
    )  # fmt: skip
    first, second = load_labelled(config)
    assert (first.case.texts, first.label, second.label) == (("A passage. Is it?",), 1, 0)
    assert first.case.prompt_group_id == second.case.prompt_group_id == "A passage."
    assert first.case.verdicts == ("no", "yes")
    assert first.fields["q"] == "Is it?"


@pytest.mark.parametrize("label", ["1", "true", "True", "1.0"])
def test_labels_of_a_csv_file(tmp_path: Path, label: str) -> None:
    file = write(tmp_path, "rows.csv", f"text,label\ngood,{label}\nbad,0\n")
    assert [one.label for one in load_labelled(LabelledFileConfig(file=file))] == [1, 0]


def test_lines_of_label_and_text_break_at_line_feeds_only(tmp_path: Path) -> None:
    # In latin-1, byte 0x85 is a character at which `str.splitlines` breaks, and 0xe9 is an e with an accent.
    file = write(tmp_path, "train.lines", b"1 a fine caf\xe9\n0 so\x85 so\r\n\n1 a fine caf\xe9\n")
    found = load_labelled(LabelledFileConfig(file=file, encoding="latin-1"))
    assert [(one.label, one.case.texts[0]) for one in found] == [(1, "a fine café"), (0, "so\x85 so")]
    with pytest.raises(InputError, match=r"cannot be read as utf-8 text .* such as latin-1"):
        load_labelled(LabelledFileConfig(file=file))


def test_bad_rows_are_named_or_skipped(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": 2}, {"text": " ", "label": 1}, {"text": "b", "label": 1}, {"text": "b", "label": 0}]
    rows += [{"text": "c"}]
    file = write(tmp_path, "rows.jsonl", "\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError) as caught:
        load_labelled(LabelledFileConfig(file=file))
    message = str(caught.value)
    assert "rows.jsonl:1: label: the number 2; expected 0 or 1, or words named by --data.classes" in message
    assert "rows.jsonl:2: text: an empty text" in message
    assert "rows.jsonl:4: label: the same text stands here with the other label" in message
    assert "rows.jsonl:5: label: no such column" in message
    assert [one.case.texts[0] for one in load_labelled(LabelledFileConfig(file=file, on_bad="skip"))] == ["b"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": "{txt}"}, "correct --data.text"),
        ({"group": "user"}, "correct --data.group"),
        ({"where": ("kind=x",)}, "correct --data.where"),
        ({"where": ("kind",)}, "expected column=value"),
        ({"classes": ("yes",)}, "data.classes: 1 values; expected two"),
        ({"verdicts": ("a", "b", "c")}, "data.verdicts: 3 values; expected two"),
        ({"file": None}, "no file given; expected --data.file"),
    ],
)
def test_a_wrong_description_of_a_file(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    file = write(tmp_path, "rows.jsonl", '{"text": "a", "label": 1}\n')
    with pytest.raises(InputError, match=message):
        load_labelled(LabelledFileConfig(**({"file": file} | changes)))


def test_sides_share_no_group_are_balanced_and_keep_the_test_side_over_seeds() -> None:
    items = [item(number, int(number % 3 == 0), f"g{number // 4}") for number in range(1200)]
    sides = [split_sides(items, Sizes(150, 40, 100), seed=seed, test_seed=9, where="task") for seed in (0, 1)]
    for one in sides:
        assert [len(found) for found in one] == [150, 150, 40, 100]
        for found in one:
            assert sum(case.label for case in found) * 2 == len(found)
        groups = [{case.case.prompt_group_id for case in found} for found in one]
        assert not any(groups[i] & groups[j] for i in range(4) for j in range(i))
    assert sides[0].test == sides[1].test
    assert sides[0].half_a != sides[1].half_a


def test_few_items_shrink_all_sides_alike_and_too_few_are_refused() -> None:
    items = [item(number, number % 2) for number in range(400)]
    sides = split_sides(items, Sizes(1000, 200, 600), seed=0, test_seed=0, where="task")
    # 400 of 2,800 wanted: 0.9 / 7 of each, 128, 128, 25 and 77; balancing may cost some of these
    assert all(0.8 * wanted <= len(found) <= wanted for found, wanted in zip(sides, (128, 128, 25, 77), strict=True))
    with pytest.raises(InputError, match="too few for an interval"):
        split_sides(items[:60], Sizes(100, 40, 100), seed=0, test_seed=0, where="task")
    with pytest.raises(InputError, match="all 200 labels are class 0; expected both classes"):
        split_sides(items[::2], Sizes(10, 10, 10), seed=0, test_seed=0, where="task")


def test_balanced() -> None:
    found = balanced([item(number, int(number < 3)) for number in range(20)], seed=0, at_most=100)
    assert sorted(one.label for one in found) == [0, 0, 0, 1, 1, 1]
    assert len(balanced(found, seed=0, at_most=4)) == 4


def test_halves_that_share_a_group_or_a_text_are_refused() -> None:
    one, other = item(1, 0, "same"), item(2, 1, "same")
    with pytest.raises(InputError, match="group 'same' stands on the sides half_a and test"):
        check_sides(Sides([one], [], [], [other]), "task")
    twin = LabelledCase(one.case._replace(prompt_group_id="other"), 0)
    with pytest.raises(InputError, match=r"text \('text 1',\).* stands on the sides half_a and half_b"):
        check_sides(Sides([one], [twin], [], []), "task")
