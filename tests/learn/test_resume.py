"""Every trainer through a kill and a damaged checkpoint: it ends as a run that was never stopped, bit by bit."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_lora import TRAINERS, Killed, assert_equal, weights_of
from tiny_world import make_lm, make_stage

from qinglan.core.run import Stage
from qinglan.learn import classifier, dpo, ppo, reward, sft
from qinglan.models.adapters import EVERY_WEIGHT

MODULES = {"sft": sft, "reward": reward, "dpo": dpo, "ppo": ppo, "classify": classifier}
SHORT = {
    "sft": {"epochs": 3},
    "reward": {"count": 16},
    "dpo": {"count": 16},
    "ppo": {"iterations": 6},
    "classify": {"count": 16},
}
"""Settings that make six updates, or iterations."""


def train(name: str, stage: Stage) -> Any:
    """A short run that trains every weight and writes a checkpoint after each update."""
    return TRAINERS[name](make_lm(), stage, EVERY_WEIGHT, every=1, **SHORT[name])


def dying(name: str, at: int) -> Any:
    """The trainer's `update`, which ends the process at call number `at`."""
    inner, calls = MODULES[name].update, []

    def update(*args: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == at:
            raise Killed
        return inner(*args, **named)

    return update


@pytest.fixture(scope="module", params=TRAINERS)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, list]:
    """A trainer's name with model and log of a run that was never stopped."""
    stage = make_stage(tmp_path_factory.mktemp("whole"), request.param)
    return request.param, weights_of(train(request.param, stage)), log_of(stage)


def log_of(stage: Stage) -> list[dict[str, float]]:
    rows = stage.run.metrics(stage.name)
    return [{key: value for key, value in row.items() if not key.startswith("seconds")} for row in rows]


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_checkpoint_is_named_and_the_run_still_ends_bit_identical(
    tmp_path, monkeypatch, capsys, whole, damage
):
    name, expected, log = whole
    with monkeypatch.context() as patch:
        patch.setattr(MODULES[name], "update", dying(name, 5))
        with pytest.raises(Killed):
            train(name, make_stage(tmp_path, name))
    stage = make_stage(tmp_path, name)
    newest = stage.dir / "checkpoints" / "step-00000004.safetensors"
    content = bytearray(newest.read_bytes())
    if damage == "gone":
        newest.unlink()
    elif damage == "cut":
        newest.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        newest.write_bytes(content)
    capsys.readouterr()
    assert_equal(weights_of(train(name, stage)), expected)
    assert str(newest) in capsys.readouterr().err
    assert log_of(stage) == log


CHILD = """
import os, signal, sys
sys.path[:0] = sys.argv[3:]
from pathlib import Path
import test_resume
name = sys.argv[1]
inner, calls = test_resume.MODULES[name].update, []
def update(*args, **named):
    calls.append(1)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return inner(*args, **named)
test_resume.MODULES[name].update = update
test_resume.train(name, test_resume.make_stage(Path(sys.argv[2]), name))
"""


@pytest.mark.parametrize("name", ["reward", "classify"])
def test_kill_9_and_resume_in_another_process(tmp_path, name):
    """SFT, DPO and PPO are killed in test_sft.py, test_dpo.py and test_ppo.py, with all their settings."""
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    command = [sys.executable, "-c", CHILD, name, str(tmp_path), *paths]
    ended = subprocess.run(command, env={**os.environ}, capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    stage, whole = make_stage(tmp_path, name), make_stage(tmp_path / "whole", name)
    assert sorted(path.name[5:13] for path in (stage.dir / "checkpoints").glob("*.sha256")) == ["00000002", "00000003"]
    assert_equal(weights_of(train(name, stage)), weights_of(train(name, whole)))
    assert log_of(stage) == log_of(whole)


def test_a_line_of_the_log_cut_by_a_crash_swallows_no_other(tmp_path):
    stage = make_stage(tmp_path, "sft")
    stage.log(1, {"loss": 2.0})
    with (tmp_path / "metrics.jsonl").open("a") as out:
        out.write('{"stage": "sft", "st')
    stage.log(2, {"loss": 1.0})
    stage.log(3, {"loss": 0.5})
    assert [(row["step"], row["loss"]) for row in stage.run.metrics("sft")] == [(1, 2.0), (2, 1.0), (3, 0.5)]
