"""Gradients of micro-batches that are computed at the same time equal those computed one by one, to the last bit."""

import time

import pytest
import torch
from torch import nn

from qinglan.learn.gradients import accumulate


def three_layers():
    torch.manual_seed(0)
    return nn.ModuleDict({"read": nn.Linear(8, 8), "other": nn.Linear(8, 8), "unused": nn.Linear(8, 8)})


def gradients_of(at_once, losses_at_once=1):
    net = three_layers()
    batches = torch.randn(7, 5, 8, generator=torch.Generator().manual_seed(1)).unbind()

    def of_batch(numbered, backward):
        number, batch = numbered
        time.sleep(0.01 * (number % 3))  # so that they are ready in another order
        backward(net["other"](torch.tanh(net["read"](batch))).square().sum())
        if losses_at_once == 2:
            backward(net["read"](batch).sum())
        return number

    found = accumulate([net], enumerate(batches), of_batch, at_once)
    assert found == list(range(7))
    return {name: weight.grad for name, weight in net.named_parameters()}


@pytest.mark.parametrize("losses", [1, 2])
def test_several_at_once_give_the_same_bits_as_one_by_one(losses):
    expected = gradients_of(1, losses)
    for _ in range(3):
        found = gradients_of(3, losses)
        assert all(torch.equal(found[name], expected[name]) for name in expected if "unused" not in name)
    assert found["unused.weight"] is None


def test_they_are_added_to_what_is_there():
    net = nn.Linear(2, 1, bias=False)
    net.weight.grad = torch.tensor([[10.0, 20.0]])
    # d(w x)/dw = x: 10 + 1 + 3 and 20 + 2 + 4
    accumulate([net], [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])], lambda x, back: back(net(x).sum()), 2)
    assert net.weight.grad.tolist() == [[14.0, 26.0]]


def test_frozen_weights_get_none_and_two_models_may_share_a_trunk():
    trunk, first, second = nn.Linear(4, 4), nn.Linear(4, 1), nn.Linear(4, 1)
    trunk.bias.requires_grad_(False)
    models = [nn.Sequential(trunk, first), nn.Sequential(trunk, second)]

    def of_batch(batch, backward):
        for model in models:
            backward(model(batch).sum())

    data = torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(2))
    accumulate(models, data, of_batch, 2)
    found = trunk.weight.grad.clone()
    trunk.weight.grad = None
    accumulate(models, data, of_batch, 1)
    assert torch.equal(found, trunk.weight.grad)
    assert trunk.bias.grad is None


def test_an_error_in_one_batch_ends_the_update():
    def of_batch(batch, backward):
        raise ZeroDivisionError("the second")

    with pytest.raises(ZeroDivisionError):
        accumulate([three_layers()], range(4), of_batch, 2)
