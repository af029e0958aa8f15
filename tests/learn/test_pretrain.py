"""Pretraining: weighted loss, schedules, which optimizer takes what, resume after a kill, data processes, learning."""

import math
import multiprocessing
import signal
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tiny_world import CPU, make_lm, make_stage
from torch import Tensor
from toy_blocks import CONTEXT, copies, copies_until_killed

from qinglan.core.device import Device
from qinglan.core.errors import InputError
from qinglan.core.files import read_json
from qinglan.learn.blocks import Blocks, read_batches, read_blocks
from qinglan.learn.pretrain import HELD_OUT_FIRST_BLOCK, average_weights, held_out_loss, pretrain
from qinglan.learn.pretrain_config import PretrainConfig
from qinglan.learn.pretrain_update import block_loss, make_optimizers, make_work, update
from qinglan.models.language_model import LanguageModel, load_language_model
from tests.conftest import needs_gpu

TINY = PretrainConfig(
    num_tokens=12 * 4 * 9,
    context=CONTEXT,
    batch_tokens=48,
    num_held_out_blocks=6,
    seconds_between_checkpoints=0,
    num_probes=3,
)


def weights_of(lm: LanguageModel) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in lm.model.named_parameters()}


def assert_equal_weights(one: LanguageModel, other: LanguageModel) -> None:
    for name, weight in weights_of(one).items():
        assert torch.equal(weight, weights_of(other)[name]), name


# ------------------------------------------------------------------------------------------------------------- loss


def test_loss_is_the_weighted_mean_over_predicted_tokens():
    lm = make_lm("qwen3")
    token_ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    weights = torch.tensor([[99.0, 1.0, 0.0, 3.0], [99.0, 0.5, 2.0, 0.0]])
    logits = lm.model(input_ids=token_ids).logits.detach().log_softmax(-1)
    # Position t is scored by the logits at t - 1; the first token of a row, of weight 99, by nothing.
    total = sum(
        -float(weights[row, t] * logits[row, t - 1, token_ids[row, t]]) for row in range(2) for t in range(1, 4)
    )
    assert block_loss(lm, Blocks(token_ids, weights)).item() == pytest.approx(total / 6.5, rel=1e-5)


def test_tokens_of_weight_zero_have_no_gradient_and_a_batch_without_weight_no_loss():
    lm = make_lm("qwen3")
    token_ids = torch.tensor([[5, 6, 7, 8]])
    one = torch.tensor([[0.0, 1.0, 0.0, 0.0]])
    block_loss(lm, Blocks(token_ids, one)).backward()
    gradients = {name: p.grad.clone() for name, p in lm.model.named_parameters()}
    lm.model.zero_grad()
    block_loss(lm, Blocks(torch.tensor([[5, 6, 20, 30]]), one)).backward()
    for name, parameter in lm.model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-7)
    assert block_loss(lm, Blocks(token_ids, torch.zeros(1, 4))).item() == 0.0


def test_held_out_loss_is_one_mean_over_blocks_that_are_never_trained_on():
    lm = make_lm("qwen3")
    whole = read_blocks(copies, HELD_OUT_FIRST_BLOCK, TINY.num_held_out_blocks, CONTEXT)
    # Six blocks in batches of four: the second batch is smaller and must not count as much as the first.
    assert held_out_loss(lm, copies, TINY) == pytest.approx(float(block_loss(lm, whole)), rel=1e-5)


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_no_token_is_predicted_from_what_follows_it(kind: str, attention: str):
    lm = make_lm(kind)
    lm.model.set_attn_implementation(attention)
    token_ids, other = torch.arange(5, 21)[None], torch.arange(5, 21)[None].clone()
    other[0, 8:] = 30
    early = torch.tensor([[1.0] * 8 + [0.0] * 8])
    one, two = (float(block_loss(lm, Blocks(ids, early)).detach()) for ids in (token_ids, other))
    assert one == pytest.approx(two, rel=1e-5)


# ----------------------------------------------------------------------------------------------- one update's work


def train_a_little(lm: LanguageModel, **changes: bool) -> list[float]:
    config = TINY.model_copy(update=changes)
    work = make_work(lm, make_optimizers(lm, config), config)
    batches = [read_blocks(copies, 4 * step, 4, CONTEXT) for step in range(6)]
    return [update(work, config, batch, step, "test") for step, batch in enumerate(batches)]


def test_a_loss_that_does_not_compile_is_said_and_trained_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def refuse(*_: object, **__: object) -> Callable[[], Tensor]:
        def fail() -> Tensor:
            raise RuntimeError("no compiler here")

        return fail

    monkeypatch.setattr(torch, "compile", refuse)
    plain, tried = make_lm("qwen3"), make_lm("qwen3")
    assert train_a_little(plain) == train_a_little(tried, compile=True)
    assert_equal_weights(plain, tried)
    assert "no compiler here" in capsys.readouterr().err


@needs_gpu
@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
def test_recorded_updates_are_those_of_plain_ones_to_the_last_bit(kind: str):
    device = Device.detect("cuda", "float32")
    models = []
    for graphs in (False, True):
        lm = make_lm(kind)
        lm = lm._replace(model=lm.model.to(device.torch_device), device=device)
        losses = train_a_little(lm, cuda_graphs=graphs)
        models.append((lm, losses))
    (plain, losses), (recorded, others) = models
    assert losses == others
    assert_equal_weights(plain, recorded)


# --------------------------------------------------------------------------------------------- schedules, optimizers


def test_trapezoid_climbs_stays_and_falls_to_zero():
    config = PretrainConfig(num_tokens=1000, context=10, batch_tokens=10, warmup_fraction=0.1, decay_fraction=0.2)
    factors = [config.rate_factor(step) for step in range(config.num_steps + 1)]
    assert config.num_steps == 100
    assert factors[0] == pytest.approx(1 / 11)
    assert factors[9] == pytest.approx(10 / 11)
    assert factors[10:81] == [1.0] * 71
    assert factors[90] == pytest.approx(0.5)  # 10 of the 20 last updates to go
    assert factors[99] == pytest.approx(1 / 20)
    assert factors[100] == 0.0


@pytest.mark.parametrize("schedule", ["trapezoid", "cosine", "linear"])
def test_every_schedule_peaks_at_one_and_only_falls_after_the_warm_up(schedule: str):
    config = PretrainConfig(num_tokens=1000, context=10, batch_tokens=10, warmup_fraction=0.1, schedule=schedule)
    factors = [config.rate_factor(step) for step in range(config.num_steps + 1)]
    assert max(factors) == 1.0
    assert factors[10] == pytest.approx(1.0)
    assert all(0 < factor <= 1 for factor in factors[:-1])
    assert all(later <= earlier for earlier, later in pairwise(factors[10:]))
    assert factors[-1] == pytest.approx(0.0)


def test_tokens_are_rounded_up_to_whole_updates():
    assert PretrainConfig(num_tokens=1001, context=10, batch_tokens=100).num_steps == 11


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt2"])
def test_muon_takes_hidden_matrices_and_adamw_all_the_rest(kind: str):
    lm = make_lm(kind)
    names = {id(parameter): name for name, parameter in lm.model.named_parameters()}
    optimizers = make_optimizers(lm, TINY)
    assert optimizers.muon is not None
    by_muon = {names[id(p)] for group in optimizers.muon.param_groups for p in group["params"]}
    by_adamw = {names[id(p)] for group in optimizers.adamw.param_groups for p in group["params"]}
    assert by_muon | by_adamw == set(names.values())
    assert not by_muon & by_adamw
    per_token = {name for name in names.values() if any(part in name for part in ("embed", "lm_head", "wte", "wpe"))}
    vectors = {names[id(p)] for p in lm.model.parameters() if p.ndim == 1}
    assert by_adamw == per_token | vectors


def test_averaged_weights_follow_the_weights():
    one, other = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(one.weight, 2.0)
    torch.nn.init.constant_(other.weight, 4.0)
    average_weights(one, other, 0.75, step=1000)
    assert float(one.weight) == pytest.approx(0.75 * 2 + 0.25 * 4)
    average_weights(one, other, 0.75, step=0)  # at first d = 1 / 10: the drawn weights are soon forgotten
    assert float(one.weight) == pytest.approx(0.1 * 2.5 + 0.9 * 4)


# --------------------------------------------------------------------------------------------------- the whole loop


def test_it_learns_to_copy_and_leaves_a_model_with_its_numbers(tmp_path: Path):
    config = TINY.model_copy(
        update={"num_tokens": 48 * 60, "seconds_between_checkpoints": 60.0, "muon_lr": 0.05, "adamw_lr": 0.03}
    )
    start = make_lm("qwen3")
    before = weights_of(start)["model.norm.weight"].clone()
    stage = make_stage(tmp_path, "pretrain")
    calls: list[str] = []
    eight = partial(copies, num_letters=8)
    lm = pretrain(start, eight, config, stage=stage, seed=3, probe=lambda lm: calls.append(lm.name) or {"copying": 0.5})
    assert held_out_loss(start, eight, config) > math.log(8)
    assert held_out_loss(lm, eight, config) < 0.5
    assert torch.equal(weights_of(start)["model.norm.weight"], before)

    assert calls == ["pretrain"] * 3
    rows = stage.run.metrics("pretrain")
    assert rows[-1]["tokens"] == 48 * 60
    assert [row["step"] for row in rows if "copying" in row] == [20, 40, 60]
    assert all(0 <= row["data_share"] <= 1 and row["tokens_per_second"] > 0 for row in rows)
    summary = read_json(stage.dir / "summary.json")
    assert summary["seed"] == 3
    assert summary["probes"] == {"copying": 0.5}
    assert summary["held_out_loss"] == pytest.approx(held_out_loss(lm, eight, config), rel=1e-5)
    assert_equal_weights(lm, load_language_model(stage.dir / "model", CPU))
    assert not list((stage.dir / "checkpoints").glob("*"))


@pytest.mark.parametrize("averaging", [0.0, 0.9])
def test_a_killed_run_goes_on_and_ends_bit_identical(tmp_path: Path, averaging: float):
    config = TINY.model_copy(update={"averaging": averaging})
    whole = make_stage(tmp_path / "whole", "pretrain")
    expected = pretrain(make_lm("qwen3"), copies, config, stage=whole, seed=0)

    stage = make_stage(tmp_path / "killed", "pretrain")
    for last in (4 * 4, 4 * 7):  # killed in the fifth update, and again in the eighth
        killed = multiprocessing.get_context("fork").Process(
            target=pretrain,
            args=(make_lm("qwen3"), partial(copies_until_killed, last=last), config),
            kwargs={"stage": stage, "seed": 0},
        )
        killed.start()
        killed.join()
        assert killed.exitcode == -signal.SIGKILL
        assert not (stage.dir / "model").exists()
    lm = pretrain(make_lm("qwen3"), copies, config, stage=stage, seed=0)
    assert_equal_weights(lm, expected)
    losses = [[(row["step"], row["loss"]) for row in s.run.metrics("pretrain")] for s in (whole, stage)]
    assert losses[0] == losses[1]
    assert [row.get("held_out_loss") for row in whole.run.metrics("pretrain")][2::3] == [
        row.get("held_out_loss") for row in stage.run.metrics("pretrain")
    ][2::3]


def test_a_finished_stage_is_opened_again_not_trained(tmp_path: Path):
    stage = make_stage(tmp_path, "pretrain")
    lm = pretrain(make_lm("qwen3"), copies, TINY, stage=stage, seed=0)

    def never(first: int, count: int) -> tuple[Tensor, Tensor]:
        raise AssertionError("read although the model is there")

    assert_equal_weights(pretrain(make_lm("qwen3"), never, TINY, stage=stage, seed=0), lm)


def test_data_processes_change_no_batch():
    steps = range(3, 8)
    alone = list(read_batches(copies, steps, 4, CONTEXT))
    helped = list(read_batches(copies, steps, 4, CONTEXT, num_processes=1))
    assert len(alone) == len(helped) == 5
    for one, other in zip(alone, helped, strict=True):
        assert torch.equal(one.token_ids, other.token_ids)
        assert torch.equal(one.weights, other.weights)
        assert other.token_ids.dtype == torch.int64


# ------------------------------------------------------------------------------------------------------------ errors


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_its_checkpoints(tmp_path: Path):
    def spoilt(first: int, count: int) -> tuple[Tensor, Tensor]:
        token_ids, weights = copies(first, count)
        return token_ids, weights * (math.nan if first == 12 else 1.0)

    stage = make_stage(tmp_path, "pretrain")
    with pytest.raises(InputError, match=r"pretrain, update 4: the loss is nan; expected a finite number"):
        pretrain(make_lm("qwen3"), spoilt, TINY, stage=stage, seed=0)
    assert (stage.dir / "checkpoints" / "step-00000003.safetensors").is_file()


def test_a_context_longer_than_the_models_is_refused(tmp_path: Path):
    config = PretrainConfig(num_tokens=4096, context=256, batch_tokens=256)
    with pytest.raises(InputError, match=r"context is 256 tokens, but tiny-qwen3 takes 128 at the most"):
        pretrain(make_lm("qwen3"), copies, config, stage=make_stage(tmp_path, "pretrain"), seed=0)


def test_blocks_of_another_shape_are_refused(tmp_path: Path):
    def short(first: int, count: int) -> tuple[Tensor, Tensor]:
        token_ids, weights = copies(first, count)
        return token_ids[:, :-1], weights[:, :-1]

    with pytest.raises(InputError, match=r"blocks 0 to 3: token ids \[4, 12\] .* expected \[4, 13\]"):
        pretrain(make_lm("qwen3"), short, TINY, stage=make_stage(tmp_path, "pretrain"), seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": 100, "batch_tokens": 250}, "no multiple of context 100"),
        ({"warmup_fraction": 0.5, "decay_fraction": 0.6}, "add up to more than 1"),
        ({"schedule": "step"}, "schedule"),
        ({"num_tokens": 0}, "num_tokens"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        PretrainConfig(**changes)
