"""Settings of `train_ppo` (`ppo.py`), apart so that the loop stays in view there."""

from typing import Literal, Self

from pydantic import Field, model_validator

from qinglan.core.config import Config
from qinglan.learn.advantages import Estimator
from qinglan.learn.alarms import AlarmConfig
from qinglan.learn.scoring import MissingEOS
from qinglan.models.adapters import LoRAConfig
from qinglan.models.generate import SamplingConfig


class PPOConfig(Config):
    """Reinforcement learning against a scorer; the defaults suit models of 0.2 to 2 million parameters."""

    estimator: Estimator = "gae"
    """Advantages by GAE with a value model (the paper), or without one: "rloo", "grpo", "reinforce_pp"."""
    num_iterations: int = Field(default=40, ge=1)
    """Rollouts, each followed by its updates (InstructGPT: 256k episodes, 500 iterations)."""
    episodes_per_iteration: int = Field(default=128, ge=1)
    """Completions sampled in one iteration (InstructGPT: batch 512)."""
    samples_per_prompt: int = Field(default=1, ge=1)
    """K completions of each prompt (InstructGPT: 1); "rloo" and "grpo" compare them and want at least 2."""
    minibatch_episodes: int = Field(default=32, ge=1)
    """Episodes in one optimizer step (InstructGPT: 64)."""
    inner_epochs: int = Field(default=1, ge=1)
    """Passes over each rollout (InstructGPT: 1; Stiennon et al. 2020: 4)."""
    sampling: SamplingConfig = SamplingConfig()
    """How completions are drawn. Its temperature also divides the logits of policy and reference when they score."""

    learning_rate: float = Field(default=3e-4, ge=0)
    """The policy's learning rate, constant after the warm-up (InstructGPT scanned 2.55e-6 to 2.55e-5)."""
    value_learning_rate: float = Field(default=1e-3, ge=0)
    """The value model's learning rate (InstructGPT: 9e-6)."""
    warmup_iterations: int = Field(default=0, ge=0)
    """Iterations over which both rates climb linearly to their peak (InstructGPT: 10)."""
    warmup_start: float = Field(default=0.1, gt=0, le=1)
    """Where the warm-up begins, as a fraction of the peak (InstructGPT: one tenth)."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of Adam's two moments (InstructGPT: 0.9 and 0.95)."""
    eps: float = Field(default=1e-5, gt=0)
    """Adam's epsilon (Huang et al. 2024: 1e-5)."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients of each model are scaled down to this global L2 norm; infinity turns clipping off."""

    clip: float = Field(default=0.2, gt=0)
    """The ratio of new to old probability counts no further than 1 - clip and 1 + clip (InstructGPT: 0.2)."""
    value_clip: float | None = Field(default=None, gt=0)
    """Clip range of the value loss, in standard deviations of the returns; default: no clipping."""
    discount: float = Field(default=1.0, gt=0, le=1)
    """Discount per token (InstructGPT: none)."""
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    """Lambda of GAE (Stiennon et al. 2020: 0.95)."""
    value_model: Literal["separate", "shared_trunk"] = "separate"
    """With "gae": a model of its own (the papers), or a head on the policy's trunk, which saves a forward pass and a
    model's memory. The head starts at zero."""
    value_coef: float = Field(default=0.1, ge=0)
    """Weight of the value loss in the gradient of a shared trunk (Ziegler et al. 2019: 0.1)."""
    whiten_advantages: bool = True
    """Shift and scale the advantages of "gae" to mean 0 and variance 1, once per rollout; "reinforce_pp" always
    does."""
    whiten_rewards: bool = False
    """Scale the token rewards of a rollout to variance 1, keeping their mean (Huang et al. 2024)."""
    scale_scores: bool = False
    """Divide scores by the standard deviation of all scores so far, for scorers of unknown scale."""
    entropy_coef: float = Field(default=0.0, ge=0)
    """Coefficient of an entropy bonus, in score per nat and token (InstructGPT: none)."""

    kl_coef: float = Field(default=0.05, ge=0)
    """Beta, the price of KL to the reference policy in score per nat (InstructGPT: 0.02; Stiennon et al.: 0.05)."""
    target_kl_per_completion: float | None = Field(default=None, gt=0)
    """KL that an adaptive coefficient aims at, in nats per completion (Ziegler et al.: 6); default: fixed
    coefficient."""
    kl_horizon: float = Field(default=10_000, gt=0)
    """Horizon of the adaptive coefficient, in episodes (Ziegler et al. 2019: 10,000)."""

    missing_eos: MissingEOS = "subtract"
    """Completions cut at the length limit: the penalty is subtracted from, or replaces, their score; or keep it."""
    missing_eos_penalty: float = Field(default=1.0, ge=0)
    """The penalty, in units of the score (Stiennon et al. 2020 replace by -1)."""
    truncated: Literal["terminal", "bootstrap"] = "terminal"
    """A completion cut at the limit ends there, or its value estimate stands in for score and penalty."""

    ptx_coef: float = Field(default=0.0, ge=0)
    """Gamma, the weight of the pretraining gradient in every policy step (InstructGPT, PPO-ptx: 27.8; PPO: 0)."""
    ptx_ratio: int = Field(default=8, ge=1)
    """Pretraining sequences per episode (InstructGPT: 8)."""

    returned: Literal["last", "ema"] = "last"
    """Return the policy's last weights, or their exponential moving average (InstructGPT)."""
    ema_decay: float = Field(default=0.992, ge=0, lt=1)
    """Decay of the average per optimizer step (InstructGPT: 0.992); read where `returned` is "ema"."""
    old_logprobs: Literal["sampler", "recompute"] = "sampler"
    """Take old log-probabilities from the sampler, or recompute them. With bf16 matmuls they are always recomputed,
    but where a rollout serves one update, whose ratio then is exactly 1."""
    max_tokens: int = Field(default=8192, ge=1)
    """Tokens in one forward pass, padding included. Changes speed and memory, never the gradient."""
    pack: bool = False
    """Put several short sequences into one row, each seeing only itself; pays where lengths differ much."""
    lora: LoRAConfig = LoRAConfig()
    """Train low-rank adapters of policy and value model in place of every weight."""
    compile: bool = False
    """Compile the trunk's training step with `torch.compile`; a run is then repeatable, but not to the last bit."""
    checkpoint_every: int = Field(default=5, ge=1)
    """Iterations between two checkpoints."""
    samples_every: int = Field(default=5, ge=1)
    """Iterations between two sets of completions in samples.jsonl."""
    num_logged_samples: int = Field(default=4, ge=0)
    """Completions in each set."""
    alarms: AlarmConfig = AlarmConfig()
    """When to raise an alarm."""

    @classmethod
    def paper(cls) -> Self:
        """Return InstructGPT's PPO-ptx (1.3B and 6B). The paper prints no policy rate: 5e-6 lies in what it scanned."""
        return cls(
            num_iterations=500,
            episodes_per_iteration=512,
            minibatch_episodes=64,
            inner_epochs=1,
            sampling=SamplingConfig(temperature=1.0, max_new_tokens=1024),
            learning_rate=5e-6,
            value_learning_rate=9e-6,
            warmup_iterations=10,
            warmup_start=0.1,
            clip=0.2,
            discount=1.0,
            kl_coef=0.02,
            ptx_coef=27.8,
            ptx_ratio=8,
            returned="ema",
            ema_decay=0.992,
        )

    @property
    def updates_per_iteration(self) -> int:
        """Optimizer steps of one iteration."""
        return self.inner_epochs * self.episodes_per_iteration // self.minibatch_episodes

    @model_validator(mode="after")
    def _sampled_as_scored(self) -> Self:
        sampling = self.sampling
        if sampling.top_p < 1 or sampling.top_k > 0:
            raise ValueError(
                "sampling: top_p below 1 and top_k above 0 sample from another distribution than the one trained; "
                "set top_p 1 and top_k 0"
            )
        if sampling.temperature == 0:
            raise ValueError("sampling: temperature 0 explores nothing; set it above 0 (InstructGPT: 1)")
        return self

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        for name in ("samples_per_prompt", "minibatch_episodes"):
            part, whole = getattr(self, name), self.episodes_per_iteration
            if whole % part:
                raise ValueError(f"episodes_per_iteration {whole} is no multiple of {name} {part}")
        if self.estimator in ("rloo", "grpo") and self.samples_per_prompt < 2:
            raise ValueError(f"estimator {self.estimator} compares completions: set samples_per_prompt to 2 or more")
        if self.truncated == "bootstrap" and self.estimator != "gae":
            raise ValueError(f"truncated bootstrap wants a value model: estimator gae, not {self.estimator}")
        if self.value_model == "shared_trunk" and self.estimator != "gae":
            raise ValueError(f"value_model shared_trunk belongs to estimator gae, not {self.estimator}")
        if self.lora.dropout > 0:
            raise ValueError("lora.dropout: the ratio of probabilities must start at 1 in PPO; set it to 0")
        return self
