"""Muon: the same step as torch's, singular values near one, and momentum that can be exchanged with torch's."""

import torch
from torch import Tensor, nn

from qinglan.learn.muon import Muon, orthogonalize


def make_matrices(generator: torch.Generator) -> list[nn.Parameter]:
    """Wide, tall, square, and one shape twice."""
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((8, 20), (20, 8), (9, 9), (8, 20))]


def gradients(matrices: list[nn.Parameter], generator: torch.Generator) -> list[Tensor]:
    return [torch.randn(matrix.shape, generator=generator) for matrix in matrices]


def test_singular_values_come_close_to_one_and_directions_stay(generator: torch.Generator):
    for shape in ((3, 8, 20), (2, 20, 8), (1, 9, 9)):
        matrices = torch.randn(shape, generator=generator)
        left, values, right = torch.linalg.svd(orthogonalize(matrices), full_matrices=False)
        assert float(values.min()) > 0.5
        assert float(values.max()) < 1.3
        of_input = torch.linalg.svd(matrices, full_matrices=False)
        # U V' is the same for both, up to what the unequal singular values tilt.
        torch.testing.assert_close(left @ right, of_input.U @ of_input.Vh, rtol=1e-3, atol=1e-3)


def test_steps_are_torchs_up_to_its_bfloat16(generator: torch.Generator):
    ours = make_matrices(generator)
    theirs = [nn.Parameter(matrix.detach().clone()) for matrix in ours]
    before = [matrix.detach().clone() for matrix in ours]
    one, other = Muon(ours, lr=0.1, weight_decay=0.1), torch.optim.Muon(theirs, lr=0.1, weight_decay=0.1)
    for _ in range(4):
        for a, b, gradient in zip(ours, theirs, gradients(ours, generator), strict=True):
            a.grad, b.grad = gradient.clone(), gradient.clone()
        one.step()
        other.step()
    for a, b, start in zip(ours, theirs, before, strict=True):
        moved, difference = (a - start).norm().item(), (a - b).norm().item()
        assert difference < 0.03 * moved  # bfloat16 has 8 bits, and four steps add their errors up


def test_momentum_is_exchanged_with_torchs(generator: torch.Generator):
    ours = make_matrices(generator)
    one, other = Muon(ours, lr=0.1), torch.optim.Muon(ours, lr=0.1)
    for matrix, gradient in zip(ours, gradients(ours, generator), strict=True):
        matrix.grad = gradient
    one.step()
    other.load_state_dict({"state": one.state_dict()["state"], "param_groups": other.state_dict()["param_groups"]})
    for matrix in ours:
        assert torch.equal(other.state[matrix]["momentum_buffer"], one.state[matrix]["momentum_buffer"])


def test_a_matrix_without_gradient_stays(generator: torch.Generator):
    matrices = make_matrices(generator)
    before = matrices[0].detach().clone()
    matrices[1].grad = torch.ones_like(matrices[1])
    Muon(matrices, lr=0.1, weight_decay=0.5).step()
    assert torch.equal(matrices[0], before)
