"""The relatives of f-TB as pure functions of log-probs, each crossed with every member: TB for GFlowNets, RTB, Trust-PCL.

All are `L(residual)` with a log Z that is learned by the same gradient; unreduced, one value per trajectory. A residual is
`log p_theta - log p*` for a different reading of policy and target, so a member means the same divergence in each.

- TB: Malkin et al. 2022, the member reverse_kl. Residual `log Z + log P_F - log R - log P_B`.
- RTB: Venkatraman et al. 2024, the member reverse_kl. Residual `log Z + log p - log prior - beta log r`: TB with the prior
  in the place of the backward policy, and what the learner trains with `objective.log_z: learned`.
- Trust-PCL on whole undiscounted paths: Nachum et al. 2018; Deleu et al. 2025 show that it is `a^2` times RTB.
- The squared loss of Kimi k1.5 and K2 needs no function of its own: it is `objective.tempered` with reverse_kl.
"""

from torch import Tensor

from ftb_llm.divergences import Divergence


def tb_loss(log_z: Tensor, log_pf: Tensor, log_pb: Tensor, log_reward: Tensor, divergence: Divergence) -> Tensor:
    """`L(log Z + log P_F - log R - log P_B)`, the log-probs summed along the trajectory.

    Gradients reach log Z, the forward and the backward policy. With L the loss of D_f, and any full-support trajectories,
    the forward policy's minimiser is `P_B R / Z`. What the *backward* policy descends depends on the samples: from P_F it is
    D_g(P_F || P_B R / Z) with `g(u) = u L(log u)`, which for the KL is not convex below u = 1/e; from P_B it is
    D_h(P_B R / Z || P_F) with `h'(u) = 1 - L'(-log u)`.
    """
    return divergence.loss(log_z + log_pf - log_reward - log_pb)


def rtb_loss(log_z: Tensor, logp: Tensor, logp_prior: Tensor, log_reward: Tensor, beta: float, divergence: Divergence) -> Tensor:
    """`L(log Z + log p - log prior - beta log r)`: the posterior `prior r^beta / Z`."""
    return divergence.loss(log_z + logp - logp_prior - beta * log_reward)


def trust_pcl_loss(value: Tensor, logp: Tensor, logp_ref: Tensor, reward: Tensor, temperature: float, divergence: Divergence) -> Tensor:
    """`a^2 L((V(s0) - r + a log(p / p_ref)) / a)` with the temperature `a`; for reverse_kl half the squared consistency error.

    With `a = 1 / beta`, `V(s0) = a log Z` and `r = log reward` this is a^2 times `rtb_loss`.
    """
    return temperature**2 * divergence.loss((value - reward + temperature * (logp - logp_ref)) / temperature)
