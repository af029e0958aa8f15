"""What a completion may say next: forced beginnings, and spans that must be one of given token sequences.

A `Constraint` is a function of the completion's tokens so far, its prefix included, and has no state of its own, so
that a completion that was cut, forked or drawn again is bound in the same way. A span is chosen by the model's own
probabilities over a trie of its choices: at each token, the model's distribution is renormalised over the tokens that
some choice goes on with. The probability of a choice is therefore the product of those renormalised steps, which is not
the model's probability of the choice renormalised over all choices: to compare whole options, score them
(`options.py`). Used by search that forces a quotation (McAleese et al. 2024, section 2.3).
"""

from collections.abc import Callable, Iterator, KeysView, Sequence
from collections.abc import Set as AbstractSet

from qinglan.core.errors import InputError

Constraint = Callable[[Sequence[int]], Sequence[int] | AbstractSet[int] | None]
"""What may follow, given the completion's tokens so far: a sequence of token ids is forced (an end id among them ends
the completion), a set of ids is sampled from, None leaves all open. Asked at every token that is not forced already."""

_Trie = dict[int, "_Trie"]  # token id -> what may follow it; empty where a choice is complete


def forced_prefix(token_ids: Sequence[int]) -> Constraint:
    """Return the constraint that a completion begins with these tokens and goes on freely.

    It forces one token a step. To begin at a prefix that K samples share, give a `Request` its `prefix` instead: that
    is computed once, with the prompt.
    """
    return lambda so_far: token_ids[len(so_far) :] or None


def one_of(choices: Sequence[Sequence[int]], *, start: int = 0) -> Constraint:
    """Return the constraint that the tokens from number `start` on are one of `choices`; before and after is free.

    A span is over as soon as it equals a choice, so end each with its closing mark: a choice that begins with another
    one counts as that one. Raises `InputError` where there is no choice or an empty one.
    """
    trie = _trie_of(choices)

    def constraint(so_far: Sequence[int]) -> KeysView[int] | None:
        return None if len(so_far) < start else _next(trie, iter(so_far[start:]))

    return constraint


def one_of_after(mark: Sequence[int], choices: Sequence[Sequence[int]]) -> Constraint:
    """Return the constraint that whatever follows the tokens `mark` is one of `choices`, each time; the rest is free.

    A mark at the end of a prefix counts; a mark inside a span does not. The mark is compared token by token: a model
    that spells its text with other tokens is not bound there. Raises `InputError` as `one_of` does, and for no mark.
    """
    if not len(mark):
        raise InputError("one_of_after: the mark has no tokens; expected at least one")
    trie, opening = _trie_of(choices), list(mark)

    def constraint(so_far: Sequence[int]) -> KeysView[int] | None:
        tokens, place = list(so_far), 0
        while place + len(opening) <= len(tokens):
            if tokens[place : place + len(opening)] != opening:
                place += 1
                continue
            rest = iter(tokens[place + len(opening) :])
            answer = _next(trie, rest)
            if answer is not None:
                return answer
            place = len(tokens) - sum(1 for _ in rest)  # what the span did not use up
        return None

    return constraint


def _trie_of(choices: Sequence[Sequence[int]]) -> _Trie:
    if not choices or not all(len(choice) for choice in choices):
        raise InputError("constrained span: has no choice, or an empty one; expected choices of at least one token")
    trie: _Trie = {}
    for choice in sorted(choices, key=len):
        node = trie
        for token in choice:
            is_known = token in node
            node = node.setdefault(int(token), {})
            if is_known and not node:
                break  # a shorter choice ends here
    return trie


def _next(trie: _Trie, tokens: Iterator[int]) -> KeysView[int] | None:
    """Return what may follow a span's tokens, None where the span is over; leaves in `tokens` what lies behind it."""
    node = trie
    for token in tokens:
        if token not in node:
            return None  # only a prefix that was given from outside can leave the trie
        node = node[token]
        if not node:
            return None
    return node.keys()
