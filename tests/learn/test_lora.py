"""LoRA in every trainer: it learns, only the adapter moves, the reference stays, killed runs end bit-identical."""

from collections.abc import Callable
from statistics import fmean
from typing import Any

import pytest
import torch
from test_sft import mapping
from tiny_ppo import PROMPTS, roll, rows_of, small
from tiny_world import CPU, make_demonstration, make_group, make_lm, make_stage
from torch import Tensor

from qinglan.core.errors import InputError
from qinglan.core.records import Case, ComparisonGroup, Demonstrated, Ranking
from qinglan.core.rng import numpy_stream
from qinglan.core.run import Stage
from qinglan.learn import classifier, dpo, ppo, reward, sft
from qinglan.learn.classifier import ClassifierConfig, train_classifier
from qinglan.learn.dpo import DPOConfig, train_dpo
from qinglan.learn.dropout import adapter_dropout
from qinglan.learn.labelled import Labelled
from qinglan.learn.optimize import Checkpointer, OptimizerConfig
from qinglan.learn.ppo import PPOConfig, train_ppo
from qinglan.learn.ppo_update import make_learners
from qinglan.learn.reward import RewardConfig, train_reward_model
from qinglan.learn.rollout import rollout_logprobs
from qinglan.learn.sft import SFTConfig, train_sft
from qinglan.models.adapters import LoRAConfig, adapter_of
from qinglan.models.generate import SamplingConfig
from qinglan.models.heads import ScalarModel, score_sequences
from qinglan.models.language_model import (
    LanguageModel,
    TokenSequence,
    completion_logprobs,
    load_language_model,
)

LORA = LoRAConfig(rank=8, alpha=16.0)
FAST = OptimizerConfig(learning_rate=2e-2)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """A model with tied heads, trained a little, that lies in a directory."""
    lm = make_lm(hidden=32)
    lm.model.config.tie_word_embeddings = True
    lm.model.tie_weights()
    stage = make_stage(tmp_path_factory.mktemp("base"), "sft")
    train_sft(lm, mapping(60), SFTConfig(optimizer=FAST, num_epochs=12, batch_size=8), stage=stage, seed=0)
    loaded = load_language_model(stage.dir / "model", CPU)
    assert loaded.model.get_output_embeddings().weight is loaded.model.get_input_embeddings().weight
    return loaded


def another_mapping(count: int) -> list[Demonstrated]:
    """The letters that the base answers with, each replaced by another of them."""
    swap = str.maketrans("uvwxyz", "zuxwvy")
    return [
        make_demonstration(one.prompt.messages[0].content, one.demonstration.text.translate(swap))
        for one in mapping(count)
    ]


def ranked(count: int, seed: int = 0) -> list[ComparisonGroup]:
    """Rankings of four completions of four of those letters by the number of "u": more is better."""
    generator = numpy_stream(seed, "ranked")
    groups = []
    for number in range(count):
        counts = generator.permutation(4)
        letters = [["u"] * n + list(generator.choice(list("vwxyz"), 4 - n)) for n in counts]
        answers = ["".join(generator.permutation(one)) for one in letters]
        label = Ranking(groups=tuple((int(i),) for i in (-counts).argsort()))
        groups.append(make_group("".join(generator.choice(list("abcdef"), 5)) + str(number), answers, label))
    return groups


def sft_of(base: LanguageModel, stage: Stage, lora: LoRAConfig = LORA, epochs: int = 80, every: int = 100) -> Any:
    config = SFTConfig(optimizer=FAST, num_epochs=epochs, batch_size=4, lora=lora, checkpoint_every=every)
    return train_sft(base, another_mapping(8), config, stage=stage, seed=3)


def reward_of(base: LanguageModel, stage: Stage, lora: LoRAConfig = LORA, count: int = 240, every: int = 100) -> Any:
    # At twice the rate, on half of the data, one or two seeds in ten learn nothing; so none of ten does.
    slower = FAST.model_copy(update={"learning_rate": 1e-2})
    config = RewardConfig(optimizer=slower, num_epochs=3, lora=lora, checkpoint_every=every)
    return train_reward_model(base, ranked(count), config, stage=stage, seed=3, valid=ranked(20, seed=9))


def dpo_of(base: LanguageModel, stage: Stage, lora: LoRAConfig = LORA, count: int = 120, every: int = 100) -> Any:
    config = DPOConfig(optimizer=FAST, num_epochs=4, lora=lora, checkpoint_every=every)
    return train_dpo(base, ranked(count), config, stage=stage, seed=3, valid=ranked(20, seed=9))


def two_letters(prompts: Any, completions: Any) -> list[float]:
    """Share of a completion's letters that are u or v."""
    return [sum(letter in "uv" for letter in one.text) / max(len(one.text), 1) for one in completions]


def ppo_of(base: LanguageModel, stage: Stage, lora: LoRAConfig = LORA, iterations: int = 12, every: int = 100) -> Any:
    config = small(
        num_iterations=iterations, episodes_per_iteration=64, minibatch_episodes=16, returned="ema", ema_decay=0.5,
        sampling=SamplingConfig(max_new_tokens=3), learning_rate=1e-2, kl_coef=0.01, missing_eos="keep", lora=lora,
        checkpoint_every=every,
    )  # fmt: skip
    return train_ppo(base, base, two_letters, PROMPTS, config, stage=stage, seed=0).policy


def classify_of(base: LanguageModel, stage: Stage, lora: LoRAConfig = LORA, count: int = 120, every: int = 100) -> Any:
    """Which of two texts holds more of the letter "u"."""

    def labelled(groups: list[ComparisonGroup]) -> Labelled:
        texts = [[one.text for one in group.completions] for group in groups]
        cases = [
            Case(f"case-{k}", f"group-{k}", tuple(found)) for k, found in enumerate(texts) for found in [found[:2]]
        ]
        return Labelled(cases, [float(case.texts[0].count("u") > case.texts[1].count("u")) for case in cases])

    config = ClassifierConfig(optimizer=FAST, num_epochs=3, lora=lora, checkpoint_every=every)
    return train_classifier(
        base, labelled(ranked(count)), config, stage=stage, seed=3, valid=labelled(ranked(40, seed=9))
    )


TRAINERS: dict[str, Callable[..., Any]] = {
    "sft": sft_of,
    "reward": reward_of,
    "dpo": dpo_of,
    "ppo": ppo_of,
    "classify": classify_of,
}
SHORT = {
    "sft": {"epochs": 3},
    "reward": {"count": 40},
    "dpo": {"count": 24},
    "ppo": {"iterations": 5},
    "classify": {"count": 24},
}


def weights_of(model: LanguageModel | ScalarModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.model.named_parameters()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("name", TRAINERS)
def test_it_learns_with_the_adapter_alone(tmp_path, base, name):
    before = weights_of(base)
    stage = make_stage(tmp_path, name)
    trained = TRAINERS[name](base, stage)
    rows = stage.run.metrics(name)
    if name == "sft":
        assert rows[-1]["loss"] < 0.6 * rows[1]["loss"]
    elif name in ("reward", "dpo"):
        assert rows[0]["valid_accuracy"] < 0.7 and rows[-1]["valid_accuracy"] > 0.8
    elif name == "classify":
        assert rows[-1]["valid_agreement"] > rows[0]["valid_agreement"] + 0.1
    else:
        scores = [row["score"] for row in rows]
        assert fmean(scores[-4:]) > fmean(scores[:2]) + 0.1
        assert rows[0]["start_ratio_error"] < 1e-5 and rows[0]["kl"] == pytest.approx(0.0, abs=1e-5)
    assert adapter_of(trained.model) is not None
    assert_equal(before, weights_of(base))
    # All of the result is the base and the adapter: nothing else moved, in memory or on disk.
    for key, weights in weights_of(trained).items():
        if ".lora_" not in key and not key.startswith("score."):
            assert torch.equal(weights, before[key.replace(".base_layer", "")]), key
    assert (stage.dir / "model" / "adapter_config.json").is_file()
    opened = TRAINERS[name](base, stage)  # a finished stage is opened, not trained again
    assert_equal(weights_of(opened), weights_of(trained))


@pytest.mark.parametrize("name", TRAINERS)
def test_checkpoints_and_optimizers_hold_the_adapter_alone_and_runs_repeat(tmp_path, monkeypatch, base, name):
    seen: list[set[str]] = []
    inner = Checkpointer.save

    def spy(self, step, tensors, values=None):
        seen.append(set(tensors))
        return inner(self, step, tensors, values)

    monkeypatch.setattr(Checkpointer, "save", spy)
    one, two = (
        TRAINERS[name](base, make_stage(tmp_path / part, name), every=1, **SHORT[name]) for part in ("one", "two")
    )
    assert_equal(weights_of(one), weights_of(two))
    weights = {key for key in seen[-1] if "model." in key}
    assert weights and all(".lora_" in key or "score." in key for key in weights)
    assert sum("exp_avg_sq" in key for key in seen[-1]) == sum(
        not key.startswith(("average.", "best.")) for key in weights
    )


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize(
    ("name", "module"), [("sft", sft), ("reward", reward), ("dpo", dpo), ("ppo", ppo), ("classify", classifier)]
)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_killed_run_ends_bit_identical(tmp_path, monkeypatch, base, name, module, dropout):
    if name in ("ppo", "classify") and dropout:
        with pytest.raises(ValueError, match=r"lora.dropout: the .*; set it to 0"):
            (PPOConfig if name == "ppo" else ClassifierConfig)(lora=LoRAConfig(rank=2, dropout=0.1))
        return
    lora = LORA.model_copy(update={"dropout": dropout})
    whole = TRAINERS[name](base, make_stage(tmp_path / "whole", name), lora, every=2, **SHORT[name])
    inner, calls = module.update, []

    def dying(*args: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise Killed
        return inner(*args, **named)

    monkeypatch.setattr(module, "update", dying)
    with pytest.raises(Killed):
        TRAINERS[name](base, make_stage(tmp_path / "killed", name), lora, every=2, **SHORT[name])
    monkeypatch.setattr(module, "update", inner)
    resumed = TRAINERS[name](base, make_stage(tmp_path / "killed", name), lora, every=2, **SHORT[name])
    assert_equal(weights_of(whole), weights_of(resumed))
    if dropout:
        plain = TRAINERS[name](base, make_stage(tmp_path / "plain", name), every=2, **SHORT[name])
        assert any(
            not torch.equal(a, b) for a, b in zip(weights_of(plain).values(), weights_of(whole).values(), strict=True)
        )


def test_rule_27_the_reference_is_the_adapter_off_and_stays_constant(tmp_path, base):
    """With tied heads: the policy's adapter sits in modules of its own over the reference's weights."""
    rollout = roll(base)
    before = rollout_logprobs(base, rollout, 1.0, 4096)
    policy = ppo_of(base, make_stage(tmp_path, "ppo"))
    assert torch.equal(rollout_logprobs(base, rollout, 1.0, 4096), before)
    assert not torch.allclose(rollout_logprobs(policy, rollout, 1.0, 4096), before, atol=1e-2)
    learners = make_learners(base, None, small(lora=LORA), 0, "ppo")
    own = {p.data_ptr() for p in base.model.parameters()}
    for model in (learners.policy.model, learners.value.model):
        frozen = [p for p in model.parameters() if not p.requires_grad]
        assert frozen and {p.data_ptr() for p in frozen} <= own, "no second copy of the base"


def test_merged_at_the_end_it_is_an_ordinary_model(tmp_path, base):
    stage = make_stage(tmp_path, "sft")
    merged = sft_of(base, stage, LORA.model_copy(update={"merge": True}), epochs=3)
    assert adapter_of(merged.model) is None and (stage.dir / "model" / "model.safetensors").is_file()
    adapted = sft_of(base, make_stage(tmp_path / "adapter", "sft"), epochs=3)
    sequences = [TokenSequence([1, 10, 11, 2, 30, 31, 0], 4)]
    both = [completion_logprobs(lm, sequences)[0] for lm in (merged, adapted)]
    torch.testing.assert_close(*both, atol=1e-4, rtol=1e-4)


def test_stages_in_a_row_each_go_on_with_the_adapter(tmp_path, base):
    """SFT, then a reward model and PPO from its adapter, the reward model's adapter as the value model's start."""
    start = sft_of(base, make_stage(tmp_path, "sft"), epochs=3)
    scalar = reward_of(start, make_stage(tmp_path, "reward"), count=24)
    before = score_sequences(scalar, [TokenSequence([1, 10, 2, 30, 0], 3)]), weights_of(start)
    config = small(num_iterations=2, lora=LORA)
    policy = train_ppo(
        start, start, two_letters, PROMPTS, config, stage=make_stage(tmp_path, "ppo"), seed=0, value_start=scalar
    ).policy
    assert rows_of(tmp_path)[0]["kl"] == pytest.approx(0.0, abs=1e-5)
    assert torch.equal(score_sequences(scalar, [TokenSequence([1, 10, 2, 30, 0], 3)]), before[0])
    assert_equal(weights_of(start), before[1])
    loaded = load_language_model(tmp_path / "stages" / "ppo" / "model", CPU)
    assert_equal(weights_of(loaded), weights_of(policy))


def test_a_start_that_lies_in_no_directory_is_refused_before_the_first_update(tmp_path):
    with pytest.raises(InputError, match="these weights were never saved"):
        sft_of(make_lm(), make_stage(tmp_path, "sft"))


def test_adapter_dropout_is_drawn_by_seed_and_leaves_the_base_alone(base):
    learners = make_learners(base, None, small(estimator="rloo", lora=LORA), 0, "ppo")
    model = learners.policy.model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    ids = torch.tensor([[1, 10, 11, 2, 30]])

    def out(rate: float, seed: int) -> Tensor:
        with torch.no_grad(), adapter_dropout(model, rate, seed):
            return model(ids).logits

    plain = model(ids).logits.detach()
    assert torch.equal(out(0.0, 1), plain)
    assert torch.equal(out(0.5, 1), out(0.5, 1))
    assert not torch.equal(out(0.5, 1), out(0.5, 2)) and not torch.equal(out(0.5, 1), plain)
