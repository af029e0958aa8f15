"""Settings of `recipes/instruct_gpt.py` and its presets by scale, apart so that the recipe stays one page."""

from pathlib import Path
from typing import Literal

from qinglan.core.config import Config
from qinglan.data.load import OnBad
from qinglan.data.prompts import PromptConfig
from qinglan.evals.alignment import MeasureConfig
from qinglan.learn.optimize import OptimizerConfig
from qinglan.learn.ppo_config import PPOConfig
from qinglan.learn.reward import RewardConfig
from qinglan.learn.sft import SFTConfig
from qinglan.models.generate import SamplingConfig
from qinglan.tasks.assistant_data import WorldConfig


class InstructGPTConfig(Config):
    """The whole pipeline; each stage's settings stand in their own part."""

    model: str = "micro"
    """Base model: a size of the built-in family or any Hugging Face causal LM directory."""
    larger_model: str | None = "mini"
    """Base model that the policy is compared with on the built-in world, whose judges there are (paper: 175B against
    1.3B); none: leave the comparison out."""
    reward_base: str | None = None
    """Base model of the reward model, with the policy's tokenizer; none: on the built-in world `larger_model` if it
    has that tokenizer (paper: a reward model of 6B for policies from 1.3B on), else the policy's own base."""
    template: Literal["own", "plain"] = "own"
    """Chat template: the model's own, or plain "User: ... Assistant:" text for models without one."""
    device: str = "auto"
    """cpu, cuda or auto."""
    prompts: Path | None = None
    """Your prompts for RL; default: those of the comparisons, or the built-in world."""
    demonstrations: Path | None = None
    """Your demonstrations; without them SFT is skipped."""
    comparisons: Path | None = None
    """Your comparisons; without them (and without a reward function) reward model and PPO are skipped."""
    reward: str | None = None
    """A Python function "module:function" as the reward of PPO, in place of a reward model."""
    on_bad: OnBad = "stop"
    """Broken rows of your files: stop and name them, or skip and count them."""
    hygiene: PromptConfig = PromptConfig(max_tokens=160)
    """Which prompts are dropped (paper, section 3.2)."""
    world: WorldConfig = WorldConfig()
    """The built-in world's users, demonstrators and labelers."""
    sampling: SamplingConfig = SamplingConfig(max_new_tokens=48)
    """How completions are drawn for ranking and measuring."""
    start: SFTConfig = SFTConfig(num_epochs=2, pretrain_fraction=0.1)
    """PPO's starting point and reference policy (paper, C.3)."""
    baseline: SFTConfig = SFTConfig(num_epochs=6, optimizer=OptimizerConfig(learning_rate=5e-4))
    """The SFT baseline; its checkpoint is chosen by reward-model score on validation prompts (paper, C.1: 16 epochs
    with dropout, which made models of this size worse)."""
    reward_model: RewardConfig = RewardConfig(optimizer=OptimizerConfig(learning_rate=1e-3), max_tokens=1024)
    """The reward model (paper, section 3.5 and C.2)."""
    ppo: PPOConfig = PPOConfig(
        sampling=SamplingConfig(max_new_tokens=48),
        num_iterations=20,
        episodes_per_iteration=256,
        samples_per_prompt=4,
        learning_rate=7e-4,
        kl_coef=0.15,
        max_tokens=1024,
        ptx_coef=1.0,
        ptx_ratio=1,
    )
    """PPO-ptx (paper, section 3.5 and C.4)."""
    compare_without_ptx: bool = True
    """Train a second policy without the pretraining mix, to show the alignment tax."""
    train_ceiling: bool = True
    """Train a third policy on the answer key itself, as the ceiling of the report."""
    measure: MeasureConfig = MeasureConfig()
    """How much is measured."""

    @classmethod
    def presets(cls) -> dict[str, "InstructGPTConfig"]:
        """Return the presets by scale; the first is the default."""
        tiny_world = WorldConfig(
            num_demonstrations=24,
            num_comparison_prompts=16,
            num_rl_prompts=32,
            num_valid_prompts=8,
            num_test_prompts=30,
            num_labelers=4,
            num_held_out_labelers=3,
        )
        tiny_ppo = PPOConfig(
            sampling=SamplingConfig(max_new_tokens=16),
            num_iterations=3,
            episodes_per_iteration=16,
            minibatch_episodes=8,
            ptx_coef=1.0,
            ptx_ratio=1,
        )
        tiny = cls(
            model="nano",
            larger_model="micro",
            world=tiny_world,
            ppo=tiny_ppo,
            sampling=SamplingConfig(max_new_tokens=16),
            start=SFTConfig(num_epochs=1, pretrain_fraction=0.1),
            baseline=SFTConfig(num_epochs=2),
            measure=MeasureConfig(
                best_of_n_samples=4, num_best_of_n_prompts=8, num_pretraining_documents=20, num_probe_items=5
            ),
        )
        # The paper's 1,024 new tokens want a model with a longer context than the built-in ones have.
        paper = cls(
            start=SFTConfig.paper_ppo_start(),
            baseline=SFTConfig.paper_baseline(),
            reward_model=RewardConfig.paper(),
            ppo=PPOConfig.paper(),
            hygiene=PromptConfig(),
            sampling=SamplingConfig(max_new_tokens=1024),
        )
        return {"small": cls(), "tiny": tiny, "paper": paper}
