"""Proofs on trajectories that can all be enumerated, in float64."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ftb_llm.divergences import FAMILY, Divergence, get_divergence
from ftb_llm.trajectory_losses import rtb_loss, tb_loss, trust_pcl_loss

MEMBERS = {name: get_divergence(name) for name in FAMILY if name != "tv"} | {
    "alpha=0.75": get_divergence("alpha", 0.75),
    "tv, width 0.5": get_divergence("tv", width=0.5),  # the kink of tv itself has no gradient to converge by
}
members = pytest.mark.parametrize("name", MEMBERS)


class Grid:
    """Every way from the corner of a 4 x 4 hypergrid to every cell: moves right or down, then stop."""

    SIDE = 4

    def __init__(self) -> None:
        self.paths = self._paths((0, 0))
        self.cells = [path[-1] for path in self.paths]
        self.forward_uses, self.backward_uses = self._uses()
        self.reward = torch.tensor([0.05 + (row in (0, 3)) * (column in (0, 3)) + 0.3 * (row == column) for row, column in self.cells], dtype=torch.float64)

    def _paths(self, cell: tuple[int, int]) -> list[list[tuple[int, int]]]:
        ways = [[cell]]
        for following in ((cell[0] + 1, cell[1]), (cell[0], cell[1] + 1)):
            if max(following) < self.SIDE:
                ways += [[cell, *rest] for rest in self._paths(following)]
        return ways

    def _uses(self) -> tuple[Tensor, Tensor]:
        """How often each path takes each (cell, action), the actions down, right, stop; and comes to each cell (from the left, from above)."""
        forward = torch.zeros(len(self.paths), self.SIDE**2 * 3, dtype=torch.float64)
        backward = torch.zeros(len(self.paths), self.SIDE**2 * 2, dtype=torch.float64)
        for row, path in enumerate(self.paths):
            for cell, following in zip(path, [*path[1:], None], strict=True):
                action = 2 if following is None else int(following[1] > cell[1])
                forward[row, self._index(cell) * 3 + action] += 1
                if following is not None and min(following) > 0:
                    backward[row, self._index(following) * 2 + int(following[0] > cell[0])] += 1
        return forward, backward

    def _index(self, cell: tuple[int, int]) -> int:
        return cell[0] * self.SIDE + cell[1]

    def forward(self, logits: Tensor) -> Tensor:
        """log P_F of each path; one row of three logits per cell."""
        last = torch.arange(self.SIDE**2)
        barred = torch.stack([last // self.SIDE == self.SIDE - 1, last % self.SIDE == self.SIDE - 1, torch.zeros_like(last, dtype=torch.bool)], -1)
        logp = torch.log_softmax(logits.masked_fill(barred, -math.inf), -1)
        return self.forward_uses @ logp.masked_fill(barred, 0.0).flatten()

    def backward(self, logits: Tensor) -> Tensor:
        """log P_B of each path given its last cell; one logit per cell, for having come from above."""
        return self.backward_uses @ torch.nn.functional.logsigmoid(torch.stack([-logits, logits], -1)).flatten()

    def terminal(self, log_pf: Tensor) -> dict[tuple[int, int], float]:
        shares: dict[tuple[int, int], float] = {}
        for cell, share in zip(self.cells, log_pf.exp().tolist(), strict=True):
            shares[cell] = shares.get(cell, 0.0) + share
        return shares


@pytest.fixture(scope="module")
def grid() -> Grid:
    return Grid()


def minimise(loss: Callable[[], Tensor], parameters: list[Tensor], iterations: int = 400) -> None:
    optimizer = torch.optim.LBFGS(parameters, max_iter=iterations, history_size=50, tolerance_grad=1e-11, tolerance_change=0, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)


@members
@pytest.mark.parametrize("learned_backward", [False, True])
def test_tb_reaches_the_target_and_its_z_from_frozen_trajectories(grid: Grid, name: str, learned_backward: bool) -> None:
    """Uniform over all paths: a behaviour policy that is neither P_F nor P_B."""
    forward_logits = torch.zeros(16, 3, dtype=torch.float64, requires_grad=True)
    backward_logits = torch.zeros(16, dtype=torch.float64, requires_grad=learned_backward)
    log_z = torch.zeros((), dtype=torch.float64, requires_grad=True)
    learned = [forward_logits, log_z, *([backward_logits] if learned_backward else [])]
    log_reward = grid.reward.log()
    member = MEMBERS[name]
    minimise(lambda: tb_loss(log_z, grid.forward(forward_logits), grid.backward(backward_logits), log_reward, member).mean(), learned)
    total = sum(dict(zip(grid.cells, grid.reward.tolist(), strict=True)).values())
    assert log_z.item() == pytest.approx(math.log(total), abs=1e-5)
    shares = grid.terminal(grid.forward(forward_logits.detach()))
    for cell, reward in zip(grid.cells, grid.reward.tolist(), strict=True):
        assert shares[cell] == pytest.approx(reward / total, abs=1e-5)


@members
def test_the_backward_policy_descends_the_divergence_that_its_samples_give(name: str) -> None:
    """From P_F: D_g(P_F || P_B R / Z), g(u) = u L(log u). From P_B: D_h(P_B R / Z || P_F), h'(u) = 1 - L'(-log u)."""
    member = MEMBERS[name]
    generator = torch.Generator().manual_seed(0)
    log_f = torch.log_softmax(torch.randn(9, generator=generator, dtype=torch.float64), 0)
    phi = torch.randn(9, generator=generator, dtype=torch.float64, requires_grad=True)
    log_b = torch.log_softmax(phi, 0)
    zero = torch.zeros(9, dtype=torch.float64)
    loss = tb_loss(zero, log_f, log_b, zero, member)
    (on_forward,) = torch.autograd.grad((log_f.exp() * loss).sum(), phi, retain_graph=True)
    (on_backward,) = torch.autograd.grad((log_b.detach().exp() * loss).sum(), phi, retain_graph=True)
    ratio = log_f - log_b
    d_g = (log_b.exp() * ratio.exp() * member.loss(ratio)).sum()
    (expected,) = torch.autograd.grad(d_g, phi, retain_graph=True)
    torch.testing.assert_close(on_forward, expected, rtol=1e-10, atol=1e-13)
    h_slope = 1 - member.slope(ratio.detach())
    (expected,) = torch.autograd.grad((h_slope * log_b.exp()).sum(), phi)
    torch.testing.assert_close(on_backward, expected, rtol=1e-10, atol=1e-13)


def problem(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(9, generator=generator, dtype=torch.float64)
    log_prior = torch.log_softmax(torch.randn(9, generator=generator, dtype=torch.float64), 0)
    return logits, log_prior, 0.7 * torch.randn(9, generator=generator, dtype=torch.float64)


@members
def test_rtb_reaches_the_posterior(name: str) -> None:
    logits, log_prior, log_reward = problem()
    logits.requires_grad_()
    log_z = torch.zeros((), dtype=torch.float64, requires_grad=True)
    minimise(lambda: rtb_loss(log_z, torch.log_softmax(logits, 0), log_prior, log_reward, 1.7, MEMBERS[name]).mean(), [logits, log_z])
    posterior = log_prior + 1.7 * log_reward
    torch.testing.assert_close(torch.softmax(logits.detach(), 0), torch.softmax(posterior, 0), rtol=0, atol=1e-6)
    assert log_z.item() == pytest.approx(torch.logsumexp(posterior, 0).item(), abs=1e-6)


def residuals(logits: Tensor, log_z: Tensor, value: Tensor, a: float, member: Divergence) -> tuple[Tensor, Tensor]:
    _, log_prior, log_reward = problem()
    logp = torch.log_softmax(logits, 0)
    return rtb_loss(log_z, logp, log_prior, log_reward, 1 / a, member).mean(), trust_pcl_loss(value, logp, log_prior, log_reward, a, member).mean()


@members
def test_trust_pcl_is_a_squared_rtb_in_value_and_gradient(name: str) -> None:
    a, member = 0.6, MEMBERS[name]
    logits = problem()[0].requires_grad_()
    log_z = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    value = (a * log_z.detach()).requires_grad_()
    rtb, pcl = residuals(logits, log_z, value, a, member)
    assert pcl.item() == pytest.approx(a**2 * rtb.item(), rel=1e-12)
    rtb_gradients = torch.autograd.grad(rtb, [logits, log_z], retain_graph=True)
    pcl_gradients = torch.autograd.grad(pcl, [logits, value])
    torch.testing.assert_close(pcl_gradients[0], a**2 * rtb_gradients[0], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(pcl_gradients[1], a * rtb_gradients[1], rtol=1e-12, atol=1e-15)


def test_trust_pcl_of_reverse_kl_is_half_the_squared_consistency_error() -> None:
    one = torch.tensor([-2.0, -1.0], dtype=torch.float64)
    got = trust_pcl_loss(torch.tensor(0.5), one, one - 1, torch.tensor([3.0, 1.0]), 0.25, get_divergence("reverse_kl"))
    assert got.tolist() == pytest.approx([(-0.5 + 3.0 - 0.25) ** 2 / 2, (-0.5 + 1.0 - 0.25) ** 2 / 2])


@members
def test_trust_pcl_and_rtb_train_the_same_weights(name: str) -> None:
    """SGD: the policy's learning rate divided by a^2, the value's the same as log Z's."""
    a, rate, member = 0.6, 0.02, MEMBERS[name]
    start = problem()[0]
    theirs, ours = start.clone().requires_grad_(), start.clone().requires_grad_()
    log_z = torch.zeros((), dtype=torch.float64, requires_grad=True)
    value = torch.zeros((), dtype=torch.float64, requires_grad=True)
    rtb_sgd = torch.optim.SGD([{"params": [theirs], "lr": rate}, {"params": [log_z], "lr": rate}])
    pcl_sgd = torch.optim.SGD([{"params": [ours], "lr": rate / a**2}, {"params": [value], "lr": rate}])
    for _ in range(200):
        rtb_sgd.zero_grad()
        pcl_sgd.zero_grad()
        residuals(theirs, log_z, torch.zeros(()), a, member)[0].backward()
        residuals(ours, torch.zeros(()), value, a, member)[1].backward()
        rtb_sgd.step()
        pcl_sgd.step()
    assert not torch.allclose(theirs, start, atol=1e-3)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    assert value.item() == pytest.approx(a * log_z.item(), rel=1e-9)
