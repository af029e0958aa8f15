"""Files are whole or absent, and what is wrong with one is said with its place."""

import errno
import os

import pytest

from qinglan.core.errors import InputError
from qinglan.core.files import hash_of, read_json, read_jsonl, sha256_of, write_json, write_jsonl, write_text


def test_a_full_disk_leaves_the_earlier_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    write_json(path, {"a": 1})

    def full(_handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"report.json: cannot write here .No space left on device.; free some space"):
        write_json(path, {"a": 2})
    assert read_json(path) == {"a": 1}
    assert [one.name for one in tmp_path.iterdir()] == ["report.json"]


def test_a_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(InputError, match="cannot write here"):
        write_text(tmp_path / "out" / "a.txt", "x")


def test_json_has_no_nan(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", float("nan"))
    assert not (tmp_path / "a.json").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a": \n', "rows.jsonl:2: not JSON"),
        (b'{"a": 1}\n"\xff"\n', "rows.jsonl:2: not UTF-8"),
    ],
)
def test_broken_lines_are_named(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(read_jsonl(path))


def test_lines_read_back_with_their_numbers(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"a": "é"}, [1, 2]])
    assert list(read_jsonl(path)) == [(1, {"a": "é"}), (2, [1, 2])]
    path.write_text("1\n\n2\n")
    assert list(read_jsonl(path)) == [(1, 1), (3, 2)]
    with pytest.raises(InputError, match="no such file"):
        list(read_jsonl(tmp_path / "absent.jsonl"))


def test_hashes_see_content_and_names_and_not_the_order_of_keys(tmp_path):
    assert hash_of({"a": 1, "b": 2}) == hash_of({"b": 2, "a": 1}) != hash_of({"a": 2, "b": 1})
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "x").write_text("1")
    before = sha256_of(tmp_path / "one")
    (tmp_path / "one" / "x").rename(tmp_path / "one" / "y")
    assert sha256_of(tmp_path / "one") != before
