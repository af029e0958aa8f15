"""The reward model: one scalar score for a completion, fitted to comparisons (InstructGPT, section 3.5, appendix C.2).

All pairs of a prompt stand in one batch element: the K completions are scored once each, then every decided pair of the
K scores enters the loss. Shuffling pairs instead would read each completion K - 1 times and overfit in one epoch. Soft
labels (a feedback model's or a weak model's probability) enter as they are; comparisons may be weighted by source.

Details: the head starts at N(0, 1/sqrt(d + 1)), bias 0 (Stiennon et al. 2020, released code); the score is read at the
end token; one epoch; afterwards an offset puts the mean score of demonstrations at 0, saved with the model.

Departures: the divisor is the number of pairs that count (the paper does not say whether dropped ties do); where the
architecture allows, the K completions share the computation of their prompt (`prompt_sharing.py`), which changes
nothing but the time.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol, Self, get_args

import torch
from pydantic import Field
from torch import Tensor

from qinglan.core.config import Config
from qinglan.core.errors import InputError, nearest
from qinglan.core.records import ComparisonGroup, Demonstrated, Pair, Source, pairs_of
from qinglan.core.rng import permutation, stream_seed
from qinglan.core.run import Stage
from qinglan.learn.batch import make_batches
from qinglan.learn.compiling import compile_trunks
from qinglan.learn.dropout import adapter_dropout
from qinglan.learn.encode import encode_completion
from qinglan.learn.gradients import Backward, accumulate
from qinglan.learn.losses import GroupLoss, PairTargets, group_ranking_loss
from qinglan.learn.optimize import (
    Checkpointer,
    OptimizerConfig,
    check_finite,
    clip_gradients,
    restore_training,
    set_lr,
    training_tensors,
)
from qinglan.models.adapters import LoRAConfig
from qinglan.models.heads import (
    ScalarModel,
    end_of_training,
    last_token_scores,
    load_scalar_model,
    save_scalar_model,
    scalar_model_from,
    score_sequences,
    start_of_training,
    token_values,
)
from qinglan.models.language_model import LanguageModel, TokenSequence, max_context
from qinglan.models.prompt_sharing import PromptTree, can_share_prompt, make_tree_batch, tree_end_states
from qinglan.models.trunk import num_at_once, share_of_budget


class RewardConfig(Config):
    """Fitting of a reward model; the defaults suit 0.2 to 2 million parameters and hundreds of comparisons."""

    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=5e-4)
    """AdamW and its cosine schedule."""
    num_epochs: int = Field(default=1, ge=1)
    """Passes over the comparisons (InstructGPT: 1; more overfits quickly)."""
    batch_size: int = Field(default=8, ge=1)
    """Prompts per update, each with all its pairs (InstructGPT: 64)."""
    ties: Literal["drop", "half"] = "drop"
    """Tied pairs are left out (InstructGPT), or count as probability one half."""
    share_prompt: bool = True
    """Compute the prompt once for its K completions where the architecture allows; the result is the same."""
    max_tokens: int = Field(default=8192, ge=1)
    """Tokens in one forward pass, padding included, or one prompt's if that is more. Never changes the gradient."""
    max_length: int | None = Field(default=None, ge=2)
    """Comparisons with a longer prompt and completion, in tokens, are left out and counted; default: the context."""
    lora: LoRAConfig = LoRAConfig()
    """Train a low-rank adapter in place of every weight."""
    compile: bool = False
    """Compile the trunk's training step with `torch.compile`; a run is then repeatable, but not to the last bit."""
    checkpoint_every: int = Field(default=100, ge=1)
    """Updates between two checkpoints."""

    @classmethod
    def paper(cls) -> Self:
        """Return the 6B reward model of appendix C.2: 1 epoch, rate 9e-6, cosine to 10%, 64 prompts a batch."""
        return cls(optimizer=OptimizerConfig(learning_rate=9e-6), num_epochs=1, batch_size=64)


def train_reward_model(
    start: LanguageModel,
    groups: Sequence[ComparisonGroup],
    config: RewardConfig,
    *,
    stage: Stage,
    seed: int,
    weights: Mapping[Source, float] | None = None,
    valid: Sequence[ComparisonGroup] = (),
    demonstrations: Sequence[Demonstrated] = (),
) -> ScalarModel:
    """Return a reward model fitted to `groups`, also saved as a model directory in `stage.dir/"model"`.

    Args:
        start: the model whose trunk is copied (InstructGPT: SFT or the pretrained model, with similar results).
        groups: prompts with K completions and how they were judged; those without a decided pair are left out.
        config: settings.
        stage: folder for checkpoints and result; a killed stage goes on from its last checkpoint, bit-identical on CPU.
        seed: decides order and the head's first weights.
        weights: factor of the loss by the comparison's source; a source that is not named has 1.
        valid: held-out comparisons; their loss and accuracy are logged before the first and after the last update.
        demonstrations: their mean score becomes 0 (`set_mean_score`) before the model is saved.

    Raises:
        InputError: nothing to train on, an unknown source, or a loss that is not finite.
    """
    directory = stage.dir / "model"
    if directory.is_dir():  # written whole, after the last update: an earlier start of this stage came to its end
        return load_scalar_model(directory, start.device)._replace(name=stage.name)

    # 1. Data
    examples = encode_groups(start, groups, config, weights or {}, stage.name)
    valid_examples = encode_groups(start, valid, config, {}, f"{stage.name} (valid)") if valid else []
    steps_per_epoch = -(-len(examples) // config.batch_size)
    num_steps = config.num_epochs * steps_per_epoch

    # 2. Model and state
    untrained = scalar_model_from(start, seed=stream_seed(seed, "reward", "head"), trunk="shared")
    scalar = start_of_training(untrained, config.lora, seed=stream_seed(seed, "reward", "adapter"), name=stage.name)
    optimizer = config.optimizer.make(scalar.model)
    checkpointer = Checkpointer(stage.dir / "checkpoints")
    state = checkpointer.load()
    if state is None:
        stage.log(0, evaluate_groups(scalar, valid_examples, config))
    else:
        restore_training(state.tensors, scalar.model, optimizer)
    steps_done = state.step if state else 0

    # 3. Loop
    compiled = compile_trunks([scalar.model], config.compile, scalar.device, stage.name, dropout=config.lora.dropout)
    progress = stage.progress(num_steps)
    for step in range(steps_done, num_steps):
        epoch, place = divmod(step, steps_per_epoch)
        order = permutation(len(examples), seed, "reward", "order", epoch)
        chosen = [examples[i] for i in order[place * config.batch_size :][: config.batch_size]]
        set_lr(optimizer, config.optimizer.lr_at(step, num_steps))
        masks = stream_seed(seed, "reward", "dropout", step)
        with compiled():
            metrics = update(scalar, optimizer, chosen, config, masks, f"{stage.name}, step {step + 1}")
        if step + 1 == num_steps:
            metrics |= evaluate_groups(scalar, valid_examples, config)
        stage.log(step + 1, {**metrics, "epoch": (step + 1) / steps_per_epoch})
        if (step + 1) % config.checkpoint_every == 0:
            checkpointer.save(step + 1, training_tensors(scalar.model, optimizer))
        progress.show(step + 1, f"loss {metrics['loss']:.3f}")

    # 4. Result
    scalar = end_of_training(scalar, config.lora)
    scalar = set_mean_score(scalar, demonstrations) if demonstrations else scalar
    save_scalar_model(scalar, directory)
    checkpointer.clear()
    return scalar


def set_mean_score(scalar: ScalarModel, demonstrations: Sequence[Demonstrated]) -> ScalarModel:
    """Return the model with the offset that puts the mean score of `demonstrations` at 0 (InstructGPT, section 3.5).

    `save_scalar_model` keeps the offset. Raises `InputError` without demonstrations.
    """
    if not demonstrations:
        raise InputError("reward model: no demonstrations to set the mean score with; expected at least one")
    sequences = [encode_completion(scalar.chat, item.prompt, item.demonstration) for item in demonstrations]
    mean = float(score_sequences(scalar, sequences).double().mean())
    return scalar._replace(offset=scalar.offset + mean)


# ----------------------------------------------------------------------------------------------------------- data


class PairSettings(Protocol):
    """What `encode_groups` reads of the settings of a trainer on comparisons."""

    @property
    def ties(self) -> Literal["drop", "half"]:
        """What becomes of tied pairs."""

    @property
    def max_length(self) -> int | None:
        """Most tokens of a prompt with one completion."""


class EncodedGroup(NamedTuple):
    """A prompt's completions as tokens, and the pairs among them that count. Completions in no pair are left out."""

    sequences: list[TokenSequence]
    pairs: list[Pair]
    weight: float
    source: Source
    reference_logprobs: tuple[float, ...] = ()
    """Of each completion under the reference policy, in nats; filled in by `dpo.py`."""

    @property
    def tree(self) -> PromptTree:
        """The prompt once, with its completions."""
        num_prompt = self.sequences[0].num_prompt_tokens
        prompt_ids = self.sequences[0].token_ids[:num_prompt]
        return PromptTree(prompt_ids, [sequence.token_ids[num_prompt:] for sequence in self.sequences])


def encode_groups(
    lm: LanguageModel,
    groups: Sequence[ComparisonGroup],
    config: PairSettings,
    weights: Mapping[Source, float],
    stage: str,
) -> list[EncodedGroup]:
    """Return the groups with at least one pair that counts, as tokens; what is left out is counted on stderr."""
    for source in weights:
        if source not in get_args(Source):
            raise InputError(f"{stage}: weights: no such source '{source}'{nearest(source, get_args(Source))}")
    limit = config.max_length or max_context(lm.model)
    encoded, num_undecided, num_long = [], 0, 0
    for group in groups:
        pairs = pairs_of(group.comparison.label, config.ties)
        used = sorted({item for pair in pairs for item in (pair.first, pair.second)})
        sequences = [encode_completion(lm.chat, group.prompt, group.completions[item]) for item in used]
        if not pairs:
            num_undecided += 1
        elif max(len(sequence.token_ids) for sequence in sequences) > limit:
            num_long += 1
        else:
            place = {item: k for k, item in enumerate(used)}
            kept = [Pair(place[pair.first], place[pair.second], pair.p_first_better) for pair in pairs]
            source = group.comparison.source
            encoded.append(EncodedGroup(sequences, kept, weights.get(source, 1.0), source))
    counts = f"{num_undecided} without a decided pair, {num_long} over {limit} tokens"
    if not encoded:
        raise InputError(f"{stage}: none of {len(groups)} comparisons can be used ({counts}); expected at least one")
    if num_undecided or num_long:
        print(f"{stage}: of {len(groups)} comparisons left out: {counts}", file=sys.stderr)
    return encoded


# ----------------------------------------------------------------------------------------------------- one update


def update(
    scalar: ScalarModel,
    optimizer: torch.optim.Optimizer,
    groups: Sequence[EncodedGroup],
    config: RewardConfig,
    dropout_seed: int,
    where: str,
) -> dict[str, float]:
    """Take one optimizer step at the rate that is set; return its metrics. Raises `InputError` if not finite."""
    optimizer.zero_grad()

    def of_part(numbered: tuple[int, list[EncodedGroup]], backward: Backward) -> GroupLoss:
        number, part = numbered
        with adapter_dropout(scalar.model, config.lora.dropout, stream_seed(dropout_seed, number)):
            scores = score_groups(scalar, part, config)
        result = group_ranking_loss(scores, pair_targets(part, len(groups), scalar))
        backward(result.loss)
        return result._replace(loss=result.loss.detach())

    parts, at_once = parts_at_once(scalar, groups, config.max_tokens, config.lora)
    results = accumulate([scalar.model], enumerate(parts), of_part, at_once)
    loss, num_decided = sum(result.loss.item() for result in results), sum(result.num_decided for result in results)
    num_correct, num_pairs = sum(r.num_correct.item() for r in results), sum(len(group.pairs) for group in groups)
    check_finite(loss, "the loss", where)
    grad_norm = check_finite(clip_gradients(scalar.model, config.optimizer.max_grad_norm), "the gradient's norm", where)
    optimizer.step()
    lr = optimizer.param_groups[0]["lr"]
    metrics = {"loss": loss, "pairs": num_pairs, "grad_norm": grad_norm, "lr": lr}
    return metrics | ({"accuracy": num_correct / num_decided} if num_decided else {})


def parts_at_once(
    lm: ScalarModel | LanguageModel, groups: Sequence[EncodedGroup], max_tokens: int, lora: LoRAConfig
) -> tuple[Iterator[list[EncodedGroup]], int]:
    """Return the groups in parts for a model, and how many of these are computed at the same time."""
    units, draws_masks = [num_tokens_of(group) for group in groups], lora.dropout > 0  # by hooks that all would meet
    at_once = 1 if draws_masks else num_at_once([lm.model], lm.device, units, max_tokens)
    return micro_batches(groups, share_of_budget(units, max_tokens, at_once)), at_once


def micro_batches(groups: Sequence[EncodedGroup], max_tokens: int) -> Iterator[list[EncodedGroup]]:
    """Yield the groups in parts of at most `max_tokens` tokens; none is cut, since its pairs couple its scores.

    As the loss is a sum over groups, the gradients of the parts add up to that of the whole.
    """
    part: list[EncodedGroup] = []
    for group in sorted(groups, key=num_tokens_of):
        if part and (len(part) + 1) * num_tokens_of(group) > max_tokens:
            yield part
            part = []
        part.append(group)
    yield part


def num_tokens_of(group: EncodedGroup) -> int:
    """Return the tokens of a group's sequences, the prompt counted with each."""
    return sum(len(sequence.token_ids) for sequence in group.sequences)


def score_groups(scalar: ScalarModel, groups: Sequence[EncodedGroup], config: RewardConfig) -> Tensor:
    """Return the scores [S] of all completions of `groups`, group by group; gradients flow. One pass per completion."""
    device = scalar.device.torch_device
    if config.share_prompt and can_share_prompt(scalar.model):
        batch = make_tree_batch([group.tree for group in groups], device)
        with scalar.device.autocast():
            return token_values(scalar, tree_end_states(scalar.model, batch))
    sequences = [sequence for group in groups for sequence in group.sequences]
    scores, indices = [], []
    with scalar.device.autocast():
        for rows in make_batches(sequences, max_tokens=config.max_tokens, pack=True):
            scores.append(last_token_scores(scalar, rows))
            indices += [place.original for place in rows.sequence_rows]
    return torch.cat(scores)[torch.tensor(indices, device=device).argsort()]


def pair_targets(groups: Sequence[EncodedGroup], num_groups: int, scalar: ScalarModel | LanguageModel) -> PairTargets:
    """Return the pairs of `groups` as tensors; `num_groups` is the number in the whole optimizer batch."""
    first, second, targets, weights = [], [], [], []
    base = 0
    for group in groups:
        for pair in group.pairs:
            first.append(base + pair.first)
            second.append(base + pair.second)
            targets.append(pair.p_first_better)
            weights.append(group.weight / len(group.pairs) / num_groups)
        base += len(group.sequences)
    device = scalar.device.torch_device
    return PairTargets(
        torch.tensor(first, device=device),
        torch.tensor(second, device=device),
        torch.tensor(targets, device=device),
        torch.tensor(weights, device=device),
    )


@torch.no_grad()
def evaluate_groups(scalar: ScalarModel, groups: Sequence[EncodedGroup], config: RewardConfig) -> dict[str, float]:
    """Return loss and pair accuracy on held-out groups, the accuracy by source too; nothing if there are no groups."""
    metrics: dict[str, float] = {}
    loss, num_correct, num_decided = 0.0, 0.0, 0
    for source in sorted({group.source for group in groups}):
        results = [
            group_ranking_loss(score_groups(scalar, part, config), pair_targets(part, len(groups), scalar))
            for part in micro_batches([group for group in groups if group.source == source], config.max_tokens)
        ]
        correct, decided = sum(r.num_correct.item() for r in results), sum(r.num_decided for r in results)
        if decided:
            metrics[f"valid_accuracy/{source}"] = correct / decided
        loss += sum(result.loss.item() for result in results)
        num_correct += correct
        num_decided += decided
    return metrics | ({"valid_loss": loss, "valid_accuracy": num_correct / num_decided} if num_decided else {})
