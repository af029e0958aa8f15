"""Schedules by hand-worked values; checkpoints: whole or absent, damaged ones named, resume equal to never stopping."""

import math

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from qinglan.core.errors import InputError
from qinglan.learn.optimize import (
    Checkpointer,
    OptimizerConfig,
    check_finite,
    clip_gradients,
    cosine_factor,
    make_optimizer,
    restore_training,
    set_lr,
    training_tensors,
    warmup_factor,
)


def test_cosine_starts_at_the_peak_and_ends_at_a_tenth():
    # 5 updates: progress 0, 1/4, 1/2, 3/4, 1; factor = 0.1 + 0.9 * (1 + cos(pi * progress)) / 2
    factors = [cosine_factor(step, 5) for step in range(5)]
    assert factors[0] == 1.0
    assert factors[2] == pytest.approx(0.55)
    assert factors[4] == pytest.approx(0.1)
    assert factors == sorted(factors, reverse=True)


def test_cosine_after_warmup():
    # 3 warm-up updates at 1/4, 2/4, 3/4, then the peak at update 3, the tenth at the last
    factors = [cosine_factor(step, 10, warmup_steps=3) for step in range(10)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[-1] == pytest.approx(0.1)


def test_a_single_update_has_the_peak_rate():
    assert cosine_factor(0, 1) == 1.0


def test_warmup_from_a_tenth_over_ten_steps():
    assert warmup_factor(0, 10, start=0.1) == pytest.approx(0.1)
    assert warmup_factor(5, 10, start=0.1) == pytest.approx(0.55)
    assert warmup_factor(10, 10, start=0.1) == 1.0


def test_configuration_gives_the_rate_of_a_step():
    config = OptimizerConfig(learning_rate=2e-3, warmup_fraction=0.2)
    assert config.lr_at(0, 10) == pytest.approx(2e-3 / 3)
    assert config.lr_at(2, 10) == pytest.approx(2e-3)
    assert config.lr_at(9, 10) == pytest.approx(2e-4)


def make_net() -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(generator=generator)
    return net


def train(net: nn.Module, optimizer: torch.optim.Optimizer, start: int, stop: int) -> None:
    for step in range(start, stop):
        inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        set_lr(optimizer, 0.01 * cosine_factor(step, 20))
        optimizer.zero_grad()
        (net(inputs) - inputs.sum(dim=1, keepdim=True)).square().mean().backward()
        optimizer.step()


def test_only_matrices_are_decayed():
    net = make_net()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = make_optimizer(net, 0.5, weight_decay=0.1)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in net.named_parameters():
        expected = before[name] * (1 - 0.5 * 0.1 if parameter.ndim == 2 else 1.0)
        torch.testing.assert_close(parameter.detach(), expected)


def test_clipping_returns_the_norm_before():
    net = nn.Linear(2, 1, bias=False)
    net.weight.grad = torch.tensor([[3.0, 4.0]])
    assert clip_gradients(net, 1.0) == pytest.approx(5.0)
    torch.testing.assert_close(net.weight.grad, torch.tensor([[0.6, 0.8]]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("max_norm", [0.5, 1.0, 100.0, math.inf])
def test_clipping_gives_the_bits_of_clip_grad_norm(max_norm):
    ours, theirs = nn.Linear(8, 4), nn.Linear(8, 4)
    generator = torch.Generator().manual_seed(0)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        one.grad = torch.randn(one.shape, generator=generator)
        other.grad = one.grad.clone()
    assert clip_gradients(ours, max_norm) == float(nn.utils.clip_grad_norm_(theirs.parameters(), max_norm))
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_clipping_nothing_and_what_is_not_a_number():
    net = nn.Linear(2, 1, bias=False)
    assert clip_gradients(net, 1.0) == 0.0
    net.weight.grad = torch.tensor([[math.nan, 1.0]])
    assert math.isnan(clip_gradients(net, 1.0))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_not_finite_stops_with_stage_and_step(value):
    with pytest.raises(InputError, match=r"^sft, step 7: the loss is (nan|inf);") as caught:
        check_finite(value, "the loss", "sft, step 7")
    assert "\n" not in str(caught.value)
    assert check_finite(0.5, "the loss", "sft, step 7") == 0.5


@pytest.mark.parametrize("stop", [1, 5, 19])
def test_training_resumed_from_a_checkpoint_is_bit_identical(tmp_path, stop):
    whole = make_net()
    train(whole, make_optimizer(whole, 0.01), 0, 20)

    first = make_net()
    optimizer = make_optimizer(first, 0.01)
    train(first, optimizer, 0, stop)
    Checkpointer(tmp_path).save(stop, training_tensors(first, optimizer), {"best": 0.1 + 0.2})

    state = Checkpointer(tmp_path).load()
    assert state is not None
    second = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    optimizer = make_optimizer(second, 0.01)
    restore_training(state.tensors, second, optimizer)
    assert (state.step, state.values) == (stop, {"best": 0.1 + 0.2})
    train(second, optimizer, state.step, 20)
    for one, other in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def test_tied_weights_are_kept_once_and_restored(tmp_path):
    def make_tied() -> nn.ModuleDict:
        net = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
        net["head"].weight = net["embed"].weight
        return net

    net, other = make_tied(), make_tied()
    Checkpointer(tmp_path).save(1, training_tensors(net))
    state = Checkpointer(tmp_path).load()
    assert list(state.tensors) == ["model.embed.weight"]
    restore_training(state.tensors, other)
    assert torch.equal(other["head"].weight, net["embed"].weight)


def save_steps(checkpointer: Checkpointer, *steps: int) -> None:
    for step in steps:
        checkpointer.save(step, {"x": torch.full((4,), float(step))})


def test_the_last_two_are_kept(tmp_path):
    save_steps(Checkpointer(tmp_path), 10, 20, 30)
    names = sorted(path.name for path in tmp_path.iterdir())
    stems = ["step-00000020.safetensors", "step-00000030.safetensors"]
    assert names == sorted(stems + [f"{stem}.sha256" for stem in stems])


def test_nothing_saved_is_nothing_loaded(tmp_path):
    assert Checkpointer(tmp_path / "absent").load() is None


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "no_hash", "wrong_hash"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, capsys, damage):
    save_steps(Checkpointer(tmp_path), 10, 20)
    newest = tmp_path / "step-00000020.safetensors"
    content = bytearray(newest.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
        newest.write_bytes(content)
    elif damage == "cut":
        newest.write_bytes(content[:10])
    elif damage == "gone":
        newest.unlink()
    elif damage == "no_hash":
        newest.with_name(newest.name + ".sha256").unlink()
    else:
        newest.with_name(newest.name + ".sha256").write_text(f"{'0' * 64}  {newest.name}\n")
    state = Checkpointer(tmp_path).load()
    assert state is not None and state.step == 10
    assert torch.equal(state.tensors["x"], torch.full((4,), 10.0))
    assert str(newest) in capsys.readouterr().err
    # Going on from step 10, the damaged one of a later step gives way to good ones.
    save_steps(Checkpointer(tmp_path), 15)
    assert sorted(path.name[5:13] for path in tmp_path.glob("*.safetensors")) == ["00000010", "00000015"]


@pytest.mark.parametrize(
    "full",
    [
        OSError(28, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["python", "safetensors"],
)
def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path, monkeypatch, full):
    save_steps(Checkpointer(tmp_path), 10)

    def fail(*_args: object, **_kwargs: object) -> None:
        raise full

    monkeypatch.setattr("qinglan.learn.optimize.save_file", fail)
    with pytest.raises(InputError, match="No space left on device"):
        save_steps(Checkpointer(tmp_path), 20)
    monkeypatch.undo()
    state = Checkpointer(tmp_path).load()
    assert state is not None and state.step == 10
    assert not list(tmp_path.glob("*.part"))


def test_clear_removes_all(tmp_path):
    checkpointer = Checkpointer(tmp_path)
    save_steps(checkpointer, 10, 20)
    (tmp_path / ".step-00000030.safetensors.x1.part").write_bytes(b"cut short by a kill")
    checkpointer.clear()
    assert list(tmp_path.iterdir()) == []


def test_a_rate_that_is_a_tensor_is_filled_in_place():
    rate = torch.tensor(0.5)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(2))], rate, fused=True)
    set_lr(optimizer, 0.25)
    assert optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == 0.25
