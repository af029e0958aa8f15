"""Language modelling on given token sequences: a task's own text, or the answers that a supervisor wrote.

Two uses in weak-to-strong learning (Burns et al. 2023): *generative fine-tuning*, on the task's text without any label,
before the weak labels are shown (section 5.2.2; every token is a target), and *hard labels that are texts*, in chess
the supervisor's greedy move (section 3; only the answer is a target). The loss is the mean over target tokens.
"""

from collections.abc import Sequence

from pydantic import Field

from qinglan.core.config import Config
from qinglan.core.errors import InputError
from qinglan.core.rng import permutation
from qinglan.core.run import Stage
from qinglan.learn.optimize import Checkpointer, OptimizerConfig, restore_training, set_lr, training_tensors
from qinglan.learn.sft import SFTConfig
from qinglan.learn.sft import update as language_model_update
from qinglan.models.language_model import (
    LanguageModel,
    TokenSequence,
    copy_language_model,
    load_language_model,
    max_context,
    save_language_model,
)


class TextTrainingConfig(Config):
    """Language modelling on texts of a task."""

    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=5e-4)
    """AdamW and its cosine schedule."""
    num_epochs: int = Field(default=2, ge=1)
    """Passes over the texts (paper: 5 for chess)."""
    batch_size: int = Field(default=8, ge=1)
    """Texts per update (paper: 32 for chess)."""
    max_tokens: int = Field(default=8192, ge=1)
    """Tokens in one forward pass, padding included. Changes speed and memory, never the gradient."""
    checkpoint_every: int = Field(default=100, ge=1)
    """Updates between two checkpoints."""


def train_on_texts(
    lm: LanguageModel, sequences: Sequence[TokenSequence], config: TextTrainingConfig, *, stage: Stage, seed: int
) -> LanguageModel:
    """Return a copy of `lm` trained on `sequences`, also saved as a model directory in `stage.dir/"model"`.

    Raises `InputError` for no sequence, one over the context, or a loss that is not finite.
    """
    directory = stage.dir / "model"
    if directory.is_dir():  # written whole, after the last update: an earlier start of this stage came to its end
        return load_language_model(directory, lm.device)._replace(chat=lm.chat, name=stage.name)
    _check(lm, sequences, stage.name)
    steps_per_epoch = -(-len(sequences) // config.batch_size)
    num_steps = config.num_epochs * steps_per_epoch
    student = copy_language_model(lm, name=stage.name)
    optimizer = config.optimizer.make(student.model)
    checkpointer = Checkpointer(stage.dir / "checkpoints")
    state = checkpointer.load()
    if state is not None:
        restore_training(state.tensors, student.model, optimizer)
    as_sft = SFTConfig(optimizer=config.optimizer, max_tokens=config.max_tokens)

    progress = stage.progress(num_steps)
    for step in range(state.step if state else 0, num_steps):
        epoch, place = divmod(step, steps_per_epoch)
        order = permutation(len(sequences), seed, "texts", "order", epoch)
        chosen = [sequences[i] for i in order[place * config.batch_size :][: config.batch_size]]
        set_lr(optimizer, config.optimizer.lr_at(step, num_steps))
        metrics = language_model_update(student, optimizer, chosen, [], as_sft, 0, f"{stage.name}, step {step + 1}")
        stage.log(step + 1, {**metrics, "epoch": (step + 1) / steps_per_epoch})
        if (step + 1) % config.checkpoint_every == 0:
            checkpointer.save(step + 1, training_tensors(student.model, optimizer))
        progress.show(step + 1, f"loss {metrics['loss']:.3f}")
    save_language_model(student, directory)
    checkpointer.clear()
    return student


def _check(lm: LanguageModel, sequences: Sequence[TokenSequence], where: str) -> None:
    if not sequences:
        raise InputError(f"{where}: no texts to train on; expected at least one")
    longest = max(len(sequence.token_ids) for sequence in sequences)
    if longest > max_context(lm.model):
        raise InputError(
            f"{where}: a text of {longest} tokens; the context of {lm.name} is {max_context(lm.model)} tokens and "
            "nothing is cut silently; shorten it or leave it out"
        )
