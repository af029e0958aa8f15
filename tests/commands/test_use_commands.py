"""`qinglan sample | score | evaluate | report`: what they answer, as text, as JSON and in files."""

import json

import pytest

from qinglan.core.run import Measure, Report

pytest_plugins = ("command_fixtures",)

SHORT = ("--sampling.max-new-tokens", "4")


def test_sample_prints_or_writes_what_score_reads(run, model_dir, reward_dir, demonstrations, tmp_path) -> None:
    model, file = model_dir("gemma2"), tmp_path / "sampled.jsonl"
    command = ["sample", "--model", model, "--num-samples", 2, *SHORT]
    printed = run(*command, "--text", "What is an ant?")
    assert printed.code == 0 and printed.out.startswith("user: What is an ant?\n  > ")
    assert printed.out.count("  > ") == 2

    answer = json.loads(run(*command, "--text", "What is an ant?", "--json").out)
    again = json.loads(run(*command, "--text", "What is an ant?", "--json").out)
    assert [one["token_ids"] for one in answer["completions"]] == [one["token_ids"] for one in again["completions"]]

    written = run(*command, "--prompts", demonstrations, "--to", file, "--json")
    assert json.loads(written.out) == {"num_prompts": 12, "num_skipped": 0, "to": str(file)}
    assert len(file.read_text().splitlines()) == 12 + 24

    scored = json.loads(run("score", "--reward-model", reward_dir("gemma2"), "--file", file, "--json").out)
    assert len(scored["scores"]) == 24 and scored["metrics"]["score"]["n"] == 24


def test_sample_keeps_an_empty_completion(run, reward_dir, model_dir, tmp_path) -> None:
    prompt = {"id": "p", "source": "human", "producer_id": "me", "prompt_group_id": "g"}
    empty = prompt | {"id": "c", "source": "policy", "prompt_id": "p", "text": "", "token_ids": [264], "parents": ["p"]}
    file = tmp_path / "sampled.jsonl"
    rows = [prompt | {"messages": [{"role": "user", "content": "Hi"}]}, empty]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    answer = run("score", "--reward-model", reward_dir("gemma2"), "--file", file, "--json")
    assert len(json.loads(answer.out)["scores"]) == 1
    file.write_text(json.dumps(empty))
    line = run("score", "--reward-model", reward_dir("gemma2"), "--file", file)
    assert line.code == 2 and "completion c: its prompt is not in the file" in line.err


def test_score_of_comparisons_gives_pair_accuracy(run, reward_dir, comparisons, demonstrations, tmp_path) -> None:
    model, file = reward_dir("gemma2"), tmp_path / "scores.jsonl"
    answer = run("score", "--reward-model", model, "--file", comparisons, "--to", file, "--json")
    metrics = json.loads(answer.out)["metrics"]
    assert metrics["pair_accuracy"]["n"] == 24 and metrics["score"]["n"] == 36
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == 36 and set(rows[0]) == {"prompt_id", "completion_id", "score"}
    text = run("score", "--reward-model", model, "--file", demonstrations).out
    assert len(text.splitlines()) == 13 and "pair_accuracy" not in text and text.splitlines()[-1].startswith("score: ")


def test_score_refuses_what_it_cannot_score(refused, model_dir, reward_dir, write, comparisons) -> None:
    prompts = write("prompts.jsonl", [{"prompt": "Hi"}])
    assert "holds no completion" in refused("score", "--reward-model", reward_dir("gemma2"), "--file", prompts)
    broken = write("broken.jsonl", [{"prompt": "Hi", "completion": ""}, {"prompt": "Hi", "completion": "a"}])
    assert "broken.jsonl:1: completion" in refused("score", "--reward-model", reward_dir("gemma2"), "--file", broken)
    line = refused("score", "--reward-model", model_dir("gemma2"), "--file", comparisons)
    assert "weights are missing" in line or "labels" in line


def test_evaluate_a_model_on_the_built_in_world(run, model_dir, tmp_path) -> None:
    command = ["evaluate", "--model", model_dir("gemma2"), "--num-prompts", 16, *SHORT, "--out", tmp_path, "--json"]
    report = json.loads(run(*command).out)
    assert report["recipe"] == "evaluate" and report["rows"]["student"]["n"] == 16
    for name in ("gold_score", "hallucination_rate", "harmful_rate", "refusal_rate_on_benign"):
        assert {f"{name}/sampled", f"{name}/greedy"} <= set(report["metrics"])
    assert json.loads((tmp_path / "evaluate.json").read_text()) == report


def test_evaluate_a_reward_model_on_comparisons(run, refused, reward_dir, model_dir, comparisons) -> None:
    command = ["evaluate", "--reward-model", reward_dir("gemma2"), "--comparisons", comparisons]
    report = json.loads(run(*command, "--json").out)
    assert report["metrics"]["reward_model_accuracy"]["n"] == 24
    assert report["metrics"]["held_out_prompt_groups"]["value"] == 12
    assert "reward_model_brier" in run(*command).out
    assert "belong together" in refused(*command[:3])
    assert "wants a subject" in refused(*command, "--model", model_dir("gemma2"))


def test_report_reads_a_finished_run(run, refused, tmp_path) -> None:
    metrics = {"score/policy": Measure(1.5, 1.0, 2.0, 30, "score"), "kl": Measure(None, None, None, 0, "nats")}
    report = Report("ppo", 61.0, "abc", metrics, {"student": metrics["score/policy"]}, ["kl_jump: it jumped"], 2)
    (tmp_path / "report.json").write_text(json.dumps(report.to_json()))
    lines = run("report", tmp_path).out.splitlines()
    assert lines[0].startswith("Student") and "[1.00, 2.00]" in lines[0]
    assert "Alarm: kl_jump: it jumped" in lines and lines[-1] == str(tmp_path / "report.html")
    assert run("report", "--run", tmp_path, "--markdown").out.startswith("## ppo\n")
    assert json.loads(run("report", tmp_path, "--json").out) == report.to_json()

    assert "run: is required" in refused("report")
    assert "holds no report.json" in refused("report", tmp_path / "elsewhere")
    (tmp_path / "report.json").write_text('{"metrics": 3}')
    assert "is no report of a run" in refused("report", tmp_path)
    (tmp_path / "report.json").write_text("{")
    assert "report.json:1: not JSON" in refused("report", tmp_path)


@pytest.mark.parametrize("extra", [[], ["--text", "Hi", "--prompts", "x.jsonl"]])
def test_sample_wants_one_source_of_prompts(refused, model_dir, extra) -> None:
    assert "give either --prompts FILE or --text" in refused("sample", "--model", model_dir("gemma2"), *extra)
