"""The records that travel between people, models and training: one JSON line each, immutable, unknown keys refused.

People and models write the same records, so that swapping one supervisor for another, or mixing them, is a filter on
`source`. A label is kept as it was given (ranking with ties, order shown, seconds spent); pairs are derived on load.
"""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from itertools import combinations
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from qinglan.core.files import hash_of

Source = Literal["human", "principle_model", "assisted_human", "weak_model", "oracle", "policy"]
Split = Literal["train", "valid", "test"]
FinishReason = Literal["eos", "stop", "length"]
SCHEMA_VERSION = 1


class Frozen(BaseModel):
    """Immutable value; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Message(Frozen):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class Record(Frozen):
    """What every record carries: who made it, from what, and on which side of a split it stands."""

    id: str
    created_at: datetime = Field(default_factory=lambda: datetime.now(UTC))
    schema_version: int = SCHEMA_VERSION
    source: Source
    producer_id: str
    """Pseudonym of a person, or name or hash of a model."""
    prompt_group_id: str
    """User, question or document; the unit of every split."""
    split: Split = "train"
    parents: tuple[str, ...] = ()


class Prompt(Record):
    """What the policy answers: a conversation that ends with a user's turn."""

    messages: tuple[Message, ...] = Field(min_length=1)
    tags: tuple[str, ...] = ()
    """The use case comes first ("open_qa"), further properties after it ("two_hop", "multi_turn")."""
    expects_closed_domain: bool = False
    risk_tag: str | None = None

    @model_validator(mode="after")
    def _ends_with_user(self) -> Self:
        if self.messages[-1].role != "user":
            raise ValueError("a prompt ends with a user's turn")
        return self


class Sampler(Frozen):
    """How a completion was drawn."""

    policy: str
    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    seed: int


class Completion(Record):
    """What a policy, or a person, answered to one prompt."""

    prompt_id: str
    text: str
    token_ids: tuple[int, ...] | None = None
    """As sampled, end-of-text included; never made again from the text."""
    finish_reason: FinishReason | None = None
    sampler: Sampler | None = None
    logprob_ref: float | None = None


class Demonstration(Completion):
    """A completion written to be imitated."""

    with_model_suggestions: bool = False


class Ranking(Frozen):
    """Groups of item indices, best first; items in one group are tied. Items left out were not ranked."""

    kind: Literal["ranking"] = "ranking"
    groups: tuple[tuple[int, ...], ...]


class PreferenceProbability(Frozen):
    """Probability that item 0 is better than item 1."""

    kind: Literal["preference_probability"] = "preference_probability"
    p_first_better: float = Field(ge=0.0, le=1.0)


Label = Annotated[Ranking | PreferenceProbability, Field(discriminator="kind")]


class Comparison(Record):
    """One judged set of 2..K items of one prompt."""

    prompt_id: str
    object_type: Literal["completion", "critique", "revision"] = "completion"
    items: tuple[str, ...] = Field(min_length=2)
    order_shown: tuple[int, ...]
    """`order_shown[k]` is the index in `items` of what stood at place k on the screen."""
    label: Label
    labeler_group: str | None = None
    seconds_spent: float | None = None

    @model_validator(mode="after")
    def _label_fits_items(self) -> Self:
        count = len(self.items)
        if len(set(self.items)) != count:
            raise ValueError("an item stands twice in the comparison")
        if sorted(self.order_shown) != list(range(count)):
            raise ValueError(f"order_shown must be an order of 0..{count - 1}, got {self.order_shown}")
        if isinstance(self.label, PreferenceProbability):
            if count != 2:
                raise ValueError(f"a preference probability wants 2 items, got {count}")
            return self
        named = [item for group in self.label.groups for item in group]
        if len(set(named)) != len(named):
            raise ValueError(f"the ranking names an item twice: {self.label.groups}")
        absent = [item for item in named if not 0 <= item < count]
        if absent:
            raise ValueError(
                f"the ranking names items that are absent: {absent}; there are {count} items, numbered from 0"
            )
        return self


class Rating(Record):
    """An ordinal attribute of one item, such as overall quality from 1 to 7, or a flag."""

    item_id: str
    attribute: str
    scale: tuple[int, int]
    value: int | None
    comparison_id: str | None = None


class WeakLabel(Record):
    """What a supervisor thinks of one case: the probability of class 1, or that the first of two texts is better.

    Made by a weak model, by people or by a rule; `source` and `producer_id` say by whom, `parents` by which records.
    """

    case_id: str
    p_one: float = Field(ge=0.0, le=1.0)
    """Soft label; 0 or 1 where the supervisor only decides."""
    logits: tuple[float, ...] | None = None
    """As the supervisor gave them: of both classes, or the scores of both texts; None for people and rules."""
    text: str | None = None
    """The completion that a supervisor wrote greedily, where the label is an answer and no class."""
    training_half: str | None = None
    """Which data the supervisor was trained on, which never holds the case itself; None if on none."""


class Case(NamedTuple):
    """What is judged, without its label: a text that is of class 0 or 1, or two texts of which one is better."""

    id: str
    prompt_group_id: str
    """Entity, passage or document; the unit of every split."""
    texts: tuple[str, ...]
    messages: tuple[Message, ...] = ()
    """The conversation that the texts complete; without one they are plain text."""
    verdicts: tuple[str, str] | None = None
    """The words that say "class 0" and "class 1" right after the text, where a base model can be asked for them."""
    after_record: str | None = None
    """What follows the model's own recollection, which it writes first, up to a full stop; None: there is none."""


class Demonstrated(NamedTuple):
    """A prompt with one demonstration."""

    prompt: Prompt
    demonstration: Demonstration


class ComparisonGroup(NamedTuple):
    """A prompt, its K completions in the order of `comparison.items`, and how a labeler judged them."""

    prompt: Prompt
    completions: tuple[Completion, ...]
    comparison: Comparison


class Pair(NamedTuple):
    """Target of one pair inside a comparison."""

    first: int
    second: int
    p_first_better: float


def pairs_of(label: Ranking | PreferenceProbability, ties: Literal["drop", "half"] = "drop") -> list[Pair]:
    """Return the pairs that a label decides, best first; ties are dropped or get probability 0.5 ("half")."""
    if isinstance(label, PreferenceProbability):
        return [Pair(0, 1, label.p_first_better)]
    place = {item: rank for rank, group in enumerate(label.groups) for item in group}
    pairs = []
    for i, j in combinations(sorted(place), 2):
        if place[i] == place[j]:
            if ties == "half":
                pairs.append(Pair(i, j, 0.5))
        else:
            pairs.append(Pair(i, j, 1.0) if place[i] < place[j] else Pair(j, i, 1.0))
    return pairs


def record_id(kind: str, *parts: object) -> str:
    """Return an id made from what the record says ("prompt-3f2a..."), so that the same run makes the same ids."""
    return f"{kind}-{hash_of([str(part) for part in parts])[:12]}"


Scorer = Callable[[Sequence[Prompt], Sequence[Completion]], list[float]]
"""Reward model, judge, grader or gold score: one number for each (prompt, completion); NaN is "could not be scored"."""
