"""The prompts of one run by what they are used for, and the feedback that came with them.

No prompt group stands in training and in validation or test (InstructGPT, section 3.2: splits by user). In the
built-in world demonstrations, comparisons and RL have users of their own too; those of files share the training side.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from qinglan.core.errors import InputError
from qinglan.core.records import ComparisonGroup, Demonstrated, Prompt
from qinglan.data.load import OnBad, load_comparisons, load_demonstrations, load_prompts
from qinglan.data.prompts import PromptConfig, filter_prompts, split_by_group


class Pools(NamedTuple):
    """Prompts by use; lists that a run has no data for are empty, and the recipe skips what needs them."""

    demonstrations: list[Demonstrated]
    comparison_prompts: list[Prompt]
    """For supervisors to judge completions of; empty where comparisons are given."""
    comparisons: list[ComparisonGroup]
    """Given comparisons, training side."""
    held_out_comparisons: list[ComparisonGroup]
    """Given comparisons, test side."""
    rl_prompts: list[Prompt]
    valid_prompts: list[Prompt]
    test_prompts: list[Prompt]
    dropped: dict[str, int]
    """Prompts dropped by reason, and rows skipped as broken."""


def pools_from_files(
    prompts: Path | None,
    demonstrations: Path | None,
    comparisons: Path | None,
    config: PromptConfig,
    *,
    seed: int,
    on_bad: OnBad,
    num_tokens: Callable[[Prompt], int],
) -> Pools:
    """Read the user's files and split everything by prompt group: 80% training, 5% validation, 15% test.

    RL takes its prompts from `prompts`, or else from the comparisons, or else from the demonstrations.
    Without a validation group the baseline's checkpoint is chosen on training prompts, never on those of the test.
    Raises `InputError` where no file is given, a file is broken, or none of its rows is left for training.
    """
    if prompts is None and demonstrations is None and comparisons is None:
        raise InputError(
            "no data: give --prompts, --demonstrations or --comparisons, or leave all out for the built-in world"
        )
    skipped = 0
    shown: list[Demonstrated] = []
    judged: list[ComparisonGroup] = []
    if demonstrations is not None:
        demonstrated = load_demonstrations(demonstrations, on_bad=on_bad)
        shown, skipped = demonstrated.records, skipped + len(demonstrated.skipped)
    if comparisons is not None:
        compared = load_comparisons(comparisons, on_bad=on_bad)
        judged, skipped = compared.records, skipped + len(compared.skipped)
    source = prompts or comparisons or demonstrations
    assert source is not None
    loaded = load_prompts(source, on_bad=on_bad)
    asked, skipped = loaded.records, skipped + (len(loaded.skipped) if source == prompts else 0)
    filtered = filter_prompts(asked, config, num_tokens=num_tokens)
    shares = {"train": 0.8, "valid": 0.05, "test": 0.15}
    by_split = split_by_group(filtered.kept, shares, seed)
    dropped = {**filtered.dropped, **({"broken rows": skipped} if skipped else {})}
    judged_kept = [group for group in judged if num_tokens(group.prompt) <= config.max_tokens]
    sides = split_by_group(judged_kept, shares, seed)
    if len(judged_kept) < len(judged):
        dropped["comparisons whose prompt is too long"] = len(judged) - len(judged_kept)
    demonstrated_train = split_by_group(shown, shares, seed)["train"]
    check_something_left(source, len(asked), len(by_split["train"]))
    check_something_left(demonstrations, len(shown), len(demonstrated_train))
    check_something_left(comparisons, len(judged), len(sides["train"]))
    return Pools(
        demonstrations=demonstrated_train,
        comparison_prompts=[],
        comparisons=sides["train"],
        held_out_comparisons=[*sides["valid"], *sides["test"]],
        rl_prompts=by_split["train"],
        valid_prompts=by_split["valid"] or by_split["train"][:20],
        test_prompts=by_split["test"],
        dropped=dropped,
    )


def check_something_left(path: Path | None, num_given: int, num_left: int) -> None:
    """Raise `InputError` where a file is given, but none of its rows stands on the training side."""
    if path is not None and num_left == 0:
        raise InputError(
            f"{path}: none of {num_given} rows is left for training, after filters and a split by prompt group (80% "
            "training); expected at least one; give rows of more prompt groups, or raise hygiene.max_tokens"
        )
