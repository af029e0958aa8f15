"""Model directories in Hugging Face's layout: opened with errors that name what is wrong, replaced only when whole."""

import os
import shutil
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from qinglan.core.device import Device
from qinglan.core.errors import InputError
from qinglan.models.attention import choose_attention

MAX_FILE_SIZE = "50GB"
"""Weights beyond this are split into several files, as transformers does by default."""


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model directory. Raises `InputError` where the directory or the tokenizer is absent."""
    if not directory.is_dir():
        raise InputError(f"{directory}: no such directory; expected a Hugging Face model directory")
    if not any((directory / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise InputError(f"{directory}: holds no config.json; expected a Hugging Face model directory")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{directory}: holds no usable tokenizer ({_first_line(error)}); add tokenizer.json"
        ) from error
    # Where all files of a tokenizer are absent, transformers makes one that knows nothing but control tokens.
    if set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids):
        raise InputError(f"{directory}: holds no usable tokenizer (its vocabulary is empty); add tokenizer.json")
    return tokenizer


def load_weights(
    auto_class: Any, directory: Path, device: Device, *, may_miss: Set[str] = frozenset(), **config_changes: Any
) -> PreTrainedModel:
    """Return a model in fp32 on the device, evaluation mode, dropout 0; `auto_class` is a `transformers` Auto class.

    Raises `InputError` where weights are damaged, missing (but for those named in `may_miss`), or of other shapes than
    the configuration says.
    """
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, **config_changes)
        turn_off_dropout(config)
        with _no_progress_bars():
            model, info = auto_class.from_pretrained(
                directory, config=config, dtype=torch.float32, local_files_only=True, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError, StrictDataclassError) as error:
        raise InputError(
            f"{directory}: cannot be opened as a model ({_first_line(error)}); the weights may be damaged: "
            "make or copy them again"
        ) from error
    missing = sorted({str(key) for key in info["missing_keys"]} - may_miss)
    if missing:
        raise InputError(
            f"{directory}: {len(missing)} weights are missing ({missing[0]}, ...); expected a whole "
            f"{type(model).__name__}; choose another directory"
        )
    for parameter in model.parameters():
        # Out of the file's pages into memory of its own: kernels may round otherwise where weights begin at another
        # alignment, and a resumed run must see the numbers of the model that it was never stopped with.
        parameter.data = parameter.data.clone()
    return prepare(model.to(device.torch_device))


def prepare(model: PreTrainedModel) -> PreTrainedModel:
    """Put a model into the state that every loop here expects: evaluation mode and no token that counts as padding.

    `nn.Embedding(padding_idx=...)` never gives that row a gradient, which is wrong where padding is the end token too;
    and with a `pad_token_id`, GPT-2 warns at each end token that a mask may be missing. Masks come from lengths here.
    """
    embeddings: Any = model.get_input_embeddings()
    embeddings.padding_idx = None
    trunk: Any = model.base_model
    for part in (model, trunk):  # the trunk of a loaded model may hold a configuration of its own
        part.config.get_text_config().pad_token_id = None
    choose_attention(model)
    return model.eval()


def turn_off_dropout(config: Any) -> None:
    """Set every dropout rate of a transformers configuration to 0."""
    text_config = config.get_text_config()
    for key, value in text_config.to_dict().items():
        if ("dropout" in key or "pdrop" in key) and isinstance(value, float):
            setattr(text_config, key, 0.0)


def save_weights(
    model: PreTrainedModel, directory: Path, *, pad_token_id: int | None, max_file_size: str = MAX_FILE_SIZE
) -> None:
    """Write configuration and safetensors; other tools read the padding token from the configuration."""
    config = model.config.get_text_config()
    config.pad_token_id = pad_token_id
    try:
        model.save_pretrained(directory, max_shard_size=max_file_size)
    finally:
        config.pad_token_id = None


def write_model_directory(directory: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a directory beside `directory`, then put it in its place.

    Raises `InputError` where the disk is full or the folder cannot be written.
    """
    directory = Path(directory)
    part = directory.with_name(f".{directory.name}.part")
    old = directory.with_name(f".{directory.name}.old")
    try:
        for left_over in (part, old):
            shutil.rmtree(left_over, ignore_errors=True)
        part.mkdir(parents=True)
        write(part)
        for file in part.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        if directory.exists():
            directory.rename(old)
        part.rename(directory)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{directory}: cannot write here ({error}); free some space or choose another --out"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if old.exists() and not directory.exists():
            old.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
