"""The base models of the built-in world: sizes, drawing fresh weights, opening and shipping trained ones.

A stock `transformers` decoder (Qwen3, for its QK-norm) with tied embeddings and one tokenizer for all, so that the
shipped directories open in any tool. RoPE base 1,000 for a short context, matrices scaled by their fan-in and output
matrices that start at zero make such small nets learn faster; `LOG.md` has the measurements.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from qinglan.core.device import Device
from qinglan.core.errors import InputError, nearest
from qinglan.core.files import read_json, sha256_of, write_json
from qinglan.core.rng import stream
from qinglan.models.chat import make_chat_format
from qinglan.models.directory import prepare
from qinglan.models.language_model import LanguageModel, load_language_model, save_language_model

CONTEXT = 256
"""Tokens that every base model takes."""
ROPE_BASE = 1000.0
"""Of the rotary positions: the usual 10,000 spends half of the rotations on distances that a short context lacks."""
EMBEDDING_STD = 0.05
"""Of the tied embeddings."""
WEIGHTS_DIR = Path(__file__).parent / "weights"
TOKENIZER_DIR = Path(__file__).parent / "tokenizer"
CARD = "model_card.json"
ABOUT = (
    "Base model of Qinglan's built-in world, a small invented world in plain English. It continues documents; it knows "
    "nothing of the real world and is of no use outside this tool's demonstrations and tests."
)
HASHED_FILES = ("config.json", "model*.safetensors*", "tokenizer.json", "tokenizer_config.json")
"""Patterns of the files whose hashes stand in a card."""
SHIPPED_FILE_SIZE = "16MB"
"""Weights of larger models are shipped in several files."""


class Size(NamedTuple):
    """The shape of one base model; `num_heads` heads of `head_dim` need not add up to `hidden`."""

    num_layers: int
    hidden: int
    mlp: int
    num_heads: int
    head_dim: int


SIZES: dict[str, Size] = {
    "nano": Size(num_layers=3, hidden=64, mlp=128, num_heads=4, head_dim=16),
    "micro": Size(num_layers=4, hidden=96, mlp=256, num_heads=4, head_dim=24),
    "mini": Size(num_layers=6, hidden=160, mlp=432, num_heads=5, head_dim=32),
    "small": Size(num_layers=7, hidden=256, mlp=688, num_heads=8, head_dim=32),
    "base": Size(num_layers=10, hidden=384, mlp=1024, num_heads=12, head_dim=32),
}
"""About 0.27, 0.66, 2.2, 6.1 and 18.6 million parameters with a vocabulary of 2,304; the last two come from a GPU."""


# ------------------------------------------------------------------------------------------------------------ fresh


def size_of(name: str) -> Size:
    """Return the shape of the size called `name`. Raises `InputError` with the nearest name."""
    if name not in SIZES:
        raise InputError(f"size {name}: no such base model; expected one of {', '.join(SIZES)}{nearest(name, SIZES)}")
    return SIZES[name]


def base_tokenizer() -> PreTrainedTokenizerBase:
    """Return the tokenizer of the family."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(TOKENIZER_DIR, local_files_only=True)
    return tokenizer


def build(
    size: str,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    *,
    device: Device | None = None,
    context: int = CONTEXT,
    vocabulary: int | None = None,
) -> LanguageModel:
    """Return a base model with freshly drawn weights, in fp32.

    Args:
        size: name in `SIZES`.
        tokenizer: decides vocabulary, end token and chat format.
        seed: draws the weights, each matrix from a stream of its own name.
        device: default the CPU.
        context: tokens that the model takes.
        vocabulary: rows of the embedding, at least the tokenizer's (the default).
    """
    shape = size_of(size)
    chat = make_chat_format(tokenizer)
    config = Qwen3Config(
        vocab_size=vocabulary or len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=context,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_BASE},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=chat.end_id,
    )
    device = device or Device.detect("cpu")
    with device.torch_device, torch.random.fork_rng():  # transformers draws too, from the global generator
        model = prepare(Qwen3ForCausalLM(config))
    draw_weights(model, seed, size)
    return LanguageModel(model, tokenizer, chat, device, size)


@torch.no_grad()
def draw_weights(model: nn.Module, seed: int, *keys: str) -> None:
    """Draw every matrix anew, in place: N(0, 1 / fan-in), embeddings N(0, `EMBEDDING_STD`), output matrices zero.

    A block whose output matrix is zero adds nothing at first, so each layer starts as the identity. Gains keep their 1.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.zero_()
            continue
        std = EMBEDDING_STD if "embed_tokens" in name else parameter.shape[1] ** -0.5
        values = torch.randn(parameter.shape, generator=stream(seed, "base model", *keys, name))
        parameter.copy_(values * std)


# ---------------------------------------------------------------------------------------------------------- shipped


def shipped_sizes(weights_dir: Path = WEIGHTS_DIR) -> list[str]:
    """Return the sizes whose trained weights come with the package, smallest first."""
    return [size for size in SIZES if (weights_dir / size / CARD).is_file()]


def base_model_path(size: str, weights_dir: Path = WEIGHTS_DIR) -> Path:
    """Return the directory of a shipped base model, after checking its files against the hashes in its card.

    Raises `InputError` for an unknown size, one that is not shipped, and a damaged or foreign file, which it names.
    """
    size_of(size)
    directory = weights_dir / size
    if not (directory / CARD).is_file():
        raise InputError(
            f"base model {size}: its weights do not come with this installation (looked in {directory}); make them "
            f"with `qinglan world pretrain`, or use one of: {', '.join(shipped_sizes(weights_dir)) or 'none shipped'}"
        )
    for name, expected in model_card(size, weights_dir)["sha256"].items():
        file = directory / name
        if not file.is_file() or sha256_of(file) != expected:
            state = "is not the file that was shipped (damaged or replaced)" if file.is_file() else "is missing"
            raise InputError(f"{file}: {state}; expected SHA-256 {expected}; install the package again")
    return directory


def model_card(size: str, weights_dir: Path = WEIGHTS_DIR) -> dict[str, Any]:
    """Return the card of a shipped base model: data, seed, command, seconds, loss, probes, hashes."""
    card: dict[str, Any] = read_json(weights_dir / size / CARD)
    return card


def resolve_model(name_or_dir: str | Path, weights_dir: Path = WEIGHTS_DIR) -> Path:
    """Return the directory of a base model by its size name, or the Hugging Face directory itself.

    A size name wins over a directory of that name; `./nano` means the directory.
    Raises `InputError` where it is neither, with the nearest size name.
    """
    if str(name_or_dir) in SIZES:
        return base_model_path(str(name_or_dir), weights_dir)
    directory = Path(name_or_dir)
    if directory.is_dir():
        return directory
    raise InputError(
        f"model {name_or_dir}: no such directory, and no base model of that name; expected a Hugging Face directory "
        f"or one of {', '.join(SIZES)}{nearest(str(name_or_dir), SIZES)}"
    )


def ship(
    run_dir: Path,
    size: str,
    *,
    stage: str = "pretrain",
    command: str | None = None,
    probes: dict[str, Any] | None = None,
    weights_dir: Path = WEIGHTS_DIR,
) -> Path:
    """Copy a pretrained model from a run into the package, in bfloat16, with its card; return the directory.

    Args:
        run_dir: the run; `stages/<stage>/` holds what `learn.pretrain.pretrain` left there.
        size: name under which it is shipped; the model must have that shape.
        stage: the pretraining stage.
        command: how the model can be made again; default: the run's own command line, folders left out.
        probes: capabilities measured afterwards on the bfloat16 weights; default: those of the last update.
        weights_dir: where the family lies.

    Raises:
        InputError: no finished pretraining there, or a model of another shape.
    """
    source = Path(run_dir) / "stages" / stage
    if not (source / "model").is_dir():
        raise InputError(
            f"{source}: holds no finished pretraining; let it run to its end first (--resume goes on with it)"
        )
    lm = load_language_model(source / "model", Device.detect("cpu"))
    _check_shape(lm, size, source)
    summary, lineage = read_json(source / "summary.json"), read_json(Path(run_dir) / "lineage.json")
    directory = weights_dir / size
    # The card goes last: without it a directory does not count as shipped.
    (directory / CARD).unlink(missing_ok=True)
    save_language_model(lm._replace(model=lm.model.bfloat16()), directory, max_file_size=SHIPPED_FILE_SIZE)
    hashed = sorted(file.name for pattern in HASHED_FILES for file in directory.glob(pattern))
    card = {
        "name": f"qinglan-{size}",
        "about": ABOUT,
        "parameters": summary["parameters"],
        "dtype": "bfloat16",
        "data": "qinglan.tasks.corpus, generated by program",
        "data_seed": summary["seed"],
        "command": command or _command_line(lineage["command"]),
        "code": lineage["code"],
        "tokens": summary["tokens"],
        "seconds": summary["seconds"],
        "device": summary["device"],
        "loss": summary["loss"],
        "held_out_loss": summary["held_out_loss"],
        "probes": summary["probes"] if probes is None else probes,
        "config": summary["config"],
        "license": "Apache-2.0",
        "sha256": {name: sha256_of(directory / name) for name in hashed},
    }
    write_json(directory / CARD, card)
    return directory


def _check_shape(lm: LanguageModel, size: str, source: Path) -> None:
    config = lm.model.config
    found = Size(
        config.num_hidden_layers,
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.head_dim,
    )
    if found != size_of(size):
        raise InputError(f"{source}: holds {found}; expected the shape of {size}, {SIZES[size]}; name its own size")


def _command_line(argv: list[str]) -> str:
    """Return a command that means the same on another machine: folders of absolute paths are left out."""
    return " ".join(Path(part).name if Path(part).is_absolute() else part for part in argv)
