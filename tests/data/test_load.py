"""Every format by a hand-written row: what it must become."""

import csv
import gzip
import io
import json

import pyarrow
import pytest
from pyarrow import parquet

from qinglan.core.errors import InputError
from qinglan.core.records import PreferenceProbability, Ranking
from qinglan.data.load import load_comparisons, load_demonstrations, load_prompts

USER, BOT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def turns(prompt):
    return [(message.role, message.content) for message in prompt.messages]


@pytest.fixture
def file(tmp_path):
    return tmp_path / "rows.jsonl"


@pytest.mark.parametrize(
    ("row", "name", "prompt", "text"),
    [
        ({"messages": [USER, BOT]}, "trl_messages", [("user", "Hi")], "Hello"),
        ({"prompt": "Hi", "completion": " Hello "}, "trl_prompt_completion", [("user", "Hi")], "Hello"),
        ({"prompt": [USER], "completion": [BOT]}, "trl_prompt_completion", [("user", "Hi")], "Hello"),
        ({"prompt": "Hi", "response": "Hello"}, "prompt_response", [("user", "Hi")], "Hello"),
        ({"instruction": "Add", "input": "1 2", "output": "3"}, "alpaca", [("user", "Add\n\n1 2")], "3"),
        ({"instruction": "Add", "input": "", "output": "3"}, "alpaca", [("user", "Add")], "3"),
        (
            {"instruction": "Who?", "context": "It was Ann.", "response": "Ann", "category": "closed_qa"},
            "dolly",
            [("user", "Who?\n\nIt was Ann.")],
            "Ann",
        ),
        (
            {"instruction": "Add", "instances": [{"input": "1 2", "output": "3"}]},
            "self_instruct",
            [("user", "Add\n\n1 2")],
            "3",
        ),
        ({"question": "1+2?", "answer": "3"}, "question_answer", [("user", "1+2?")], "3"),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
            "sharegpt",
            [("user", "Hi")],
            "Hello",
        ),
    ],
)
def test_demonstrations(file, row, name, prompt, text):
    loaded = load_demonstrations(lines(file, row))
    assert loaded.format == name
    assert not loaded.skipped
    (shown,) = loaded.records
    assert turns(shown.prompt) == prompt
    assert shown.demonstration.text == text
    assert shown.demonstration.prompt_id == shown.prompt.id
    assert shown.demonstration.source == "human"


HH = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Bye\n\nAssistant: {}"
HH_PROMPT = [("user", "Hi"), ("assistant", "Yes?"), ("user", "Bye")]
CHOSEN, REJECTED = {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad"}


@pytest.mark.parametrize(
    ("row", "name", "prompt"),
    [
        ({"prompt": "Hi", "chosen": "good", "rejected": "bad"}, "trl_preference", [("user", "Hi")]),
        ({"prompt": [USER], "chosen": [CHOSEN], "rejected": [REJECTED]}, "trl_preference", [("user", "Hi")]),
        ({"prompt": "Hi", "chosen": [USER, CHOSEN], "rejected": [USER, REJECTED]}, "trl_preference", [("user", "Hi")]),
        ({"chosen": [USER, CHOSEN], "rejected": [USER, REJECTED]}, "trl_implicit_preference", [("user", "Hi")]),
        ({"chosen": HH.format("good"), "rejected": HH.format("bad")}, "hh_transcripts", HH_PROMPT),
        ({"prompt": HH.format("").rstrip(), "chosen": "good", "rejected": "bad"}, "trl_preference", HH_PROMPT),
        (
            {
                "conversations": [{"from": "human", "value": "Hi"}],
                "chosen": {"from": "gpt", "value": "good"},
                "rejected": {"from": "gpt", "value": "bad"},
            },
            "sharegpt_preference",
            [("user", "Hi")],
        ),
        ({"prompt": "Hi", "completions": ["good", "bad"], "ranking": [0, 1]}, "k_wise_rankings", [("user", "Hi")]),
    ],
)
def test_pairs(file, row, name, prompt):
    loaded = load_comparisons(lines(file, row))
    assert loaded.format == name
    (group,) = loaded.records
    assert turns(group.prompt) == prompt
    assert [item.text for item in group.completions] == ["good", "bad"]
    assert group.comparison.label == Ranking(groups=((0,), (1,)))
    assert group.comparison.items == tuple(item.id for item in group.completions)


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ({"ranking": [2, [0, 3], 1]}, ((2,), (0, 3), (1,))),
        ({"ranking": [3, 0]}, ((3,), (0,))),
        ({"ranking": [["d"], ["a", "b"]]}, ((3,), (0, 1))),
        ({"ranks": [2, 1, 2, None]}, ((1,), (0, 2))),
        ({"ranks": [1, 1, 1, 1]}, ((0, 1, 2, 3),)),
    ],
)
def test_k_wise_rankings_keep_ties_and_gaps(file, label, expected):
    completions = [{"id": name, "text": f"text {name}", "model": "m"} for name in "abcd"]
    (group,) = load_comparisons(
        lines(file, {"prompt": "Hi", "completions": completions, "labeler": 7, **label})
    ).records
    assert group.comparison.label == Ranking(groups=expected)
    assert group.comparison.producer_id == "7"
    assert [item.producer_id for item in group.completions] == ["m"] * 4


@pytest.mark.parametrize(
    ("preference", "groups"), [(1, ((0,), (1,))), (2.0, ((1,), (0,))), (1.5, ((0, 1),)), (0, ((0, 1),))]
)
def test_alpaca_eval(file, preference, groups):
    row = {
        "instruction": "Hi",
        "output_1": "a",
        "output_2": "b",
        "generator_1": "x",
        "preference": preference,
        "annotator": "j",
    }
    loaded = load_comparisons(lines(file, row))
    (group,) = loaded.records
    assert loaded.format == "alpaca_eval"
    assert group.comparison.label == Ranking(groups=groups)
    assert (group.comparison.source, group.comparison.producer_id) == ("principle_model", "j")
    assert [item.producer_id for item in group.completions] == ["x", "unknown"]


def test_soft_labels(file):
    row = {"prompt": "Hi", "completions": ["a", "b"], "p_first_better": 0.25}
    assert load_comparisons(lines(file, row)).records[0].comparison.label == PreferenceProbability(p_first_better=0.25)
    row = {"instruction": "Hi", "output_1": "a", "output_2": "b", "preference": 1.75}
    assert load_comparisons(lines(file, row)).records[0].comparison.label == PreferenceProbability(p_first_better=0.25)


def test_summarize_feedback(file):
    info = {"id": "t3_x", "post": "Long story.", "title": "Story", "subreddit": "tifu", "article": None}
    row = {"info": info, "summaries": [{"text": " a", "policy": "p"}, {"text": "b", "policy": "q"}], "choice": 1}
    (group,) = load_comparisons(lines(file, row | {"worker": "w1", "split": "valid2"})).records
    assert turns(group.prompt) == [("user", "SUBREDDIT: r/tifu\n\nTITLE: Story\n\nPOST: Long story.\n\nTL;DR:")]
    assert group.comparison.label == Ranking(groups=((1,), (0,)))
    assert group.comparison.producer_id == "w1"
    assert (group.prompt.prompt_group_id, group.prompt.split) == ("document-t3_x", "valid")


TREE = [
    {"message_id": "r", "parent_id": None, "role": "prompter", "text": "Q"},
    {"message_id": "a", "parent_id": "r", "role": "assistant", "text": "worse", "rank": 1},
    {"message_id": "b", "parent_id": "r", "role": "assistant", "text": "best", "rank": 0},
    {"message_id": "c", "parent_id": "r", "role": "assistant", "text": "unranked"},
    {"message_id": "x", "parent_id": "r", "role": "assistant", "text": "", "rank": 2, "deleted": True},
    {"message_id": "d", "parent_id": "b", "role": "prompter", "text": "Q2"},
    {"message_id": "e", "parent_id": "d", "role": "assistant", "text": "only"},
    {"message_id": "y", "parent_id": "x", "role": "prompter", "text": "below the deleted one"},
]


def nested(name=None):
    found = []
    for row in TREE:
        if row["parent_id"] == name:
            found.append({**row, "replies": nested(row["message_id"])})
    return found


@pytest.mark.parametrize("rows", [TREE, [{"message_tree_id": "r", "prompt": nested()[0]}]], ids=["flat", "nested"])
def test_oasst_trees(file, rows):
    groups = load_comparisons(lines(file, *rows))
    assert groups.format == "oasst_trees"
    (group,) = groups.records
    assert [item.text for item in group.completions] == ["worse", "best", "unranked"]
    assert group.comparison.label == Ranking(groups=((1,), (0,)))
    shown = load_demonstrations(file)
    assert [(turns(one.prompt)[-1][1], one.demonstration.text) for one in shown.records] == [
        ("Q", "best"),
        ("Q2", "only"),
    ]
    assert turns(shown.records[1].prompt) == [("user", "Q"), ("assistant", "best"), ("user", "Q2")]
    assert {one.prompt.prompt_group_id for one in shown.records} == {"tree-r"}
    assert shown.notes["messages left out with all replies, as deleted or failed in review"] == 1


def test_three_annotators_make_three_comparisons(file):
    row = {
        "instruction": "Hi",
        "input": "",
        "response1": "a",
        "response2": "b",
        "annotator1": 1,
        "annotator2": 2,
        "annotator3": 0,
    }
    groups = load_comparisons(lines(file, row)).records
    assert [group.comparison.label.groups for group in groups] == [((0,), (1,)), ((1,), (0,)), ((0, 1),)]
    assert len({group.comparison.id for group in groups}) == 3
    assert len({group.comparison.prompt_id for group in groups}) == 1


def test_thumbs_and_unranked_samples_give_prompts_only(file):
    lines(file, {"messages": [USER, BOT], "label": False})
    assert turns(load_prompts(file).records[0]) == [("user", "Hi")]
    with pytest.raises(InputError, match="holds prompts only \\(format unpaired\\); expected demonstrations"):
        load_demonstrations(file)
    lines(file, {"prompt": "Hi", "completions": ["a", "b"]})
    assert load_prompts(file).format == "unpaired"


def test_prompts_are_distinct_and_repeats_are_counted(file):
    loaded = load_prompts(lines(file, {"prompt": "Hi"}, {"prompt": "Ho"}, {"prompt": "Hi"}))
    assert [turns(prompt) for prompt in loaded.records] == [[("user", "Hi")], [("user", "Ho")]]
    assert loaded.notes == {"repeated prompts, merged": 1}


def test_equal_judgements_are_kept_with_their_own_ids(file):
    row = {"prompt": "Hi", "chosen": "a", "rejected": "b"}
    loaded = load_comparisons(lines(file, row, row))
    first, second = (group.comparison.id for group in loaded.records)
    assert second == f"{first}-2"
    assert loaded.notes == {"comparisons with equal content, kept": 1}


def test_equal_texts_may_be_tied(file):
    row = {"prompt": "Hi", "completions": ["a", "a", "b"], "ranking": [2, [0, 1]]}
    (group,) = load_comparisons(lines(file, row)).records
    assert len({item.id for item in group.completions}) == 3


def test_all_comparisons_of_one_prompt_share_a_group_whoever_made_them(file):
    rows = [
        {"prompt": text, "chosen": "a", "rejected": "b", "worker": worker}
        for text in ("Hi  there", "hi there")
        for worker in "pq"
    ]
    groups = load_comparisons(lines(file, *rows)).records
    assert len({group.prompt.prompt_group_id for group in groups}) == 1
    transcripts = [{"chosen": HH.format("a"), "rejected": HH.format("b")}]
    transcripts.append({"chosen": "\n\nHuman: Hi\n\nAssistant: c", "rejected": "\n\nHuman: Hi\n\nAssistant: d"})
    groups = load_comparisons(lines(file, *transcripts)).records
    assert len({group.prompt.id for group in groups}) == 2
    assert len({group.prompt.prompt_group_id for group in groups}) == 1


def test_loading_twice_gives_equal_records(file):
    lines(file, {"prompt": "Hi", "chosen": "a", "rejected": "b"})
    assert load_comparisons(file).records == load_comparisons(file).records


ROWS = [
    {"prompt": "Hi, you\nthere", "completions": ["a", "b, c"], "ranking": [[1], [0]]},
    {"prompt": "Ho", "completions": ["c", "d"], "ranking": [[0, 1]]},
]


def container_text(name):
    if ".csv" in name or ".tsv" in name:
        out = io.StringIO()
        writer = csv.writer(out, delimiter="\t" if ".tsv" in name else ",")
        writer.writerow(ROWS[0])
        cells = [[cell if isinstance(cell, str) else json.dumps(cell) for cell in row.values()] for row in ROWS]
        writer.writerows(cells)
        return out.getvalue()
    if name.startswith("array"):
        return json.dumps(ROWS, indent=1)
    return "\ufeff" + "\n\n".join(json.dumps(row) for row in ROWS)


def write_container(path):
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        content = container_text(path.name).encode()
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize(
    "name",
    ["a.jsonl", "a.jsonl.gz", "a.json", "array.json", "array.json.gz", "a.parquet", "a.csv", "a.csv.gz", "a.tsv"],
)
def test_containers_say_the_same(tmp_path, name):
    loaded = load_comparisons(write_container(tmp_path / name))
    assert loaded.format == "k_wise_rankings"
    assert [turns(group.prompt) for group in loaded.records] == [[("user", "Hi, you\nthere")], [("user", "Ho")]]
    assert [group.comparison.label.groups for group in loaded.records] == [((1,), (0,)), ((0, 1),)]
    assert [item.text for item in loaded.records[0].completions] == ["a", "b, c"]


def test_folders_and_lists(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    lines(folder / "b.jsonl", {"prompt": "2", "completion": "b"})
    lines(folder / "a.jsonl", {"instruction": "1", "output": "a"})
    (folder / "README.txt").write_text("about")
    loaded = load_demonstrations(folder)
    assert [one.demonstration.text for one in loaded.records] == ["a", "b"]
    assert loaded.format == "alpaca + trl_prompt_completion"
    assert loaded.notes == {"files of the folder left out by their suffix": 1}
    assert len(load_demonstrations([folder / "b.jsonl", folder / "a.jsonl"]).records) == 2
    with pytest.raises(InputError, match="named twice"):
        load_demonstrations([folder, folder / "a.jsonl"])


def test_one_pretty_printed_object_is_one_row(tmp_path):
    path = tmp_path / "tree.json"
    path.write_text(json.dumps({"message_tree_id": "r", "prompt": nested()[0]}, indent=2))
    assert len(load_demonstrations(path).records) == 2


def test_a_format_can_be_named(file):
    lines(file, {"prompt": "Hi", "completion": "a", "label": True})
    assert len(load_demonstrations(file, format="trl_prompt_completion").records) == 1
    with pytest.raises(InputError, match="did you mean 'trl_messages'"):
        load_demonstrations(file, format="trl_message")
