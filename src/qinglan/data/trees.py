"""OpenAssistant conversation trees, nested or as flat message rows: demonstrations and rankings of sibling replies.

A prompter's turn with its history is a prompt. Its assistant replies, where ranked (0 the best), are one comparison;
the best of them, or an only reply, is a demonstration. Replies that were deleted or failed review, and all below
them, are left out. The tree is the prompt group, so that no conversation crosses a split.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from qinglan.core.records import ComparisonGroup, Demonstrated, Message, Prompt, Source
from qinglan.data.comparison_formats import ranking_from_ranks
from qinglan.data.fields import (
    ROLES,
    Item,
    Parsed,
    label_text,
    list_of,
    make_demonstrated,
    make_group,
    make_prompt,
    mapping_of,
    number_of,
    required,
    text_of,
)
from qinglan.data.rows import Row, RowError, RowProblem, shown

MAX_DEPTH = 200


class Node(NamedTuple):
    """One message of a tree: its row, its checked content and its replies (filled while the tree is put together)."""

    row: Row
    message: Message
    name: str
    parent: str | None
    rank: int | None
    author: str
    usable: bool
    source: Source
    replies: list["Node"]


def parse_trees(rows: Sequence[Row], problems: list[RowError], notes: Counter[str]) -> Iterator[Parsed]:
    """Yield what each tree holds; messages that cannot be used go to `problems`, and their replies go with them."""
    roots: list[Node] = []
    flat: dict[str, Node] = {}
    for row in rows:
        try:
            if isinstance(row.fields.get("prompt"), dict):
                roots.append(nested(row, row.fields["prompt"], None, "prompt", 0))
                continue
            node = nested(row, row.fields, label_text(row.fields, "parent_id"), "row", 0)
            if node.name in flat:
                raise RowProblem(
                    "message_id",
                    f"{shown(node.name)} stands already at {flat[node.name].row.place}",
                    "one row for a message",
                )
            flat[node.name] = node
        except RowProblem as problem:
            problems.append(problem.at(row.place))
    for node in flat.values():
        if node.parent is None:
            roots.append(node)
        elif node.parent in flat:
            flat[node.parent].replies.append(node)
        else:
            absent = f"names an absent message, {shown(node.parent)}"
            problems.append(
                RowError(
                    node.row.place, "parent_id", absent, "a message_id of this file", "add the parent or remove the row"
                )
            )
    reached: set[int] = set()
    for root in roots:
        found = tree_records(root, reached, problems, notes)
        if found is not None:
            yield found
    for node in flat.values():
        if node.parent in flat and id(node) not in reached and not above_is_missing(node, flat):
            problems.append(
                RowError(node.row.place, "parent_id", "the replies form a ring", "a tree with a root", "remove the row")
            )


def above_is_missing(node: Node, flat: dict[str, Node]) -> bool:
    """Return whether a message hangs on one that is reported already, or was left out (and is no part of a ring)."""
    seen = set()
    while node.parent is not None and node.name not in seen:
        seen.add(node.name)
        if node.parent not in flat:
            return True
        node = flat[node.parent]
    return node.parent is None


def nested(row: Row, value: Any, parent: str | None, field: str, depth: int) -> Node:
    """Return a message with all its nested replies."""
    if depth > MAX_DEPTH:
        raise RowProblem(field, f"more than {MAX_DEPTH} turns deep", "a conversation")
    fields = mapping_of(value, field, "a message {message_id, role, text, replies}")
    role = required(fields, "role")
    known = ROLES.get(role) if isinstance(role, str) else None
    if known not in ("user", "assistant"):
        raise RowProblem(f"{field}.role", f"unknown role, {shown(role)}", "prompter or assistant")
    name = label_text(fields, "message_id")
    if name is None:
        raise RowProblem(f"{field}.message_id", "missing", "an id for each message")
    rank = fields.get("rank")
    usable = fields.get("deleted") is not True and fields.get("review_result") is not False
    author = label_text(fields, "model_name", "user_id") or "unknown"
    if not usable:
        return Node(row, Message(role=known, content=""), name, parent, None, author, False, "human", [])
    replies = fields.get("replies")
    below = list_of(replies, f"{field}.replies", "a list of messages") if replies is not None else []
    return Node(
        row=row,
        message=Message(role=known, content=text_of(required(fields, "text"), f"{field}.text")),
        name=name,
        parent=parent,
        rank=None if rank is None else int(number_of(rank, f"{field}.rank")),
        author=author,
        usable=True,
        source="policy" if fields.get("model_name") else "human",
        replies=[nested(row, reply, name, f"{field}.replies[{k}]", depth + 1) for k, reply in enumerate(below)],
    )


def tree_records(root: Node, reached: set[int], problems: list[RowError], notes: Counter[str]) -> Parsed | None:
    """Return the prompts, demonstrations and comparisons of one tree, or None where its root is left out."""
    prompts: list[Prompt] = []
    demonstrations: list[Demonstrated] = []
    comparisons: list[ComparisonGroup] = []
    waiting: list[tuple[Node, tuple[Message, ...]]] = [(root, ())]
    while waiting:
        node, before = waiting.pop()
        reached.add(id(node))
        turns = (*before, node.message)
        if not node.usable:
            notes["messages left out with all replies, as deleted or failed in review"] += 1
            continue
        waiting += [(reply, turns) for reply in reversed(node.replies)]
        if node.message.role == "user":
            try:
                prompt = make_prompt(node.row, turns, group=f"tree-{root.name}")
                prompts.append(prompt)
                replies = [reply for reply in node.replies if reply.usable and reply.message.role == "assistant"]
                comparisons += ranked_group(prompt, replies)
                best = best_reply(replies)
                demonstrations += [
                    make_demonstrated(one.row, prompt, one.message.content, labeler=one.author) for one in best
                ]
                notes["prompts with several replies and no rank, so without demonstration"] += (
                    bool(replies) and not best
                )
            except RowProblem as problem:
                problems.append(problem.at(node.row.place))
    if not prompts:
        return None
    return Parsed(root.row.place, None, tuple(prompts), tuple(demonstrations), tuple(comparisons))


def best_reply(replies: Sequence[Node]) -> list[Node]:
    """Return the best ranked reply, or the only one; several without ranks give none: nobody said which to imitate."""
    ranked = [(reply.rank, number) for number, reply in enumerate(replies) if reply.rank is not None]
    if ranked:
        return [replies[min(ranked)[1]]]
    return list(replies) if len(replies) == 1 else []


def ranked_group(prompt: Prompt, replies: Sequence[Node]) -> list[ComparisonGroup]:
    """Return the comparison of two or more ranked replies (unranked ones are items without a place), or nothing."""
    if sum(reply.rank is not None for reply in replies) < 2:
        return []
    items = [Item(reply.message.content, reply.author, source=reply.source) for reply in replies]
    label = ranking_from_ranks([reply.rank for reply in replies], len(replies))
    return [make_group(replies[0].row, prompt, items, label, labeler="oasst_consensus")]
