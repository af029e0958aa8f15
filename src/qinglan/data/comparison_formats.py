"""Formats that hold comparisons: pairs (TRL, HH transcripts, ShareGPT, votes) and K-wise rankings with ties and gaps.

The raw label is kept: a ranking with tie groups, or the probability that the first item is better. Pairs are derived
later (`core.records.pairs_of`). `summarize_feedback` rows are those of Stiennon et al. 2020, with the paper's prompt
layout.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from qinglan.core.records import Label, Message, PreferenceProbability, Ranking
from qinglan.data.demonstration_formats import instruction_turns
from qinglan.data.fields import (
    Item,
    Parsed,
    completion_of,
    ending_with_user,
    label_text,
    list_of,
    make_group,
    make_prompt,
    mapping_of,
    messages_of,
    number_of,
    optional_text,
    prompt_turns,
    required,
    required_inside,
    text_of,
    transcript_turns,
)
from qinglan.data.rows import Row, RowProblem, shown

FIRST, SECOND, TIE = Ranking(groups=((0,), (1,))), Ranking(groups=((1,), (0,))), Ranking(groups=((0, 1),))


def parse_trl_preference(row: Row) -> Parsed:
    """TRL `prompt` + `chosen` + `rejected`; lists may repeat the prompt's turns. `p_chosen` makes it a soft label."""
    given = required(row.fields, "prompt")
    prompt = prompt_turns(given, "prompt")
    sides = {}
    for field in ("chosen", "rejected"):
        value = required(row.fields, field)
        if isinstance(value, list) and len(value) > 1:
            turns = messages_of(value, field)
            before, last = turns[:-1], turns[-1]
            repeats = before[-len(prompt) :] == prompt and all(turn.role == "system" for turn in before[: -len(prompt)])
            if last.role != "assistant" or not repeats:
                raise RowProblem(
                    field,
                    "several turns that do not repeat the prompt",
                    "one assistant turn, after the prompt or alone",
                )
            sides[field], prompt_here = last.content, before
            prompt = prompt_here if field == "chosen" else prompt
        else:
            sides[field] = completion_of(value, field)
    return pair(row, prompt, sides["chosen"], sides["rejected"])


def parse_implicit_preference(row: Row) -> Parsed:
    """TRL without a prompt column: `chosen` and `rejected` are conversations that differ in their last turn."""
    chosen = messages_of(required(row.fields, "chosen"), "chosen")
    rejected = messages_of(required(row.fields, "rejected"), "rejected")
    return shared_prompt(row, chosen, rejected)


def parse_hh(row: Row) -> Parsed:
    """HH transcripts: the prompt is all that stands before the last "Assistant:" turn, kept as messages."""
    sides = [transcript_turns(text_of(required(row.fields, field), field), field) for field in ("chosen", "rejected")]
    return shared_prompt(row, sides[0], sides[1])


def shared_prompt(row: Row, chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> Parsed:
    """Return the comparison of two conversations that share all turns but the last."""
    for field, turns in (("chosen", chosen), ("rejected", rejected)):
        if not turns or turns[-1].role != "assistant":
            raise RowProblem(field, "the conversation ends with a user's turn", "an assistant's turn at the end")
        ending_with_user(turns[:-1], field)
    if chosen[:-1] != rejected[:-1]:
        raise RowProblem("rejected", "its turns before the last differ from those of chosen", "one prompt for both")
    return pair(row, chosen[:-1], chosen[-1].content, rejected[-1].content)


def pair(row: Row, messages: tuple[Message, ...], chosen: str, rejected: str) -> Parsed:
    """Return a comparison whose first item is the chosen one; equal texts are refused."""
    if chosen == rejected:
        raise RowProblem("chosen/rejected", "the two are identical", "two different completions", "remove the row")
    prompt = make_prompt(row, messages)
    label: Label = FIRST
    if row.fields.get("p_chosen") is not None:
        label = PreferenceProbability(p_first_better=probability(row.fields["p_chosen"], "p_chosen"))
    given_id = label_text(row.fields, "id")
    items = [Item(chosen, producer(row.fields, "chosen_model")), Item(rejected, producer(row.fields, "rejected_model"))]
    return Parsed(
        row.place, given_id, (prompt,), comparisons=(make_group(row, prompt, items, label, given_id=given_id),)
    )


def producer(fields: Mapping[str, Any], *names: str) -> str:
    """Return who made a completion, or "unknown"."""
    return label_text(fields, *names) or "unknown"


def probability(value: Any, field: str) -> float:
    """Return a number in [0, 1]."""
    number = number_of(value, field, "a probability from 0 to 1")
    if not 0.0 <= number <= 1.0:
        raise RowProblem(field, f"found {shown(value)}", "a probability from 0 to 1")
    return number


def parse_sharegpt_preference(row: Row) -> Parsed:
    """ShareGPT `conversations` with `chosen` and `rejected`, each a message {from, value} or text."""
    messages = ending_with_user(messages_of(required(row.fields, "conversations"), "conversations"), "conversations")
    sides = [completion_of(required(row.fields, field), field) for field in ("chosen", "rejected")]
    return pair(row, messages, sides[0], sides[1])


def parse_k_wise(row: Row) -> Parsed:
    """`prompt` + `completions` + one of `ranking`, `ranks`, `p_first_better`; `labeler` and `id` are optional.

    `ranking` lists items best first, by number from 0 or by the completion's `id`; items in an inner list are tied;
    items left out were not ranked. `ranks` gives one number for each completion, 1 the best, equal numbers tied, null
    not ranked.
    """
    prompt = make_prompt(row, prompt_turns(required(row.fields, "prompt"), "prompt"))
    values = list_of(required(row.fields, "completions"), "completions", "a list of 2 or more completions")
    if len(values) < 2:
        raise RowProblem("completions", f"found {len(values)}", "2 or more completions")
    items = [item_of(value, f"completions[{number}]") for number, value in enumerate(values)]
    given = [name for name in ("ranking", "ranks", "p_first_better") if row.fields.get(name) is not None]
    if len(given) != 1:
        raise RowProblem(
            "ranking", f"found {' and '.join(given) or 'no label'}", "one of ranking, ranks, p_first_better"
        )
    value = row.fields[given[0]]
    label: Label
    if given[0] == "ranking":
        label = ranking_of(value, items)
    elif given[0] == "ranks":
        label = ranking_from_ranks(value, len(items))
    elif len(items) == 2:
        label = PreferenceProbability(p_first_better=probability(value, "p_first_better"))
    else:
        raise RowProblem("p_first_better", f"found {len(items)} completions", "exactly 2 completions")
    given_id = label_text(row.fields, "id")
    return Parsed(
        row.place, given_id, (prompt,), comparisons=(make_group(row, prompt, items, label, given_id=given_id),)
    )


def item_of(value: Any, field: str) -> Item:
    """Return a completion from text, messages, or an object {text | completion, id?, model?}."""
    if not isinstance(value, dict) or "role" in value or "from" in value:
        return Item(completion_of(value, field), "unknown")
    key = "completion" if "completion" in value and "text" not in value else "text"
    text = completion_of(required_inside(value, key, field), f"{field}.{key}")
    return Item(text, producer(value, "model", "producer_id", "generator"), label_text(value, "id"))


def ranking_of(value: Any, items: Sequence[Item]) -> Ranking:
    """Return the ranking in a list, best first, of item numbers or ids, tied ones in inner lists."""
    numbers: dict[str | int, int] = {number: number for number in range(len(items))}
    numbers |= {item.name: number for number, item in enumerate(items) if item.name is not None}
    groups = []
    for entry in list_of(value, "ranking", "a list of item numbers, best first"):
        tied = entry if isinstance(entry, list) else [entry]
        group = []
        for name in tied:
            if isinstance(name, bool) or not isinstance(name, int | str) or name not in numbers:
                there = f"one of the {len(items)} completions, numbered from 0 to {len(items) - 1}"
                raise RowProblem(
                    "ranking",
                    f"names an absent item, {shown(name)}",
                    there,
                    "number from 0, or name the completion's id",
                )
            group.append(numbers[name])
        groups.append(tuple(group))
    return checked_ranking([group for group in groups if group])


def ranking_from_ranks(value: Any, count: int) -> Ranking:
    """Return the ranking in a list of one rank per completion: lowest is best, equal ones tied, null not ranked."""
    ranks = list_of(value, "ranks", "a list of one number for each completion")
    if len(ranks) != count:
        raise RowProblem(
            "ranks",
            f"found {len(ranks)} ranks for {count} completions",
            "one rank for each completion (null if not ranked)",
        )
    ranked = sorted((number_of(rank, "ranks"), item) for item, rank in enumerate(ranks) if rank is not None)
    return checked_ranking([tuple(item for _, item in tied) for _, tied in groupby(ranked, key=lambda pair: pair[0])])


def checked_ranking(groups: Sequence[tuple[int, ...]]) -> Ranking:
    """Return a ranking of two or more different items."""
    named = [item for group in groups for item in group]
    twice = sorted({item for item in named if named.count(item) > 1})
    if twice:
        raise RowProblem("ranking", f"names item {twice[0]} twice", "every item at most once")
    if len(named) < 2:
        raise RowProblem("ranking", f"ranks {len(named)} items", "at least 2 ranked items")
    return Ranking(groups=tuple(groups))


def parse_summarize_feedback(row: Row) -> Parsed:
    """summarize-from-feedback: {info: {post | article, title}, summaries: [{text, policy}], choice, worker}."""
    info = mapping_of(required(row.fields, "info"), "info", "an object with post or article")
    summaries = list_of(required(row.fields, "summaries"), "summaries", "a list of 2 summaries")
    if len(summaries) != 2:
        raise RowProblem("summaries", f"found {len(summaries)}", "2 summaries")
    items = []
    for number, value in enumerate(summaries):
        field = f"summaries[{number}]"
        summary = mapping_of(value, field, "an object {text, policy}")
        items.append(
            Item(text_of(required_inside(summary, "text", field), f"{field}.text"), producer(summary, "policy"))
        )
    choice = required(row.fields, "choice")
    if isinstance(choice, bool) or choice not in (0, 1):
        raise RowProblem("choice", f"names an absent item, {shown(choice)}", "0 or 1, the better summary")
    source_id = label_text(info, "id")
    prompt = make_prompt(row, summary_prompt(info), group=f"document-{source_id}" if source_id else None)
    group = make_group(row, prompt, items, FIRST if choice == 0 else SECOND)
    return Parsed(row.place, None, (prompt,), comparisons=(group,))


def summary_prompt(info: Mapping[str, Any]) -> tuple[Message, ...]:
    """Return the text to summarise as the paper lays it out: subreddit, title, post, "TL;DR:"."""
    body = optional_text(info, "post") or optional_text(info, "article")
    if not body:
        raise RowProblem("info", "neither post nor article has text", "the text that was summarised")
    name = "POST" if optional_text(info, "post") else "ARTICLE"
    subreddit, title = optional_text(info, "subreddit"), optional_text(info, "title")
    lines = [f"SUBREDDIT: r/{subreddit}"] if subreddit else []
    lines += [f"TITLE: {title}"] if title else []
    return (Message(role="user", content="\n\n".join([*lines, f"{name}: {body}", "TL;DR:"])),)


def parse_alpaca_eval(row: Row) -> Parsed:
    """AlpacaEval: `preference` 1 = output_1, 2 = output_2, 1.5 or 0 = tie; others are 1 + P(output_2 better)."""
    given = number_of(required(row.fields, "preference"), "preference", "1, 2, or 1.5 for a tie")
    if given != 0 and not 1 <= given <= 2:
        raise RowProblem("preference", f"found {shown(given)}", "1, 2, or 1.5 for a tie")
    fixed: dict[float, Label] = {1.0: FIRST, 2.0: SECOND, 1.5: TIE, 0.0: TIE}
    label = fixed.get(given) or PreferenceProbability(p_first_better=2.0 - given)
    turns = instruction_turns(
        text_of(required(row.fields, "instruction"), "instruction"), optional_text(row.fields, "input")
    )
    prompt = make_prompt(row, turns, tags=(label_text(row.fields, "dataset"),))
    items = [
        Item(text_of(required(row.fields, f"output_{k}"), f"output_{k}"), producer(row.fields, f"generator_{k}"))
        for k in (1, 2)
    ]
    return Parsed(
        row.place, None, (prompt,), comparisons=(make_group(row, prompt, items, label, source="principle_model"),)
    )


def parse_pandalm(row: Row) -> Parsed:
    """PandaLM: two completions and votes `annotator1`, `annotator2`, ...: 1, 2, or 0 for a tie; a comparison each."""
    instruction = text_of(required(row.fields, "instruction"), "instruction")
    prompt = make_prompt(row, instruction_turns(instruction, optional_text(row.fields, "input")))
    models = (label_text(row.fields, "cmp_key") or "").split("_")
    names = models if len(models) == 2 and all(models) else ["unknown", "unknown"]
    items = [Item(text_of(required(row.fields, f"response{k}"), f"response{k}"), names[k - 1]) for k in (1, 2)]
    groups = []
    for name in sorted(name for name in row.fields if name.removeprefix("annotator").isdigit()):
        label = vote(required(row.fields, name), name, {1: FIRST, 2: SECOND, 0: TIE})
        groups.append(make_group(row, prompt, items, label, labeler=name))
    return Parsed(row.place, None, (prompt,), comparisons=tuple(groups))


def parse_auto_j(row: Row) -> Parsed:
    """Auto-J pairs: `prompt`, `response 1`, `response 2` and `label`: 0 = first, 1 = second, 2 = tie."""
    label = vote(required(row.fields, "label"), "label", {0: FIRST, 1: SECOND, 2: TIE})
    prompt = make_prompt(
        row, prompt_turns(required(row.fields, "prompt"), "prompt"), tags=(label_text(row.fields, "scenario"),)
    )
    items = [Item(text_of(required(row.fields, f"response {k}"), f"response {k}"), "unknown") for k in (1, 2)]
    return Parsed(row.place, None, (prompt,), comparisons=(make_group(row, prompt, items, label),))


def vote(value: Any, field: str, meanings: Mapping[int, Label]) -> Label:
    """Return what a numbered vote means."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value not in meanings:
        raise RowProblem(field, f"found {shown(value)}", f"one of {', '.join(str(key) for key in sorted(meanings))}")
    return meanings[int(value)]
