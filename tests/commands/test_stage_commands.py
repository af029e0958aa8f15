"""`qinglan sft | reward | ppo | dpo` from end to end, on tiny random models of several architectures."""

import json
import math
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from qinglan.commands.train import SFTCommand
from qinglan.core.run import Run

pytest_plugins = ("command_fixtures",)

FAST = ("--held-out", "0.5", "--seed", "3")
SHORT = ("--sampling.max-new-tokens", "4")
PPO_FAST = (
    *("--held-out", "0.5", "--max-measured", "3", "--training.num-iterations", "1"),
    *("--training.minibatch-episodes", "4", "--training.episodes-per-iteration", "4"),
    *("--training.sampling.max-new-tokens", "4"),
)  # fmt: skip
CONTRACT = {"recipe", "seconds", "config_hash", "metrics", "rows", "alarms", "unscored"}


def check_run(out: Path, recipe: str, answer) -> dict:
    """Check what every finished run holds; return its report."""
    assert answer.code == 0, answer.err
    report = json.loads((out / "report.json").read_text())
    assert report == json.loads(answer.out)
    assert set(report) == CONTRACT and report["recipe"] == recipe
    for measure in [*report["metrics"].values(), *report["rows"].values()]:
        assert set(measure) == {"value", "low", "high", "n", "unit"}
    page = (out / "report.html").read_text()
    assert "How did training go?" in page and "<script" not in page
    lineage = json.loads((out / "lineage.json").read_text())
    assert lineage["recipe"] == recipe and all(" sha256:" in text for text in lineage["inputs"].values())
    return report


@pytest.mark.parametrize(
    ("architecture", "options"),
    [("llama", {}), ("qwen2", {"pad_is_eos": True}), ("gpt2", {"template": "plain"}), ("gemma3", {})],
)
def test_sft(run, model_dir, demonstrations, tmp_path, architecture, options) -> None:
    model, out = model_dir(architecture, **options), tmp_path / "run"
    answer = run(
        "sft", "--model", model, "--demonstrations", demonstrations, *FAST, *SHORT,
        "--training.num-epochs", 2, "--training.batch-size", 8, "--out", out, "--json",
    )  # fmt: skip
    report = check_run(out, "sft", answer)
    before, after = report["rows"]["floor"], report["rows"]["student"]
    assert after["value"] < before["value"] and before["n"] == after["n"] >= 2
    assert report["metrics"]["rows/training"]["value"] + report["metrics"]["rows/held_out"]["value"] == 12
    directory = out / "stages" / "sft" / "model"
    AutoModelForCausalLM.from_pretrained(directory)
    assert AutoTokenizer.from_pretrained(directory).chat_template
    assert "What does it say?" in (out / "report.html").read_text()


def test_sft_mixes_in_a_text_file(run, model_dir, demonstrations, tmp_path) -> None:
    text = tmp_path / "corpus.txt"
    text.write_text("The elk lives\nin the north.\n\n\n<|im_end|> is text here.\n")
    answer = run(
        "sft", "--model", model_dir(), "--demonstrations", demonstrations, *FAST, *SHORT, "--pretraining", text,
        "--training.pretrain-fraction", "0.2", "--training.num-epochs", 1, "--out", tmp_path / "run", "--json",
    )  # fmt: skip
    check_run(tmp_path / "run", "sft", answer)
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert "pretrain_loss" in logged[-1]


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2", "gemma2"])
def test_reward(run, model_dir, comparisons, demonstrations, tmp_path, architecture) -> None:
    out = tmp_path / "run"
    answer = run(
        "reward", "--model", model_dir(architecture), "--comparisons", comparisons, *FAST, "--out", out, "--json",
        *(["--demonstrations", demonstrations] if architecture == "qwen2" else []),
    )  # fmt: skip
    report = check_run(out, "reward", answer)
    accuracy = report["metrics"]["reward_model_accuracy"]
    assert accuracy["n"] == 2 * report["metrics"]["rows/held_out"]["n"]  # of three pairs one is tied
    assert accuracy["n"] == 2 * report["metrics"]["held_out_prompt_groups"]["n"]
    assert 0 <= accuracy["low"] <= accuracy["value"] <= accuracy["high"] <= 1
    assert report["rows"]["floor"] == report["metrics"]["longer_wins_accuracy"]
    assert report["metrics"]["longer_wins_accuracy"]["value"] == pytest.approx(0.5, abs=0.5)
    assert "reward_model_ece" in report["metrics"]
    directory = out / "stages" / "reward_model" / "model"
    model = AutoModelForSequenceClassification.from_pretrained(directory)
    assert model.config.num_labels == 1
    assert (model.config.qinglan["offset"] != 0) == (architecture == "qwen2")


@pytest.mark.parametrize(("architecture", "loss"), [("qwen2", "dpo"), ("gpt2", "ipo"), ("gemma3", "dpo")])
def test_dpo(run, model_dir, comparisons, tmp_path, architecture, loss) -> None:
    out = tmp_path / "run"
    answer = run(
        "dpo", "--model", model_dir(architecture), "--comparisons", comparisons, *FAST, *SHORT,
        "--training.loss", loss, "--training.sft-coef", "0.1", "--out", out, "--json",
    )  # fmt: skip
    report = check_run(out, "dpo", answer)
    accuracy = report["metrics"]["implied_reward_accuracy"]
    assert accuracy["n"] == 2 * report["metrics"]["rows/held_out"]["n"]  # of three pairs one is tied
    assert report["rows"]["student"] == accuracy
    assert report["metrics"]["kl"]["n"] == report["metrics"]["rows/held_out"]["n"]
    assert {"length/start", "cut_short/policy"} <= set(report["metrics"])
    logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert logged[0]["start/loss"] > 0 and "valid_margin" in logged[-1]
    AutoModelForCausalLM.from_pretrained(out / "stages" / "dpo" / "model")
    assert "What does it say?" in (out / "report.html").read_text()


@pytest.mark.parametrize(("architecture", "pad_is_eos"), [("llama", False), ("gpt2", True)])
def test_ppo_against_a_reward_model(
    run, model_dir, reward_dir, demonstrations, tmp_path, architecture, pad_is_eos
) -> None:
    out = tmp_path / "run"
    answer = run(
        "ppo", "--policy", model_dir(architecture, pad_is_eos=pad_is_eos), "--prompts", demonstrations, *PPO_FAST,
        "--reward-model", reward_dir(architecture, pad_is_eos=pad_is_eos), "--out", out, "--json",
    )  # fmt: skip
    report = check_run(out, "ppo", answer)
    assert {"score_gain", "score_gain_greedy", "kl", "length/policy", "cut_short/start_greedy"} <= set(
        report["metrics"]
    )
    assert report["rows"]["student"] == report["metrics"]["score/policy"]
    assert report["rows"]["student"]["n"] == 3
    AutoModelForCausalLM.from_pretrained(out / "stages" / "ppo" / "model")


def test_ppo_against_a_function(run, model_dir, demonstrations, tmp_path, monkeypatch) -> None:
    (tmp_path / "rewards_of_test.py").write_text(
        "def brevity(prompts, completions):\n"
        "    print('seen by nobody')\n"
        "    assert prompts[0][-1]['role'] == 'user'\n"
        "    return [-float(len(text)) for text in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    answer = run(
        "ppo", "--policy", model_dir("qwen2"), "--prompts", demonstrations, *PPO_FAST,
        "--reward", "rewards_of_test:brevity", "--training.estimator", "rloo", "--training.samples-per-prompt", "2",
        "--json",
    )  # fmt: skip
    report = check_run(tmp_path / "runs" / "ppo", "ppo", answer)
    assert report["rows"]["floor"]["value"] <= 0


def test_every_stage_with_adapters_one_on_the_other(run, model_dir, demonstrations, comparisons, tmp_path) -> None:
    lora = ("--training.lora.rank", 2, "--seed", 3, "--json")
    made = {name: tmp_path / name for name in ("sft", "reward", "ppo", "dpo")}
    directory = {name: out / "stages" / name / "model" for name, out in made.items()}
    directory["reward"] = made["reward"] / "stages" / "reward_model" / "model"
    commands = [
        ("sft", "--model", model_dir("qwen2"), "--demonstrations", demonstrations, *SHORT),
        ("reward", "--model", directory["sft"], "--comparisons", comparisons),
        ("ppo", "--policy", directory["sft"], "--prompts", demonstrations, "--reward-model", directory["reward"],
         *PPO_FAST),
        ("dpo", "--model", directory["sft"], "--comparisons", comparisons, *SHORT),
    ]  # fmt: skip
    for name, *command in commands:
        answer = run(name, *command, "--held-out", "0.5", *lora, "--out", made[name])
        check_run(made[name], name, answer)
        assert (directory[name] / "adapter_model.safetensors").is_file()
    answer = run("sample", "--model", directory["ppo"], "--prompts", demonstrations, "--json")
    assert answer.code == 0, answer.err


def test_the_text_for_people_ends_with_the_paths(run, model_dir, comparisons, tmp_path) -> None:
    out = tmp_path / "run"
    answer = run("reward", "--model", model_dir(), "--comparisons", comparisons, *FAST, "--out", out)
    assert answer.code == 0
    lines = answer.out.splitlines()
    assert lines[0].startswith("Floor") and lines[1].startswith("Student")
    assert lines[-2:] == [f"model: {out / 'stages' / 'reward_model' / 'model'}", str(out / "report.html")]


def test_a_finished_run_is_refused_resumed_and_repeated(run, refused, model_dir, demonstrations, tmp_path) -> None:
    out, again = tmp_path / "run", tmp_path / "again"
    command = [
        "sft",
        "--model",
        model_dir(),
        "--demonstrations",
        demonstrations,
        *FAST,
        *SHORT,
        "--training.num-epochs",
        1,
    ]
    first = json.loads(run(*command, "--out", out, "--json").out)
    written = (out / "stages" / "sft" / "model" / "model.safetensors").stat().st_mtime_ns

    assert "holds a run already; add --resume" in refused(*command, "--out", out)
    other = [*command[:-1], 2]
    assert "holds a run with another configuration" in refused(*other, "--out", out, "--resume")

    resumed = json.loads(run(*command, "--out", out, "--resume", "--json").out)
    assert resumed["metrics"] == first["metrics"]
    assert (out / "stages" / "sft" / "model" / "model.safetensors").stat().st_mtime_ns == written

    repeated = run("sft", "--config", out / "config.yaml", "--out", again, "--json")  # config.yaml tells the seed: 3
    assert json.loads(repeated.out)["metrics"] == first["metrics"]
    other_seed = ("sft", "--config", out / "config.yaml", "--seed", 4, "--out", out, "--resume")  # the flag wins
    assert "holds a run with seed 3, not 4" in refused(*other_seed)

    with Run.open(out, read_command(out), seed=3, recipe="sft", resume=True):
        assert "another process is working in this folder" in refused(*command, "--out", out, "--resume")


def read_command(out: Path) -> SFTCommand:
    values = yaml.safe_load((out / "config.yaml").read_text())
    assert values.pop("seed") == 3
    return SFTCommand(**values)


def test_without_held_out_groups_nothing_is_measured_but_the_model_is_there(
    run, model_dir, comparisons, tmp_path
) -> None:
    out = tmp_path / "run"
    answer = run(
        "reward", "--model", model_dir(), "--comparisons", comparisons, "--held-out", 0, "--out", out, "--json"
    )
    report = check_run(out, "reward", answer)
    assert report["rows"] == {} and report["metrics"]["rows/training"]["value"] == 12
    assert (out / "stages" / "reward_model" / "model").is_dir()


def test_presets_are_the_papers_values() -> None:
    paper = SFTCommand(model="m", demonstrations=Path("d"), **SFTCommand.presets()["paper"])
    assert paper.training.num_epochs == 16 and paper.training.dropout == 0.2
    assert math.isclose(paper.training.optimizer.learning_rate, 9.65e-6)
