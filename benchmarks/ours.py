"""What our side of several jobs needs: the model, records from the workload, a stage in a folder that vanishes."""

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.workloads import Workload
from qinglan.core.config import Config
from qinglan.core.device import Device
from qinglan.core.records import Comparison, ComparisonGroup, Completion, Demonstrated, Demonstration, Message, Prompt
from qinglan.core.records import Ranking as RankingLabel
from qinglan.core.run import Run, Stage
from qinglan.models.language_model import LanguageModel, load_language_model


class Nothing(Config):
    """A run's configuration that says nothing."""


def load(work: Workload, dtype: str = "float32", *, for_training: bool = True) -> LanguageModel:
    """Return the workload's model."""
    return load_language_model(work.model_dir, Device.detect("cpu", dtype), for_training=for_training)


def new_stage() -> tuple[Stage, "tempfile.TemporaryDirectory[str]"]:
    """Return a stage, and its folder, which lives as long as the second value."""
    folder = tempfile.TemporaryDirectory()
    run = Run.open(Path(folder.name) / "run", Nothing(), seed=0, recipe="bench", quiet=True)
    return run.stage("bench"), folder


def prompt_record(number: int, text: str) -> Prompt:
    """Return a prompt of one user turn."""
    name = f"prompt-{number}"
    message = Message(role="user", content=text)
    return Prompt(id=name, source="human", producer_id="bench", prompt_group_id=name, messages=(message,))


def completion_fields(prompt: Prompt, number: int, text: str) -> dict[str, Any]:
    """Return the fields of a completion of `prompt`."""
    return {
        "id": f"{prompt.id}-{number}",
        "source": "human",
        "producer_id": "bench",
        "prompt_group_id": prompt.prompt_group_id,
        "prompt_id": prompt.id,
        "text": text,
    }


def ranked_groups(rankings: list[list[dict[str, Any]]]) -> list[ComparisonGroup]:
    """Return rankings, best completion first, as records."""
    groups = []
    for number, ranking in enumerate(rankings):
        prompt = prompt_record(number, ranking[0]["prompt"])
        completions = tuple(
            Completion(**completion_fields(prompt, place, one["completion"])) for place, one in enumerate(ranking)
        )
        comparison = Comparison(
            id=f"comparison-{number}",
            source="human",
            producer_id="bench",
            prompt_group_id=prompt.prompt_group_id,
            prompt_id=prompt.id,
            items=tuple(completion.id for completion in completions),
            order_shown=tuple(range(len(completions))),
            label=RankingLabel(groups=tuple((place,) for place in range(len(completions)))),
        )
        groups.append(ComparisonGroup(prompt, completions, comparison))
    return groups


def demonstrations(chats: list[dict[str, Any]]) -> list[Demonstrated]:
    """Return chats as records."""
    found = []
    for number, chat in enumerate(chats):
        prompt = prompt_record(number, chat["prompt"])
        found.append(Demonstrated(prompt, Demonstration(**completion_fields(prompt, 0, chat["completion"]))))
    return found
