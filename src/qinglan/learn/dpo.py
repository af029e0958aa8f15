"""Direct preference optimization: a policy fitted to comparisons without a reward model (Rafailov et al. 2023).

The optimum of reward minus beta times KL is a policy whose log-ratio to the reference is the reward over beta, up to a
constant of the prompt. So beta (log pi - log pi_ref) is scored as a reward model's score would be, with the same loss
over the same comparisons as in `reward.py`: rankings of K completions, and probabilities as they are. IPO (Azar et al.
2024) replaces the logistic loss by a squared distance, which stays finite where labels are certain. Both may be joined
by the likelihood of the best completions (Pang et al. 2024):

    L = L_preference + sft_coef * 1/G * sum over prompts g of w_g * mean over the best y of g of -log pi(y|x) / |y|

    policy = train_dpo(start, groups, DPOConfig(), stage=run.stage("dpo"), seed=0)

The reference is the policy's start. Its log-probabilities are computed once, before the first update, and every K
completions are read once each, sharing the computation of their prompt where the architecture allows. Departures: AdamW
for RMSprop; gradients are clipped; the mean over pairs is taken within a prompt first, then over prompts.
"""

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Literal, NamedTuple, Self

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from qinglan.core.config import Config
from qinglan.core.errors import InputError
from qinglan.core.records import ComparisonGroup, Completion, Pair, Prompt, Scorer, Source
from qinglan.core.rng import permutation, stream_seed
from qinglan.core.run import Stage
from qinglan.learn.batch import make_batches
from qinglan.learn.checks import MAX_MEAN_RATIO_ERROR
from qinglan.learn.compiling import compile_trunks
from qinglan.learn.dropout import adapter_dropout
from qinglan.learn.encode import encode_completion
from qinglan.learn.gradients import Backward, accumulate
from qinglan.learn.losses import GroupLoss, group_policy_loss
from qinglan.learn.optimize import (
    Checkpointer,
    OptimizerConfig,
    check_finite,
    clip_gradients,
    restore_training,
    set_lr,
    training_tensors,
)
from qinglan.learn.reward import EncodedGroup, encode_groups, micro_batches, pair_targets, parts_at_once
from qinglan.models.adapters import LoRAConfig
from qinglan.models.language_model import (
    LanguageModel,
    completion_logprobs,
    end_of_training,
    load_language_model,
    save_language_model,
    start_of_training,
    target_logprobs,
    target_states,
)
from qinglan.models.prompt_sharing import can_share_prompt, make_tree_batch, tree_logprobs


class DPOConfig(Config):
    """Preference optimization without a reward model; the defaults suit models of 0.2 to 2 million parameters."""

    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=3e-4)
    """AdamW and its cosine schedule."""
    loss: Literal["dpo", "ipo"] = "dpo"
    """Logistic loss (Rafailov et al. 2023, equation 7) or squared distance (Azar et al. 2024, equation 17)."""
    beta: float = Field(default=0.1, gt=0)
    """Price of KL to the reference, in logits per nat (Rafailov et al.: 0.1); for "ipo" its tau."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of the labels taken to be swapped (Mitchell 2023, conservative DPO); with "dpo" only."""
    sft_coef: float = Field(default=0.0, ge=0)
    """Weight of the best completions' negative log-likelihood, in nats per token (Pang et al. 2024: 1)."""
    num_epochs: int = Field(default=1, ge=1)
    """Passes over the comparisons."""
    batch_size: int = Field(default=8, ge=1)
    """Prompts per update, each with all its pairs (Rafailov et al.: 64 pairs)."""
    ties: Literal["drop", "half"] = "drop"
    """Tied pairs are left out, or count as probability one half."""
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
        """Return appendix B of Rafailov et al.: beta 0.1, rate 1e-6, batch 64; its 150 steps of warm-up as a tenth."""
        optimizer = OptimizerConfig(learning_rate=1e-6, final_lr_fraction=1.0, warmup_fraction=0.1)
        return cls(optimizer=optimizer, beta=0.1, batch_size=64)

    @model_validator(mode="after")
    def _smoothing_is_dpos(self) -> Self:
        if self.label_smoothing and self.loss != "dpo":
            raise ValueError(f'label_smoothing belongs to loss "dpo", not "{self.loss}"; set it to 0')
        return self


def train_dpo(
    start: LanguageModel,
    groups: Sequence[ComparisonGroup],
    config: DPOConfig,
    *,
    stage: Stage,
    seed: int,
    reference: LanguageModel | None = None,
    weights: Mapping[Source, float] | None = None,
    valid: Sequence[ComparisonGroup] = (),
) -> LanguageModel:
    """Return a copy of `start` fitted to `groups`, also saved as a model directory in `stage.dir/"model"`.

    Args:
        start: where training starts; it is not changed.
        groups: prompts with K completions and how they were judged; those without a decided pair are left out.
        config: settings.
        stage: folder for checkpoints and result; a killed stage goes on from its last checkpoint, bit-identical on CPU.
        seed: decides the order.
        reference: the policy that KL is measured to; default: `start`.
        weights: factor of the loss by the comparison's source; a source that is not named has 1.
        valid: held-out comparisons; what is measured on them is logged before the first and after the last update.

    Raises:
        InputError: nothing to train on, an unknown source, a loss that is not finite, or a policy that does not score
            its own completions as its reference does before the first update.
    """
    directory = stage.dir / "model"
    if directory.is_dir():  # written whole, after the last update: an earlier start of this stage came to its end
        return load_language_model(directory, start.device)._replace(name=stage.name)

    # 1. Data
    examples = encode_groups(start, groups, config, weights or {}, stage.name)
    valid_examples = encode_groups(start, valid, config, {}, f"{stage.name} (valid)") if valid else []
    steps_per_epoch = -(-len(examples) // config.batch_size)
    num_steps = config.num_epochs * steps_per_epoch

    # 2. Log-probabilities of the reference, once; policy and state
    checkpointer = Checkpointer(stage.dir / "checkpoints")
    state = checkpointer.load()
    known = None if state is None else state.tensors["reference_logprobs"]
    if known is None:
        known = reference_logprobs(reference or start, [*examples, *valid_examples], config)
    both = with_reference([*examples, *valid_examples], known)
    examples, valid_examples = both[: len(examples)], both[len(examples) :]
    policy = start_of_training(start, config.lora, seed=stream_seed(seed, "dpo", "adapter"), name=stage.name)
    optimizer = config.optimizer.make(policy.model)
    if state is None:
        found = check_start(policy, examples[: config.batch_size], config, stage.name, is_reference=reference is None)
        stage.log(0, found | evaluate_groups(policy, valid_examples, config))
    else:
        restore_training(state.tensors, policy.model, optimizer)
    steps_done = state.step if state else 0

    # 3. Loop
    compiled = compile_trunks([policy.model], config.compile, policy.device, stage.name, dropout=config.lora.dropout)
    progress = stage.progress(num_steps)
    for step in range(steps_done, num_steps):
        epoch, place = divmod(step, steps_per_epoch)
        order = permutation(len(examples), seed, "dpo", "order", epoch)
        chosen = [examples[i] for i in order[place * config.batch_size :][: config.batch_size]]
        set_lr(optimizer, config.optimizer.lr_at(step, num_steps))
        masks = stream_seed(seed, "dpo", "dropout", step)
        with compiled():
            metrics = update(policy, optimizer, chosen, config, masks, f"{stage.name}, step {step + 1}")
        if step + 1 == num_steps:
            metrics |= evaluate_groups(policy, valid_examples, config)
        stage.log(step + 1, {**metrics, "epoch": (step + 1) / steps_per_epoch})
        if (step + 1) % config.checkpoint_every == 0:
            tensors = training_tensors(policy.model, optimizer) | {"reference_logprobs": known}
            checkpointer.save(step + 1, tensors)
        progress.show(step + 1, f"loss {metrics['loss']:.3f}")

    # 4. Result
    policy = end_of_training(policy, config.lora)
    save_language_model(policy, directory)
    checkpointer.clear()
    return policy


# ------------------------------------------------------------------------------------------------ log-probabilities


def group_logprobs(lm: LanguageModel, groups: Sequence[EncodedGroup], config: DPOConfig) -> Float[Tensor, " S"]:
    """Return the log-probability of every whole completion, group by group, in nats; gradients flow."""
    device = lm.device.torch_device
    if config.share_prompt and can_share_prompt(lm.model):
        with lm.device.autocast():
            return tree_logprobs(lm.model, make_tree_batch([group.tree for group in groups], device))
    sequences = [sequence for group in groups for sequence in group.sequences]
    total = torch.zeros(len(sequences), device=device)
    for batch in make_batches(sequences, max_tokens=config.max_tokens, pack=True):
        batch = batch.to(device)
        with lm.device.autocast():
            states = target_states(lm.model, batch)
            logprobs = target_logprobs(lm.model, states, batch, with_entropy=False).logprobs
        owners = torch.tensor([place.original for place in batch.sequence_rows], device=device)
        lengths = torch.tensor(batch.lengths, device=device)
        total = total.index_add(0, owners.repeat_interleave(lengths), logprobs)
    return total


@torch.no_grad()
def reference_logprobs(lm: LanguageModel, groups: Sequence[EncodedGroup], config: DPOConfig) -> Float[Tensor, " S"]:
    """Return the log-probability of every completion of `groups` under the reference, in order, on the CPU."""
    places = {id(group): place for place, group in enumerate(groups)}
    found: list[Tensor] = [torch.empty(0)] * len(groups)
    for part in micro_batches(groups, config.max_tokens):
        sizes = [len(group.sequences) for group in part]
        for group, values in zip(part, group_logprobs(lm, part, config).cpu().split(sizes), strict=True):
            found[places[id(group)]] = values
    return torch.cat(found)


def with_reference(groups: Sequence[EncodedGroup], logprobs: Float[Tensor, " S"]) -> list[EncodedGroup]:
    """Return the groups with their shares of the reference's log-probabilities."""
    shares = logprobs.split([len(group.sequences) for group in groups])
    return [
        group._replace(reference_logprobs=tuple(share.tolist())) for group, share in zip(groups, shares, strict=True)
    ]


def as_implicit_scorer(policy: LanguageModel, reference: LanguageModel, beta: float, max_tokens: int = 8192) -> Scorer:
    """Return the reward model that the policy secretly is: beta (log pi(y|x) - log pi_ref(y|x)), in logits.

    Rafailov et al. 2023, equation 5, without its term of the prompt alone, which no comparison of completions sees.
    """

    def score(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
        sequences = [encode_completion(policy.chat, *both) for both in zip(prompts, completions, strict=True)]
        ours, theirs = (completion_logprobs(lm, sequences, max_tokens=max_tokens) for lm in (policy, reference))
        return [beta * float((one - other).sum()) for one, other in zip(ours, theirs, strict=True)]

    return score


def check_start(
    policy: LanguageModel, groups: Sequence[EncodedGroup], config: DPOConfig, stage: str, *, is_reference: bool
) -> dict[str, float]:
    """Check on the first groups that the policy starts at its reference: every log-ratio is 0, DPO's loss log 2.

    Returns what is logged at step 0. Raises `InputError` where policy and reference are one model and disagree: dropout
    left on, or completions cut otherwise on one side.
    """
    error, found = 0.0, Tally()
    with torch.no_grad():
        for part in micro_batches(groups, config.max_tokens):
            result = policy_loss(policy, part, len(groups), config)
            per_token = result.logratios.cpu() / torch.tensor(lengths_of(part))
            error, found = max(error, float(per_token.abs().max())), found.add(result.tally)
    most = MAX_MEAN_RATIO_ERROR[policy.device.compute_dtype]
    if is_reference and not error <= most:
        raise InputError(
            f"{stage}: before any update the policy must score completions as its reference does; the log-ratio is "
            f"{error:.1e} nats per token (at most {most:.0e}); the model draws random numbers when it scores, or its "
            "matmuls are too coarse; turn dropout off, or use float32"
        )
    return {"start/logratio_error": error, "start/loss": found.loss}


# ----------------------------------------------------------------------------------------------------- one update


class Tally(NamedTuple):
    """Sums over the groups of a batch, for the log."""

    loss: float = 0.0
    preference_loss: float = 0.0
    sft_loss: float = 0.0
    num_pairs: float = 0
    num_decided: float = 0
    num_correct: float = 0.0
    margin: float = 0.0
    best_logratio: float = 0.0
    other_logratio: float = 0.0
    num_best: float = 0
    num_others: float = 0

    def add(self, other: "Tally") -> "Tally":
        """Return the tally of both."""
        return Tally(*(a + b for a, b in zip(self, other, strict=True)))

    def metrics(self, config: DPOConfig) -> dict[str, float]:
        """Return what is logged: losses, and means over decided pairs and over completions."""
        found = {"loss": self.loss, "pairs": self.num_pairs}
        if config.sft_coef:
            found |= {"preference_loss": self.preference_loss, "sft_loss": self.sft_loss}
        if self.num_decided:
            found |= {"accuracy": self.num_correct / self.num_decided, "margin": self.margin / self.num_decided}
        if self.num_best:
            found["chosen_logratio"] = self.best_logratio / self.num_best
        if self.num_others:
            found["rejected_logratio"] = self.other_logratio / self.num_others
        return found


class PolicyBatchLoss(NamedTuple):
    """The loss of some groups of a batch, their log-ratios to the reference, and what is logged."""

    loss: Float[Tensor, ""]
    logratios: Float[Tensor, " S"]
    tally: Tally


def policy_loss(
    policy: LanguageModel, groups: Sequence[EncodedGroup], num_groups: int, config: DPOConfig
) -> PolicyBatchLoss:
    """Return the loss of `groups`, which are some of the `num_groups` of an optimizer batch; gradients flow."""
    device = policy.device.torch_device
    logprobs = group_logprobs(policy, groups, config)
    reference = torch.tensor([value for group in groups for value in group.reference_logprobs], device=device)
    logratios = logprobs - reference
    preference: GroupLoss = group_policy_loss(
        logratios, pair_targets(groups, num_groups, policy),
        kind=config.loss, beta=config.beta, label_smoothing=config.label_smoothing,
    )  # fmt: skip
    is_best = torch.tensor([one for group in groups for one in best_of(group)], device=device)
    shares = [
        group.weight / sum(best_of(group)) / num_groups if one else 0.0 for group in groups for one in best_of(group)
    ]
    per_token = logprobs / torch.tensor(lengths_of(groups), device=device)
    sft_loss = -(torch.tensor(shares, device=device) * per_token).sum()
    loss = preference.loss + config.sft_coef * sft_loss if config.sft_coef else preference.loss
    known = logratios.detach()
    tally = Tally(
        loss=loss.item(),
        preference_loss=preference.loss.item(),
        sft_loss=sft_loss.item(),
        num_pairs=sum(len(group.pairs) for group in groups),
        num_decided=preference.num_decided,
        num_correct=preference.num_correct.item(),
        margin=preference.margins.item(),
        best_logratio=known[is_best].sum().item(),
        other_logratio=known[~is_best].sum().item(),
        num_best=int(is_best.sum()),
        num_others=int((~is_best).sum()),
    )
    return PolicyBatchLoss(loss, known, tally)


def best_of(group: EncodedGroup) -> list[bool]:
    """Return for each completion whether none of its pairs prefers the other: the ranking's first place."""
    beaten = {worse_of(pair) for pair in group.pairs if pair.p_first_better != 0.5}
    return [item not in beaten for item in range(len(group.sequences))]


def worse_of(pair: Pair) -> int:
    """Return the item of a decided pair that is less likely the better one."""
    return pair.second if pair.p_first_better > 0.5 else pair.first


def lengths_of(groups: Sequence[EncodedGroup]) -> list[int]:
    """Return the number of tokens of each completion, end token included, group by group."""
    return [len(ids) for group in groups for ids in group.tree.completion_ids]


def update(
    policy: LanguageModel,
    optimizer: torch.optim.Optimizer,
    groups: Sequence[EncodedGroup],
    config: DPOConfig,
    dropout_seed: int,
    where: str,
) -> dict[str, float]:
    """Take one optimizer step at the rate that is set; return its metrics. Raises `InputError` if not finite."""
    optimizer.zero_grad()

    def of_part(numbered: tuple[int, list[EncodedGroup]], backward: Backward) -> Tally:
        number, part = numbered
        with adapter_dropout(policy.model, config.lora.dropout, stream_seed(dropout_seed, number)):
            found = policy_loss(policy, part, len(groups), config)
        backward(found.loss)
        return found.tally

    parts, at_once = parts_at_once(policy, groups, config.max_tokens, config.lora)
    tally = reduce(Tally.add, accumulate([policy.model], enumerate(parts), of_part, at_once), Tally())
    check_finite(tally.loss, "the loss", where)
    grad_norm = check_finite(clip_gradients(policy.model, config.optimizer.max_grad_norm), "the gradient's norm", where)
    optimizer.step()
    return tally.metrics(config) | {"grad_norm": grad_norm, "lr": optimizer.param_groups[0]["lr"]}


@torch.no_grad()
def evaluate_groups(policy: LanguageModel, groups: Sequence[EncodedGroup], config: DPOConfig) -> dict[str, float]:
    """Return loss, accuracy, margin and log-ratios on held-out groups; nothing if there are no groups."""
    if not groups:
        return {}
    tally = Tally()
    for part in micro_batches(groups, config.max_tokens):
        tally = tally.add(policy_loss(policy, part, len(groups), config).tally)
    return {f"valid_{name}": value for name, value in tally.metrics(config).items() if name != "pairs"}
