"""`qinglan data check | import | export`: what they say, what they write, and their exit codes."""

import json

import pytest

from qinglan.data.load import load_comparisons, load_demonstrations, load_prompts

pytest_plugins = ("command_fixtures",)


def rows_of(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_check_says_what_a_file_holds(run, comparisons) -> None:
    answer = run("data", "check", comparisons)
    assert answer.code == 0 and "12 of 12 sound" in answer.out and "k_wise_rankings" in answer.out
    data = json.loads(run("data", "check", "--file", comparisons, "--json").out)
    assert data["num_comparisons"] == 12 and data["broken"] == []


def test_check_of_broken_rows_prints_the_report_and_exits_with_2(run, comparisons, tmp_path) -> None:
    with comparisons.open("a") as file:
        file.write('{"prompt": "Hi"\n')
    answer = run("data", "check", comparisons)
    assert answer.code == 2 and "12 of 13 sound" in answer.out and "comparisons.jsonl:13: " in answer.out
    answer = run("data", "check", comparisons, "--json", "--out", tmp_path / "kept")
    assert answer.code == 2 and len(json.loads(answer.out)["broken"]) == 1
    assert (tmp_path / "kept" / "data-check.json").is_file()


def test_check_of_no_file_or_format(refused, comparisons, tmp_path) -> None:
    assert "no such file" in refused("data", "check", tmp_path / "none.jsonl")
    assert "file: is required" in refused("data", "check")
    assert "no such format; did you mean 'trl_preference'?" in refused(
        "data", "check", comparisons, "--format", "trl_pref"
    )


def test_import_and_export_keep_what_was_judged(run, comparisons, tmp_path) -> None:
    records, pairs = tmp_path / "records.jsonl", tmp_path / "pairs.jsonl"
    answer = run("data", "import", comparisons, "--to", records)
    assert answer.code == 0 and answer.out == f"60 records\n{records}\n"
    labels = [one.comparison.label for one in load_comparisons(comparisons).records]
    assert [one.comparison.label for one in load_comparisons(records).records] == labels

    answer = run("data", "export", records, "--to", pairs, "--json")
    assert json.loads(answer.out) == {"to": str(pairs), "num_rows": 24, "num_left_out": 12, "num_skipped": 0}
    assert {"prompt", "chosen", "rejected"} <= set(rows_of(pairs)[0])
    assert run("data", "export", records, "--to", tmp_path / "k.jsonl", "--style", "k_wise").code == 0
    assert [one.comparison.label for one in load_comparisons(tmp_path / "k.jsonl").records] == labels


def test_export_of_demonstrations_and_prompts(run, demonstrations, tmp_path) -> None:
    chats, asked = tmp_path / "chats.parquet", tmp_path / "asked.jsonl"
    assert run("data", "export", demonstrations, "--to", chats, "--style", "messages").code == 0
    assert len(load_demonstrations(chats).records) == 12
    assert run("data", "export", demonstrations, "--to", asked, "--what", "prompts").out.startswith(
        "12 rows of prompts"
    )
    assert len(load_prompts(asked).records) == 12


def test_broken_rows_stop_an_import_or_are_skipped(run, refused, demonstrations, tmp_path) -> None:
    with demonstrations.open("a") as file:
        file.write(json.dumps({"prompt": "Hi", "completion": ""}) + "\n")
    target = tmp_path / "out.jsonl"
    answer = run("data", "import", demonstrations, "--to", target)
    assert answer.code == 2 and "demonstrations.jsonl:13: completion" in answer.err and not target.exists()
    assert "1 broken rows skipped" in run("data", "import", demonstrations, "--to", target, "--on-bad", "skip").out
    assert len(load_demonstrations(target).records) == 12


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--to", "out.txt"], "out.txt: unknown kind of file"),
        (
            ["--to", "o.jsonl", "--style", "k_wise"],
            "demonstrations have no such form; expected one of records, trl, messages",
        ),
        (["--to", "o.jsonl", "--what", "comparisons"], "expected comparisons"),
        (["--to", "demonstrations.jsonl"], "is the file that is read; name another one"),
        ([], "to: is required"),
    ],
)
def test_exports_that_make_no_sense(refused, demonstrations, tmp_path, monkeypatch, extra, message) -> None:
    monkeypatch.chdir(tmp_path)
    before = demonstrations.read_text()
    assert message in refused("data", "export", demonstrations, *extra)
    assert demonstrations.read_text() == before and len(list(tmp_path.iterdir())) == 1
