"""LoRA: a low-rank update of frozen weights (Hu et al. 2021), saved as an ordinary PEFT directory.

    y = W x + alpha / rank * B A x          W frozen; A drawn at random, B zero at the start

A model that is trained this way has modules of its own over the *same* weights as the model it starts from, which are
never written to. So the start is the adapted model with its adapter off, at no cost in memory: it serves as reference.

A start that has an adapter already lends its copy to the training, whose rank must then be the same; where every weight
is to be trained, the adapter is merged first. A directory holds adapter_config.json, adapter_model.safetensors, the
tokenizer, and qinglan.json with the hash of the base's weights, since an adapter on another base is nonsense.

`peft` takes seconds to import, so only the functions that need it do.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from qinglan.core.config import Config
from qinglan.core.device import Device
from qinglan.core.errors import InputError
from qinglan.core.files import hash_of, read_json, sha256_of, write_json
from qinglan.core.rng import stream
from qinglan.models.directory import load_weights, prepare

M = TypeVar("M", bound=nn.Module)

PREFIX = "base_model.model."
"""What PEFT writes before the names of a model's weights."""
HEAD = "score"
"""The head of reward models, value models and classifiers: new, so it is trained and saved whole."""


class LoRAConfig(Config):
    """Low-rank adapters (Hu et al. 2021) in place of training every weight."""

    rank: int = Field(default=0, ge=0)
    """Rank of the update of each matrix (Hu et al.: 1 to 64); 0 trains every weight."""
    alpha: float = Field(default=16.0, gt=0)
    """The update is multiplied by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on what enters the update; not in PPO, where the ratio of probabilities must start at 1."""
    target_modules: tuple[str, ...] = ()
    """Ends of the names of the layers that are adapted, such as q_proj; default: every linear layer but the head."""
    merge: bool = False
    """Add the update to the weights at the end and save a whole model, not an adapter."""


EVERY_WEIGHT = LoRAConfig()
"""No adapter."""


class Adapter(NamedTuple):
    """The adapter of a model."""

    rank: int
    config: Any
    """A `peft.LoraConfig`."""


def adapter_of(model: nn.Module) -> Adapter | None:
    """Return the adapter of a model, or None."""
    found = getattr(model, "peft_config", {}).get("default")
    return None if found is None else Adapter(found.r, found)


# ----------------------------------------------------------------------------------------------- copies to be trained


def share_weights(module: M) -> M:
    """Return modules of their own over the same weights, none of which is to be trained."""
    shared: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in module.parameters()}
    return copy.deepcopy(module, shared)


def trainable_copy(model: PreTrainedModel, lora: LoRAConfig, *, seed: int) -> PreTrainedModel:
    """Return what training starts from: a copy of every weight, or an adapter over the weights of `model`.

    With an adapter, the score head of a reward or value model is trained too. `seed` decides the first weights of a new
    adapter. Raises `InputError` for an adapter of another rank than `model` has, layers that are not there, and weights
    of `model` that lie in no directory, on which an adapter could not be saved.
    """
    if lora.rank == 0:
        return merged_copy(model)
    if not lora.merge:
        _base_directory(model)
    student, known = share_weights(model), adapter_of(model)
    if known is None:
        _inject(student, _peft_config(student, lora))
        for name, module in _lora_layers(student):
            first, second = module.lora_A["default"].weight, module.lora_B["default"].weight
            drawn = nn.init.kaiming_uniform_(torch.empty(first.shape), a=5**0.5, generator=stream(seed, "lora", name))
            with torch.no_grad():
                first.copy_(drawn)
                second.zero_()
    elif known.rank != lora.rank:
        raise InputError(
            f"lora.rank is {lora.rank}, but the model to start from has an adapter of rank {known.rank}, which "
            f"training would go on with; set lora.rank to {known.rank}, or to 0 to train every weight"
        )
    for name, parameter in list(student.named_parameters()):
        is_trained = ".lora_" in name or name.startswith(f"{HEAD}.")
        if is_trained:
            owner, _, last = name.rpartition(".")
            setattr(student.get_submodule(owner), last, nn.Parameter(parameter.detach().clone()))
        else:
            parameter.requires_grad_(False)
    return student.eval()


def end_of_training(model: PreTrainedModel, lora: LoRAConfig) -> PreTrainedModel:
    """Return the model that a trainer leaves: with `lora.merge`, its adapter is added to a copy of the weights."""
    return merged_copy(model) if lora.merge and adapter_of(model) is not None else model


def carry_adapter(origin: nn.Module, model: nn.Module) -> None:
    """Note on `model`, which took over the trunk of `origin` under a head of its own, the adapter that is in it."""
    adapter = adapter_of(origin)
    if adapter is not None:
        config = copy.deepcopy(adapter.config)
        config.task_type = "SEQ_CLS"
        model.peft_config = {"default": config}  # type: ignore[assignment]


def merged_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model with weights of its own, all to be trained, into which the adapter (if any) has been added."""
    whole = copy.deepcopy(model)
    with torch.no_grad():
        for name, module in list(_lora_layers(whole)):
            base = module.get_base_layer()
            base.weight += module.get_delta_weight("default")  # alpha / rank * B A
            owner, _, last = name.rpartition(".")
            setattr(whole.get_submodule(owner), last, base)
    if adapter_of(whole) is not None:
        del whole.peft_config
    whole.config.name_or_path = ""  # no directory holds these weights, until they are saved
    for parameter in whole.parameters():
        parameter.requires_grad_(True)
    return whole


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in model.named_modules() if hasattr(module, "lora_A"))


def _peft_config(model: PreTrainedModel, lora: LoRAConfig) -> Any:
    from peft import LoraConfig, TaskType
    from transformers.pytorch_utils import Conv1D

    alpha: Any = lora.alpha  # PEFT says int, and takes any number
    return LoraConfig(
        task_type=TaskType.SEQ_CLS if hasattr(model, HEAD) else TaskType.CAUSAL_LM,
        r=lora.rank,
        lora_alpha=alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules) or "all-linear",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2's layers
    )


def _inject(model: PreTrainedModel, config: Any) -> None:
    """Put LoRA layers into `model`, in place. Raises `InputError` for layers that cannot be adapted or are absent."""
    from peft import inject_adapter_in_model

    linear = sorted(
        {name.rpartition(".")[2] for name, m in model.named_modules() if getattr(m, "weight", None) is not None}
    )
    try:
        with torch.random.fork_rng():  # what PEFT draws is replaced
            inject_adapter_in_model(config, model)
    except ValueError as error:
        raise InputError(
            f"lora.target_modules: {str(error).splitlines()[0]}; expected ends of names, such as {', '.join(linear)}"
        ) from error
    heads = (model.get_input_embeddings(), model.get_output_embeddings(), getattr(model, HEAD, None))
    if any(hasattr(head, "lora_A") or hasattr(head, "lora_embedding_A") for head in heads):
        raise InputError(
            "lora.target_modules: embeddings and the head cannot be adapted, as they may be one matrix; expected "
            f"layers of the trunk, among {', '.join(linear)}"
        )


# -------------------------------------------------------------------------------------------------------- directories


def is_adapter_directory(directory: Path) -> bool:
    """Return True for a PEFT directory."""
    return (Path(directory) / "adapter_config.json").is_file()


def save_adapter(model: PreTrainedModel, directory: Path, notes: dict[str, Any]) -> None:
    """Write the adapter of `model`, and its score head if it has one, into an empty directory.

    `notes` are kept in qinglan.json. Raises `InputError` where the base's weights lie in no directory.
    """
    adapter = adapter_of(model)
    assert adapter is not None
    base = _base_directory(model)
    has_head = hasattr(model, HEAD)
    config = copy.deepcopy(adapter.config)
    config.base_model_name_or_path = str(base)
    config.target_modules = sorted(config.target_modules)
    config.modules_to_save = [HEAD] if has_head else None
    config.inference_mode = True
    config.save_pretrained(directory)
    weights = directory / "adapter_model.safetensors"
    save_file(_adapter_weights(model), weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # as the other files; safetensors keeps its own to the owner
    write_json(directory / "qinglan.json", {"base_weights": _hash_of_weights(base), **notes})


def load_model(auto_class: Any, directory: Path, device: Device, **config_changes: Any) -> PreTrainedModel:
    """Open a model directory, or the base that a PEFT directory names with the adapter on it.

    Raises `InputError` for what `load_weights` does, a base that is gone or has changed, and kinds of adapters other
    than plain LoRA.
    """
    if not is_adapter_directory(directory):
        return load_weights(auto_class, directory, device, **config_changes)
    from peft import PeftConfig

    config: Any = PeftConfig.from_pretrained(str(directory))
    is_plain = config.peft_type == "LORA" and not config.use_dora and config.bias == "none"
    extra = set(config.modules_to_save or ()) - {HEAD}
    if not is_plain or extra:
        what = f"also keeps {', '.join(sorted(extra))} whole" if extra else "is another kind of adapter"
        raise InputError(f"{directory}: {what}; expected plain LoRA; merge it into its base with PEFT, and use that")
    base = _base_of(directory, config.base_model_name_or_path)
    own_head: set[str] = set()
    if config.task_type == "SEQ_CLS":
        own_head = {f"{HEAD}.weight"}
        config_changes["num_labels"] = _num_outputs(directory / "adapter_model.safetensors")
    with torch.random.fork_rng():  # a head that the base lacks is drawn, then replaced
        model = load_weights(auto_class, base, device, may_miss=own_head, **config_changes)
    config.modules_to_save, config.inference_mode = None, False
    _inject(model, config)
    _load_adapter_weights(model, directory / "adapter_model.safetensors")
    placed: Any = model.to(device.torch_device)  # type: ignore[arg-type]
    return prepare(placed)


def notes_of(directory: Path) -> dict[str, Any]:
    """Return what `save_adapter` noted beside an adapter; empty for one that others made."""
    file = Path(directory) / "qinglan.json"
    return read_json(file) if file.is_file() else {}


def _base_directory(model: PreTrainedModel) -> Path:
    """Return where the weights of `model`, without its adapter, were opened or saved."""
    base = Path(model.config.name_or_path or "-")
    if not (base / "config.json").is_file():
        raise InputError(
            "lora: an adapter wants a base model that lies in a directory, and these weights were never saved; save "
            "the model that training starts from, or set lora.merge"
        )
    return base.resolve()


def _base_of(directory: Path, name: str | None) -> Path:
    places = [Path(name or "-"), directory / (name or "-")]
    base = next((place for place in places if (place / "config.json").is_file()), None)
    if base is None:
        raise InputError(
            f"{directory}: its base model {name} is not there; expected a model directory; put it back, or correct "
            f"base_model_name_or_path in {directory / 'adapter_config.json'}"
        )
    expected = notes_of(directory).get("base_weights")
    if expected is not None and expected != _hash_of_weights(base):
        raise InputError(
            f"{directory}: its base model {base} has other weights than in training; an adapter fits only the weights "
            "it was trained on; restore them"
        )
    return base


def _hash_of_weights(base: Path) -> str:
    return hash_of([[file.name, sha256_of(file)] for file in sorted(base.glob("*.safetensors"))])


def _adapter_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of adapter and score head under PEFT's names."""
    return {
        PREFIX + name.replace(".default.", "."): p.detach().contiguous()
        for name, p in model.named_parameters()
        if ".lora_" in name or name.startswith(f"{HEAD}.")
    }


def _num_outputs(file: Path) -> int:
    """Return the number of rows of the head in an adapter's file."""
    head = _read_weights(file).get(f"{PREFIX}{HEAD}.weight")
    if head is None:
        raise InputError(f"{file}: has no {HEAD} head; expected the adapter of a reward model or a classifier")
    return len(head)


def _read_weights(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: cannot be opened ({error}); make or copy the adapter again") from error


def _load_adapter_weights(model: nn.Module, file: Path) -> None:
    saved = _read_weights(file)
    expected = _adapter_weights(model)
    wrong = sorted(expected.keys() ^ saved.keys())
    wrong += [name for name in expected.keys() & saved.keys() if expected[name].shape != saved[name].shape]
    if wrong:
        raise InputError(f"{file}: does not fit its configuration and base ({wrong[0]}, ...); make or copy it again")
    with torch.no_grad():
        for name, weights in expected.items():
            weights.copy_(saved[name])
