"""Settings of `recipes/weak_to_strong.py` and its presets by scale, apart so that the recipe stays one page."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from qinglan.core.config import Config
from qinglan.core.device import Dtype
from qinglan.data.labelled import LabelledFileConfig
from qinglan.evals.weak_to_strong import AdmissionConfig
from qinglan.learn.classifier import ClassifierConfig
from qinglan.learn.texts import TextTrainingConfig
from qinglan.models.chat import TemplateName
from qinglan.supervisors.simulated import LabelerConfig

Method = Literal["naive", "confidence", "product", "bootstrap", "generative", "probe", "few_shot"]
DEFAULT_TASKS = (
    "claims_recalled",
    "two_hops",
    "values",
    "values_recalled",
    "traits",
    "grammar",
    "disputes",
    "membership",
    "told",
    "sentiment",
    "sums",
    "passages",
    "answers",
    "better_recalled",
    "preferences",
)


class WeakToStrongConfig(Config):
    """A grid of tasks, weak supervisors, strong students, methods and seeds."""

    weak: tuple[str, ...] = ("nano", "micro")
    """Supervisors: sizes of the built-in family, Hugging Face directories, "labelers" (simulated people), or rules:
    "lexicon:FILE", "vader:FILE", "keywords:FILE", "column:NAME" (numbers, or the words of `data.classes`)."""
    strong: tuple[str, ...] = ("mini",)
    """Students: sizes of the built-in family or Hugging Face directories."""
    between: tuple[str, ...] = ("micro",)
    """Models through which the method "bootstrap" goes; "none" for none."""
    tasks: tuple[str, ...] = DEFAULT_TASKS
    """Judging tasks (`tasks/judgements.py`) and answering tasks (`tasks/answering.py`); your file replaces them."""
    methods: tuple[Method, ...] = ("naive", "confidence", "bootstrap", "generative", "probe", "few_shot")
    """How the student learns from the weak labels."""
    seeds: int = Field(default=1, ge=1)
    """Fine-tuning seeds: halves, heads and orders of all cells."""
    students: Literal["admitted", "all"] = "admitted"
    """Train students on admitted tasks only, or on all."""
    released: bool = False
    """Run also what the released code does, as methods "released_naive" and "released_confidence", with a supervisor
    and a ceiling of their own: head from zero, ramp that jumps, threshold of one batch, classes as they come, last
    weights, ceiling on the supervisor's half."""
    data: LabelledFileConfig = LabelledFileConfig()
    """A file of texts and labels in place of the tasks."""
    comparisons: Path | None = None
    """A file of comparisons in place of the tasks: the setting of reward models."""
    puzzles: Path | None = None
    """A file of Lichess puzzles for the task "lichess"."""
    template: TemplateName = "own"
    """Chat template: the model's own, or plain "User: ... Assistant:" text for models without one."""
    device: str = "auto"
    """cpu, cuda or auto."""
    dtype: Dtype = "auto"
    """Precision of matrix products; auto is bfloat16 on a GPU that has it, else float32. Losses are float32 always."""
    num_half: int = Field(default=600, ge=16)
    """Cases in each half: A trains the supervisor, B student and ceiling (paper: 10,000 in the released code)."""
    num_valid: int = Field(default=100, ge=16)
    """Cases with weak labels that choose the student's checkpoint."""
    num_test: int = Field(default=300, ge=16)
    """Cases that everybody is measured on."""
    num_shots: int = Field(default=5, ge=2)
    """Examples shown by the method "few_shot" (paper: 5), half of each class by their weak labels."""
    training: ClassifierConfig = ClassifierConfig(batch_size=6, evaluate_every=50)
    """Fine-tuning of supervisor, student and ceiling."""
    rate_exponent: float = Field(default=0.0, ge=0)
    """x, by which the learning rate falls with a model's size N: as (2 million / N)^x above 2 million parameters, which
    its default suits. The released code takes a fifth of its rate for GPT-2 large and all that is larger."""
    texts: TextTrainingConfig = TextTrainingConfig()
    """Language modelling: the method "generative", and all training on answering tasks."""
    admission: AdmissionConfig = AdmissionConfig()
    """Rules, fixed beforehand, by which a task counts."""
    labelers: LabelerConfig = LabelerConfig(accuracy=0.2, laziness=0.1)
    """Simulated people, where they are the supervisor: far less reliable than those of other recipes, as an expert's
    task asks for. One of them is right in about two of three cases."""
    num_labelers: int = Field(default=3, ge=1)
    """How many of them label each case."""
    workers: int = Field(default=0, ge=0)
    """Processes that work on cells at the same time, one thread each; 0: as many as there are cores (CPU), else one."""
    keep_models: bool = False
    """Keep every trained model; otherwise its predictions alone."""

    @field_validator("weak", "strong", "between", "tasks", "methods", mode="before")
    @classmethod
    def _commas_separate(cls, value: Any) -> Any:
        """Take "nano,micro" for two names, and "none" for no name."""
        if isinstance(value, str):
            value = (value,)
        return tuple(part for one in value or () for part in str(one).split(",") if part not in ("", "none"))

    @model_validator(mode="after")
    def _names_are_there(self) -> Self:
        for name in ("weak", "strong", "tasks", "methods"):
            found = getattr(self, name)
            if not found or len(set(found)) < len(found):
                raise ValueError(f"{name}: expected at least one name, each once, got {' '.join(found) or 'none'}")
        return self

    @property
    def steps_between(self) -> tuple[str, ...]:
        """The models between supervisor and student, where a method goes through them."""
        return self.between if "bootstrap" in self.methods else ()

    @classmethod
    def presets(cls) -> dict[str, "WeakToStrongConfig"]:
        """Return the presets by scale; the first is the default."""
        tiny = cls(
            weak=("nano",),
            strong=("micro",),
            between=(),
            tasks=("claims_recalled", "preferences", "facts"),
            methods=("naive", "confidence", "generative", "probe", "few_shot"),
            students="all",
            num_half=32,
            num_valid=16,
            num_test=40,
            training=ClassifierConfig(num_epochs=1, evaluate_every=2),
            texts=TextTrainingConfig(num_epochs=1),
            workers=1,
        )
        paper = cls(
            training=ClassifierConfig.paper().model_copy(update={"head": "auto"}),  # not every task has verdict words
            texts=TextTrainingConfig(num_epochs=5, batch_size=32),
            num_half=10_000,
            num_valid=1_000,
            num_test=5_000,
            seeds=5,
        )
        return {"small": cls(), "tiny": tiny, "paper": paper}
