"""The InstructGPT recipe through the users' own command: on the built-in world, and on files of one's own."""

import json
from pathlib import Path

import pytest

from qinglan import cli
from qinglan.evals.instruct_gpt import HEADLINE
from qinglan.recipes.instruct_gpt_config import InstructGPTConfig
from qinglan.recipes.instruct_gpt_data import reward_base
from qinglan.tasks.base_models import base_tokenizer, build


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Run a command and return exit code, standard output and standard error."""
    code = cli.run(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_whole_pipeline_on_the_built_in_world(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    arguments = ["instruct-gpt", "--preset", "tiny", "--out", str(out), "--seed", "3", "--json"]
    code, printed, _ = run(arguments, capsys)
    assert code == 0
    report = json.loads((out / "report.json").read_text())
    assert json.loads(printed) == report
    assert set(report) == {"recipe", "seconds", "config_hash", "metrics", "rows", "alarms", "unscored"}
    assert set(report["rows"]) >= {"floor", "student", "ceiling", "gap_recovered"}
    for name in HEADLINE:
        assert set(report["metrics"][name]) == {"value", "low", "high", "n", "unit"}, name
        assert report["metrics"][name]["n"] > 0, name
    assert (out / "report.html").read_text().startswith("<!DOCTYPE html>") or "<html" in (
        out / "report.html"
    ).read_text()
    for stage in ("start", "reward_model", "baseline", "ppo"):
        assert (out / "stages" / stage / "model" / "config.json").is_file(), stage

    inputs = json.loads((out / "lineage.json").read_text())["inputs"]
    assert set(inputs) == {"model", "larger_model"} and all("sha256:" in one for one in inputs.values())

    code, _, error = run(arguments, capsys)
    assert code == 2 and "--resume" in error
    before = (out / "stages" / "ppo" / "model" / "model.safetensors").stat().st_mtime_ns
    code, again, _ = run([*arguments, "--resume"], capsys)
    assert code == 0
    assert (out / "stages" / "ppo" / "model" / "model.safetensors").stat().st_mtime_ns == before
    first, second = report["metrics"], json.loads(again)["metrics"]
    assert {name: first[name] for name in HEADLINE} == {name: second[name] for name in HEADLINE}


def hh_rows(count: int) -> str:
    """Return human-preference transcripts in which the chosen reply is the shorter one."""
    rows = []
    for number in range(count):
        prompt = f"\n\nHuman: Question {number} about number {number * 7}?\n\nAssistant:"
        rows.append(json.dumps({"chosen": prompt + " Yes.", "rejected": prompt + " No, no, never ask that again."}))
    return "\n".join(rows) + "\n"


def test_on_files_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "comparisons.jsonl"
    file.write_text(hh_rows(40))
    arguments = ["instruct-gpt", "--preset", "tiny", "--model", "nano", "--comparisons", str(file), "--json"]
    code, printed, error = run([*arguments, "--out", str(tmp_path / "own")], capsys)
    assert code == 0, error
    metrics = json.loads(printed)["metrics"]
    assert {"reward_model_accuracy", "proxy_score/policy", "proxy_score/sft", "kl"} <= set(metrics)
    assert "gold_score/policy" not in metrics
    assert "SFT: no demonstrations" in (tmp_path / "own" / "report.html").read_text()


def test_a_broken_file_stops_before_anything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "broken.jsonl"
    file.write_text(hh_rows(3) + '{"chosen": "x"}\n{oops\n')
    out = tmp_path / "never"
    code, _, error = run(["instruct-gpt", "--preset", "tiny", "--comparisons", str(file), "--out", str(out)], capsys)
    assert code == 2
    assert "broken.jsonl:4" in error or "broken.jsonl:5" in error
    assert not out.exists()


def test_a_larger_model_that_reads_other_tokens_is_no_reward_model() -> None:
    base, larger = (build(size, base_tokenizer(), seed=0) for size in ("nano", "micro"))
    foreign = larger._replace(chat=larger.chat._replace(render_hash="another"))
    config = InstructGPTConfig()
    assert reward_base(config, base, larger) is larger
    assert reward_base(config, base, foreign) is base
    assert reward_base(config, base, None) is base


def test_prompts_that_leave_no_room_stop_the_run_before_its_first_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    code, _, error = run(["instruct-gpt", "--preset", "paper", "--model", "nano", "--out", str(out)], capsys)
    assert code == 2 and error.count("\n") == 1
    assert "of nano's context of 256, but completions may have 1024; lower max_new_tokens" in error
    assert not out.exists()


def test_more_completions_at_the_least_than_at_the_most_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = run(["quickstart", "--world.min-ranked", "9", "--world.max-ranked", "4"], capsys)
    assert code == 2 and "min_ranked is 9, more than max_ranked 4" in error
