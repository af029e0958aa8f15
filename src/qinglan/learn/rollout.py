"""A rollout: the completions of one iteration with everything that is computed once for them, before any update.

Token ids travel: what was sampled is what is scored and trained on, and text is never tokenised again on the way.

Legend: E episodes (one prompt, one completion), T tokens of the longest completion.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from qinglan.core.files import write_text
from qinglan.core.records import Completion, FinishReason, Prompt
from qinglan.core.rng import permutation
from qinglan.core.run import Stage
from qinglan.learn.advantages import pad_rows
from qinglan.models.completion_rows import completion_states, make_completion_batches, states_before
from qinglan.models.generate import SamplingConfig, completion_record, generate
from qinglan.models.heads import ScalarModel, token_values
from qinglan.models.language_model import LanguageModel, TokenSequence, token_logprobs


class Rollout(NamedTuple):
    """Sampled episodes; those of one prompt stand side by side. Tensors lie on the CPU."""

    prompts: list[Prompt]
    completions: list[Completion]
    sequences: list[TokenSequence]
    """Prompt and completion as token ids."""
    finish_reasons: list[FinishReason]
    completion_mask: Bool[Tensor, "E T"]
    """True where a token was sampled, the end token included."""
    logprobs: Float[Tensor, "E T"]
    """Of the sampled tokens under the policy that sampled them, in nats."""

    @property
    def lengths(self) -> Tensor:
        """Tokens of each completion, int64 [E]."""
        return self.completion_mask.sum(dim=1)


class StateValues(NamedTuple):
    """What the value model says before any update."""

    values: Float[Tensor, "E T"]
    """Value of the state before each sampled token."""
    end_values: Float[Tensor, " E"]
    """Value after the last token, read only where an episode was cut short."""


def prompt_positions(num_prompts: int, start: int, count: int, seed: int) -> Iterator[int]:
    """Yield the indices of the prompts number `start` .. `start + count - 1` of an endless, shuffled pass over all."""
    orders: dict[int, list[int]] = {}
    for position in range(start, start + count):
        epoch, place = divmod(position, num_prompts)
        if epoch not in orders:
            orders[epoch] = permutation(num_prompts, seed, "ppo", "prompts", epoch)
        yield orders[epoch][place]


def draw_rollout(
    policy: LanguageModel,
    prompts: Sequence[Prompt],
    prompt_ids: Sequence[list[int]],
    sampling: SamplingConfig,
    *,
    seed: int,
    num_samples: int,
) -> Rollout:
    """Sample `num_samples` completions of each prompt; the sampler's log-probabilities become the old ones."""
    drawn = generate(policy, prompt_ids, sampling, seed=seed, num_samples=num_samples)
    episodes = [
        (prompt, ids, sample, index)
        for prompt, ids, samples in zip(prompts, prompt_ids, drawn, strict=True)
        for index, sample in enumerate(samples)
    ]
    logprobs, mask = pad_rows([torch.tensor(sample.logprobs, dtype=torch.float32) for _, _, sample, _ in episodes])
    return Rollout(
        prompts=[prompt for prompt, *_ in episodes],
        completions=[
            completion_record(policy, prompt, sample, sampling, seed=seed, index=index)
            for prompt, _, sample, index in episodes
        ],
        sequences=[TokenSequence([*ids, *sample.token_ids], len(ids)) for _, ids, sample, _ in episodes],
        finish_reasons=[sample.finish_reason for _, _, sample, _ in episodes],
        completion_mask=mask,
        logprobs=logprobs,
    )


def rollout_logprobs(lm: LanguageModel, rollout: Rollout, temperature: float, max_tokens: int) -> Float[Tensor, "E T"]:
    """Return the log-probabilities of the sampled tokens under any model, of the distribution at `temperature`."""
    found = torch.zeros_like(rollout.logprobs)
    with torch.no_grad(), lm.device.autocast():
        everything = range(len(rollout.sequences))
        for batch in make_completion_batches(rollout.sequences, everything, [lm.model], max_tokens=max_tokens):
            states = states_before(lm.model, batch)
            scored = token_logprobs(
                lm.model, states, batch.completion_ids, temperature=temperature, with_entropy=False
            ).logprobs.cpu()
            _put(found, rollout, batch.numbers, scored)
    return found


def state_values(value: ScalarModel, rollout: Rollout, max_tokens: int) -> StateValues:
    """Return the value of every state of the rollout, without a gradient: V(s_t) stands at the token before a_t."""
    values, end_values = torch.zeros_like(rollout.logprobs), torch.empty(len(rollout.sequences))
    with torch.no_grad(), value.device.autocast():
        everything = range(len(rollout.sequences))
        for batch in make_completion_batches(rollout.sequences, everything, [value.model], max_tokens=max_tokens):
            states = completion_states(value.model, batch)
            _put(values, rollout, batch.numbers, token_values(value, states.before).cpu())
            end_values[batch.numbers] = token_values(value, states.ends).cpu()
    return StateValues(values, end_values)


def _put(table: Float[Tensor, "E T"], rollout: Rollout, episodes: list[int], values: Float[Tensor, " N"]) -> None:
    """Write values of sampled tokens, episode by episode, into the rows of these episodes."""
    rows = torch.zeros(len(episodes), table.shape[1])
    rows[rollout.completion_mask[episodes]] = values
    table[episodes] = rows


def log_samples(stage: Stage, step: int, rollout: Rollout, scores: Sequence[float], count: int) -> None:
    """Append `count` episodes to the run's samples.jsonl: {stage, step, prompt, completion, score}.

    They are spread over the rollout, since the samples of one prompt stand side by side.
    """
    episodes = list(zip(rollout.prompts, rollout.completions, scores, strict=True))
    with (stage.run.dir / "samples.jsonl").open("a", encoding="utf-8") as out:
        for prompt, completion, score in episodes[:: max(1, len(episodes) // max(1, count))][:count]:
            row: dict[str, Any] = {"stage": stage.name, "step": step, "prompt": _text_of(prompt)}
            row |= {"completion": completion.text, "score": score}
            out.write(json.dumps(row, ensure_ascii=False) + "\n")


def forget_samples(stage: Stage, from_step: int) -> None:
    """Remove the samples that an interrupted run wrote from `from_step` on: they are written again."""
    path = stage.run.dir / "samples.jsonl"
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        write_text(path, "".join(line for line in lines if not _is_outdated(line, stage.name, from_step)))


def _is_outdated(line: str, stage: str, from_step: int) -> bool:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return True  # cut short by a crash; what it was to say is written again
    return row["stage"] == stage and row["step"] >= from_step


def _text_of(prompt: Prompt) -> str:
    """Return the prompt's text: one user turn as it is, a longer conversation with its roles."""
    if len(prompt.messages) == 1:
        return prompt.messages[0].content
    return "\n".join(f"{message.role}: {message.content}" for message in prompt.messages)
