"""`qinglan world ...` as its user types it: probes by name, a picture, and one line for every mistake."""

import json

import pytest

pytest_plugins = ("command_fixtures",)


def test_probes_by_name_with_a_picture(run, tmp_path):
    picture = tmp_path / "capability.svg"
    answer = run(
        "world", "evaluate", "--models", "nano", "--probes", "copying", "judging_claims", "--num-items", "8",
        "--picture", picture, "--json",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    names = {"copying", "judging_claims", "calibration_error"}
    assert set(found["metrics"]) == {f"capability/{name}/nano" for name in names}
    assert all({"value", "low", "high", "n"} <= set(one) for one in found["metrics"].values())
    assert found["parameters"]["nano"] > 200_000 and picture.read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["evaluate", "--probes", "copyign"], "no probe copyign; did you mean 'copying'?"),
        (
            ["evaluate", "--models", "nanno"],
            "or one of nano, micro, mini, small, base; did you mean 'nano'",
        ),
        (["evaluate", "--models", "nano", "--picture", "a.pdf"], "name a .png or .svg"),
        (["pretrain", "--sizes", "nanno"], "size nanno: no such base model"),
        (["pretrain", "--parts", "plian"], "no part plian of the corpus"),
        (["pretrain", "--training.context", "512"], "512 tokens, but base models take 256 at the most"),
    ],
)
def test_mistakes_get_one_line(refused, arguments, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert line in refused("world", *arguments)
    assert not list(tmp_path.iterdir())  # nothing half-written


def test_a_second_start_in_one_folder_is_refused_and_loses_nothing(run, refused, tmp_path):
    pretrain = (
        "world",
        "pretrain",
        "--sizes",
        "nano",
        "--training.num-tokens",
        "512",
        "--training.batch-tokens",
        "256",
    )
    brief = ("--training.num-probes", "1", "--num-probe-items", "2", "--out", tmp_path)
    first = run(*pretrain, *brief)
    assert first.code == 0, first.err
    weights = (tmp_path / "nano" / "stages" / "pretrain" / "model" / "model.safetensors").read_bytes()
    assert "holds a run already; add --resume" in run(*pretrain, *brief).err
    again = run(*pretrain, *brief, "--resume")
    assert again.code == 0, again.err
    assert (tmp_path / "nano" / "stages" / "pretrain" / "model" / "model.safetensors").read_bytes() == weights
    unprobed = run(*pretrain, "--num-probe-items", "0", "--parts", "plain", "--out", tmp_path / "unprobed", "--json")
    assert json.loads(unprobed.out) == {"nano": {}}
