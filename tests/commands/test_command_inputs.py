"""Bad input to the stage commands: exit code 2, one clear line, and no run folder; or rows skipped and counted."""

import json
import shutil

import pytest
from conftest import make_tokenizer

pytest_plugins = ("command_fixtures",)

LONG = "word " * 300
"""Longer than the tiny models' context of 256 tokens."""
FAST = ("--held-out", "0.3", "--training.num-epochs", 1)
PPO_FAST = (
    *("--held-out", "0", "--max-measured", "2", "--training.num-iterations", "1", "--training.minibatch-episodes", "4"),
    *("--training.episodes-per-iteration", "4", "--training.sampling.max-new-tokens", "4"),
)  # fmt: skip


GOOD = {"prompt": "Hi?", "completion": "Ho!"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": "Hi", ', "demonstrations.jsonl:13: row: not JSON"),
        ({"prompt": "Hi"}, "demonstrations.jsonl:13: completion: missing"),
        ({"prompt": 3, "completion": "a"}, "demonstrations.jsonl:13: prompt: "),
        ({"prompt": "Hi", "completion": " "}, "demonstrations.jsonl:13: completion: "),
        ({"prompt": [{"role": "robot", "content": "x"}], "completion": "a"}, "robot"),
        ("[1, 2]", "demonstrations.jsonl:13: row: "),
    ],
)
def test_broken_demonstrations_stop_or_are_skipped(run, model_dir, demonstrations, tmp_path, row, message) -> None:
    with demonstrations.open("a") as file:
        file.write((row if isinstance(row, str) else json.dumps(row)) + "\n")
    command = ["sft", "--model", model_dir(), "--demonstrations", demonstrations, "--out", tmp_path / "run"]
    answer = run(*command)
    assert answer.code == 2 and answer.out == "" and not (tmp_path / "run").exists()
    first, last = answer.err.splitlines()
    assert message in first and first.startswith("qinglan: ")
    assert last.startswith("1 of 13 rows cannot be used")


def test_skipped_rows_are_counted(run, model_dir, demonstrations, tmp_path) -> None:
    with demonstrations.open("a") as file:
        file.write(json.dumps({"prompt": "Hi", "completion": ""}) + "\n")
        file.write(json.dumps({"prompt": LONG, "completion": "too long"}) + "\n")
    command = ["sft", "--model", model_dir(), "--demonstrations", demonstrations, *FAST, "--on-bad", "skip"]
    answer = run(*command, "--sampling.max-new-tokens", 2, "--out", tmp_path / "run", "--json")
    metrics = json.loads(answer.out)["metrics"]
    assert (metrics["rows/broken"]["value"], metrics["rows/too_long"]["value"]) == (1, 1)
    assert metrics["rows/training"]["value"] + metrics["rows/held_out"]["value"] == 12


def test_rows_longer_than_the_context(refused, model_dir, write, demonstrations, tmp_path) -> None:
    rows = write("long.jsonl", [GOOD, {"prompt": LONG, "completion": "a"}])
    line = refused("sft", "--model", model_dir(), "--demonstrations", rows, out=tmp_path / "run")
    assert "over the limit of 256 (the model's context); 1 of 2 rows do" in line and "--on-bad skip" in line
    only = write("only.jsonl", [{"prompt": LONG, "completion": "a"}])
    line = refused("sft", "--model", model_dir(), "--demonstrations", only, "--on-bad", "skip", out=tmp_path / "run")
    assert "1 of 1 rows do; shorten them" in line
    pairs = write(
        "pairs.jsonl",
        [{"prompt": "Hi", "chosen": LONG, "rejected": "b"}, {"prompt": "H", "chosen": "a", "rejected": "b"}],
    )
    assert "comparison " in refused("reward", "--model", model_dir(), "--comparisons", pairs, out=tmp_path / "run")
    asked = write("asked.jsonl", [{"prompt": "Hi"}, {"prompt": LONG}])
    line = refused("ppo", "--policy", model_dir(), "--prompts", asked, "--reward", "builtins:len", out=tmp_path / "run")
    assert "over the limit of 192 (context 256 less max_new_tokens)" in line


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Hi", "completions": ["a", "b"], "ranking": [0, 2]}, "ranking"),
        ({"prompt": "Hi", "completions": ["a", "b"], "ranking": [0, 0]}, "ranking"),
        ({"prompt": "Hi", "completions": ["a", ""], "ranking": [0, 1]}, "completions"),
        ({"prompt": "Hi", "completions": ["a", "b"]}, "ranking"),
    ],
)
def test_broken_comparisons(run, model_dir, comparisons, tmp_path, row, message) -> None:
    with comparisons.open("a") as file:
        file.write(json.dumps(row) + "\n")
    answer = run("reward", "--model", model_dir(), "--comparisons", comparisons, "--out", tmp_path / "run")
    assert answer.code == 2 and f"comparisons.jsonl:13: {message}" in answer.err.splitlines()[0]
    assert not (tmp_path / "run").exists()


def test_comparisons_that_decide_nothing(refused, model_dir, write) -> None:
    tied = write("tied.jsonl", [{"prompt": "Hi", "completions": ["a", "b"], "ranking": [[0, 1]]}])
    line = refused(
        "reward", "--model", model_dir(), "--comparisons", tied, "--held-out", 0, "--out", tied.parent / "run"
    )
    assert "none of 1 comparisons can be used (1 without a decided pair" in line


def test_files_of_another_kind_or_none(refused, model_dir, demonstrations, comparisons, tmp_path) -> None:
    out = tmp_path / "run"
    line = refused("sft", "--model", model_dir(), "--demonstrations", comparisons, out=out)
    assert "holds prompts and comparisons only" in line and "expected demonstrations" in line
    assert "no such file" in refused("sft", "--model", model_dir(), "--demonstrations", tmp_path / "no.jsonl", out=out)
    line = refused("sft", "--model", model_dir(), "--demonstrations", demonstrations, "--held-out", "0.9999", out=out)
    assert "none of 12 rows is left for training, 12 are held out" in line


def test_model_directories_that_cannot_be_used(run, refused, model_dir, demonstrations, tmp_path) -> None:
    def copy(name):
        return shutil.copytree(model_dir("gpt2"), tmp_path / name)

    def answer(model):
        return refused("sft", "--model", model, "--demonstrations", demonstrations, out=tmp_path / "run")

    assert "no such directory, and no base model of that name" in answer("micr")
    assert "holds no config.json" in answer(tmp_path)
    no_tokenizer = copy("no-tokenizer")
    for file in no_tokenizer.glob("*token*"):
        file.unlink()
    assert "holds no usable tokenizer" in answer(no_tokenizer)
    no_template = copy("no-template")
    make_tokenizer(template=None).save_pretrained(no_template)
    (no_template / "chat_template.jinja").unlink(missing_ok=True)
    assert "has no chat template" in answer(no_template) and "--template plain" in answer(no_template)
    damaged = copy("damaged")
    (damaged / "model.safetensors").write_bytes(b"\0" * 64)
    assert "cannot be opened as a model" in answer(damaged)
    plain = ["--template", "plain", "--sampling.max-new-tokens", 2, "--out", tmp_path / "run"]
    assert run("sft", "--model", no_template, "--demonstrations", demonstrations, *FAST, *plain).code == 0


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise ValueError('no idea')", "raised ValueError: no idea at prompt "),
        ("return [float('nan')] * len(completions)", "gave nan for prompt "),
        ("return ['much'] * len(completions)", "gave 'much' for prompt "),
        ("return [1.0]", "gave 1 scores for 2 completions"),
    ],
)
def test_reward_functions_that_fail(refused, model_dir, demonstrations, tmp_path, monkeypatch, body, message) -> None:
    name = f"bad_reward_{abs(hash(body))}"
    (tmp_path / f"{name}.py").write_text(f"def reward(prompts, completions):\n    {body}\n")
    monkeypatch.syspath_prepend(tmp_path)
    line = refused(
        "ppo", "--policy", model_dir(), "--prompts", demonstrations, "--reward", f"{name}:reward", *PPO_FAST,
        out=tmp_path / "run",
    )  # fmt: skip
    assert message in line


def test_a_reward_that_fails_later_leaves_a_run_to_go_on_with(
    run, refused, model_dir, demonstrations, tmp_path, monkeypatch
) -> None:
    (tmp_path / "moody_reward.py").write_text(
        "from pathlib import Path\n"
        "def reward(prompts, completions):\n"
        f"    bad = len(completions) == 4 and not Path({str(tmp_path / 'well')!r}).exists()\n"
        "    return [float('nan') if bad else 0.5 * len(text) for text in completions]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    command = [
        "ppo", "--policy", model_dir(), "--prompts", demonstrations, "--reward", "moody_reward:reward", *PPO_FAST,
        "--out", tmp_path / "run",
    ]  # fmt: skip
    assert "ppo, iteration 0: the scorer: gave nan for prompt" in refused(*command)
    assert not (tmp_path / "run" / "stages" / "ppo" / "model").exists()
    (tmp_path / "well").touch()
    assert run(*command, "--resume").code == 0


def test_rewards_that_do_not_fit(refused, model_dir, reward_dir, demonstrations, tmp_path) -> None:
    command = ["ppo", "--policy", model_dir(), "--prompts", demonstrations]
    out = tmp_path / "run"
    assert "give either --reward-model DIR or --reward module:function" in refused(*command, out=out)
    both = ["--reward", "builtins:len", "--reward-model", reward_dir()]
    assert "give either --reward-model DIR or --reward module:function" in refused(*command, *both, out=out)
    assert "expected module:function" in refused(*command, "--reward", "brevity", out=out)
    assert "No module named 'no_such_module'" in refused(*command, "--reward", "no_such_module:f", out=out)
    assert "has no function lenn" in refused(*command, "--reward", "builtins:lenn", out=out)
    other = reward_dir("gpt2", template="plain")
    assert "writes conversations otherwise than" in refused(*command, "--reward-model", other, out=out)


def test_pretraining_text_and_its_weight_belong_together(refused, model_dir, demonstrations, tmp_path) -> None:
    command = ["sft", "--model", model_dir(), "--demonstrations", demonstrations]
    out, text = tmp_path / "run", tmp_path / "corpus.txt"
    weight = ["--training.pretrain-fraction", "0.1"]
    assert "there is no" in (line := refused(*command, *weight, out=out)) or "no pretraining text" in line
    assert "no such file" in refused(*command, *weight, "--pretraining", text, out=out)
    text.write_text(" \n\n")
    assert "holds no text" in refused(*command, *weight, "--pretraining", text, out=out)
    text.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read as UTF-8 text" in refused(*command, *weight, "--pretraining", text, out=out)
    text.write_text("Some text.")
    assert "is not mixed in while training.pretrain_fraction is 0" in refused(*command, "--pretraining", text, out=out)


def test_a_device_that_is_not_there(refused, model_dir, demonstrations, tmp_path) -> None:
    command = ["sft", "--model", model_dir(), "--demonstrations", demonstrations, "--device", "abacus"]
    assert "no such device; use auto, cpu or cuda" in refused(*command, out=tmp_path / "run")
