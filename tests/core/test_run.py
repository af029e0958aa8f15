"""The run folder: what is refused, what is kept, what is made anew."""

import json
from pathlib import Path

import pytest

from qinglan.core.config import Config
from qinglan.core.errors import InputError
from qinglan.core.run import Measure, Report, Run


class Settings(Config):
    """Settings of the runs below."""

    size: int = 1
    """Any number."""


def opened(directory: Path, *, size: int = 1, seed: int = 0, resume: bool = False) -> Run:
    return Run.open(directory, Settings(size=size), seed=seed, recipe="test", resume=resume, quiet=True)


def test_an_earlier_run_is_only_opened_to_go_on_with_it(tmp_path):
    with opened(tmp_path / "run"):
        pass
    with pytest.raises(InputError, match="holds a run already; add --resume"):
        opened(tmp_path / "run")
    with pytest.raises(InputError, match="another configuration"):
        opened(tmp_path / "run", size=2, resume=True)
    with opened(tmp_path / "run", resume=True) as run:
        assert run.seed == 0


def test_another_seed_is_refused_before_it_empties_the_stages(tmp_path):
    with opened(tmp_path / "run", seed=3) as run:
        run.stage("sft", "settings").finish({"loss": 1.0})
    with pytest.raises(InputError, match="seed 3, not 4; go on with --seed 3"):
        opened(tmp_path / "run", seed=4, resume=True)
    with opened(tmp_path / "run", seed=3, resume=True) as run:
        assert run.stage("sft", "settings").is_done
        assert run.finished("sft") == {"loss": 1.0}
        assert json.loads((run.dir / "lineage.json").read_text())["seed"] == 3


def test_lineage_names_the_run_that_an_input_came_from(tmp_path):
    with opened(tmp_path / "first", seed=3) as first:
        model = first.dir / "stages" / "sft" / "model"
        model.mkdir(parents=True)
        (model / "config.json").write_text("{}")
    (tmp_path / "own.jsonl").write_text("{}\n")
    with opened(tmp_path / "second", seed=4) as second:
        second.add_input("model", model)
        second.add_input("prompts", tmp_path / "own.jsonl")
    parent = {"run": str(first.dir), "recipe": "test", "config_hash": first.config_hash, "seed": 3}
    assert json.loads((second.dir / "lineage.json").read_text())["parents"] == {"model": parent}


def test_a_damaged_lineage_beside_an_input_stops_nothing(tmp_path):
    for text in ("{", "[]"):
        with opened(tmp_path / "first", resume=True) as first:
            (first.dir / "data.jsonl").write_text("{}\n")
        (first.dir / "lineage.json").write_text(text)
        with opened(tmp_path / "second", resume=True) as second:
            second.add_input("data", first.dir / "data.jsonl")
        assert second.parents == {}
        (first.dir / "lineage.json").unlink()


def test_a_run_of_before_the_seed_stood_in_its_configuration_goes_on(tmp_path):
    with opened(tmp_path / "run", seed=3) as run:
        config = run.dir / "config.yaml"
    config.write_text(config.read_text().replace("seed: 3\n", ""))
    with opened(tmp_path / "run", seed=3, resume=True):
        assert config.read_text().startswith("seed: 3\n")


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty and holds no run"):
        opened(tmp_path, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_one_process_at_a_time(tmp_path):
    with opened(tmp_path / "run"), pytest.raises(InputError, match="another process is working"):
        opened(tmp_path / "run", resume=True)


def test_a_stage_is_kept_while_everything_that_decides_it_is_the_same(tmp_path):
    with opened(tmp_path / "run") as run:
        first = run.stage("first", Settings(size=1))
        (first.dir / "weights").write_text("w")
        first.finish()
        second = run.stage("second", first)
        second.finish()

        assert run.stage("first", Settings(size=1)).is_done and run.stage("second", first).is_done
        # Other settings of the first: it is emptied, and the second, which reads it, is no longer done.
        changed = run.stage("first", Settings(size=2))
        assert not changed.is_done and not (changed.dir / "weights").exists()
        assert not run.stage("second", changed).is_done


def test_the_last_line_of_a_step_counts_and_a_cut_line_is_passed_over(tmp_path):
    with opened(tmp_path / "run") as run:
        run.log("ppo", 0, {"kl": 1.0})
        run.log("ppo", 1, {"kl": 2.0})
        with (run.dir / "metrics.jsonl").open("a") as out:
            out.write('{"stage": "ppo", "step": 2, "k')
        run.log("ppo", 1, {"kl": 3.0})
        run.log("sft", 1, {"loss": 9.0})
        assert [row["kl"] for row in run.metrics("ppo")] == [1.0, 3.0]


def test_what_is_not_finite_is_null_in_the_report(tmp_path):
    with opened(tmp_path / "run") as run:
        rate = Measure(0.5, 0.4, float("inf"), 10, "rate")
        path = run.write_report(Report("test", 1.0, run.config_hash, {"rate": rate}, {}, [], 0))
    assert json.loads(path.read_text())["metrics"]["rate"] == {
        "value": 0.5, "low": 0.4, "high": None, "n": 10, "unit": "rate",
    }  # fmt: skip
