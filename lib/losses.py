"""The equations of the README as pure functions of tensors.

Shape suffixes: P problems, G completions of a group, N = P * G rows, T tokens. No function here knows a
model, a setting or a device.
"""

import torch


def sequence_logprob(logp_NT, length_N, *, reduction="mean"):
    """Log-probability of each completion from those of its tokens.

        s_n = sum_{t < length_n} logp_nt            (sum)
        s_n = sum_{t < length_n} logp_nt / length_n (mean)

    logp_NT    (N, T) token log-probabilities [nat]; what stands behind a row's length is ignored
    length_N   (N,) completion tokens, the end token included
    Returns (N,) [nat] or [nat/token]; 0 where a completion has no token.
    Raises ValueError for an unknown reduction.

    >>> sequence_logprob(torch.tensor([[-1.0, -3.0, 9.0]]), torch.tensor([2]))
    tensor([-2.])
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is mean or sum, not {reduction!r}")
    mask_NT = torch.arange(logp_NT.shape[1], device=logp_NT.device) < length_N[:, None]
    total_N = logp_NT.masked_fill(~mask_NT, 0.0).sum(dim=1)
    return total_N if reduction == "sum" else total_N / length_N.clamp(min=1)


def better_worse_pairs(reward_PG, *, pairs="halves", min_better_reward=None):
    """Which ordered pairs (i, j) of a group teach "i is better than j"?

    halves    i in the upper half by reward, j in the lower one; equal rewards keep the order of sampling, and
              with odd G the middle completion belongs to the lower half
    ordered   every pair
    In both cases only where reward_i > reward_j and, if given, reward_i >= min_better_reward.

    reward_PG  (P, G)
    Returns (P, G, G) bool, [p, i, j].
    Raises ValueError for an unknown rule, G < 2, or rewards that are not finite.
    Source: leosongwei/GRDPO, README (halves) and train.py (ordered, with 1.1 as the minimum).
    """
    if pairs not in ("halves", "ordered"):
        raise ValueError(f"pairs is halves or ordered, not {pairs!r}")
    if reward_PG.dim() != 2 or reward_PG.shape[1] < 2:
        raise ValueError(
            f"a group needs at least two completions, got rewards of shape {tuple(reward_PG.shape)}"
        )
    if not torch.isfinite(reward_PG).all():
        raise ValueError("rewards must be finite")
    size = reward_PG.shape[1]
    better_PGG = reward_PG[:, :, None] > reward_PG[:, None, :]
    if pairs == "halves":
        order_PG = reward_PG.argsort(dim=1, descending=True, stable=True)
        upper_PG = torch.zeros_like(reward_PG, dtype=torch.bool).scatter(1, order_PG[:, : size // 2], True)
        better_PGG = better_PGG & upper_PG[:, :, None] & ~upper_PG[:, None, :]
    if min_better_reward is not None:
        better_PGG = better_PGG & (reward_PG >= min_better_reward)[:, :, None]
    return better_PGG


def count_silent_groups(reward_PG, *, pairs="halves", min_better_reward=None):
    """How many groups have no better/worse pair, and teach nothing? Arguments as in `better_worse_pairs`."""
    pair_PGG = better_worse_pairs(reward_PG, pairs=pairs, min_better_reward=min_better_reward)
    return int((~pair_PGG.flatten(1).any(dim=1)).sum())


def grdpo(s_PG, reward_PG, *, beta, pairs="halves", min_better_reward=None):
    """Mean pairwise logistic loss over the better/worse pairs of each group.

        L_p = mean over pairs (i, j) of group p of  -log sigmoid(beta * (s_pi - s_pj))
        L   = mean of L_p over the groups that have a pair

    s_PG       (P, G) log-probability per completion [nat, or nat/token if a mean]
    reward_PG  (P, G) any unit; only the order matters, equal rewards form no pair
    beta       > 0, slope of the logistic [1/nat]
    pairs, min_better_reward   which pairs count, see `better_worse_pairs`
    Returns a scalar [nat]; 0 with zero gradient where no group has a pair.
    Raises ValueError if beta <= 0, G < 2, shapes differ or anything is not finite.
    Source: leosongwei/GRDPO. Differs: it sums over pairs and groups where we average, so its gradient is
    larger by the number of pairs; behind the clipping of the gradient norm that difference disappears.

    Two completions, the better one less likely by 1 nat: log(1 + e) = 1.3133

    >>> grdpo(torch.tensor([[-2.0, -1.0]]), torch.tensor([[1.0, 0.0]]), beta=1.0)
    tensor(1.3133)
    """
    if beta <= 0:
        raise ValueError(f"beta must be > 0, not {beta}")
    if s_PG.shape != reward_PG.shape:
        raise ValueError(f"shapes differ: log-probs {tuple(s_PG.shape)}, rewards {tuple(reward_PG.shape)}")
    if not torch.isfinite(s_PG).all():
        raise ValueError("log-probabilities must be finite")
    pair_PGG = better_worse_pairs(reward_PG, pairs=pairs, min_better_reward=min_better_reward)
    margin_PGG = beta * (s_PG[:, :, None] - s_PG[:, None, :])
    nats_PGG = torch.nn.functional.softplus(-margin_PGG).masked_fill(~pair_PGG, 0.0)
    count_P = pair_PGG.sum(dim=(1, 2))
    loss_P = nats_PGG.sum(dim=(1, 2)) / count_P.clamp(min=1)
    return loss_P.sum() / (count_P > 0).sum().clamp(min=1)
