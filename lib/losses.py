"""The equations of the README as pure functions of tensors.

Shape suffixes: P problems, G completions of a group, N = P * G rows, T tokens. No function here knows a
model, a setting or a device.
"""

import math

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
    mask_NT = mask_tokens(length_N, logp_NT.shape[1])
    total_N = logp_NT.masked_fill(~mask_NT, 0.0).sum(dim=1)
    return total_N if reduction == "sum" else total_N / length_N.clamp(min=1)


def mask_tokens(length_N, width):
    """(N, width) bool: which columns are tokens of a completion, told from its length alone."""
    return torch.arange(width, device=length_N.device) < length_N[:, None]


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


def reward_target(reward_PG, *, reward_temperature, scale_rewards="group", std_floor=0.0):
    """What the rewards of a group ask for: a distribution over its completions.

        z_i = (R_i - mean_g R) / (max(std, std_floor) + 1e-8)
        q   = softmax over the group of  z / reward_temperature

    reward_PG            (P, G) any unit
    reward_temperature   > 0, of z: large is closer to uniform
    scale_rewards        group: std of the group; batch: of all rewards here; none: centred, not divided
    std_floor            >= 0, in the unit of the rewards: a smaller spread is not blown up to full size
    The stds are unbiased. Returns q, (P, G): rows sum to 1, uniform where all rewards of a group are equal.
    Source: wk222/TRL-ADPO at b708664 and its verl port at e51101ae. Differs: they normalise by group a second
    time, so that there group, batch and none are the same.
    """
    _check_ranges(reward_temperature=reward_temperature, scale_rewards=scale_rewards, std_floor=std_floor)
    z_PG = reward_PG - reward_PG.mean(dim=1, keepdim=True)
    if scale_rewards != "none":
        std = reward_PG.std(dim=1, keepdim=True) if scale_rewards == "group" else reward_PG.std()
        z_PG = z_PG / (std.clamp(min=std_floor) + 1e-8)
    return (z_PG / reward_temperature).softmax(dim=1)


def adapt_tau(q_PG, *, tau, adaptive_tau="off", adaptive_tau_alpha=0.5, adaptive_tau_min=0.05):
    """(tau_P, entropy_P): the temperature of each problem, and the entropy H of its target it follows.

        off        tau
        original   max(tau_min, tau * (1 - alpha * H / ln G)): an undecided target gets a low one
        inverted   max(tau_min, tau * (1 - alpha * (1 - H / ln G))): a decided target gets a low one

    q_PG  (P, G) the target: rows that sum to 1; H = -sum_i q_i log(q_i + 1e-8) [nat]
    Source: as `reward_target`. `original` is what that code computes, `inverted` what its README says.
    """
    _check_ranges(tau=tau, adaptive_tau=adaptive_tau)
    _check_ranges(adaptive_tau_alpha=adaptive_tau_alpha, adaptive_tau_min=adaptive_tau_min)
    entropy_P = -(q_PG * (q_PG + 1e-8).log()).sum(dim=1)
    if adaptive_tau == "off":
        return torch.full_like(entropy_P, tau), entropy_P
    share_P = entropy_P / math.log(q_PG.shape[1])
    share_P = share_P if adaptive_tau == "original" else 1 - share_P
    return (tau * (1 - adaptive_tau_alpha * share_P)).clamp(min=adaptive_tau_min), entropy_P


def adpo(
    s_PG,
    anchor_PG,
    reward_PG,
    *,
    tau,
    reward_temperature,
    adaptive_tau="off",
    adaptive_tau_alpha=0.5,
    adaptive_tau_min=0.05,
    scale_rewards="group",
    drop_failed=False,
    std_floor=0.0,
):
    """Cross entropy between what the rewards ask for and where the policy stands, measured from its anchor.

        u_i = (s_i - a_i) / tau            p = softmax over the group of u
        L   = mean over problems of  -sum_i q_i log p_i          dL/ds_i = (p_i - q_i) / (tau * problems)

    s_PG       (P, G) log-probability per completion under the policy [nat, or nat/token if a mean]
    anchor_PG  (P, G) the same under the anchor; no gradient reaches it
    reward_PG  (P, G) any unit
    tau        > 0, temperature of the anchored log-probabilities [unit of s]: small is steep
    adaptive_tau, ..._alpha, ..._min               how tau follows the target of a problem, see `adapt_tau`
    reward_temperature, scale_rewards, std_floor   how rewards become the target q, see `reward_target`
    drop_failed   leave out problems in which no completion has a reward above 0; the mean is over the others
    Returns (loss, info): a scalar [nat], 0 with zero gradient where every problem is dropped; and a dict of
    constants: tau_P, q_PG, p_PG, entropy_P (of q [nat]), dropped_P (bool).
    Where the anchor is the policy itself, p is 1/G and the loss ln G whatever the rewards are; its gradient
    is not zero. Where all rewards of a group are equal, q is uniform: the group pulls back to its anchor.
    Raises ValueError if a parameter is out of range, G < 2, groups differ in size, or anything is not finite.
    Source: as `reward_target`; arXiv 2510.18913. Differs: one normalisation by group instead of two, and no
    row of a group that is not whole is cut off. Two completions, both as likely as their anchor, log 2:

    >>> s_PG, reward_PG = torch.tensor([[-7.0, -3.0]]), torch.tensor([[1.0, 0.0]])
    >>> adpo(s_PG, s_PG, reward_PG, tau=0.8, reward_temperature=0.5)[0]
    tensor(0.6931)
    """
    _check_groups(**{"log-probabilities": s_PG, "anchor": anchor_PG, "rewards": reward_PG})
    with torch.no_grad():
        how = {"reward_temperature": reward_temperature, "scale_rewards": scale_rewards}
        q_PG = reward_target(reward_PG, std_floor=std_floor, **how)
        how = {"adaptive_tau_alpha": adaptive_tau_alpha, "adaptive_tau_min": adaptive_tau_min}
        tau_P, entropy_P = adapt_tau(q_PG, tau=tau, adaptive_tau=adaptive_tau, **how)
        dropped_P = (reward_PG <= 0).all(dim=1) & drop_failed
    log_p_PG = ((s_PG - anchor_PG.detach()) / tau_P[:, None]).log_softmax(dim=1)
    loss_P = -(q_PG * log_p_PG).sum(dim=1).masked_fill(dropped_P, 0.0)
    loss = loss_P.sum() / (~dropped_P).sum().clamp(min=1)
    info = {"tau_P": tau_P, "q_PG": q_PG, "entropy_P": entropy_P, "dropped_P": dropped_P}
    return loss, info | {"p_PG": log_p_PG.detach().exp()}


_ADMITTED = {
    "tau": ("> 0", lambda value: value > 0),
    "reward_temperature": ("> 0", lambda value: value > 0),
    "adaptive_tau": ("off | original | inverted", ("off", "original", "inverted").__contains__),
    "adaptive_tau_alpha": ("in [0, 1]", lambda value: 0 <= value <= 1),
    "adaptive_tau_min": ("> 0", lambda value: value > 0),
    "scale_rewards": ("group | batch | none", ("group", "batch", "none").__contains__),
    "std_floor": (">= 0", lambda value: value >= 0),
    "normaliser": ("grpo | dapo | dr_grpo", ("grpo", "dapo", "dr_grpo").__contains__),
    "clip_eps": ("> 0", lambda value: value > 0),
    "clip_eps_high": ("> 0", lambda value: value > 0),
    "kl_coef": (">= 0", lambda value: value >= 0),
}


def _check_ranges(**values):
    """ValueError for the first of these parameters that is out of range."""
    for name, value in values.items():
        admitted, holds = _ADMITTED[name]
        if not holds(value):
            raise ValueError(f"{name} must be {admitted}, not {value!r}")


def _check_groups(**tensors):
    """ValueError unless all are finite (P, G) tensors of the same shape, with G >= 2."""
    shapes = set()
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or tensor.dim() != 2:
            found = tuple(getattr(tensor, "shape", ())) or type(tensor).__name__
            raise ValueError(f"{name}: groups of equal size stand in a (P, G) tensor, not in {found}")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} must be finite")
        shapes.add(tuple(tensor.shape))
    if len(shapes) > 1:
        raise ValueError(f"shapes differ: {', '.join(f'{n} {tuple(t.shape)}' for n, t in tensors.items())}")
    size = shapes.pop()[1]
    if size < 2:
        raise ValueError(f"a group needs at least two completions, not {size}")


def anchor_kl(logp_GT, anchor_logp_GT, mask_GT):
    """KL of the policy from its anchor per token, estimated from sampled tokens (Schulman's k3).

        d = anchor_logp - logp          KL = mean over the tokens in the mask of  exp(d) - d - 1

    logp_GT         (G, T) token log-probabilities under the policy [nat]; any number of rows
    anchor_logp_GT  (G, T) the same under the anchor; no gradient reaches it
    mask_GT         (G, T) bool, the tokens that count; what stands elsewhere is ignored, whatever it is
    Returns a scalar >= 0 [nat/token]; 0 where the mask is empty.
    Raises ValueError if shapes differ.
    Source: as `reward_target`. Differs: the mask is applied before exp, so that no pad can become inf * 0.

    >>> anchor_kl(torch.tensor([[-1.0, 0.0]]), torch.tensor([[-2.0, 9.0]]), torch.tensor([[True, False]]))
    tensor(0.3679)
    """
    if not logp_GT.shape == anchor_logp_GT.shape == mask_GT.shape:
        shapes = [tuple(tensor.shape) for tensor in (logp_GT, anchor_logp_GT, mask_GT)]
        raise ValueError(f"shapes differ: log-probs {shapes[0]}, anchor {shapes[1]}, mask {shapes[2]}")
    return _token_kl(logp_GT, anchor_logp_GT, mask_GT.bool()).sum() / mask_GT.sum().clamp(min=1)


def _token_kl(logp_GT, anchor_logp_GT, mask_GT):
    """exp(d) - d - 1 with d = anchor_logp - logp, per token; 0 where the mask is False."""
    d_GT = (anchor_logp_GT.detach() - logp_GT).masked_fill(~mask_GT, 0.0)
    return d_GT.expm1() - d_GT


def group_advantages(reward_G, *, seen=None, scale=True):
    """How much better each completion of a group is than what was seen of its problem.

        A_i = (r_i - mean(seen)) / (std(seen) + 1e-4)        the std is unbiased

    reward_G  (G,) any unit
    seen      (M,) the rewards of all attempts at the problem, this one's among them; None is this group alone
    scale     False leaves out the division
    Returns (G,); exactly 0 where all that was seen is equal: such a group teaches nothing.
    Raises ValueError if there are fewer than two rewards, or anything is not finite.
    Source: whaaaaaatt/adaGRPO; where nothing was sampled again these are the advantages of GRPO.

    >>> group_advantages(torch.tensor([1.0, 0.0]), seen=torch.tensor([1.0, 0.0, 0.0, 0.0]), scale=False)
    tensor([ 0.7500, -0.2500])
    """
    seen = reward_G if seen is None else seen
    if reward_G.dim() != 1 or seen.dim() != 1 or len(seen) < 2:
        shapes = f"{tuple(reward_G.shape)} and {tuple(seen.shape)}"
        raise ValueError(f"rewards stand in one row, and of a problem two are needed; got {shapes}")
    if not (torch.isfinite(reward_G).all() and torch.isfinite(seen).all()):
        raise ValueError("rewards must be finite")
    if seen.min() == seen.max():
        return torch.zeros_like(reward_G)
    centred_G = reward_G - seen.mean()
    return centred_G / (seen.std() + 1e-4) if scale else centred_G


def average_tokens(value_GT, mask_GT, *, normaliser, max_tokens=None):
    """One number from one per token: whose mean a loss is.

        grpo      mean over rows of the mean over a row's tokens: a token counts more in a short completion
        dapo      sum / number of all tokens (TRL calls it bnpo where, as here, the batch is one step)
        dr_grpo   sum / (rows * max_tokens): a constant, whatever the lengths are

    value_GT    (G, T); what stands where mask_GT is False is ignored, whatever it is
    max_tokens  of dr_grpo: the limit of a completion
    Raises ValueError for an unknown normaliser, or dr_grpo without max_tokens.
    """
    _check_ranges(normaliser=normaliser)
    if normaliser == "dr_grpo" and not max_tokens:
        raise ValueError("dr_grpo divides by max_tokens: how many is it?")
    value_GT = value_GT.masked_fill(~mask_GT, 0.0)
    if normaliser == "grpo":
        return (value_GT.sum(dim=1) / mask_GT.sum(dim=1).clamp(min=1)).mean()
    tokens = mask_GT.sum().clamp(min=1) if normaliser == "dapo" else len(value_GT) * max_tokens
    return value_GT.sum() / tokens


def clipped_policy_gradient(
    logp_GT,
    old_logp_GT,
    advantage_G,
    mask_GT,
    *,
    clip_eps,
    clip_eps_high=None,
    ref_logp_GT=None,
    kl_coef=0.0,
    normaliser="grpo",
    max_tokens=None,
):
    """The clipped policy gradient with one advantage per completion, and a KL to a reference.

        ratio_t = exp(logp_t - old_logp_t)         L = the mean of l_t, see `average_tokens`
        l_t     = -min(ratio_t * A, clip(ratio_t, 1 - clip_eps, 1 + clip_eps_high) * A) + kl_coef * KL_t

    logp_GT, old_logp_GT, ref_logp_GT   (G, T) of the policy, of the policy that sampled, of the reference
                [nat]; rows of any number of groups. No gradient reaches the last two
    advantage_G (G,) see `group_advantages`
    mask_GT     (G, T) bool, the tokens that count; what stands elsewhere is ignored, whatever it is
    clip_eps, clip_eps_high   > 0, how far a ratio may go down and up; None is the same as down
    kl_coef     >= 0, of KL_t as in `anchor_kl`; above 0 it needs ref_logp_GT
    Returns (loss, info): a scalar that is not finite where something in the mask is not, and a dict of
    constants: clip_ratio/{low,high,region}_mean, the share of tokens held back, and kl given a reference.
    The ratio measures what the updates changed; at the first one the loss is -mean(A) and nothing clips. For
    tokens not drawn from exp(old_logp) but tempered, truncated or phased, a bias remains, as in TRL.
    Raises ValueError for unequal shapes, a parameter out of range, or what is missing.
    Source: arXiv 2402.03300, 2503.14476, 2503.20783; whaaaaaatt/adaGRPO. A ratio of e, clipped at 1.2:

    >>> logp, mask = torch.tensor([[-1.0, -1.0]]), torch.tensor([[True, True]])
    >>> clipped_policy_gradient(logp, logp - 1, torch.tensor([2.0]), mask, clip_eps=0.2)[0]
    tensor(-2.4000)
    """
    high = clip_eps if clip_eps_high is None else clip_eps_high
    _check_ranges(clip_eps=clip_eps, clip_eps_high=high, kl_coef=kl_coef)
    _check_rows(logp_GT, old_logp_GT, mask_GT, ref_logp_GT, advantage_G=advantage_G)
    if kl_coef > 0 and ref_logp_GT is None:
        raise ValueError("a KL needs the log-probabilities of the reference")
    mask_GT, a_G1 = mask_GT.bool(), advantage_G[:, None]
    ratio_GT = (logp_GT - old_logp_GT.detach()).masked_fill(~mask_GT, 0.0).exp()
    token_GT = -torch.minimum(ratio_GT * a_G1, ratio_GT.clamp(1 - clip_eps, 1 + high) * a_G1)
    info = {"low": (ratio_GT < 1 - clip_eps) & (a_G1 < 0), "high": (ratio_GT > 1 + high) & (a_G1 > 0)}
    info["region"] = info["low"] | info["high"]
    info = {f"clip_ratio/{side}_mean": held_GT.sum() / mask_GT.sum() for side, held_GT in info.items()}
    if ref_logp_GT is not None:
        info["kl"] = anchor_kl(logp_GT.detach(), ref_logp_GT, mask_GT)
        token_GT = token_GT + kl_coef * _token_kl(logp_GT, ref_logp_GT, mask_GT)
    return average_tokens(token_GT, mask_GT, normaliser=normaliser, max_tokens=max_tokens), info


def _check_rows(*tensors_GT, advantage_G):
    """ValueError unless these (those that are not None) have the same shape, with an advantage per row."""
    shapes = [tuple(tensor.shape) for tensor in tensors_GT if tensor is not None]
    if len(set(shapes)) > 1 or tuple(advantage_G.shape) != shapes[0][:1]:
        found = ", ".join(map(str, [*shapes, tuple(advantage_G.shape)]))
        raise ValueError(f"shapes differ: log-probs, mask and advantages are {found}")
