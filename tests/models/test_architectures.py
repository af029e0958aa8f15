"""The sampler on architectures beyond those that training is tested with: exact by slots, or exact without them.

Two layers of 16 units, random weights, completions beyond windows of 5. The expected kind of memory is a fact about
transformers' models: where it changes, look at the plan before the expectation.
"""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from qinglan import cli
from qinglan.core.errors import InputError
from qinglan.models.directory import prepare
from qinglan.models.generate import SamplingConfig, generate
from qinglan.models.language_model import load_language_model
from qinglan.models.options import option_logprobs
from qinglan.models.row_memory import model_facts
from tests.conftest import CPU

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [40], [60, 61, 62, 63]]
OPTIONS = [[20, 21, 22], [23] * 9]
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
NARROW = {"head_dim": 8, "sliding_window": 5}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 12,  # keys and values of unequal width
    "first_k_dense_replace": 1,
}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
BY_SLOTS = {
    "Cohere2": NARROW,  # one layer of two slides, the logits are scaled
    "DeepseekV3": LATENT | EXPERTS | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_key_value_heads": 2},
    "Ernie4_5": {"head_dim": 8},
    "Exaone4": NARROW,
    "GPTNeoX": {"num_key_value_heads": None},  # positions turn a part of each head
    "Glm4": {"head_dim": 8},
    "GptOss": NARROW | {"num_local_experts": 4, "num_experts_per_tok": 2},  # attention sinks
    "Granite": {"logits_scaling": 2.0},
    "Ministral": NARROW,
    "Mixtral": {"num_local_experts": 4},
    "Nemotron": {},
    "Olmo3": {"sliding_window": 5},
    "Phi3": {},
    "Qwen3Moe": EXPERTS | {"head_dim": 8},
    "SmolLM3": {"no_rope_layers": [1, 0]},
    "Starcoder2": {"sliding_window": 5},
}
BY_TOKENS = {
    "Bamba": {"attn_layer_indices": [1], "mamba_n_heads": 2, "mamba_d_head": 16, "mamba_d_state": 4},
    "Bloom": {"n_layer": 2, "n_head": 2},  # ALiBi
    "Falcon": {"alibi": True, "num_key_value_heads": None},
    "Qwen3Next": EXPERTS | LINEAR | {"head_dim": 8},
}


def make(tiny_lm, name, changes):
    lm = tiny_lm()
    sizes = {key: value for key, value in {**SIZES, **changes}.items() if value is not None or key == "bos_token_id"}
    config = getattr(transformers, f"{name}Config")(vocab_size=len(lm.tokenizer), **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    ends = frozenset(range(0, len(lm.tokenizer), 16))
    return lm._replace(model=prepare(model), name=name, chat=lm.chat._replace(end_ids=ends))


def plain(lm, prompt, tokens, temperature):
    with torch.no_grad():
        logits = lm.model(input_ids=torch.tensor([[*prompt, *tokens]]), use_cache=False).logits[0].float()
    logprobs = (logits / temperature).log_softmax(-1)[len(prompt) - 1 : -1]
    return logprobs.gather(1, torch.tensor(tokens)[:, None])[:, 0]


@pytest.mark.parametrize("name", [*BY_SLOTS, *BY_TOKENS])
def test_samples_greedy_completions_and_options_are_exact(tiny_lm, name, capsys):
    lm = make(tiny_lm, name, BY_SLOTS.get(name, BY_TOKENS.get(name)))
    config = SamplingConfig(max_new_tokens=20, temperature=0.8, max_rows=4)
    for prompt, row in zip(PROMPTS, generate(lm, PROMPTS, config, seed=0, num_samples=2), strict=True):
        for sample in row:
            expected = plain(lm, prompt, sample.token_ids, 0.8)
            torch.testing.assert_close(torch.tensor(sample.logprobs), expected, atol=1e-5, rtol=0)
    for prompt, row in zip(PROMPTS, option_logprobs(lm, PROMPTS, [OPTIONS] * 3), strict=True):
        for option, logprobs in zip(OPTIONS, row, strict=True):
            torch.testing.assert_close(logprobs, plain(lm, prompt, option, 1.0), atol=1e-5, rtol=0)
    greedy = generate(lm, PROMPTS, SamplingConfig(max_new_tokens=12, temperature=0), seed=0)
    for prompt, (sample,) in zip(PROMPTS, greedy, strict=True):
        with torch.no_grad():
            output = lm.model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                do_sample=False,
                max_new_tokens=12,
                eos_token_id=sorted(lm.chat.end_ids),
                pad_token_id=0,
            )
        assert sample.token_ids == output[0, len(prompt) :].tolist()
    assert (model_facts(lm.model, name, None).plan is not None) == (name in BY_SLOTS)
    assert capsys.readouterr().err.count(f"sampling from {name}: ") == (name not in BY_SLOTS)


@pytest.mark.parametrize("name", ["Bloom", "Qwen3Next", "GptOss"])
def test_the_command_samples_where_training_is_refused(tiny_lm, name, tmp_path, capsys):
    lm = make(tiny_lm, name, BY_SLOTS.get(name, BY_TOKENS.get(name)))
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    command = ["--model", str(tmp_path), "--sampling.max-new-tokens", "4"]
    assert cli.run(["sample", *command, "--text", "Hi", "--num-samples", "2"]) == 0
    answer = capsys.readouterr()
    assert answer.out.count("  > ") == 2
    assert ("reads the whole text again, slower but exact" in answer.err) == (name in BY_TOKENS)
    with pytest.raises(InputError, match="it can be sampled from, not trained"):
        load_language_model(tmp_path, CPU)
