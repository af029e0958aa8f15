"""`qinglan classify` through the user's own command: it learns, it can be resumed, and bad input leaves nothing."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification

from qinglan import cli


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    """Return a file of 240 short reviews; the good ones say so."""
    file = tmp_path / "reviews.jsonl"
    rows = []
    for number in range(240):
        word = ("bad", "good")[number % 2]
        rows.append({"text": f"The soup number {number} was {word}.", "label": number % 2})
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = cli.run(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("method", ["fine-tuning", "probe"])
def test_it_learns(reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str) -> None:
    out = tmp_path / "run"
    arguments = ["classify", "--model", "nano", "--data.file", str(reviews), "--data.verdicts", "bad", "good"]
    arguments += ["--num-train", "120", "--num-valid", "30", "--num-test", "60", "--out", str(out), "--json"]
    code, printed, error = run([*arguments, "--method", method], capsys)
    assert code == 0, error
    metrics = json.loads(printed)["metrics"]
    assert metrics["accuracy"]["value"] > 0.9
    assert {"zero_shot_accuracy", "calibration_error", "brier"} <= set(metrics)
    assert "<html" in (out / "report.html").read_text()
    if method == "fine-tuning":
        model = AutoModelForSequenceClassification.from_pretrained(out / "stages" / "classifier" / "model")
        assert model.config.num_labels == 2
    else:
        assert len(json.loads((out / "stages" / "classifier" / "model" / "probe.json").read_text())["weights"]) == 64


def test_texts_over_the_context_are_named_or_left_out(
    reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with reviews.open("a") as out:
        out.write("\n" + json.dumps({"text": "good soup " * 200, "label": 1}))
    arguments = ["classify", "--model", "nano", "--data.file", str(reviews), "--training.num-epochs", "1", "--json"]
    arguments += ["--num-train", "40", "--num-valid", "16", "--num-test", "16", "--out", str(tmp_path / "run")]
    code, _, error = run(arguments, capsys)
    assert code == 2 and "over the context of 256; 1 of 241 texts do" in error
    assert not (tmp_path / "run").exists()
    code, printed, _ = run([*arguments, "--data.on-bad", "skip"], capsys)
    assert code == 0 and json.loads(printed)["metrics"]["rows/too_long"]["value"] == 1
