"""PPO with 4 inner epochs: prompts of 16 words, 64 new tokens, reward and value models of the policy's size.

Ours against TRL 0.24's `PPOTrainer`, the last that there was. 32 episodes a rollout, 2 minibatches of 16, 4 epochs: 8
optimizer steps on both sides.
"""

from collections.abc import Callable
from typing import Any

from benchmarks.workloads import Workload

UNIT = "episodes per second"
PEER_NAME = "TRL 0.24 PPOTrainer, transformers 4.57"
MUST_REACH, AIM = 2.0, 3.0
EPISODES, MINIBATCH, EPOCHS, NEW_TOKENS = 32, 16, 4, 64
USES_OLD_TRL = True
ITERATIONS = {"llama": 4, "mini": 1, "base": 1}
"""Of one slice, on both sides: enough that what is done once in a training (checks, saving) weighs little."""
OURS: dict[str, list[dict[str, Any]]] = {
    "llama": [
        {"max_tokens": 1024},
        {"max_tokens": 2048},
        {"max_tokens": 8192},
        {"max_tokens": 2048, "value_model": "shared_trunk", "differs": "the value is a head on the policy's trunk"},
    ],
    "mini": [{"max_tokens": 8192}],
    "base": [{"max_tokens": 8192}],
}
PEER: dict[str, list[dict[str, Any]]] = {
    "llama": [{"forward": 32}, {"forward": 8}],
    "mini": [{"forward": 32}],
    "base": [{"forward": 32}],
}


def ours(work: Workload, options: dict[str, Any]) -> Callable[[], Callable[[], float]]:
    """Return slices of `train_ppo` with a reward model as the scorer and a value model that starts from it."""
    from benchmarks.ours import load, new_stage, prompt_record
    from qinglan.learn.ppo import PPOConfig, train_ppo
    from qinglan.models.generate import SamplingConfig
    from qinglan.models.heads import as_scorer, scalar_model_from

    policy, reference = load(work, options["dtype"]), load(work, options["dtype"])
    reward_model = scalar_model_from(policy, seed=0)
    prompts = [prompt_record(number, text) for number, text in enumerate(work.data["short_prompts"])]
    num_iterations = ITERATIONS[work.setting]
    config = PPOConfig(
        estimator="gae",
        num_iterations=num_iterations,
        episodes_per_iteration=EPISODES,
        minibatch_episodes=MINIBATCH,
        inner_epochs=EPOCHS,
        sampling=SamplingConfig(max_new_tokens=NEW_TOKENS),
        learning_rate=1e-6,
        value_learning_rate=1e-6,
        kl_coef=0.05,
        missing_eos="keep",
        max_tokens=options["max_tokens"],
        value_model=options.get("value_model", "separate"),
    )
    value_start = reward_model if config.value_model == "separate" else None

    def make_slice() -> Callable[[], float]:
        stage, folder = new_stage()

        def run() -> float:
            scorer = as_scorer(reward_model)
            train_ppo(policy, reference, scorer, prompts, config, stage=stage, seed=0, value_start=value_start)
            folder.cleanup()
            return float(num_iterations * EPISODES)

        return run

    return make_slice


def peer(work: Workload, options: dict[str, Any]) -> Callable[[], Callable[[], float]]:
    """Return slices of `PPOTrainer.train`."""
    from datasets import Dataset
    from trl import PPOConfig, PPOTrainer

    from benchmarks.trl_side import arguments, causal_model, scalar_model, tokenizer_of

    num_episodes = EPISODES * ITERATIONS[work.setting]
    tokenizer = tokenizer_of(work)
    ids = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
        for text in work.data["short_prompts"]
    ]
    dataset = Dataset.from_list([{"input_ids": one} for one in ids])
    changes: dict[str, Any] = {
        "per_device_train_batch_size": EPISODES,
        "gradient_accumulation_steps": 1,
        "num_mini_batches": EPISODES // MINIBATCH,
        "num_ppo_epochs": EPOCHS,
        "local_rollout_forward_batch_size": options["forward"],
        "response_length": NEW_TOKENS,
        "total_episodes": num_episodes,
        "num_sample_generations": 0,
        "temperature": 1.0,
        "stop_token": "eos",
        "kl_coef": 0.05,
        "bf16": options["dtype"] == "bfloat16",
    }

    def make_slice() -> Callable[[], float]:
        trainer = PPOTrainer(
            args=PPOConfig(**arguments(**changes)),
            processing_class=tokenizer,
            model=causal_model(work),
            ref_model=causal_model(work),
            reward_model=scalar_model(work),
            value_model=scalar_model(work),
            train_dataset=dataset,
            eval_dataset=dataset,
        )

        def run() -> float:
            trainer.train()
            return float(num_episodes)

        return run

    return make_slice
