"""Where an InstructGPT run gets its prompts, feedback and base models: the user's files, or the built-in world."""

from pathlib import Path
from typing import NamedTuple

from qinglan.core.errors import InputError
from qinglan.core.records import Prompt
from qinglan.data.pools import Pools, pools_from_files
from qinglan.learn.sft import PretrainSource
from qinglan.models.chat import make_chat_format
from qinglan.models.language_model import LanguageModel, load_language_model, max_context
from qinglan.recipes.instruct_gpt_config import InstructGPTConfig
from qinglan.tasks.assistant import World
from qinglan.tasks.assistant_data import world_data
from qinglan.tasks.base_models import base_tokenizer, resolve_model
from qinglan.tasks.corpus import pretraining_sequences


class Data(NamedTuple):
    """What a run learns from; the answer key and the corpus are None for files of one's own."""

    pools: Pools
    world: World | None
    pretrain: PretrainSource | None
    files: dict[str, Path]


def gather(config: InstructGPTConfig, base: LanguageModel, seed: int) -> Data:
    """Return the prompts and feedback of the user's files, or else of the built-in world."""

    def num_tokens(prompt: Prompt) -> int:
        return len(base.chat.prompt_ids(prompt.messages))

    files = {"prompts": config.prompts, "demonstrations": config.demonstrations, "comparisons": config.comparisons}
    given = {name: path for name, path in files.items() if path is not None}
    if given:
        pools = pools_from_files(**files, config=config.hygiene, seed=seed, on_bad=config.on_bad, num_tokens=num_tokens)
        return Data(pools, None, None, given)
    made = world_data(config.world, config.hygiene, seed=seed, num_tokens=num_tokens)
    is_family = base.chat.render_hash == make_chat_format(base_tokenizer()).render_hash
    corpus = pretraining_sequences(base.tokenizer._tokenizer, seed, max_tokens=64) if is_family else None
    return Data(made.pools, made.world, corpus, {})


def reward_base(config: InstructGPTConfig, base: LanguageModel, larger: LanguageModel | None) -> LanguageModel:
    """Return the pretrained model that the reward model starts from.

    Raises `InputError` for one that reads other tokens, or conversations otherwise, than the policy writes them.
    """
    if config.reward_base is not None:
        chosen = load_language_model(resolve_model(config.reward_base), base.device, template=config.template)
        if chosen.chat.render_hash != base.chat.render_hash:
            raise InputError(
                f"reward_base {config.reward_base}: has another tokenizer or chat template than {config.model}; "
                "expected those of the policy; choose another, or leave it out"
            )
        return chosen
    return larger if larger is not None and larger.chat.render_hash == base.chat.render_hash else base


def check_lengths(config: InstructGPTConfig, base: LanguageModel, pools: Pools) -> None:
    """Raise `InputError` where a prompt leaves no room for a completion in the model's context."""
    context = max_context(base.model)
    wanted = max(config.sampling.max_new_tokens, config.ppo.sampling.max_new_tokens)
    for prompt in (*pools.comparison_prompts, *pools.rl_prompts, *pools.valid_prompts, *pools.test_prompts):
        num_tokens = len(base.chat.prompt_ids(prompt.messages))
        if num_tokens + wanted > context:
            raise InputError(
                f"prompt {prompt.id}: has {num_tokens} tokens and leaves {context - num_tokens} of {config.model}'s "
                f"context of {context}, but completions may have {wanted}; lower max_new_tokens of sampling and "
                "ppo.sampling, or hygiene.max_tokens"
            )
