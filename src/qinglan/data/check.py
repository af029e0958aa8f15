"""What `qinglan data check FILE` says: the format found, sound and broken rows, and what the data looks like.

Nothing is changed and no row stops the check; lengths are in characters, as no tokenizer is asked.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qinglan.core.records import ComparisonGroup, Prompt, Ranking, pairs_of
from qinglan.data.load import Contents, Paths, name_of, parse_files
from qinglan.data.rows import RowError, cut

MAX_SHOWN_ERRORS = 20
QUANTILES = {"min": 0.0, "p10": 0.1, "median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


class FileReport(NamedTuple):
    """What one file (or folder, or list) holds."""

    path: str
    files: tuple[str, ...]
    formats: tuple[str, ...]
    num_rows: int
    num_rows_ok: int
    broken: tuple[RowError, ...]
    num_prompts: int
    """Distinct prompts."""
    num_groups: int
    """Distinct prompt groups, the unit of every split."""
    num_demonstrations: int
    num_comparisons: int
    num_ties: int
    """Comparisons with at least one tie."""
    num_undecided: int
    """Comparisons in which everything is tied, from which no pair can be learned."""
    num_ratings: int
    k_histogram: dict[int, int]
    """Number of comparisons by number of items."""
    characters: dict[str, dict[str, int]]
    """Quantiles of the lengths of prompts, demonstrations and compared completions."""
    notes: dict[str, int]
    """What was merged, kept twice or left out by rule, counted."""
    roles: dict[str, int]
    """Turns inside distinct prompts by role."""
    share_multi_turn: float
    """Share of distinct prompts with more than one user's turn."""
    labelers: dict[str, int]
    """Judgements and demonstrations by labeler."""
    sample: str
    """The first sound row as it was understood."""

    def as_dict(self) -> dict[str, Any]:
        """Return the report as a JSON object."""
        return {
            **self._asdict(),
            "broken": [error._asdict() for error in self.broken],
            "k_histogram": {str(k): count for k, count in self.k_histogram.items()},
        }

    def as_text(self) -> str:
        """Return the report as lines for a terminal; at most `MAX_SHOWN_ERRORS` broken rows are shown."""
        share = f" ({self.num_rows_ok / self.num_rows:.1%})" if self.num_rows else ""
        lines = [
            f"{self.path}: {' + '.join(self.formats) or 'no format found'}",
            f"  rows            {self.num_rows_ok} of {self.num_rows} sound{share}, {len(self.broken)} findings",
            f"  prompts         {self.num_prompts} distinct in {self.num_groups} groups, "
            f"{self.share_multi_turn:.0%} multi-turn; turns: {counts(self.roles)}",
            f"  demonstrations  {self.num_demonstrations}",
            f"  comparisons     {self.num_comparisons} ({self.num_ties} with ties, {self.num_undecided} undecided)",
        ]
        if self.k_histogram:
            lines.append(f"  items compared  {', '.join(f'{count} of K={k}' for k, count in self.k_histogram.items())}")
        if self.num_ratings:
            lines.append(f"  ratings         {self.num_ratings}")
        if self.labelers:
            lines.append(f"  labelers        {len(self.labelers)}: {counts(dict(list(self.labelers.items())[:8]))}")
        for name, lengths in self.characters.items():
            lines.append(f"  characters      {name}: {', '.join(f'{key} {value}' for key, value in lengths.items())}")
        lines += [f"  note            {count} {note}" for note, count in self.notes.items()]
        if self.sample:
            lines += ["  first sound row", *(f"    {line}" for line in self.sample.splitlines())]
        if self.broken:
            lines += ["  findings", *(f"    {error.line()}" for error in self.broken[:MAX_SHOWN_ERRORS])]
            hidden = len(self.broken) - MAX_SHOWN_ERRORS
            lines += [f"    ... and {hidden} more (--json names all)"] if hidden > 0 else []
        return "\n".join(lines)


def check_file(path: Paths, *, format: str | None = None) -> FileReport:
    """Return what a file, folder or list of both holds, and every row that cannot be used.

    Raises `InputError` where there is no such file, a file is damaged as a whole, or no format has its columns.
    """
    contents = parse_files(path, format)
    groups = [group for parsed in contents.parsed for group in parsed.comparisons]
    demonstrations = [one for parsed in contents.parsed for one in parsed.demonstrations]
    prompts = {prompt.id: prompt for parsed in contents.parsed for prompt in parsed.prompts}
    notes = {note: count for note, count in contents.notes.items() if count}
    labelers = Counter(group.comparison.producer_id for group in groups)
    labelers.update(one.demonstration.producer_id for one in demonstrations)
    lengths = {
        "prompts": [sum(len(message.content) for message in prompt.messages) for prompt in prompts.values()],
        "demonstrations": [len(one.demonstration.text) for one in demonstrations],
        "completions": [len(completion.text) for group in groups for completion in group.completions],
    }
    multi = sum(sum(message.role == "user" for message in prompt.messages) > 1 for prompt in prompts.values())
    return FileReport(
        path=name_of(path),
        files=tuple(str(Path(file)) for file in contents.files),
        formats=tuple(one.name for one in contents.formats),
        num_rows=contents.num_rows,
        num_rows_ok=contents.num_rows - len({error.place for error in contents.broken}),
        broken=tuple(contents.broken),
        num_prompts=len(prompts),
        num_groups=len({prompt.prompt_group_id for prompt in prompts.values()}),
        num_demonstrations=len(demonstrations),
        num_comparisons=len(groups),
        num_ties=sum(has_tie(group) for group in groups),
        num_undecided=sum(is_undecided(group) for group in groups),
        num_ratings=sum(len(parsed.ratings) for parsed in contents.parsed),
        k_histogram=dict(sorted(Counter(len(group.completions) for group in groups).items())),
        characters={name: quantiles(values) for name, values in lengths.items() if values},
        notes=notes,
        roles=dict(Counter(message.role for prompt in prompts.values() for message in prompt.messages).most_common()),
        share_multi_turn=multi / len(prompts) if prompts else 0.0,
        labelers=dict(labelers.most_common()),
        sample=sample_of(contents),
    )


def has_tie(group: ComparisonGroup) -> bool:
    """Return whether a comparison calls two items equally good."""
    label = group.comparison.label
    return any(len(tied) > 1 for tied in label.groups) if isinstance(label, Ranking) else label.p_first_better == 0.5


def is_undecided(group: ComparisonGroup) -> bool:
    """Return whether no pair of a comparison is decided."""
    return all(pair.p_first_better == 0.5 for pair in pairs_of(group.comparison.label))


def quantiles(values: Sequence[int]) -> dict[str, int]:
    """Return the quantiles of some lengths (nearest rank)."""
    ordered = sorted(values)
    return {name: ordered[round(share * (len(ordered) - 1))] for name, share in QUANTILES.items()}


def counts(numbers: dict[str, int]) -> str:
    """Return named counts as one phrase."""
    return ", ".join(f"{name} {count}" for name, count in numbers.items()) or "none"


def sample_of(contents: Contents) -> str:
    """Return the first sound row as understood: its turns, and its demonstration or its items with their label."""
    for parsed in contents.parsed:
        if parsed.comparisons:
            group = parsed.comparisons[0]
            items = [f"[{number}] {one_line(item.text)}" for number, item in enumerate(group.completions)]
            label = group.comparison.label
            verdict = label.groups if isinstance(label, Ranking) else f"P(0 better) = {label.p_first_better:g}"
            return "\n".join([*turns_of(group.prompt), *items, f"best first: {verdict}"])
        if parsed.demonstrations:
            shown = parsed.demonstrations[0]
            return "\n".join([*turns_of(shown.prompt), f"demonstration: {one_line(shown.demonstration.text)}"])
        if parsed.prompts:
            return "\n".join(turns_of(parsed.prompts[0]))
    return ""


def turns_of(prompt: Prompt) -> list[str]:
    """Return a prompt's turns, one short line each."""
    return [f"{message.role}: {one_line(message.content)}" for message in prompt.messages]


def one_line(text: str) -> str:
    """Return text on one short line."""
    return cut(" ".join(text.split()))
