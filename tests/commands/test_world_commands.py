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
            "expected a Hugging Face directory or one of nano, micro, mini; did you mean",
        ),
        (["evaluate", "--models", "nano", "--picture", "a.pdf"], "name a .png or .svg"),
        (["pretrain", "--sizes", "nanno"], "size nanno: no such base model"),
        (["pretrain", "--parts", "plian"], "no part plian of the corpus"),
        (["pretrain", "--training.context", "512"], "context is 512 tokens, but nano takes 256 at the most"),
    ],
)
def test_mistakes_get_one_line(refused, arguments, line, tmp_path):
    extra = ["--sizes", "nano"] if arguments[:2] == ["pretrain", "--training.context"] else []
    assert line in refused(
        "world", *arguments, *extra, "--num-probe-items" if arguments[0] == "pretrain" else "--num-items", "2"
    )
