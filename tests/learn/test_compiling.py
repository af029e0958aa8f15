"""`torch.compile` as an option: the same gradients, the model as it was afterwards, and a word where it cannot.

Making machine code takes a minute: one test traces with the real compiler and runs what comes out as it is ("eager"),
the others put something in the compiler's place.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_sft import mapping
from tiny_ppo import PROMPTS, brevity, rows_of, small
from tiny_world import CPU, make_lm, make_stage

from qinglan.learn.compiling import compile_trunks
from qinglan.learn.ppo import train_ppo
from qinglan.learn.sft import SFTConfig, accumulate_gradients, encode_demonstrations, train_sft


def gradients(lm: Any, config: SFTConfig) -> torch.Tensor:
    examples = encode_demonstrations(lm, mapping(6), None, "sft")
    accumulate_gradients(lm, examples, [], config, 0)
    found = torch.cat([p.grad.flatten() for p in lm.model.parameters()])
    lm.model.zero_grad()
    return found


def test_gradients_are_the_same_and_the_model_is_as_it_was(monkeypatch):
    inner = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: inner(function, **options, backend="eager"))
    lm = make_lm()
    expected = {pack: gradients(lm, SFTConfig(pack=pack)) for pack in (True, False)}
    compiled = compile_trunks([lm.model], True, CPU, "sft")
    for pack in (True, False):
        with compiled():
            assert "forward" in vars(lm.model.base_model)
            found = gradients(lm, SFTConfig(pack=pack))
        torch.testing.assert_close(found, expected[pack], atol=1e-6, rtol=1e-4)
    assert "forward" not in vars(lm.model.base_model)
    torch.compiler.reset()


def counting(calls: list[int]) -> Callable[..., Any]:
    """Stand in for `torch.compile`: functions stay as they are, and their calls are counted."""

    def compile_(function: Any, **_: Any) -> Any:
        def counted(*args: Any, **named: Any) -> Any:
            calls.append(1)
            return function(*args, **named)

        return counted

    return compile_


def test_what_cannot_be_compiled_is_said_once_and_training_goes_on(monkeypatch, tmp_path, capsys):
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler here\nand a hint\nand more lines")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    config = SFTConfig(num_epochs=1, batch_size=4, compile=True)
    train_sft(make_lm(), mapping(4), config, stage=make_stage(tmp_path / "one", "sft"), seed=0)
    [line] = [line for line in capsys.readouterr().err.splitlines() if "compile" in line]
    assert line == "sft: cannot compile (RuntimeError: no compiler here and a hint); going on without"
    dropped = config.model_copy(update={"dropout": 0.1})
    train_sft(make_lm(), mapping(4), dropped, stage=make_stage(tmp_path / "two", "sft"), seed=0)
    assert "sft: cannot compile with dropout 0.1; going on without" in capsys.readouterr().err


@pytest.mark.parametrize(("value_model", "trunks"), [("separate", 2), ("shared_trunk", 1)])
def test_ppo_compiles_its_trunks_for_the_updates_alone(monkeypatch, tmp_path, value_model, trunks):
    calls: list[int] = []
    monkeypatch.setattr(torch, "compile", counting(calls))
    lm = make_lm()
    for is_compiled in (True, False):
        config = small(num_iterations=2, compile=is_compiled, value_model=value_model)
        stage = make_stage(tmp_path / str(is_compiled), "ppo")
        train_ppo(lm, lm, brevity, PROMPTS, config, stage=stage, seed=0)
    for compiled, plain in zip(rows_of(tmp_path / "True"), rows_of(tmp_path / "False"), strict=True):
        assert compiled.pop("stage") == plain.pop("stage")
        assert compiled == pytest.approx(plain, rel=1e-4, abs=1e-5, nan_ok=True)
    assert len(calls) == trunks * (3 + 2 * 4), "three trials, then two iterations of four updates"
