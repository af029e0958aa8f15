"""What `data check` says about a file."""

import json

import pytest

from qinglan.core.errors import InputError
from qinglan.data.check import check_file


def test_report_counts_and_shows(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [
        {"prompt": "Hi there", "completions": ["a", "bbb", "cc"], "ranking": [1, [0, 2]], "labeler": "ann"},
        {
            "prompt": [
                {"role": "user", "content": "x"},
                {"role": "assistant", "content": "y"},
                {"role": "user", "content": "z"},
            ]
        }
        | {"completions": ["a", "b"], "ranks": [1, 1], "labeler": "bob"},
        {"prompt": "Hi there", "completions": ["a", "b"], "p_first_better": 0.5, "labeler": "ann"},
        {"prompt": "Hi", "completions": ["a", "b"], "ranking": [0, 5]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = check_file(path)
    assert report.formats == ("k_wise_rankings",)
    assert (report.num_rows, report.num_rows_ok, len(report.broken)) == (4, 3, 1)
    assert (report.num_prompts, report.num_groups, report.num_comparisons) == (2, 2, 3)
    assert (report.num_ties, report.num_undecided) == (3, 2)
    assert report.k_histogram == {2: 2, 3: 1}
    assert report.roles == {"user": 3, "assistant": 1}
    assert report.share_multi_turn == 0.5
    assert report.labelers == {"ann": 2, "bob": 1}
    assert report.characters["prompts"] == {"min": 3, "p10": 3, "median": 3, "p90": 8, "p99": 8, "max": 8}
    shown = json.loads(json.dumps(report.as_dict()))
    assert shown["broken"][0]["place"] == f"{path}:4"
    assert shown["k_histogram"] == {"2": 2, "3": 1}
    text = report.as_text()
    assert f"{path}: k_wise_rankings" in text
    assert "3 of 4 sound (75.0%)" in text
    assert "best first: ((1,), (0, 2))" in text
    assert f"{path}:4: ranking: names an absent item" in text


def test_broken_rows_do_not_stop_the_check_but_a_damaged_file_does(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("{\n" * 30)
    report = check_file(path)
    assert (report.num_rows, report.num_rows_ok, report.formats) == (30, 0, ())
    assert "and 10 more" in report.as_text()
    path.write_text("")
    with pytest.raises(InputError, match="no rows"):
        check_file(path)
