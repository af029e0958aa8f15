"""The base family: shapes, initialisation, shipping with a card, hash checks, names, and what is shipped."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qinglan.core.config import Config
from qinglan.core.device import Device
from qinglan.core.errors import InputError
from qinglan.core.files import sha256_of, write_json
from qinglan.core.records import Message
from qinglan.core.run import Run
from qinglan.models.language_model import LanguageModel, load_language_model, save_language_model
from qinglan.tasks import base_models
from qinglan.tasks.base_models import (
    SIZES,
    WEIGHTS_DIR,
    base_model_path,
    base_tokenizer,
    build,
    model_card,
    resolve_model,
    ship,
    shipped_sizes,
)

CPU = Device.detect("cpu")


class Empty(Config):
    """A run of these tests has no settings."""


@pytest.fixture(scope="module")
def nano() -> LanguageModel:
    return build("nano", base_tokenizer(), seed=0)


@pytest.fixture
def trained(tmp_path: Path, nano: LanguageModel) -> Path:
    """A run folder as pretraining leaves it."""
    run = Run(tmp_path / "run", Empty(), seed=7, recipe="world-pretrain", quiet=True)
    stage = run.stage("pretrain")
    save_language_model(nano, stage.dir / "model")
    summary = {"seed": 7, "parameters": nano.model.num_parameters(), "tokens": 4096, "seconds": 1.5, "device": "cpu"}
    results = {"loss": 2.5, "held_out_loss": 2.6, "probes": {"copying": 0.9}, "config": {}}
    write_json(stage.dir / "summary.json", summary | results)
    write_json(run.dir / "lineage.json", {"command": ["/usr/bin/qinglan", "world", "pretrain"], "code": {"torch": "2"}})
    return tmp_path / "run"


# ------------------------------------------------------------------------------------------------------------ fresh


def test_sizes_grow_about_threefold_from_a_quarter_of_a_million_to_eighteen_million():
    counts = {size: build(size, base_tokenizer(), seed=0).model.num_parameters() for size in SIZES}
    assert 0.2e6 < counts["nano"] < 0.3e6
    assert 0.5e6 < counts["micro"] < 0.7e6
    assert 1.9e6 < counts["mini"] < 2.4e6
    assert 5.5e6 < counts["small"] < 6.5e6
    assert 17e6 < counts["base"] < 19e6


def test_a_fresh_model_predicts_almost_uniformly_and_its_blocks_are_the_identity(nano: LanguageModel):
    token_ids = torch.tensor([[5, 80, 300, 7]])
    with torch.no_grad():
        output = nano.model(input_ids=token_ids, output_hidden_states=True)
    embedded = nano.model.get_input_embeddings()(token_ids)
    torch.testing.assert_close(output.hidden_states[1], embedded)  # after the first layer, before the final norm
    entropy = torch.distributions.Categorical(logits=output.logits).entropy()
    assert float(entropy.min()) > math.log(nano.model.config.vocab_size) - 0.3


def test_weights_are_drawn_from_the_seed_and_no_global_state(nano: LanguageModel):
    torch.manual_seed(123)
    state = torch.get_rng_state()
    again, other = build("nano", base_tokenizer(), seed=0), build("nano", base_tokenizer(), seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    for (name, one), two, three in zip(
        nano.model.named_parameters(), again.model.parameters(), other.model.parameters(), strict=True
    ):
        assert torch.equal(one, two), name
        assert one.ndim < 2 or not one.any() or not torch.equal(one, three), name


def test_matrices_are_scaled_by_their_fan_in(nano: LanguageModel):
    up = nano.model.model.layers[0].mlp.up_proj.weight
    assert up.detach().std().item() == pytest.approx(64**-0.5, rel=0.05)


def test_the_tokenizer_sets_vocabulary_and_end_token(nano: LanguageModel):
    assert nano.model.config.vocab_size == len(nano.tokenizer)
    assert nano.model.config.eos_token_id in nano.chat.end_ids
    assert nano.model.config.rope_parameters["rope_theta"] == 1000.0
    assert nano.model.config.tie_word_embeddings


# ---------------------------------------------------------------------------------------------------------- shipping


def test_a_shipped_model_opens_in_transformers_and_is_the_trained_one_in_bfloat16(
    tmp_path: Path, trained: Path, nano: LanguageModel
):
    weights_dir = tmp_path / "weights"
    directory = ship(trained, "nano", weights_dir=weights_dir)
    assert base_model_path("nano", weights_dir) == directory == resolve_model("nano", weights_dir)
    assert shipped_sizes(weights_dir) == ["nano"]
    model = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True)
    assert model.dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    text = "Tom lives in a small house."
    assert tokenizer.encode(text) == base_tokenizer().encode(text)
    loaded = load_language_model(directory, CPU)
    for one, two in zip(loaded.model.parameters(), nano.model.parameters(), strict=True):
        assert torch.equal(one, two.bfloat16().float())
    prompt = [Message(role="user", content="Where is the cat?")]
    assert loaded.chat.render_hash == nano.chat.render_hash
    assert loaded.chat.prompt_ids(prompt) == nano.chat.prompt_ids(prompt)
    assert nano.model.dtype == torch.float32


def test_the_card_says_how_the_model_was_made(tmp_path: Path, trained: Path):
    ship(trained, "nano", weights_dir=tmp_path)
    card = model_card("nano", tmp_path)
    assert card["command"] == "qinglan world pretrain"  # no folder of the machine it was made on
    assert card["tokens"] == 4096
    assert card["data_seed"] == 7
    assert card["held_out_loss"] == 2.6
    assert card["probes"] == {"copying": 0.9}
    assert card["sha256"]["model.safetensors"] == sha256_of(tmp_path / "nano" / "model.safetensors")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_damaged_or_foreign_file_is_named(tmp_path: Path, trained: Path, name: str):
    file = ship(trained, "nano", weights_dir=tmp_path) / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=rf"nano/{name}: is not the file that was shipped .*install the package again"):
        base_model_path("nano", tmp_path)
    file.unlink()
    with pytest.raises(InputError, match=rf"nano/{name}: is missing"):
        base_model_path("nano", tmp_path)


def test_an_unfinished_run_or_another_shape_is_not_shipped(tmp_path: Path, trained: Path):
    with pytest.raises(InputError, match=r"holds no finished pretraining"):
        ship(trained, "nano", stage="elsewhere", weights_dir=tmp_path)
    with pytest.raises(InputError, match=r"expected the shape of micro"):
        ship(trained, "micro", weights_dir=tmp_path)
    assert shipped_sizes(tmp_path) == []


def test_large_weights_are_shipped_in_several_files_all_of_them_hashed(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(base_models, "SHIPPED_FILE_SIZE", "200KB")  # nano has 540 kB in bfloat16
    directory = ship(trained, "nano", weights_dir=tmp_path / "weights")
    parts = sorted(file.name for file in directory.glob("*.safetensors"))
    assert len(parts) >= 3
    assert {*parts, "model.safetensors.index.json"} < set(model_card("nano", tmp_path / "weights")["sha256"])
    (directory / parts[1]).write_bytes(b"damaged")
    with pytest.raises(InputError, match=f"{parts[1]}: is not the file that was shipped"):
        base_model_path("nano", tmp_path / "weights")


# -------------------------------------------------------------------------------------------------------------- names


def test_a_model_is_a_size_or_a_directory(tmp_path: Path):
    assert resolve_model(tmp_path) == tmp_path
    with pytest.raises(InputError, match=r"model mikro: no such directory.*did you mean 'micro'\?"):
        resolve_model("mikro")
    with pytest.raises(
        InputError,
        match=r"size minni: no such base model; expected one of nano, micro, mini, small, base; did you mean",
    ):
        build("minni", base_tokenizer(), seed=0)


def test_a_size_that_is_not_shipped_is_said_so(tmp_path: Path):
    with pytest.raises(InputError, match=r"base model mini: its weights do not come .*none shipped"):
        resolve_model("mini", tmp_path)


# ------------------------------------------------------------------------------------------------- what is shipped


def test_every_directory_of_weights_is_a_whole_base_model_with_the_tokenizer_of_the_family():
    found = [path.name for path in WEIGHTS_DIR.glob("*") if path.is_dir()]
    assert sorted(found) == sorted(shipped_sizes())
    for size in found:
        directory = base_model_path(size)
        for name in ("tokenizer.json", "chat_template.jinja"):
            assert (directory / name).read_bytes() == (base_models.TOKENIZER_DIR / name).read_bytes()
        assert all(file.stat().st_size <= 16 * 2**20 for file in directory.glob("model*.safetensors"))
        assert json.loads((directory / "config.json").read_text())["dtype"] == "bfloat16"
        card = model_card(size)
        assert "/" not in card["command"].replace("://", "")
        assert card["held_out_loss"] < 3.0
    assert sum(file.stat().st_size for file in WEIGHTS_DIR.rglob("*")) < 60_000_000
