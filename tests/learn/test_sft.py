"""Supervised fine-tuning: what is a target, exact means over the batch, selection, resume, and that it memorises."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_world import CPU, LETTERS, make_demonstration, make_lm, make_stage
from torch import Tensor

from qinglan.core.errors import InputError
from qinglan.core.records import Demonstrated
from qinglan.core.rng import numpy_stream
from qinglan.learn import sft
from qinglan.learn.optimize import OptimizerConfig
from qinglan.learn.sft import (
    SFTConfig,
    accumulate_gradients,
    check_start,
    encode_demonstrations,
    mean_loss,
    train_sft,
)
from qinglan.models.language_model import LanguageModel, completion_logprobs, load_language_model

UPPER = str.maketrans("abcdef", "uvwxyz")


def mapping(count: int, seed: int = 0) -> list[Demonstrated]:
    """A toy language: each letter of the prompt is answered by its partner."""
    generator = numpy_stream(seed, "mapping")
    prompts = ["".join(generator.choice(list("abcdef"), generator.integers(1, 6))) for _ in range(count)]
    return [make_demonstration(f"{prompt}", prompt.translate(UPPER)) for prompt in prompts]


def corpus(start: int, count: int) -> list[list[int]]:
    """Pretraining sequences by position."""
    return [
        numpy_stream(0, "corpus", number).integers(4, 4 + len(LETTERS), 5 + number % 7).tolist()
        for number in range(start, start + count)
    ]


def gradients(lm: LanguageModel) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in lm.model.named_parameters() if p.grad is not None}
    lm.model.zero_grad()
    return found


def assert_equal_weights(one: LanguageModel, other: LanguageModel) -> None:
    for (name, a), (_, b) in zip(one.model.named_parameters(), other.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


# ------------------------------------------------------------------------------------------------- targets, loss


def test_only_the_completion_is_a_target_and_its_end_token_is():
    lm = make_lm()
    [sequence] = encode_demonstrations(lm, [make_demonstration("ab", "xyz")], None, "sft")
    assert sequence.token_ids[sequence.num_prompt_tokens :] == [*lm.tokenizer.convert_tokens_to_ids(list("xyz")), 0]
    assert sequence.token_ids[-1] in lm.chat.end_ids


def test_the_end_token_is_taught_and_prompt_tokens_are_not():
    lm = make_lm()
    examples = encode_demonstrations(lm, [make_demonstration("ab", "x")], None, "sft")
    accumulate_gradients(lm, examples, [], SFTConfig(), 0)
    # The gradient of the unembedding row of a target is negative along its hidden state, so a step raises its logit.
    before = completion_logprobs(lm, examples)[0]
    with torch.no_grad():
        for parameter in lm.model.parameters():
            parameter -= 0.05 * parameter.grad
    after = completion_logprobs(lm, examples)[0]
    assert len(before) == 2  # "x" and the end token
    assert (after > before).all()


def test_the_loss_is_the_token_mean():
    lm = make_lm()
    examples = encode_demonstrations(lm, mapping(7), None, "sft")
    tokens = torch.cat([-values for values in completion_logprobs(lm, examples)])
    loss = accumulate_gradients(lm, examples, [], SFTConfig(), 0)
    assert loss.loss == pytest.approx(tokens.mean().item(), abs=1e-5)
    assert loss.num_targets == len(tokens)
    assert mean_loss(lm, examples, 64) == pytest.approx(loss.loss, abs=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("pack", [True, False])
def test_micro_batching_does_not_change_the_gradient(kind, pack):
    """Eight ragged sequences as 1 x 8, 2 x 4 and 4 x 2, with pretraining sequences among them."""
    lm = make_lm(kind)
    examples = encode_demonstrations(lm, mapping(6), None, "sft")
    extra = [sft.TokenSequence(ids, 1) for ids in corpus(0, 2)]
    longest = max(len(sequence.token_ids) for sequence in [*examples, *extra])
    found = []
    for rows in (8, 4, 2, 1):
        config = SFTConfig(max_tokens=rows * longest, pack=pack, pretrain_fraction=0.25)
        loss = accumulate_gradients(lm, examples, extra, config, 0)
        found.append((loss.loss, gradients(lm)))
    for loss, grads in found[1:]:
        assert loss == pytest.approx(found[0][0], abs=1e-6)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, found[0][1][name], atol=1e-6, rtol=1e-5)


def test_pretraining_sequences_are_all_target_and_weigh_their_share():
    lm = make_lm()
    examples = encode_demonstrations(lm, mapping(4), None, "sft")
    extra = [sft.TokenSequence(ids, 1) for ids in corpus(0, 3)]
    loss = accumulate_gradients(lm, examples, extra, SFTConfig(pretrain_fraction=0.25), 0)
    both = gradients(lm)
    demo = accumulate_gradients(lm, examples, [], SFTConfig(), 0)
    demo_grads = gradients(lm)
    pretrain = accumulate_gradients(lm, extra, [], SFTConfig(), 0)
    pretrain_grads = gradients(lm)
    assert loss.num_targets == demo.num_targets + sum(len(ids) - 1 for ids in corpus(0, 3))
    assert loss.demonstration_loss == pytest.approx(demo.loss, abs=1e-5)
    assert loss.pretrain_loss == pytest.approx(pretrain.loss, abs=1e-5)
    assert loss.loss == pytest.approx(0.75 * demo.loss + 0.25 * pretrain.loss, abs=1e-5)
    for name, grad in both.items():
        torch.testing.assert_close(grad, 0.75 * demo_grads[name] + 0.25 * pretrain_grads[name], atol=1e-6, rtol=1e-4)


# -------------------------------------------------------------------------------------------------- step-0 checks


def test_start_check_reports_targets_and_masked_rows():
    lm = make_lm()
    examples = encode_demonstrations(lm, [make_demonstration("ab", "xyz"), make_demonstration("c", "d")], None, "sft")
    found = check_start(lm, examples, SFTConfig(), "sft")
    assert found == {"start/sequences": 2, "start/target_tokens": 6, "start/masked_row_share": 0.0}


def test_an_untaught_end_token_stops_the_run():
    lm = make_lm()
    [sequence] = encode_demonstrations(lm, [make_demonstration("ab", "xyz")], None, "sft")
    masked = sequence._replace(num_prompt_tokens=len(sequence.token_ids))
    with pytest.raises(InputError, match="end token of a completion is not among the targets"):
        check_start(lm, [masked], SFTConfig(), "sft")


def test_a_completion_without_an_end_token_is_named():
    item = make_demonstration("ab", "xyz")
    cut = item._replace(demonstration=item.demonstration.model_copy(update={"token_ids": (5, 6)}))
    with pytest.raises(InputError, match="demonstration d-ab: its last token"):
        encode_demonstrations(make_lm(), [cut], None, "sft")


def test_a_completion_without_tokens_is_named():
    item = make_demonstration("ab", "xyz")
    empty = item._replace(demonstration=item.demonstration.model_copy(update={"token_ids": ()}))
    with pytest.raises(InputError, match="completion d-ab: has no tokens"):
        encode_demonstrations(make_lm(), [empty], None, "sft")


def test_sampled_token_ids_are_kept():
    item = make_demonstration("ab", "xyz")
    sampled = item._replace(demonstration=item.demonstration.model_copy(update={"token_ids": (50, 51, 0)}))
    [sequence] = encode_demonstrations(make_lm(), [sampled], None, "sft")
    assert sequence.token_ids[-3:] == [50, 51, 0]


def test_long_demonstrations_are_left_out_and_counted_never_cut(capsys):
    items = [make_demonstration("a" * 120, "b" * 120), make_demonstration("a", "b")]
    assert len(encode_demonstrations(make_lm(), items, None, "sft")) == 1
    assert "1 of 2 demonstrations left out (over 128 tokens)" in capsys.readouterr().err
    with pytest.raises(InputError, match="none of 2 demonstrations fits into 4 tokens"):
        encode_demonstrations(make_lm(), items, 4, "sft")


def test_a_pretraining_share_without_a_corpus_is_refused(tmp_path):
    with pytest.raises(InputError, match="there is no pretraining corpus"):
        train_sft(make_lm(), mapping(4), SFTConfig(pretrain_fraction=0.1), stage=make_stage(tmp_path, "sft"), seed=0)


# ------------------------------------------------------------------------------------------------------- learning


def learning_config(**changes: Any) -> SFTConfig:
    return SFTConfig(optimizer=OptimizerConfig(learning_rate=1e-2), **changes)


def test_it_memorises_a_toy_mapping_and_repeats(tmp_path):
    data = mapping(8)
    config = SFTConfig(optimizer=OptimizerConfig(learning_rate=2e-2), num_epochs=60)
    start = make_lm(hidden=32)
    one, two = (
        train_sft(start, data, config, stage=make_stage(tmp_path / name, "sft"), seed=3) for name in ("one", "two")
    )
    assert_equal_weights(one, two)
    assert_equal_weights(start, make_lm(hidden=32))  # where it started is not changed
    examples = encode_demonstrations(start, data, None, "sft")
    assert mean_loss(start, examples, 512) > 3.0
    assert mean_loss(one, examples, 512) < 0.1
    # The directory is an ordinary model directory with the same weights.
    loaded = load_language_model(tmp_path / "one" / "stages" / "sft" / "model", CPU)
    assert_equal_weights(one, loaded)
    assert not list((tmp_path / "one" / "stages" / "sft" / "checkpoints").glob("*"))


def test_select_keeps_the_best_epoch_and_the_first_of_equals(tmp_path):
    seen: list[dict[str, Tensor]] = []
    scores = [0.1, 0.7, 0.3, 0.7]

    def select(lm: LanguageModel) -> float:
        seen.append({name: p.detach().clone() for name, p in lm.model.named_parameters()})
        return scores[len(seen) - 1]

    chosen = train_sft(
        make_lm(), mapping(8), learning_config(num_epochs=4), stage=make_stage(tmp_path, "sft"), seed=0, select=select
    )
    assert len(seen) == 4
    for name, parameter in chosen.model.named_parameters():
        assert torch.equal(parameter, seen[1][name])


def test_a_selection_score_that_is_not_finite_names_the_epoch(tmp_path):
    with pytest.raises(InputError, match=r"^sft, epoch 1: the selection score is nan"):
        train_sft(
            make_lm(),
            mapping(4),
            SFTConfig(),
            stage=make_stage(tmp_path, "sft"),
            seed=0,
            select=lambda lm: math.nan,
        )


def test_a_loss_that_is_not_finite_names_stage_and_step_and_keeps_checkpoints(tmp_path, monkeypatch):
    inner, calls = sft.target_logprobs, []

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        found = inner(*args, **kwargs)
        return found._replace(logprobs=found.logprobs * math.nan) if len(calls) == 4 + 1 else found

    monkeypatch.setattr(sft, "target_logprobs", poisoned)
    config = learning_config(num_epochs=3, batch_size=4, checkpoint_every=2)
    with pytest.raises(InputError, match=r"^sft, step 5: the loss is nan; expected a finite number;") as caught:
        train_sft(make_lm(), mapping(8), config, stage=make_stage(tmp_path, "sft"), seed=0)
    assert "\n" not in str(caught.value)
    names = sorted(path.name for path in (tmp_path / "stages" / "sft" / "checkpoints").glob("*.safetensors"))
    assert names == ["step-00000002.safetensors", "step-00000004.safetensors"]
    # Once the cause is gone the stage goes on from step 4 and ends as if nothing had happened.
    monkeypatch.setattr(sft, "target_logprobs", inner)
    resumed = train_sft(make_lm(), mapping(8), config, stage=make_stage(tmp_path, "sft"), seed=0)
    whole = train_sft(make_lm(), mapping(8), config, stage=make_stage(tmp_path / "whole", "sft"), seed=0)
    assert_equal_weights(whole, resumed)


# --------------------------------------------------------------------------------------------------------- resume


def full_config() -> SFTConfig:
    """All that could break a resume: dropout, pretraining mix, warm-up, decay, a ragged last batch, selection."""
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup_fraction=0.2, weight_decay=0.1)
    return SFTConfig(
        optimizer=optimizer, num_epochs=3, batch_size=4, dropout=0.2, pretrain_fraction=0.2, checkpoint_every=2
    )


def train_full(directory: Path) -> LanguageModel:
    def select(lm: LanguageModel) -> float:
        return -abs(mean_loss(lm, encode_demonstrations(lm, mapping(3, seed=9), None, "sft"), 512) - 4.2)

    return train_sft(
        make_lm(),
        mapping(14),
        full_config(),
        stage=make_stage(directory, "sft"),
        seed=5,
        pretrain=corpus,
        valid=mapping(3, seed=8),
        select=select,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was never stopped."""
    directory = tmp_path_factory.mktemp("whole")
    train_full(directory)
    return directory


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("killed_at", [[1], [4], [5, 10]])
def test_a_killed_stage_resumes_bit_identical(tmp_path, monkeypatch, whole, killed_at):
    inner = sft.update
    for count in killed_at:
        steps: list[int] = []

        def killing(*args: Any, limit: int = count, steps: list[int] = steps) -> dict[str, float]:
            steps.append(1)
            if int(args[-1].rsplit(" ", 1)[1]) > limit:
                raise Killed
            return inner(*args)

        monkeypatch.setattr(sft, "update", killing)
        with pytest.raises(Killed):
            train_full(tmp_path / "killed")
        monkeypatch.setattr(sft, "update", inner)
    assert_equal_weights(train_full(whole), train_full(tmp_path / "killed"))
    logs = [make_stage(directory, "sft").run.metrics("sft") for directory in (whole, tmp_path / "killed")]
    assert logs[0] == logs[1]
    assert [row["step"] for row in logs[0] if "valid_loss" in row and "selection_score" in row] == [4, 8, 12]


CHILD = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_sft
inner = test_sft.sft.update
def slow(*args):
    time.sleep(0.15)  # so that the parent has time to kill it between two updates
    return inner(*args)
test_sft.sft.update = slow
test_sft.train_full(Path(sys.argv[2]))
"""


def test_a_process_killed_by_the_system_resumes_bit_identical(tmp_path, whole):
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(Path(__file__).parent), str(tmp_path / "killed")])
    checkpoints = tmp_path / "killed" / "stages" / "sft" / "checkpoints"
    limit = time.monotonic() + 300
    while not list(checkpoints.glob("*.sha256")) and time.monotonic() < limit:
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert list(checkpoints.glob("step-*.safetensors"))
    assert not (tmp_path / "killed" / "stages" / "sft" / "model").exists()
    assert_equal_weights(train_full(whole), train_full(tmp_path / "killed"))


def test_paper_values():
    baseline, start = SFTConfig.paper_baseline(), SFTConfig.paper_ppo_start()
    assert (baseline.num_epochs, baseline.batch_size, baseline.dropout) == (16, 32, 0.2)
    assert baseline.optimizer.learning_rate == 9.65e-6
    assert (start.num_epochs, start.pretrain_fraction, start.optimizer.learning_rate) == (2, 0.1, 5e-6)
    for config in (baseline, start):
        assert (config.optimizer.final_lr_fraction, config.optimizer.warmup_fraction) == (0.1, 0.0)
