"""Log-probabilities of given continuations of a prompt: multiple choice, with the prompt computed once.

All options of a prompt copy its keys and values and run in one forward pass behind them. What is returned equals a
plain forward pass over prompt and option (`language_model.completion_logprobs`), at a fraction of the cost where the
prompt is long and the options are short.
"""

import math
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from qinglan.core.errors import InputError
from qinglan.core.records import Prompt
from qinglan.models.language_model import LanguageModel, max_context, token_logprobs
from qinglan.models.row_memory import MAX_FORWARD_TOKENS, RowMemory, dtype_of_keys, make_row_memory, model_facts


class _Item(NamedTuple):
    """One option of one prompt."""

    prompt: int
    option: int
    token_ids: list[int]


def score_options(lm: LanguageModel, prompts: Sequence[Prompt], options: Sequence[Sequence[str]]) -> list[list[float]]:
    """Return the log-probability, in nats, that a completion of each prompt begins with each of its options.

    The end of the completion is not part of an option: of two options, one should not begin with the other. Options are
    written as the chat template writes a completion. Raises `InputError` as `option_logprobs` does.
    """
    prompt_ids = [lm.chat.prompt_ids(prompt.messages) for prompt in prompts]
    option_ids = [[lm.chat.completion_ids(text)[:-1] for text in texts] for texts in options]
    return [[float(one.sum()) for one in row] for row in option_logprobs(lm, prompt_ids, option_ids)]


def option_logprobs(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    options: Sequence[Sequence[Sequence[int]]],
    *,
    temperature: float = 1.0,
    memory_budget_mib: int = 1024,
) -> list[list[Tensor]]:
    """Return the log-probability of every token of every option, as [prompt][option] -> fp32 [tokens] on the CPU, nats.

    Args:
        lm: the model that scores.
        prompts: token ids that end exactly where an option begins.
        options: for each prompt the token ids of its options.
        temperature: of the distribution that is scored.
        memory_budget_mib: memory for the rows that are scored together, in MiB.

    Raises:
        InputError: a prompt or an option is empty, or both together exceed the context; the budget holds no row.
    """
    if temperature <= 0:
        raise InputError(f"temperature: {temperature}; expected more than 0 to score tokens")
    if len(options) != len(prompts):
        raise InputError(f"options: got {len(options)} lists for {len(prompts)} prompts; expected one for each")
    found: list[list[Tensor]] = [[torch.empty(0)] * len(row) for row in options]
    items = [
        _Item(number, index, list(option)) for number, row in enumerate(options) for index, option in enumerate(row)
    ]
    _check_items(lm, prompts, items)
    if not items:
        return found
    # The longest go first, so that rows of similar length stand together; the options of a prompt stay together.
    items.sort(key=lambda item: (-len(prompts[item.prompt]), item.prompt))
    dtype = dtype_of_keys(lm)
    with torch.no_grad(), lm.device.autocast():
        facts = model_facts(lm.model, lm.name, dtype)
        longest = max(len(item.token_ids) for item in items)
        width = len(prompts[items[0].prompt]) + longest
        num_rows = (memory_budget_mib << 20) // (facts.bytes_per_token * width)
        if num_rows == 0:
            raise InputError(
                f"memory_budget_mib: {memory_budget_mib} MiB hold no row; a row of {width} tokens takes "
                f"{math.ceil(facts.bytes_per_token * width / 2**20)} MiB; give at least that"
            )
        num_rows = min(num_rows, len(items), max(1, MAX_FORWARD_TOKENS // longest))
        memory = make_row_memory(lm.model, facts, num_rows, width, dtype)
        for start in range(0, len(items), num_rows):
            part = items[start : start + num_rows]
            for item, logprobs in zip(part, _score(lm, prompts, part, memory, temperature), strict=True):
                found[item.prompt][item.option] = logprobs
    return found


def _score(
    lm: LanguageModel, prompts: Sequence[Sequence[int]], items: Sequence[_Item], memory: RowMemory, temperature: float
) -> list[Tensor]:
    """Return the log-probabilities of each item's tokens; items of one prompt stand next to each other."""
    slot = 0
    for number, group in groupby(items, key=lambda item: item.prompt):
        slots = list(range(slot, slot + len(list(group))))
        memory.prefill([prompts[number][:-1]], slots, [0] * len(slots))
        slot += len(slots)
    longest = max(len(item.token_ids) for item in items)
    tokens = torch.zeros(len(items), longest, dtype=torch.long)
    for row, item in zip(tokens, items, strict=True):
        # The prompt's last token predicts the option's first; the option's last token predicts nothing.
        fed = [prompts[item.prompt][-1], *item.token_ids[:-1]]
        row[: len(fed)] = torch.tensor(fed)
    starts = torch.tensor([len(prompts[item.prompt]) - 1 for item in items])
    positions = starts[:, None] + torch.arange(longest)
    device = lm.model.device
    states = memory.extend(tokens.to(device), positions.to(device), int(positions.max()) + 1)[: len(items)]
    lengths = [len(item.token_ids) for item in items]
    predicting = torch.cat([row[:length] for row, length in zip(states, lengths, strict=True)])
    targets = torch.tensor([token for item in items for token in item.token_ids], device=device)
    scored = token_logprobs(lm.model, predicting, targets, temperature=temperature, with_entropy=False)
    return list(scored.logprobs.cpu().clone().split(lengths))


def _check_items(lm: LanguageModel, prompts: Sequence[Sequence[int]], items: Sequence[_Item]) -> None:
    context = max_context(lm.model)
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise InputError(f"prompt {number}: has no tokens; expected at least one")
    for item in items:
        length = len(prompts[item.prompt]) + len(item.token_ids)
        if not item.token_ids:
            raise InputError(f"option {item.option} of prompt {item.prompt}: has no tokens; expected at least one")
        if length > context:
            raise InputError(
                f"option {item.option} of prompt {item.prompt}: {length} tokens with its prompt exceed the context of "
                f"{lm.name}, {context} tokens; shorten the prompt or the option"
            )
