"""Residual dropout: the right places, the right scale, the same masks for the same seed, nothing left behind."""

import pytest
import torch
from tiny_world import make_lm
from torch import nn

from qinglan.core.errors import InputError
from qinglan.learn.dropout import residual_blocks, residual_dropout

IDS = torch.arange(4, 20)[None]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "mistral", "gemma3"])
def test_each_layer_has_two_blocks(kind):
    assert len(residual_blocks(make_lm(kind).model)) == 4


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3"])
def test_masks_follow_the_seed_and_leave_nothing_behind(kind):
    model = make_lm(kind).model
    plain = model(IDS).logits

    def dropped(seed: int) -> torch.Tensor:
        with residual_dropout(model, 0.5, seed):
            return model(IDS).logits

    assert torch.equal(dropped(1), dropped(1))
    assert not torch.equal(dropped(1), dropped(2))
    assert not torch.equal(dropped(1), plain)
    assert torch.equal(model(IDS).logits, plain)
    with residual_dropout(model, 0.0, 1):
        assert torch.equal(model(IDS).logits, plain)


def test_it_stands_where_gpt2_has_its_own_residual_dropout():
    """Dropping everything leaves the residual stream as the embeddings made it, by either way."""
    model = make_lm("gpt2").model
    with torch.no_grad(), residual_dropout(model, 1.0 - 1e-7, 1):
        ours = model.transformer(IDS).last_hidden_state
    for block in model.transformer.h:
        block.attn.resid_dropout.p = block.mlp.dropout.p = 1.0
        block.attn.resid_dropout.train()
        block.mlp.dropout.train()
    theirs = model.transformer(IDS).last_hidden_state
    torch.testing.assert_close(ours, theirs.detach(), atol=1e-6, rtol=0)


def test_the_share_and_the_scale():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Identity()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.mlp(x)

    net = nn.Module()
    net.layers = nn.ModuleList([Block()])
    with residual_dropout(net, 0.2, 7):
        out = net.layers[0](torch.ones(20_000))
    assert out.unique().tolist() == pytest.approx([0.0, 1.25])
    # 20,000 draws at 0.2: standard deviation of the share is sqrt(0.2 * 0.8 / 20,000) = 0.0028
    assert (out == 0).float().mean().item() == pytest.approx(0.2, abs=0.012)


def test_an_unknown_architecture_is_refused():
    with pytest.raises(InputError, match="set dropout to 0"):
        residual_blocks(nn.Linear(2, 2))
