"""Losses and gradients equal TRL's on the same batch, before anything is timed: SFT, pairwise reward model, DPO.

TRL comes with the extra `bench`; without it this file is skipped, and says so.
"""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from qinglan.core.records import Ranking
from qinglan.learn.dpo import DPOConfig, policy_loss, reference_logprobs, with_reference
from qinglan.learn.losses import group_ranking_loss
from qinglan.learn.reward import EncodedGroup, RewardConfig, pair_targets, score_groups
from qinglan.learn.sft import SFTConfig, accumulate_gradients
from qinglan.models.heads import scalar_model_from
from qinglan.models.language_model import LanguageModel, TokenSequence

try:
    import trl
    from datasets import Dataset
except ImportError:
    pytest.skip("TRL is not installed: pip install -e '.[bench]' compares with it", allow_module_level=True)

from qinglan.core.records import pairs_of

ARCHITECTURES = ("llama", "qwen3", "gpt2")
TOLERANCE = 1e-5
# Prompt and completions, best first: lengths differ, so that padding, packing and prompt sharing all come in.
LENGTHS = ((5, (3, 7, 1)), (2, (4, 4, 9)), (8, (2, 6, 5)))


def make_groups(lm: LanguageModel) -> list[list[TokenSequence]]:
    draw = torch.Generator().manual_seed(2)

    def ids(length: int) -> list[int]:
        return torch.randint(20, 90, (length,), generator=draw).tolist()

    groups = []
    for num_prompt, lengths in LENGTHS:
        prompt = ids(num_prompt)
        groups.append([TokenSequence([*prompt, *ids(n), lm.chat.end_id], num_prompt) for n in lengths])
    return groups


def encoded(groups: list[list[TokenSequence]]) -> list[EncodedGroup]:
    pairs = pairs_of(Ranking(groups=((0,), (1,), (2,))))
    return [EncodedGroup(group, pairs, 1.0, "human") for group in groups]


def gradients_of(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert max(float(gradient.abs().max()) for gradient in theirs.values()) > 1e-2, "the gradients say nothing"
    for name, gradient in theirs.items():
        torch.testing.assert_close(
            ours[name], gradient, atol=TOLERANCE, rtol=TOLERANCE, msg=lambda m, n=name: f"{n}: {m}"
        )


def arguments(folder: Path) -> dict:
    return {"output_dir": str(folder), "report_to": "none", "bf16": False, "gradient_checkpointing": False} | {
        "use_cpu": True,
        "disable_tqdm": True,
        "max_length": None,
    }


def their_loss(trainer, rows: list[dict]) -> float:
    """Compute TRL's loss of one batch as its trainer does, without dropout, and leave the gradient in its model."""
    trainer.model.eval()  # no dropout, which our models never have
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    loss.backward()
    return float(loss.detach())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("pack", [True, False])
def test_supervised_loss_and_gradient(
    tiny_lm: Callable[..., LanguageModel], tmp_path: Path, architecture: str, pack: bool
) -> None:
    lm = tiny_lm(architecture)
    sequences = [sequence for group in make_groups(lm) for sequence in group]
    rows = [{"input_ids": ids, "labels": [-100] * num_prompt + ids[num_prompt:]} for ids, num_prompt in sequences]
    trainer = trl.SFTTrainer(
        model=copy.deepcopy(lm.model),
        args=trl.SFTConfig(**arguments(tmp_path)),
        train_dataset=Dataset.from_list(rows),
        processing_class=lm.tokenizer,
    )
    theirs = their_loss(trainer, rows)

    ours = accumulate_gradients(lm, sequences, [], SFTConfig(pack=pack, max_tokens=32), 0)

    assert ours.loss == pytest.approx(theirs, abs=TOLERANCE)
    assert_equal(gradients_of(lm.model), gradients_of(trainer.model))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("share_prompt", [True, False])
def test_pairwise_reward_loss_and_gradient(
    tiny_lm: Callable[..., LanguageModel], tmp_path: Path, architecture: str, share_prompt: bool
) -> None:
    """Every group has three pairs, so that the mean over groups of the mean over pairs is TRL's mean over all pairs."""
    lm = tiny_lm(architecture)
    scalar = scalar_model_from(lm, seed=0)
    groups = encoded(make_groups(lm))
    rows = [
        {"chosen_ids": g.sequences[p.first].token_ids, "rejected_ids": g.sequences[p.second].token_ids}
        for g in groups
        for p in g.pairs
    ]
    trainer = trl.RewardTrainer(
        model=copy.deepcopy(scalar.model),
        args=trl.RewardConfig(**arguments(tmp_path)),
        train_dataset=Dataset.from_list(rows),
        processing_class=lm.tokenizer,
    )
    theirs = their_loss(trainer, rows)

    config = RewardConfig(share_prompt=share_prompt)
    ours = group_ranking_loss(score_groups(scalar, groups, config), pair_targets(groups, len(groups), scalar))
    ours.loss.backward()

    assert float(ours.loss.detach()) == pytest.approx(theirs, abs=TOLERANCE)
    assert_equal(gradients_of(scalar.model), gradients_of(trainer.model))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("share_prompt", [True, False])
def test_direct_preference_loss_and_gradient(
    tiny_lm: Callable[..., LanguageModel], tmp_path: Path, architecture: str, share_prompt: bool
) -> None:
    policy, reference = tiny_lm(architecture), tiny_lm(architecture, seed=1)
    groups = encoded(make_groups(policy))
    rows = [
        {
            "prompt_ids": g.sequences[0].token_ids[: g.sequences[0].num_prompt_tokens],
            "chosen_ids": g.sequences[p.first].token_ids[g.sequences[0].num_prompt_tokens :],
            "rejected_ids": g.sequences[p.second].token_ids[g.sequences[0].num_prompt_tokens :],
        }
        for g in groups
        for p in g.pairs
    ]
    trainer = trl.DPOTrainer(
        model=copy.deepcopy(policy.model),
        ref_model=copy.deepcopy(reference.model),
        args=trl.DPOConfig(**arguments(tmp_path), beta=0.1),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        processing_class=policy.tokenizer,
    )
    theirs = their_loss(trainer, rows)

    config = DPOConfig(beta=0.1, share_prompt=share_prompt)
    groups = with_reference(groups, reference_logprobs(reference, groups, config))
    ours = policy_loss(policy, groups, len(groups), config)
    ours.loss.backward()

    assert float(ours.loss.detach()) == pytest.approx(theirs, abs=TOLERANCE)
    assert_equal(gradients_of(policy.model), gradients_of(trainer.model))
