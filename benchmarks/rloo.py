"""RLOO with K = 4: prompts of 16 words, 64 new tokens, a cheap reward function; ours against TRL's `RLOOTrainer`.

64 episodes a rollout, one optimizer step, KL to a reference model on both sides.
"""

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.workloads import Workload

UNIT = "episodes per second"
PEER_NAME = "TRL 1.16 RLOOTrainer"
MUST_REACH, AIM = 2.5, 4.0
EPISODES, STEP_EPISODES, K, NEW_TOKENS = 64, 64, 4, 64
ITERATIONS = {"llama": 8, "mini": 1, "base": 1}
"""Of one slice, on both sides: enough that what is done once in a training (checks, saving) weighs little."""
OURS: dict[str, list[dict[str, Any]]] = {
    "llama": [{"max_tokens": tokens} for tokens in (2048, 4096, 8192)],
    "mini": [{"max_tokens": 2048}],
    "base": [{"max_tokens": 1024}, {"max_tokens": 2048, "memory": "more than the peer's"}],
}
PEER: dict[str, list[dict[str, Any]]] = {
    "llama": [{"batch": 16}, {"batch": 64}, {"batch": 64, "continuous": True}],
    "mini": [{"batch": 16}],
    "base": [{"batch": 16}, {"batch": 64}],
}
PEER_DEFAULTS: dict[str, Any] = {"batch": 8, "gradient_checkpointing": True}
"""Of `RLOOConfig`."""


def reward_of(text: str) -> float:
    """Return a number that costs nothing to work out."""
    return (len(text) % 7) / 7.0


def ours(work: Workload, options: dict[str, Any]) -> Callable[[], Callable[[], float]]:
    """Return slices of `train_ppo` with estimator "rloo"."""
    from benchmarks.ours import load, new_stage, prompt_record
    from qinglan.learn.ppo import PPOConfig, train_ppo
    from qinglan.models.generate import SamplingConfig

    policy, reference = load(work, options["dtype"]), load(work, options["dtype"])
    prompts = [prompt_record(number, text) for number, text in enumerate(work.data["short_prompts"])]
    num_iterations = ITERATIONS[work.setting]
    config = PPOConfig(
        estimator="rloo",
        num_iterations=num_iterations,
        episodes_per_iteration=EPISODES,
        samples_per_prompt=K,
        minibatch_episodes=STEP_EPISODES,
        sampling=SamplingConfig(max_new_tokens=NEW_TOKENS),
        learning_rate=1e-6,
        kl_coef=0.05,
        missing_eos="keep",
        max_tokens=options["max_tokens"],
    )

    def score(prompts: Sequence[Any], completions: Sequence[Any]) -> list[float]:
        return [reward_of(completion.text) for completion in completions]

    def make_slice() -> Callable[[], float]:
        stage, folder = new_stage()

        def run() -> float:
            train_ppo(policy, reference, score, prompts, config, stage=stage, seed=0)
            folder.cleanup()
            return float(num_iterations * EPISODES)

        return run

    return make_slice


def peer(work: Workload, options: dict[str, Any]) -> Callable[[], Callable[[], float]]:
    """Return slices of `RLOOTrainer.train`."""
    from datasets import Dataset
    from trl import RLOOConfig, RLOOTrainer

    from benchmarks.trl_side import arguments, tokenizer_of

    tokenizer = tokenizer_of(work)
    dataset = Dataset.from_list([{"prompt": [{"role": "user", "content": t}]} for t in work.data["short_prompts"]])
    num_iterations = ITERATIONS[work.setting]
    args = arguments(
        per_device_train_batch_size=options["batch"],
        gradient_accumulation_steps=STEP_EPISODES // options["batch"],
        steps_per_generation=EPISODES // options["batch"],
        max_steps=num_iterations * EPISODES // STEP_EPISODES,
        num_generations=K,
        max_completion_length=NEW_TOKENS,
        beta=0.05,
        temperature=1.0,
        bf16=options["dtype"] == "bfloat16",
        gradient_checkpointing=bool(options.get("gradient_checkpointing")),
        use_transformers_continuous_batching=bool(options.get("continuous")),
        model_init_kwargs={"dtype": "float32"},
    )

    def score(completions: Sequence[Any], **others: Any) -> list[float]:
        return [reward_of(completion[0]["content"]) for completion in completions]

    def make_slice() -> Callable[[], float]:
        trainer = RLOOTrainer(
            model=str(work.model_dir),
            reward_funcs=score,
            args=RLOOConfig(**args),
            train_dataset=dataset,
            processing_class=tokenizer,
        )

        def run() -> float:
            trainer.train()
            return float(num_iterations * EPISODES)

        return run

    return make_slice
