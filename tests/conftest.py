"""Fixtures that several test folders share: tiny random models with a byte tokenizer, made in memory.

One thread for everything: tiny models gain nothing from more, and a test that forks after OpenMP started its threads
would wait for ever.
"""

import os
from collections.abc import Callable

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from qinglan.core.device import Device
from qinglan.models import kernels
from qinglan.models.chat import TemplateName, make_chat_format
from qinglan.models.directory import prepare
from qinglan.models.heads import ScalarModel
from qinglan.models.language_model import LanguageModel, TokenSequence

os.environ["OMP_NUM_THREADS"] = "1"  # for subprocesses, and for `prepare_process`
torch.set_num_threads(1)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
"""Of tests that compare what a GPU does with and without recorded steps; the suite of a CPU leaves them out."""

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen2_sliding", "qwen3", "gpt2", "gemma2", "gemma3")
CPU = Device.detect("cpu", "float32")
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MERGES = [("t", "h"), ("th", "e"), ("i", "n"), ("Ġ", "the"), ("a", "n"), ("l", "l")]  # several ways to write one text
SLIDING_WINDOW = 5
LENGTHS = ((14, 5), (3, 1), (9, 9), (11, 2), (1, 1), (6, 5))  # (tokens, prompt tokens); some longer than the window


def make_tokenizer(
    pad_is_eos: bool = False, template: str | None = CHATML, bos: bool = False
) -> PreTrainedTokenizerFast:
    """Byte-level tokenizer of 256 bytes, a few merges and the control tokens; `<|im_end|>` closes a turn, not eos."""
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet()) + [first + second for first, second in MERGES]
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>", "<|bos|>"]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    names = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>" if pad_is_eos else "<|pad|>"}
    if bos:
        names["bos_token"] = "<|bos|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, add_bos_token=bos, **names)
    tokenizer.chat_template = template
    return tokenizer


def make_config(architecture: str, num_tokens: int) -> PreTrainedConfig:
    """Two layers of 16 units, of two kinds where the architecture has them; weights large enough that mistakes show."""
    sizes = {
        "vocab_size": num_tokens,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
    }
    gemma = {"head_dim": 8, "sliding_window": SLIDING_WINDOW, "query_pre_attn_scalar": 8}
    if architecture == "llama":
        return LlamaConfig(**sizes, tie_word_embeddings=False)
    if architecture == "mistral":
        return MistralConfig(**sizes, sliding_window=SLIDING_WINDOW)
    if architecture == "qwen2":
        return Qwen2Config(**sizes, tie_word_embeddings=True)
    if architecture == "qwen2_sliding":
        return Qwen2Config(**sizes, use_sliding_window=True, sliding_window=SLIDING_WINDOW, max_window_layers=1)
    if architecture == "qwen3":
        return Qwen3Config(**sizes, head_dim=8)
    if architecture == "gpt2":
        return GPT2Config(vocab_size=num_tokens, n_embd=16, n_layer=2, n_head=2, n_positions=256, initializer_range=0.3)
    if architecture == "gemma2":
        return Gemma2Config(**sizes, **gemma, attn_logit_softcapping=2.0, final_logit_softcapping=3.0)
    if architecture == "gemma3":
        return Gemma3TextConfig(
            **sizes, **gemma, layer_types=["sliding_attention", "full_attention"], final_logit_softcapping=3.0
        )
    raise ValueError(architecture)


def make_tiny_lm(
    architecture: str = "llama",
    *,
    pad_is_eos: bool = False,
    template: TemplateName = "own",
    seed: int = 0,
    attention: str | None = None,
) -> LanguageModel:
    """Random model of one architecture; equal arguments give equal weights."""
    tokenizer = make_tokenizer(pad_is_eos, CHATML if template == "own" else None)
    config = make_config(architecture, len(tokenizer))
    config.pad_token_id, config.eos_token_id, config.bos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id, None
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        for parameter in model.parameters():  # biases and gains too, so that one that is forgotten shows
            if parameter.ndim == 1:
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return LanguageModel(prepare(model), tokenizer, make_chat_format(tokenizer, template), CPU, f"tiny-{architecture}")


def make_sequences(lm: LanguageModel | ScalarModel) -> list[TokenSequence]:
    """Ragged sequences of any ids, pad and control ids included, that end with the end token."""
    draw = torch.Generator().manual_seed(1)
    sequences = []
    for length, num_prompt in LENGTHS:
        ids = torch.randint(len(lm.tokenizer), (length,), generator=draw).tolist()
        sequences.append(TokenSequence([*ids[:-1], lm.chat.end_id], num_prompt))
    return sequences


@pytest.fixture
def tiny_lm() -> Callable[..., LanguageModel]:
    """Return the factory of tiny random models (see `make_tiny_lm`)."""
    return make_tiny_lm


@pytest.fixture
def generator() -> torch.Generator:
    """Return a seeded CPU generator."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models run as where no compiler is."""
    monkeypatch.setattr(kernels, "library", lambda: None)


@pytest.fixture(params=["kernels", "operations"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test runs with compiled kernels and without."""
    if request.param == "operations":
        monkeypatch.setattr(kernels, "library", lambda: None)
    elif kernels.has_compiler():
        assert kernels.library() is not None, "there is a compiler, but it does not make the kernels"
    else:
        pytest.skip("no compiler for kernels")
