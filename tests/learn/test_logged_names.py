"""Every number that a training stage logs is explained in docs/instruct_gpt.md or docs/engine.md."""

import re
from pathlib import Path

from tiny_ppo import brevity, corpus, count_a, small, train
from tiny_world import make_demonstration, make_group, make_lm, make_stage

from qinglan.core.records import Ranking
from qinglan.learn.dpo import DPOConfig, train_dpo
from qinglan.learn.reward import RewardConfig, train_reward_model
from qinglan.learn.sft import SFTConfig, train_sft

DOCS = Path(__file__).parents[2] / "docs"
TEXT = "\n".join((DOCS / name).read_text(encoding="utf-8") for name in ("instruct_gpt.md", "engine.md"))
HEADINGS = {"sft": "### SFT (stages", "reward": "### Reward model\n", "ppo": "### PPO\n", "dpo": "## DPO\n"}


def undocumented(directory: Path, stage: str) -> set[str]:
    """Return the names in a stage's log that its section of the page does not explain."""
    section = TEXT.split(HEADINGS[stage])[1].split("\n#")[0]
    names = {name for row in make_stage(directory, stage).run.metrics(stage) for name in row} - {"stage", "step"}
    assert len(names) > 5
    return {
        name
        for name in names
        if f"`{name}`" not in section and f"`{re.sub('/human$', '/<source>', name)}`" not in section
    }


def test_sft(tmp_path: Path) -> None:
    shown = [make_demonstration(text, "yes") for text in ("ab", "cd", "ef")]
    train_sft(
        make_lm(), shown, SFTConfig(num_epochs=1, batch_size=2, pretrain_fraction=0.5),
        stage=make_stage(tmp_path, "sft"), seed=0, pretrain=corpus, valid=shown[:1], select=lambda lm: 0.0,
    )  # fmt: skip
    assert not undocumented(tmp_path, "sft")


def test_reward_model(tmp_path: Path) -> None:
    groups = [make_group(text, ["yes", "no"], Ranking(groups=((0,), (1,)))) for text in ("ab", "cd", "ef")]
    config = RewardConfig(batch_size=2)
    train_reward_model(make_lm(), groups, config, stage=make_stage(tmp_path, "reward"), seed=0, valid=groups[:1])
    assert not undocumented(tmp_path, "reward")


def test_dpo(tmp_path: Path) -> None:
    groups = [make_group(text, ["yes", "no"], Ranking(groups=((0,), (1,)))) for text in ("ab", "cd", "ef")]
    config = DPOConfig(batch_size=2, sft_coef=1.0)
    train_dpo(make_lm(), groups, config, stage=make_stage(tmp_path, "dpo"), seed=0, valid=groups[:1])
    assert not undocumented(tmp_path, "dpo")


def test_ppo(tmp_path: Path) -> None:
    config = small(num_iterations=1, ptx_coef=1.0, ptx_ratio=1)
    train(tmp_path, config, scorer=brevity, gold=count_a, score_range=(0.0, 1.0), pretrain=corpus)
    assert not undocumented(tmp_path, "ppo")
