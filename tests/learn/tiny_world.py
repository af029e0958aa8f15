"""A character tokenizer, random two-layer models of several architectures, and toy records, all made in memory."""

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from qinglan.core.config import Config
from qinglan.core.device import Device
from qinglan.core.records import (
    Comparison,
    ComparisonGroup,
    Completion,
    Demonstrated,
    Demonstration,
    Label,
    Message,
    Prompt,
    Source,
)
from qinglan.core.run import Run, Stage
from qinglan.models.chat import make_chat_format
from qinglan.models.directory import prepare
from qinglan.models.language_model import LanguageModel

CPU = Device.detect("cpu", "float32")
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}<u>{{ m.content }}{% else %}<a>{{ m.content }}<e>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:;?!'<>/=+*éï-_|"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character; the padding token is the end token."""
    vocabulary = {token: i for i, token in enumerate(["<e>", "<u>", "<a>", "<s>", *LETTERS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="_"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    tokenizer.decoder = Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<e>", pad_token="<e>", additional_special_tokens=["<u>", "<a>"]
    )
    fast.chat_template = TEMPLATE
    return fast


def make_config(kind: str, hidden: int = 16) -> PretrainedConfig:
    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"vocab_size": 4 + len(LETTERS), "max_position_embeddings": 128}
    grouped = {"num_key_value_heads": 1, "head_dim": hidden // 2}
    if kind == "gpt2":
        return GPT2Config(
            vocab_size=sizes["vocab_size"],
            n_positions=128,
            n_embd=hidden,
            n_layer=2,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
        )
    if kind == "llama":
        return LlamaConfig(**sizes)
    if kind == "qwen3":
        return Qwen3Config(**sizes, **grouped)
    if kind == "qwen2":
        return Qwen2Config(**sizes, num_key_value_heads=1)
    if kind == "gemma":
        return GemmaConfig(**sizes, **grouped)
    if kind == "mistral":
        return MistralConfig(**sizes, **grouped, sliding_window=None)
    if kind == "mistral_sliding":
        return MistralConfig(**sizes, **grouped, sliding_window=4)
    if kind == "gemma3":
        return Gemma3TextConfig(
            **sizes, **grouped, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
        )
    raise AssertionError(kind)


def make_lm(kind: str = "llama", hidden: int = 16) -> LanguageModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(make_config(kind, hidden))
    tokenizer = make_tokenizer()
    return LanguageModel(prepare(model), tokenizer, make_chat_format(tokenizer), CPU, f"tiny-{kind}")


class Empty(Config):
    """A run of these tests has no settings."""


def make_stage(directory: Path, name: str) -> Stage:
    """A stage of a run folder that is not locked, so that a test can start it again in the same process."""
    return Run(directory, Empty(), seed=0, recipe="test", quiet=True).stage(name)


def make_prompt(text: str) -> Prompt:
    return Prompt(
        id=f"p-{text}",
        source="human",
        producer_id="tester",
        prompt_group_id=text,
        messages=(Message(role="user", content=text),),
    )


def make_demonstration(question: str, answer: str) -> Demonstrated:
    prompt = make_prompt(question)
    demonstration = Demonstration(
        id=f"d-{question}",
        source="human",
        producer_id="tester",
        prompt_group_id=question,
        prompt_id=prompt.id,
        text=answer,
    )
    return Demonstrated(prompt, demonstration)


def make_group(question: str, answers: Sequence[str], label: Label, source: Source = "human") -> ComparisonGroup:
    prompt = make_prompt(question)
    common = {"source": source, "producer_id": "tester", "prompt_group_id": question}
    completions = tuple(
        Completion(id=f"c-{question}-{k}", prompt_id=prompt.id, text=text, **common) for k, text in enumerate(answers)
    )
    comparison = Comparison(
        id=f"r-{question}",
        prompt_id=prompt.id,
        items=tuple(completion.id for completion in completions),
        order_shown=tuple(range(len(answers))),
        label=label,
        **common,
    )
    return ComparisonGroup(prompt, completions, comparison)
