"""The reward model's loss by hand-worked numbers and by its properties."""

import math

import pytest
import torch

from qinglan.learn.losses import PairTargets, cross_entropy, group_ranking_loss, pairwise_loss


def targets(*pairs: tuple[int, int, float, float]) -> PairTargets:
    first, second, p, weights = zip(*pairs, strict=True)
    return PairTargets(torch.tensor(first), torch.tensor(second), torch.tensor(p), torch.tensor(weights))


def test_pair_loss_by_hand():
    # sigmoid(log 3) = 3/4: -log(3/4) if the first is better, -log(1/4) if the second is, their mean at one half
    margin = torch.tensor([math.log(3.0)] * 3)
    losses = pairwise_loss(margin, torch.tensor([1.0, 0.0, 0.5]))
    expected = [math.log(4 / 3), math.log(4), (math.log(4 / 3) + math.log(4)) / 2]
    torch.testing.assert_close(losses, torch.tensor(expected))


def test_swapping_a_pair_maps_p_to_one_minus_p():
    margins, p = torch.tensor([-1.5, 0.0, 2.0]), torch.tensor([0.2, 1.0, 0.7])
    torch.testing.assert_close(pairwise_loss(margins, p), pairwise_loss(-margins, 1 - p))


def test_a_soft_label_is_fitted_where_the_sigmoid_equals_it():
    margin = torch.tensor([math.log(0.7 / 0.3)], requires_grad=True)
    pairwise_loss(margin, torch.tensor([0.7])).sum().backward()
    torch.testing.assert_close(margin.grad, torch.zeros(1), atol=1e-6, rtol=0)


def test_extreme_margins_stay_finite():
    margins = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = pairwise_loss(margins, torch.tensor([0.0, 1.0])).sum()
    loss.backward()
    assert loss.item() == pytest.approx(2e4)
    assert torch.isfinite(margins.grad).all()


def test_group_of_two_equals_the_plain_pair_loss():
    scores = torch.tensor([0.3, 1.0])
    result = group_ranking_loss(scores, targets((1, 0, 1.0, 1.0)))
    assert result.loss.item() == pytest.approx(-math.log(1 / (1 + math.exp(-0.7))))
    assert (result.num_correct.item(), result.num_decided) == (1.0, 1)


def test_three_ranked_completions_by_hand():
    # scores 2, 1, 0 ranked in this order: margins 1, 2, 1, each pair with weight 1/3
    third = 1 / 3
    pairs = targets((0, 1, 1.0, third), (0, 2, 1.0, third), (1, 2, 1.0, third))
    result = group_ranking_loss(torch.tensor([2.0, 1.0, 0.0]), pairs)
    assert result.loss.item() == pytest.approx((2 * math.log1p(math.exp(-1)) + math.log1p(math.exp(-2))) / 3)


def test_a_constant_added_to_all_scores_changes_nothing():
    pairs = targets((0, 1, 0.9, 0.5), (2, 1, 1.0, 0.5))
    scores = torch.tensor([0.1, -2.0, 1.0])
    one, other = group_ranking_loss(scores, pairs), group_ranking_loss(scores + 5.0, pairs)
    torch.testing.assert_close(one.loss, other.loss)


def test_equal_scores_count_half_and_halves_are_not_counted():
    pairs = targets((0, 1, 1.0, 1.0), (0, 2, 0.2, 1.0), (1, 2, 0.5, 1.0))
    result = group_ranking_loss(torch.tensor([1.0, 1.0, 3.0]), pairs)
    # pair 0: equal, one half; pair 1: the second is better and scores higher; pair 2: not decided
    assert (result.num_correct.item(), result.num_decided) == (1.5, 2)


def test_cross_entropy_is_the_weighted_sum():
    loss = cross_entropy(torch.tensor([-1.0, -3.0]), torch.tensor([0.25, 0.75]))
    assert loss.item() == pytest.approx(2.5)
