"""Models and data that both sides of a benchmark read from one folder, as token ids and as text.

Three settings: `llama`, 4 layers of 256 units with random weights and a vocabulary of 1,024, where one word is one
token; and `mini` and `base`, built-in base models of 2.2 and 18.6 million parameters.
Text is made of single-token words of the tokenizer at hand.

This file runs in the peers' environments too, so that whatever needs Qinglan is imported where it is used.
"""

import json
import math
import random
from pathlib import Path
from typing import Any, NamedTuple

SETTINGS = ("llama", "mini", "base")
BUILT_IN = ("mini", "base")
NUM_LETTER_WORDS = 676
TEMPLATE = (
    "{% for message in messages %}{{ '<|' ~ message.role ~ '|> ' ~ (message.content | trim) }}"
    "{% if message.role == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


class Workload(NamedTuple):
    """What both sides of a job read."""

    setting: str
    model_dir: Path
    data: dict[str, Any]
    tokens: dict[str, Any]
    """Names and ids of the tokenizer's control tokens, for environments that cannot open its settings."""

    @classmethod
    def load(cls, folder: Path) -> "Workload":
        """Read the folder that `prepare` wrote."""
        saved = json.loads((folder / "workload.json").read_text(encoding="utf-8"))
        return cls(saved["setting"], folder / "model", saved["data"], saved["tokens"])


def prepare(setting: str, folder: Path) -> None:
    """Write model, data and token names of a setting into `folder`."""
    from qinglan.core.device import Device
    from qinglan.models.language_model import load_language_model, save_language_model

    if setting == "llama":
        lm = random_llama()
    else:
        from qinglan.tasks.base_models import base_model_path

        lm = load_language_model(base_model_path(setting), Device.detect("cpu"))
    save_language_model(lm, folder / "model")
    _let_old_transformers_read(folder / "model" / "config.json")
    chat = lm.chat
    tokens = {
        "eos_token": lm.tokenizer.decode([chat.end_id]),
        "pad_token": lm.tokenizer.decode([chat.pad_id]),
        "end_id": chat.end_id,
        "end_ids": sorted(chat.end_ids),
        "pad_id": chat.pad_id,
    }
    saved = {"setting": setting, "data": make_data(lm, setting), "tokens": tokens}
    (folder / "workload.json").write_text(json.dumps(saved), encoding="utf-8")


def _let_old_transformers_read(config_file: Path) -> None:
    """Name the rotary base as transformers 4 reads it, beside the form of transformers 5."""
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["rope_theta"] = config.get("rope_parameters", {}).get("rope_theta", 10000.0)
    config["dtype"] = config["torch_dtype"] = "float32"
    config_file.write_text(json.dumps(config, indent=2), encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------ models


def random_llama(num_layers: int = 4, hidden: int = 256, vocabulary: int = 1024, context: int = 2048) -> Any:
    """Return a Llama with random weights and a tokenizer in which every two-letter word is one token."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from qinglan.core.device import Device
    from qinglan.models.chat import make_chat_format
    from qinglan.models.directory import prepare as ready
    from qinglan.models.language_model import LanguageModel

    tokenizer = word_tokenizer(vocabulary)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        max_position_embeddings=context,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ready(LlamaForCausalLM(config))
    return LanguageModel(model, tokenizer, make_chat_format(tokenizer), Device.detect("cpu"), "llama")


def word_tokenizer(vocabulary: int) -> Any:
    """Return a byte-level BPE tokenizer of this size; each word of two letters is one token, the rest is filling."""
    import string

    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = string.ascii_lowercase
    merges = [("Ġ", a) for a in letters] + [("Ġ" + a, b) for a in letters for b in letters]
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet()) + [a + b for a, b in merges]
    control = ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|pad|>"]
    filling = [f"unused{i}" for i in range(vocabulary - len(tokens) - len(control))]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens + filling)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|pad|>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


# -------------------------------------------------------------------------------------------------------------- data


def make_data(lm: Any, setting: str) -> dict[str, Any]:
    """Return the data of all jobs: rankings, prompts of 16 words, prompts to sample from, chats."""
    words = single_token_words(lm)
    rng = random.Random(0)

    def text(length: int) -> str:
        return " ".join(rng.choice(words) for _ in range(length))

    return {
        "rankings": [_ranking(lm, text(64), [text(rng.randint(10, 40)) for _ in range(9)]) for _ in range(64)],
        "short_prompts": [text(16) for _ in range(256)],
        "sampling": _sampling_prompts(lm, setting, text),
        "chats": [_chat(lm, text, rng, 1000 if setting == "llama" else 240) for _ in range(512)],
    }


def single_token_words(lm: Any) -> list[str]:
    """Return lower-case words that, with a blank before them, are one token each."""
    vocabulary = lm.tokenizer.get_vocab()
    found = sorted(name[1:] for name in vocabulary if name[:1] == "Ġ" and name[1:].isascii() and name[1:].isalpha())
    kept = [word for word in found if word.islower() and len(word) > 1]
    encode = lm.tokenizer.encode
    return [word for word in kept if len(encode(f" {word} {word}", add_special_tokens=False)) == 2]


def _ids(lm: Any, prompt: str, completion: str) -> dict[str, Any]:
    from qinglan.core.records import Message

    prompt_ids = lm.chat.prompt_ids((Message(role="user", content=prompt),))
    completion_ids = lm.chat.completion_ids(completion)
    return {"prompt": prompt, "completion": completion, "prompt_ids": prompt_ids, "completion_ids": completion_ids}


def _ranking(lm: Any, prompt: str, completions: list[str]) -> list[dict[str, Any]]:
    """Return K completions of a prompt, the best first."""
    return [_ids(lm, prompt, completion) for completion in completions]


def _chat(lm: Any, text: Any, rng: random.Random, limit: int) -> dict[str, Any]:
    """Return a demonstration with lengths as in English OpenAssistant conversations.

    Words so far: log-normal around 52, deviation 1.35; words of the reply: around 81, deviation 1.11 (687 replies of
    100 trees); 1.3 tokens a word, cut so that both fit into the context.
    """
    prompt = min(max(4, round(1.3 * math.exp(rng.gauss(math.log(52), 1.35)))), limit // 2)
    completion = min(max(4, round(1.3 * math.exp(rng.gauss(math.log(81), 1.11)))), limit - prompt)
    return _ids(lm, text(prompt), text(completion))


def _sampling_prompts(lm: Any, setting: str, text: Any) -> dict[str, Any]:
    """Return 64 prompts as token ids, the ids that end a completion, and the longest completion.

    A random model has no end of its own: any of 16 in 1,024 tokens ends a text, so that lengths are geometric with a
    mean of 64. The built-in model gets prompts of its world and ends by itself.
    """
    from qinglan.core.records import Message

    if setting == "llama":
        prompts = [lm.chat.prompt_ids((Message(role="user", content=text(16)),)) for _ in range(64)]
        ends = [lm.chat.end_id, *(lm.tokenizer.convert_tokens_to_ids(f"unused{i}") for i in range(15))]
        return {"prompts": prompts, "end_ids": ends, "max_new_tokens": 256}
    from qinglan.models.language_model import max_context
    from qinglan.tasks.assistant import draw_prompts

    drawn = [lm.chat.prompt_ids(prompt.messages) for prompt in draw_prompts(200, 0, "test").prompts]
    prompts = sorted(drawn, key=len)[:64]
    room = max_context(lm.model) - max(len(ids) for ids in prompts)
    return {"prompts": prompts, "end_ids": sorted(lm.chat.end_ids), "max_new_tokens": min(256, room)}
