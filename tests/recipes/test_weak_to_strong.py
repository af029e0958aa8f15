"""Weak-to-strong through the user's own command: the tiny grid, killed and resumed, on files, with people and rules."""

import json
from pathlib import Path
from typing import Any

import pytest

from qinglan import cli
from qinglan.core.errors import InputError
from qinglan.recipes import weak_to_strong_fitting, weak_to_strong_grid
from qinglan.recipes.weak_to_strong_config import WeakToStrongConfig
from qinglan.recipes.weak_to_strong_data import num_parameters
from qinglan.recipes.weak_to_strong_fitting import training_of
from qinglan.recipes.weak_to_strong_grid import Cell

CONTRACT = {"value", "low", "high", "n", "unit"}
SMALL = ["--num-half", "24", "--num-test", "24", "--training.evaluate-every", "2"]


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = cli.run([*arguments, "--json"])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def tiny(out: Path, *more: str) -> list[str]:
    return ["weak-to-strong", "--preset", "tiny", "--out", str(out), "--seed", "3", *more]


def test_the_tiny_preset_says_what_its_contract_promises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    code, printed, error = run(tiny(out), capsys)
    assert code == 0, error
    report = json.loads((out / "report.json").read_text())
    assert json.loads(printed) == report
    metrics = report["metrics"]
    for measure in metrics.values():
        assert set(measure) == CONTRACT
    assert metrics["tasks_admitted"]["n"] == 3
    for method in ("naive", "confidence", "bootstrap", "generative"):
        assert f"pgr/{method}" in metrics
    assert {"agreement/right", "agreement/wrong"} <= set(metrics)
    for task in ("claims_recalled", "preferences", "facts"):
        for who in (f"weak/{task}", f"ceiling/{task}", f"student/{task}/naive"):
            assert 0.0 <= metrics[f"accuracy/{who}"]["value"] <= 1.0
            assert metrics[f"accuracy/{who}"]["n"] == 40
        assert f"pgr/{task}/naive" in metrics
        assert {f"admission/{task}/{key}" for key in ("weak", "ceiling", "gap")} <= set(metrics)
    assert "accuracy/zero_shot/claims_recalled" in metrics and "accuracy/zero_shot/facts" in metrics
    for method in ("confidence", "generative", "probe", "few_shot"):
        assert f"accuracy/student/claims_recalled/{method}" in metrics
    page = (out / "report.html").read_text()
    for title in ("How much of the gap is recovered?", "Does the student imitate errors?", "Which tasks count?"):
        assert title in page
    # What makes no sense for a task is said with its reason, is no alarm, and the rest goes on.
    assert "Does not apply: preferences, nano to micro, few_shot" in page
    assert not any("few_shot" in line for line in report["alarms"])
    labels = (out / "stages/cells/claims_recalled/supervisor-nano-seed0/half_b.jsonl").read_text().splitlines()
    label = json.loads(labels[0])
    assert label["training_half"] == "half A of claims_recalled, seed 0" and len(label["logits"]) == 1

    inputs = json.loads((out / "lineage.json").read_text())["inputs"]
    assert set(inputs) == {"model nano", "model micro"} and all("sha256:" in text for text in inputs.values())

    # A second start computes nothing again and says the same.
    before = {file: file.stat().st_mtime_ns for file in out.glob("stages/cells/*/*/done.json")}
    code, again, _ = run([*tiny(out), "--resume"], capsys)
    assert code == 0
    assert before == {file: file.stat().st_mtime_ns for file in out.glob("stages/cells/*/*/done.json")}
    assert json.loads(again)["metrics"] == metrics


class Killed(Exception):
    """Stands for the end of the process."""


def test_a_killed_grid_resumes_and_ends_bit_identical(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["--tasks", "claims", "--methods", "naive,confidence", *SMALL, "--training.checkpoint-every", "2"]
    more += ["--training.num-epochs", "2"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run(tiny(whole, *more), capsys)[0] == 0

    inner, calls = weak_to_strong_fitting.encoded_logits, []

    def killing(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 7:  # in the middle of the second training that measures itself
            raise Killed
        return inner(*args)

    monkeypatch.setattr(weak_to_strong_fitting, "encoded_logits", killing)
    with pytest.raises(Killed):
        cli.run(tiny(stopped, *more))
    monkeypatch.setattr(weak_to_strong_fitting, "encoded_logits", inner)
    capsys.readouterr()
    assert run([*tiny(stopped, *more), "--resume"], capsys)[0] == 0
    first, second = (json.loads((out / "report.json").read_text()) for out in (whole, stopped))
    assert first["metrics"] == second["metrics"] and first["rows"] == second["rows"]


def test_several_processes_give_the_same_as_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--tasks", "letters", "--methods", "probe", *SMALL]
    reports = []
    for workers in ("1", "2"):
        out = tmp_path / workers
        assert run(tiny(out, *more, "--workers", workers), capsys)[0] == 0
        reports.append(json.loads((out / "report.json").read_text())["metrics"])
    assert reports[0] == reports[1]


def test_bootstrapping_the_released_choices_and_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--weak", "nano,labelers", "--strong", "mini", "--between", "micro", "--tasks", "claims"]
    more += ["--methods", "naive,bootstrap", "--released", *SMALL]
    code, printed, error = run(tiny(tmp_path / "run", *more), capsys)
    assert code == 0, error
    report = json.loads(printed)
    metrics = report["metrics"]
    assert "accuracy/student/claims/bootstrap" in metrics
    assert {f"accuracy/student/claims/released_{loss}" for loss in ("naive", "confidence")} <= set(metrics)
    assert {"accuracy/released_weak/claims", "accuracy/released_ceiling/claims"} <= set(metrics)
    # People are the second supervisor: the same records, the same metrics with a suffix.
    assert "accuracy/student/claims/naive/labelers-mini" in metrics
    cells = tmp_path / "run" / "stages" / "cells" / "claims"
    label = json.loads((cells / "supervisor-labelers-seed0" / "half_b.jsonl").read_text().splitlines()[0])
    assert label["source"] == "human"
    assert (cells / "link-nano-micro-seed0" / "half_b.jsonl").is_file()


def write_reviews(path: Path, count: int = 220) -> Path:
    rows = []
    for number in range(count):
        word = ("bad", "good")[number % 2]
        said = (
            ("bad", "good")[(number // 2) % 5 == 0] if number % 4 == 0 else word
        )  # an annotator who errs now and then
        rows.append({"text": f"The soup {number} was {word}.", "label": number % 2, "ann": float(said == "good")})
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_on_a_file_with_a_lexicon_and_one_annotator(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_reviews(tmp_path / "reviews.jsonl")
    keywords = tmp_path / "words.txt"
    keywords.write_text("good\n")
    more = ["--data.file", str(file), "--data.verdicts", "bad", "good", "--methods", "naive,probe", *SMALL]
    more += ["--weak", f"keywords:{keywords}", "column:ann"]
    code, printed, error = run(tiny(tmp_path / "run", *more), capsys)
    assert code == 0, error
    metrics = json.loads(printed)["metrics"]
    assert metrics["accuracy/weak/your_data"]["value"] == 1.0  # the keyword is the label here
    assert 0.6 < metrics["accuracy/weak/your_data/ann-micro"]["value"] < 1.0
    assert "accuracy/student/your_data/naive/ann-micro" in metrics


def test_on_a_file_of_comparisons(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = []
    for number in range(220):
        prompt = f"\n\nHuman: Question {number} about number {number * 7}?\n\nAssistant:"
        rows.append(json.dumps({"chosen": prompt + " Yes.", "rejected": prompt + " No, no, never ask that again."}))
    file = tmp_path / "comparisons.jsonl"
    file.write_text("\n".join(rows))
    more = ["--comparisons", str(file), "--methods", "naive", *SMALL]
    code, printed, error = run(tiny(tmp_path / "run", *more), capsys)
    assert code == 0, error
    assert json.loads(printed)["metrics"]["accuracy/ceiling/your_data"]["value"] > 0.8


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tasks", "claim"], "task claim: no such task; did you mean 'claims'"),
        (["--weak", "nanoo"], "no base model of that name"),
        (["--weak", "lexicon:nowhere.zip"], "nowhere.zip: no such file"),
        (["--tasks", "claims,claims"], "tasks: expected at least one name, each once, got claims claims"),
        (["--methods", "naiv"], "methods.0: Input should be 'naive'"),
    ],
)
def test_bad_names_leave_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    code, _, error = run(tiny(tmp_path / "run", *more), capsys)
    assert code == 2 and message in error
    assert not (tmp_path / "run").exists()


def test_files_that_make_no_study_are_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"text": f"text {n}", "label": 1}) for n in range(50)))
    code, _, error = run(tiny(tmp_path / "run", "--data.file", str(file)), capsys)
    assert code == 2 and "all 50 labels are class 1; expected both classes" in error
    reviews = write_reviews(tmp_path / "reviews.jsonl")
    code, _, error = run(tiny(tmp_path / "run", "--data.file", str(reviews), "--weak", "column:other"), capsys)
    assert code == 2 and "column:other: no such column; expected one of text, label, ann" in error
    long = [{"text": f"text {n} " + "soup " * 400, "label": n % 2} for n in range(50)]
    too_long = tmp_path / "long.jsonl"
    too_long.write_text("\n".join(map(json.dumps, long)))
    code, _, error = run(tiny(tmp_path / "run", "--data.file", str(too_long)), capsys)
    assert code == 2 and "exceeds the context of a model; 50 of 50 texts do" in error
    code, _, error = run(tiny(tmp_path / "run", "--tasks", "lichess"), capsys)
    assert code == 2 and "give it as --puzzles" in error
    assert not (tmp_path / "run").exists()
    file = write_reviews(tmp_path / "few.jsonl", 30)
    code, _, error = run(tiny(tmp_path / "run", "--data.file", str(file)), capsys)
    assert code == 2 and "too few for an interval" in error


def test_a_cell_with_bad_input_is_left_out_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = weak_to_strong_grid.Cell

    def refuse(*args: Any, **more: Any) -> Any:
        raise InputError("labels outside 0 and 1")

    monkeypatch.setattr("qinglan.recipes.weak_to_strong.labels_of_model", refuse)
    code, printed, _ = run(tiny(tmp_path / "run", "--tasks", "claims,facts", "--methods", "naive", *SMALL), capsys)
    assert code == 0 and inner is weak_to_strong_grid.Cell
    report = json.loads(printed)
    assert any("claims, nano to micro: labels outside 0 and 1" in line for line in report["alarms"])
    assert "accuracy/student/facts/naive" in report["metrics"]
    assert "accuracy/student/claims/naive" not in report["metrics"]


def test_no_ceiling_is_trained_for_a_task_that_breaks_another_rule(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--tasks", "letters", "--methods", "naive", *SMALL, "--students", "admitted", "--admission.min-weak", "1"]
    code, printed, error = run(tiny(tmp_path / "run", *more), capsys)
    assert code == 0, error
    report = json.loads(printed)
    assert report["metrics"]["tasks_admitted"] == {"value": 0, "low": None, "high": None, "n": 1, "unit": "tasks"}
    assert "no task was admitted" in report["alarms"][0]
    assert "admission/letters/weak" in report["metrics"] and "admission/letters/gap" not in report["metrics"]
    cells = {folder.name for folder in (tmp_path / "run/stages/cells/letters").iterdir()}
    assert cells == {"base-micro-seed1000", "supervisor-nano-seed1000"}


def test_presets() -> None:
    presets = WeakToStrongConfig.presets()
    assert list(presets) == ["small", "tiny", "paper"]
    assert presets["small"].training.confidence == 0.5 and presets["small"].training.ramp_fraction == 0.2
    assert len(presets["small"].tasks) >= 12


def test_the_rate_falls_with_size_above_two_million_parameters() -> None:
    config = WeakToStrongConfig(rate_exponent=0.5)

    def rate(model: str, settings: WeakToStrongConfig) -> float:
        cell = Cell("student", "letters", model, 0, weak="nano", method="naive")
        return training_of(settings, cell).optimizer.learning_rate

    assert num_parameters(config, "small") == 6_127_808
    # 3e-4 * (2,000,000 / 6,127,808) ** 0.5 = 3e-4 * 0.5713
    assert rate("small", config) == pytest.approx(3e-4 * 0.5713, rel=1e-3)
    assert rate("micro", config) == 3e-4 and rate("small", WeakToStrongConfig()) == 3e-4
