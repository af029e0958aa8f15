"""Bad rows: each is named by file, line and field; only `InputError` is ever raised; nothing is lost silently."""

import gzip
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qinglan.core.errors import InputError
from qinglan.data.check import check_file
from qinglan.data.load import MAX_FINDINGS, load_comparisons, load_demonstrations, load_prompts

GOOD = {"prompt": "Hi", "chosen": "a", "rejected": "b"}
RANKED = {"prompt": "Hi", "completions": ["a", "b", "c"], "ranking": [0, 1, 2]}


def lines(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture
def file(tmp_path):
    return tmp_path / "rows.jsonl"


@pytest.mark.parametrize(
    ("good", "bad", "field", "words"),
    [
        (GOOD, "{broken", "row", "not JSON"),
        (GOOD, '{"prompt": ' + "1" * 5000 + "}", "row", "not JSON"),
        (GOOD, "[" * 100000, "row", "nested too deep"),
        (GOOD, "[1, 2]", "row", "a list"),
        (GOOD, "\x00", "row", "not JSON"),
        (GOOD, {"prompt": "Hi", "chosen": "a"}, "rejected", "missing"),
        (GOOD, GOOD | {"chosen": None}, "chosen", "null"),
        (GOOD, GOOD | {"chosen": 3}, "chosen", "the number 3"),
        (GOOD, GOOD | {"chosen": " \n"}, "chosen", "empty text"),
        (GOOD, GOOD | {"chosen": "\ud800"}, "chosen", "surrogate"),
        (GOOD, GOOD | {"rejected": "a "}, "chosen/rejected", "identical"),
        (
            GOOD,
            GOOD | {"prompt": [{"role": "tool", "content": "x"}]},
            "prompt[0].role",
            "unknown role, the text 'tool'",
        ),
        (GOOD, GOOD | {"prompt": [{"role": "user", "content": ""}]}, "prompt[0].content", "empty text"),
        (GOOD, GOOD | {"prompt": [{"role": "user"}]}, "prompt[0].content", "missing"),
        (GOOD, GOOD | {"prompt": []}, "prompt", "no messages"),
        (
            GOOD,
            GOOD | {"prompt": [{"role": "assistant", "content": "x"}]},
            "prompt",
            "ends with the turn of role assistant",
        ),
        (GOOD, GOOD | {"p_chosen": 1.5}, "p_chosen", "1.5"),
        (RANKED, RANKED | {"ranking": [0, 3]}, "ranking", "names an absent item, the number 3"),
        (RANKED, RANKED | {"ranking": [1, 2, 3]}, "ranking", "number from 0"),
        (RANKED, RANKED | {"ranking": [-1, 0]}, "ranking", "absent item"),
        (RANKED, RANKED | {"ranking": [True, 0]}, "ranking", "absent item, true"),
        (RANKED, RANKED | {"ranking": [0, [0, 1]]}, "ranking", "names item 0 twice"),
        (RANKED, RANKED | {"ranking": [[0]]}, "ranking", "ranks 1 items"),
        (RANKED, RANKED | {"ranking": "0>1"}, "ranking", "the text '0>1'"),
        (RANKED, RANKED | {"ranks": [1, 2, 3]}, "ranking", "found ranking and ranks"),
        (RANKED, RANKED | {"ranking": None}, "ranking", "found no label"),
        (RANKED, RANKED | {"ranking": None, "ranks": [1, 2]}, "ranks", "found 2 ranks for 3 completions"),
        (RANKED, RANKED | {"ranking": None, "ranks": [1, 2, "3"]}, "ranks", "the text '3'"),
        (RANKED, '{"prompt": "Hi", "completions": ["a", "b"], "ranks": [1, NaN]}', "ranks", "the number nan"),
        (RANKED, RANKED | {"ranking": None, "p_first_better": 0.5}, "p_first_better", "found 3 completions"),
        (RANKED, RANKED | {"completions": ["a"]}, "completions", "found 1"),
        (RANKED, RANKED | {"completions": ["a", "", "c"]}, "completions[1]", "empty text"),
        (RANKED, RANKED | {"completions": ["a", "b", "a"]}, "completions", "identical"),
    ],
)
def test_bad_comparisons_are_named_by_line_and_field(file, good, bad, field, words):
    lines(file, good, bad, good)
    with pytest.raises(InputError) as stopped:
        load_comparisons(file)
    first, last = str(stopped.value).splitlines()
    assert first.startswith(f"{file}:2: {field}: ")
    assert words in first
    assert "expected" in first
    assert last.startswith("1 of 3 rows cannot be used")
    loaded = load_comparisons(file, on_bad="skip")
    assert len(loaded.records) == 2
    assert [(error.place, error.field) for error in loaded.skipped] == [(f"{file}:2", field)]


@pytest.mark.parametrize(
    ("good", "bad", "words"),
    [
        (
            {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a"}]},
            {"messages": "Hi"},
            "messages",
        ),
        (
            {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a"}]},
            {"messages": [{"role": "user", "content": "Hi"}]},
            "holds a prompt without completion",
        ),
        ({"instruction": "a", "output": "b"}, {"instruction": "a", "output": ""}, "output: empty text"),
        (
            {"instruction": "a", "output": "b"},
            {"instruction": "a", "input": 3, "output": "b"},
            "input: found the number 3",
        ),
        ({"question": "a", "answer": "b"}, {"question": "a", "answer": True}, "answer: found true"),
        (
            {"instruction": "a", "instances": []},
            {"instruction": "a", "instances": [{"input": "x"}]},
            "instances[0].output: missing",
        ),
        (
            {"id": 1, "prompt": "a", "completion": "b"},
            {"id": 1, "prompt": "c", "completion": "d"},
            "'1' stands already at",
        ),
    ],
)
def test_bad_demonstrations(file, good, bad, words):
    lines(file, good | {"instances": [{"output": "x"}]} if "instances" in good else good, bad)
    with pytest.raises(InputError) as stopped:
        load_demonstrations(file)
    assert str(stopped.value).startswith(f"{file}:2: ")
    assert words in str(stopped.value)


HH = "\n\nHuman: Hi\n\nAssistant: {}"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"chosen": HH.format("a"), "rejected": HH.format("")}, "turn 2 (Assistant): empty text"),
        ({"chosen": HH.format("a"), "rejected": HH.format("b\n\nHuman: more")}, "ends with a user's turn"),
        ({"chosen": HH.format("a"), "rejected": HH.format("b").replace("Hi", "Ho")}, "differ from those of chosen"),
        ({"chosen": "good", "rejected": "bad"}, "no transcript"),
        (
            {"chosen": HH.format("a"), "rejected": HH.format("b\n\nAssistant: c")},
            "ends with the turn of role assistant",
        ),
    ],
)
def test_bad_transcripts(file, row, words):
    lines(file, row, {"chosen": HH.format("a"), "rejected": HH.format("b")})
    with pytest.raises(InputError, match=r":1: (chosen|rejected)") as stopped:
        load_comparisons(file)
    assert words in str(stopped.value)


def message(name, parent, role="prompter", **more):
    return {"message_id": name, "parent_id": parent, "role": role, "text": f"text {name}", **more}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (message("x", "gone", "assistant"), "parent_id: names an absent message"),
        (message("x", "r", "judge"), "unknown role, the text 'judge'"),
        (message("r", None), "message_id: the text 'r' stands already"),
        (message("x", "x", "assistant"), "ring"),
        (message("x", "r", "assistant", text=None), "text: null"),
        (message("x", "r", "assistant", rank="first"), "rank: found the text 'first'"),
    ],
)
def test_bad_trees(file, row, words):
    lines(file, message("r", None), message("a", "r", "assistant"), row)
    with pytest.raises(InputError) as stopped:
        load_demonstrations(file)
    assert str(stopped.value).startswith(f"{file}:3: ")
    assert words in str(stopped.value)
    assert len(load_demonstrations(file, on_bad="skip").records) == 1


def test_no_more_than_twenty_findings_are_listed(file):
    lines(file, GOOD, *[GOOD | {"chosen": ""}] * 30)
    with pytest.raises(InputError) as stopped:
        load_comparisons(file)
    found = str(stopped.value).splitlines()
    assert len(found) == MAX_FINDINGS + 1
    assert found[-1].startswith("30 of 31 rows cannot be used, 10 more not shown")


def test_files_that_are_damaged_as_a_whole(tmp_path):
    def refused(name, content, words):
        path = tmp_path / name
        path.write_bytes(content)
        for on_bad in ("stop", "skip"):
            with pytest.raises(InputError, match=words):
                load_comparisons(path, on_bad=on_bad)

    refused("empty.jsonl", b"", "no rows")
    refused("spaces.jsonl", b"\n \n", "no rows")
    refused("cut.jsonl.gz", gzip.compress(json.dumps(GOOD).encode() * 50)[:-20], "damaged gzip")
    refused("not.jsonl.gz", b"plain text", "damaged gzip")
    refused("not.parquet", b"PAR1 but not really", "Parquet")
    refused("cut.json", b'[{"prompt": "a"},\n{"prompt"', ":2: not JSON")
    refused("gap.json", b'[{"prompt": "a"}\n{"prompt": "b"}]', ":2: not JSON")
    refused("after.json", b'[{"prompt": "a"}]\n{}', ":2: text after the end")
    refused("latin.csv", "prompt,chosen,rejected\ncafé,a,b\n".encode("latin-1"), "not UTF-8")
    refused("twice.csv", b"prompt,prompt\na,b\n", "stands twice in the header")
    refused("strange.jsonl", b'{"colour": "red"}\n', "no known format has the columns colour")
    refused("other.txt", b"text", "unknown kind of file")
    with pytest.raises(InputError, match="no such file"):
        load_comparisons(tmp_path / "absent.jsonl")
    with pytest.raises(InputError, match="no file given"):
        load_comparisons([])


def test_bytes_that_are_no_utf8_cost_one_row(file):
    file.write_bytes(json.dumps(GOOD).encode() + b'\n{"prompt": "\xff"}\n')
    assert load_comparisons(file, on_bad="skip").skipped[0].place == f"{file}:2"


def test_csv_rows_of_wrong_width_cost_one_row(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('prompt,chosen,rejected\n"two\nlines",a,b\nx,y\nHi,a,\n')
    loaded = load_comparisons(path, on_bad="skip")
    assert len(loaded.records) == 1
    assert [(error.place, error.field) for error in loaded.skipped] == [(f"{path}:4", "row"), (f"{path}:5", "rejected")]


def test_nothing_usable_is_an_error_also_when_skipping(file):
    with pytest.raises(InputError, match="no comparisons could be read from 2 rows"):
        load_comparisons(lines(file, GOOD | {"chosen": ""}, GOOD | {"chosen": 1}), on_bad="skip")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "text", "id"]), inner, max_size=3)
    ),
    max_leaves=6,
)
COLUMNS = [
    *("prompt", "messages", "completion", "chosen", "rejected", "completions", "ranking", "ranks", "p_first_better"),
    *(
        "labeler",
        "id",
        "conversations",
        "instruction",
        "input",
        "output",
        "instances",
        "response",
        "question",
        "answer",
    ),
    *("info", "summaries", "choice", "output_1", "output_2", "preference", "response1", "response2", "annotator1"),
    *("message_id", "parent_id", "role", "text", "rank", "replies", "label", "kind", "record", "source", "producer_id"),
    *("prompt_group_id", "prompt_id", "items", "split"),
]
ROW = st.dictionaries(st.sampled_from(COLUMNS), JSON, min_size=1, max_size=6)
SOUND = st.sampled_from(
    [
        GOOD,
        RANKED,
        {"message_id": "r", "parent_id": None, "role": "prompter", "text": "Q"},
        {"instruction": "a", "output": "b"},
        {"chosen": HH.format("a"), "rejected": HH.format("b")},
        {"instruction": "Hi", "output_1": "a", "output_2": "b", "preference": 1},
        {
            "id": "p",
            "source": "human",
            "producer_id": "x",
            "prompt_group_id": "g",
            "messages": [{"role": "user", "content": "Hi"}],
        },
    ]
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sound=SOUND, changes=ROW, others=st.lists(ROW, max_size=3))
def test_any_row_is_used_or_named(tmp_path, sound, changes, others):
    path = tmp_path / "fuzz.jsonl"
    rows = [sound, sound | changes, *others]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for load in (load_prompts, load_demonstrations, load_comparisons):
        try:
            loaded = load(path, on_bad="skip")
        except InputError as error:
            assert str(error).strip()
        else:
            assert loaded.records
            assert all(error.place.startswith(f"{path}:") for error in loaded.skipped)
    try:
        report = check_file(path)
    except InputError as error:
        assert str(path) in str(error)
    else:
        assert report.num_rows == len(rows)
        json.dumps(report.as_dict())
        assert report.as_text()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=60), name=st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.jsonl.gz", "a.parquet"]))
def test_any_bytes_are_read_or_refused(tmp_path, content, name):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError):
        load_comparisons(path)


def test_json_that_breaks_off_is_named_by_the_column_of_its_own_line(file):
    with pytest.raises(InputError, match=r"rows.jsonl:2: row: not JSON \(Expecting value at column 11\)"):
        load_comparisons(lines(file, GOOD, '{"prompt": '))
