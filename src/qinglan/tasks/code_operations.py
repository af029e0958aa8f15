"""What the functions of the built-in world are composed of: operations with their Python and their English.

`{0}`, `{1}` stand for an operation's constants; `{x}` for what it works on. Types: "n" a number, "w" a word (or a
letter), "N" a list of numbers, "W" a list of words. Constants are single digits and letters, so that a small net can
copy them; letters after which English contracts ('s, 't, 'm, 'd) are left out, since the tokenizer splits there.
"""

import random
from typing import NamedTuple

DIGITS, LETTERS = tuple(range(2, 10)), tuple("abcehnop")
SMALL = (1, 2, 3)


Constant = int | str
Pool = tuple[int, ...] | tuple[str, ...]


class Op(NamedTuple):
    """One operation: its code, its wordings, where its constants come from, and the type it gives where it changes."""

    code: str
    wordings: tuple[str, ...]
    pools: tuple[Pool, ...] = ()
    gives: str = ""

    def draw_constants(self, rng: random.Random) -> tuple[Constant, ...]:
        """Draw a constant from every pool."""
        return tuple(rng.choice(list[Constant](pool)) for pool in self.pools)


SOURCES: dict[str, Op] = {
    "all": Op("{x}", ("",)),
    "drop": Op("{x}[{0}:]", ("skip the first {0}", "leave out the first {0}"), (SMALL,)),
    "front": Op("{x}[:-1]", ("leave out the last", "skip the last one")),
    "take": Op("{x}[:{0}]", ("take only the first {0}", "use the first {0}"), ((2, 3, 4, 5),)),
    "second": Op("{x}[::2]", ("take every second one", "use every other one")),
    "backward": Op("{x}[::-1]", ("go backwards", "start from the end")),
    "sorted": Op("sorted({x})", ("sort them", "bring them in order")),
    "distinct": Op("sorted(set({x}))", ("sort them without repeats", "sort the different ones")),
}
"""Which elements of the list, in which order."""

NUMBER_FILTERS: dict[str, Op] = {
    "none": Op("", ("",)),
    "even": Op("{x} % 2 == 0", ("keep the even ones", "only the even ones")),
    "odd": Op("{x} % 2 == 1", ("keep the odd ones", "only the odd ones")),
    "above": Op("{x} > {0}", ("keep those above {0}", "only those greater than {0}"), (DIGITS,)),
    "below": Op("{x} < {0}", ("keep those below {0}", "only those less than {0}"), (DIGITS,)),
    "at_least": Op("{x} >= {0}", ("keep those from {0} up", "only those of at least {0}"), (DIGITS,)),
    "at_most": Op("{x} <= {0}", ("keep those up to {0}", "only those of at most {0}"), (DIGITS,)),
    "other": Op("{x} != {0}", ("drop every {0}", "only those other than {0}"), (DIGITS,)),
    "multiple": Op("{x} % {0} == 0", ("keep the multiples of {0}", "only those divisible by {0}"), ((3, 4, 5),)),
    "no_multiple": Op("{x} % {0} != 0", ("drop the multiples of {0}", "only those not divisible by {0}"), ((3, 4, 5),)),
    "large": Op("abs({x}) > {0}", ("keep those of size above {0}", "only those of size more than {0}"), (DIGITS,)),
}
WORD_FILTERS: dict[str, Op] = {
    "none": Op("", ("",)),
    "longer": Op("len({x}) > {0}", ("keep those longer than {0}", "only those with over {0} letters"), ((2, 3, 4),)),
    "shorter": Op("len({x}) < {0}", ("keep those shorter than {0}", "only those with under {0} letters"), ((3, 4, 5),)),
    "length": Op("len({x}) == {0}", ("keep those of length {0}", "only those with {0} letters"), ((3, 4),)),
    "even_length": Op("len({x}) % 2 == 0", ("keep those of even length", "only those with an even length")),
    "starts": Op(
        "{x}.startswith('{0}')", ("keep those that start with {0}", "only those starting with {0}"), (LETTERS,)
    ),
    "ends": Op("{x}.endswith('{0}')", ("keep those that end with {0}", "only those ending with {0}"), (LETTERS,)),
    "has": Op("'{0}' in {x}", ("keep those with {0}", "only those that have {0}"), (LETTERS,)),
    "lacks": Op("'{0}' not in {x}", ("drop those with {0}", "only those without {0}"), (LETTERS,)),
}
"""Which elements count."""

NUMBER_MAPS: dict[str, Op] = {
    "same": Op("{x}", ("",)),
    "plus": Op("({x} + {0})", ("add {0} to each", "increase each by {0}"), (DIGITS,)),
    "minus": Op("({x} - {0})", ("subtract {0} from each", "decrease each by {0}"), (DIGITS,)),
    "times": Op("({x} * {0})", ("multiply each by {0}", "take each times {0}"), (DIGITS,)),
    "square": Op("({x} * {x})", ("square each", "take the square of each")),
    "size": Op("abs({x})", ("take the size of each", "drop the sign of each")),
    "negate": Op("(-{x})", ("negate each", "turn the sign of each")),
    "divide": Op("({x} // {0})", ("divide each by {0}", "take each divided by {0}"), ((2, 3, 4),)),
    "modulo": Op("({x} % {0})", ("take each modulo {0}", "reduce each modulo {0}"), (DIGITS,)),
    "from": Op("({0} - {x})", ("subtract each from {0}", "take {0} minus each"), (DIGITS,)),
    "distance": Op(
        "abs({x} - {0})", ("take the distance of each from {0}", "take how far each is from {0}"), (DIGITS,)
    ),
    "raise": Op("max({x}, {0})", ("raise each to at least {0}", "make each at least {0}"), (DIGITS,)),
    "cap": Op("min({x}, {0})", ("lower each to at most {0}", "make each at most {0}"), (DIGITS,)),
}
WORD_MAPS: dict[str, Op] = {
    "same": Op("{x}", ("",)),
    "length": Op("len({x})", ("take the length of each", "count the letters of each"), gives="n"),
    "count": Op("{x}.count('{0}')", ("count the {0} in each", "take how often each has {0}"), (LETTERS,), "n"),
    "upper": Op("{x}.upper()", ("put each in capitals", "write each in capitals")),
    "mirror": Op("{x}[::-1]", ("reverse each", "turn each around")),
    "initial": Op("{x}[0]", ("take the first letter of each", "use the first letter of each")),
    "final": Op("{x}[-1]", ("take the last letter of each", "use the last letter of each")),
    "suffix": Op("({x} + '{0}')", ("put {0} after each", "add {0} at the end of each"), (LETTERS,)),
    "prefix": Op("('{0}' + {x})", ("put {0} before each", "add {0} at the start of each"), (LETTERS,)),
    "double": Op("({x} * 2)", ("write each twice", "repeat each")),
    "rest": Op("{x}[1:]", ("drop the first letter of each", "cut off the first letter of each")),
}
"""What is made of each."""


class Fold(NamedTuple):
    """An aggregate: where it starts, what a step does ({a} holds it, {v} comes in), what it is as one expression."""

    start: str
    step: tuple[str, ...]
    """Lines; deeper ones are indented by four spaces. Where two ways are usual, `other_step` is the second."""
    gives: str
    wordings: tuple[str, ...]
    pools: tuple[Pool, ...] = ()
    other_step: tuple[str, ...] = ()
    whole: str = ""
    """Of a list {l}; empty where there is no usual expression."""
    result: str = "{a}"

    def draw_constants(self, rng: random.Random) -> tuple[Constant, ...]:
        """Draw a constant from every pool."""
        return tuple(rng.choice(list[Constant](pool)) for pool in self.pools)


NUMBER_FOLDS: dict[str, Fold] = {
    "sum": Fold(
        "0", ("{a} += {v}",), "n", ("return the sum", "return their total"), (), ("{a} = {a} + {v}",), "sum({l})"
    ),
    "product": Fold(
        "1", ("{a} *= {v}",), "n", ("return the product", "return all multiplied"), (), ("{a} = {a} * {v}",)
    ),
    "count": Fold(
        "0", ("{a} += 1",), "n", ("return how many", "return their number"), (), ("{a} = {a} + 1",), "len({l})"
    ),
    "largest": Fold(
        "{0}",
        ("if {v} > {a}:", "    {a} = {v}"),
        "n",
        ("return the largest or {0} if greater", "return the maximum with {0}"),
        ((0, 1, 2, 3),),
        ("{a} = max({a}, {v})",),
        "max([{0}] + {l})",
    ),
    "smallest": Fold(
        "{0}",
        ("if {v} < {a}:", "    {a} = {v}"),
        "n",
        ("return the smallest or {0} if less", "return the minimum with {0}"),
        ((6, 7, 8, 9),),
        ("{a} = min({a}, {v})",),
        "min([{0}] + {l})",
    ),
    "first": Fold("0", ("{a} = {v}", "break"), "n", ("return the first or 0", "return the first of them or else 0")),
    "last": Fold("0", ("{a} = {v}",), "n", ("return the last or 0", "return the last of them or else 0")),
    "subtract": Fold(
        "{0}",
        ("{a} -= {v}",),
        "n",
        ("return {0} minus all of them", "subtract all from {0} and return the rest"),
        (DIGITS,),
        ("{a} = {a} - {v}",),
        "({0} - sum({l}))",
    ),
    "distinct": Fold(
        "set()",
        ("{a}.add({v})",),
        "n",
        ("return how many different ones", "return the number of different values"),
        whole="len(set({l}))",
        result="len({a})",
    ),
    "collect": Fold("[]", ("{a}.append({v})",), "N", ("return the list", "return them as a list"), whole="{l}"),
    "unique": Fold(
        "[]",
        ("if {v} not in {a}:", "    {a}.append({v})"),
        "N",
        ("return the list without repeats", "return each value once"),
    ),
    "running": Fold(
        "[]", ("{t} += {v}", "{a}.append({t})"), "N", ("return the running sums", "return the list of sums so far")
    ),
}
WORD_FOLDS: dict[str, Fold] = {
    "join": Fold(
        "''", ("{a} += {v}",), "w", ("return them joined", "join them"), (), ("{a} = {a} + {v}",), "''.join({l})"
    ),
    "longest": Fold(
        "''",
        ("if len({v}) > len({a}):", "    {a} = {v}"),
        "w",
        ("return the longest", "return the first longest one"),
    ),
    "first": Fold("''", ("{a} = {v}", "break"), "w", ("return the first", "return the first of them")),
    "last": Fold("''", ("{a} = {v}",), "w", ("return the last", "return the last of them")),
    "count": NUMBER_FOLDS["count"],
    "letters": Fold(
        "0",
        ("{a} += len({v})",),
        "n",
        ("return the total length", "return the number of letters in all"),
        (),
        ("{a} = {a} + len({v})",),
        "len(''.join({l}))",
    ),
    "distinct": NUMBER_FOLDS["distinct"],
    "collect": NUMBER_FOLDS["collect"]._replace(gives="W"),
    "unique": NUMBER_FOLDS["unique"]._replace(gives="W"),
}
"""What becomes of all."""

NUMBER_POSTS: dict[str, Op] = {
    "none": Op("{x}", ("",)),
    "plus": Op("{x} + {0}", ("plus {0}", "increased by {0}"), (DIGITS,)),
    "minus": Op("{x} - {0}", ("minus {0}", "decreased by {0}"), (DIGITS,)),
    "times": Op("{x} * {0}", ("times {0}", "multiplied by {0}"), (DIGITS,)),
    "modulo": Op("{x} % {0}", ("modulo {0}", "reduced modulo {0}"), ((5, 6, 7, 8, 9),)),
    "divide": Op("{x} // {0}", ("divided by {0}", "over {0}"), ((2, 3, 4),)),
    "negate": Op("-{x}", ("negated", "with its sign turned")),
    "size": Op("abs({x})", ("without its sign", "as its size")),
    "square": Op("{x} * {x}", ("squared", "times itself")),
    "raise": Op("max({x}, {0})", ("but at least {0}", "but never under {0}"), (DIGITS,)),
    "cap": Op("min({x}, {0})", ("but at most {0}", "but never over {0}"), (DIGITS,)),
    "text": Op("str({x})", ("as text", "as a string"), gives="w"),
}
LIST_POSTS: dict[str, Op] = {
    "none": Op("{x}", ("",)),
    "reverse": Op("{x}[::-1]", ("reversed", "in reverse order")),
    "sort": Op("sorted({x})", ("sorted", "in order")),
    "descend": Op("sorted({x})[::-1]", ("sorted from the top", "in falling order")),
    "take": Op("{x}[:{0}]", ("cut to its first {0}", "of which only the first {0}"), (SMALL,)),
    "last": Op("{x}[-{0}:]", ("cut to its last {0}", "of which only the last {0}"), (SMALL,)),
    "drop": Op("{x}[{0}:]", ("without its first {0}", "of which not the first {0}"), (SMALL,)),
    "twice": Op("{x} + {x}", ("twice in a row", "followed by itself")),
}
WORD_POSTS: dict[str, Op] = {
    "none": Op("{x}", ("",)),
    "upper": Op("{x}.upper()", ("in capitals", "with capital letters")),
    "mirror": Op("{x}[::-1]", ("reversed", "turned around")),
    "take": Op("{x}[:{0}]", ("cut to its first {0}", "of which only the first {0}"), (SMALL,)),
    "plus": Op("{x} + '{0}'", ("with {0} added", "followed by {0}"), (LETTERS,)),
    "times": Op("{x} * {0}", ("repeated {0} times", "written {0} times"), ((2, 3),)),
    "length": Op("len({x})", ("as its length", "of which the length"), gives="n"),
}
"""What is done to the result at last."""

GUARDS: dict[str, Op] = {
    "none": Op("", ("",)),
    "empty": Op("not {x}", ("if the list is empty", "for an empty list")),
    "short": Op("len({x}) < {0}", ("if there are fewer than {0}", "for a list shorter than {0}"), ((2, 3, 4),)),
    "long": Op("len({x}) > {0}", ("if there are more than {0}", "for a list longer than {0}"), ((3, 4, 5),)),
    "single": Op("len({x}) == {0}", ("if its length is {0}", "for a list of length {0}"), ((1, 2, 3),)),
}
"""For which lists something else is returned at once."""

# ------------------------------------------------------------------------------------ two loops, nesting, two stages

PAIR_FILTERS: dict[str, Op] = {
    "none": Op("", ("",)),
    "greater": Op("{x} > {y}", ("where the first is greater", "with the first above the second")),
    "less": Op("{x} < {y}", ("where the first is less", "with the first below the second")),
    "unequal": Op("{x} != {y}", ("where they differ", "of two different numbers")),
    "even_sum": Op("({x} + {y}) % 2 == 0", ("where the sum is even", "with an even sum")),
    "sum_above": Op("{x} + {y} > {0}", ("where the sum is above {0}", "with a sum over {0}"), (DIGITS,)),
    "sum_below": Op("{x} + {y} < {0}", ("where the sum is below {0}", "with a sum under {0}"), (DIGITS,)),
}
PAIR_MAPS: dict[str, Op] = {
    "sum": Op("({x} + {y})", ("add the two", "take the sum")),
    "product": Op("({x} * {y})", ("multiply the two", "take the product")),
    "difference": Op("({x} - {y})", ("take the first minus the second", "subtract the second from the first")),
    "gap": Op("abs({x} - {y})", ("take their distance", "take how far they are apart")),
    "higher": Op("max({x}, {y})", ("take the greater", "use the greater one")),
    "lower": Op("min({x}, {y})", ("take the lesser", "use the lesser one")),
    "weighted": Op(
        "({x} * {0} + {y})",
        ("take the first times {0} plus the second", "take {0} times the first plus the second"),
        ((2, 3, 4),),
    ),
}
LETTER_FILTERS: dict[str, Op] = {
    "none": Op("", ("",)),
    "is": Op("{x} == '{0}'", ("that are {0}", "equal to {0}"), (LETTERS,)),
    "is_not": Op("{x} != '{0}'", ("other than {0}", "that are not {0}"), (LETTERS,)),
    "before": Op("{x} < '{0}'", ("before {0}", "that come before {0}"), (("e", "h", "n"),)),
    "after": Op("{x} > '{0}'", ("after {0}", "that come after {0}"), (("b", "c", "e"),)),
    "among": Op("{x} in '{0}'", ("among {0}", "that are in {0}"), (("aeo", "abc", "nop"),)),
}
LIMIT_FILTERS: dict[str, Op] = {
    "above": Op("{x} > {y}", ("keep those above that", "only those greater than that")),
    "below": Op("{x} < {y}", ("keep those below that", "only those less than that")),
    "other": Op("{x} != {y}", ("drop those equal to that", "only those other than that")),
    "near": Op(
        "abs({x} - {y}) < {0}", ("keep those within {0} of that", "only those less than {0} from that"), ((3, 4, 5),)
    ),
    "below_times": Op(
        "{x} * {0} < {y}",
        ("keep those that times {0} are below that", "only those less than that even times {0}"),
        ((2, 3),),
    ),
}
LIMIT_MAPS: dict[str, Op] = {
    "same": Op("{x}", ("",)),
    "gap": Op("abs({x} - {y})", ("take the distance of each from that", "take how far each is from that")),
    "plus": Op("({x} + {y})", ("add that to each", "increase each by that")),
    "minus": Op("({x} - {y})", ("subtract that from each", "decrease each by that")),
    "times": NUMBER_MAPS["times"],
    "square": NUMBER_MAPS["square"],
}
