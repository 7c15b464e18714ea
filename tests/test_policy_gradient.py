"""Group advantages and the clipped policy gradient, against slow loops and against TRL's formulas."""

import math
import statistics

import pytest
import torch

from lib.losses import clipped_policy_gradient, group_advantages, mask_tokens

LENGTHS = [4, 2, 1, 3]
MASK = mask_tokens(torch.tensor(LENGTHS), 4)


def make_rows(seed=0, spread=0.4):
    """(logp, old, ref, advantage) of four rows in float64; behind a row's length stands rubbish."""
    torch.manual_seed(seed)
    old = -torch.rand(4, 4, dtype=torch.float64) * 3
    logp, ref = (old + spread * torch.randn(4, 4, dtype=torch.float64) for _ in range(2))
    for tensor, rubbish in ((old, torch.inf), (logp, torch.nan), (ref, -torch.inf)):
        tensor[~MASK] = rubbish
    return logp.requires_grad_(), old, ref, torch.tensor([1.5, -0.5, 0.0, -1.0], dtype=torch.float64)


def by_loops(logp, old, advantage, *, low, high, ref=None, kl_coef=0.0, normaliser="grpo", max_tokens=None):
    """The loss token by token, as TRL's loss_type grpo, bnpo (our dapo) and dr_grpo have it, and dL/dlogp."""
    value, gradient = 0.0, torch.zeros(4, 4, dtype=torch.float64)
    for i, length in enumerate(LENGTHS):
        weight = {"grpo": 1 / (4 * length), "dapo": 1 / sum(LENGTHS), "dr_grpo": 1 / (4 * (max_tokens or 1))}
        for t in range(length):
            a, ratio = advantage[i].item(), math.exp(logp[i, t].item() - old[i, t].item())
            clipped = min(max(ratio, 1 - low), 1 + high)
            token = -min(ratio * a, clipped * a)
            push = -ratio * a if ratio * a <= clipped * a else 0.0
            if kl_coef:
                d = ref[i, t].item() - logp[i, t].item()
                token += kl_coef * (math.exp(d) - d - 1)
                push += kl_coef * (1 - math.exp(d))
            value += weight[normaliser] * token
            gradient[i, t] = weight[normaliser] * push
    return value, gradient


@pytest.mark.parametrize("normaliser", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("kl_coef", [0.0, 0.04])
@pytest.mark.parametrize("high", [None, 0.28])
def test_loss_and_gradient_equal_the_slow_loop(normaliser, kl_coef, high):
    logp, old, ref, advantage = make_rows()
    how = {"kl_coef": kl_coef, "normaliser": normaliser, "max_tokens": 7}
    loss, info = clipped_policy_gradient(
        logp, old, advantage, MASK, clip_eps=0.2, clip_eps_high=high, ref_logp_GT=ref, **how
    )
    loss.backward()
    expected, gradient = by_loops(logp, old, advantage, low=0.2, high=high or 0.2, ref=ref, **how)
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(logp.grad, gradient)
    assert logp.grad[0].abs().max() > 0
    assert info["kl"] > 0


def test_clipping_acts_where_the_advantage_pushes_further_and_is_counted():
    # ratios 1.5, 0.5 for a good and for a bad row: held back are 1.5 of the good and 0.5 of the bad one
    logp = torch.log(torch.tensor([[1.5, 0.5], [1.5, 0.5]])).requires_grad_()
    mask = torch.ones(2, 2, dtype=torch.bool)
    loss, info = clipped_policy_gradient(
        logp, torch.zeros(2, 2), torch.tensor([1.0, -1.0]), mask, clip_eps=0.2, clip_eps_high=0.3
    )
    loss.backward()
    assert loss.item() == pytest.approx((-1.3 - 0.5 + 1.5 + 0.8) / 4)
    assert (logp.grad != 0).tolist() == [[False, True], [True, False]]
    shares = {name: float(value) for name, value in info.items()}
    assert shares == {
        "clip_ratio/low_mean": 0.25,
        "clip_ratio/high_mean": 0.25,
        "clip_ratio/region_mean": 0.5,
    }


def test_on_policy_the_gradient_is_reinforce_and_nothing_clips():
    _, old, _, advantage = make_rows()
    logp = old.clone().requires_grad_()
    loss, info = clipped_policy_gradient(logp, logp.detach(), advantage, MASK, clip_eps=0.2)
    loss.backward()
    assert loss.item() == pytest.approx(-advantage.mean().item())
    assert info["clip_ratio/region_mean"] == 0
    expected = torch.where(MASK, -advantage[:, None] / 4 / torch.tensor(LENGTHS)[:, None], 0.0)
    torch.testing.assert_close(logp.grad, expected)
    assert "kl" not in info


def test_a_log_probability_that_is_not_finite_makes_a_loss_that_is_not():
    logp, old, _, advantage = make_rows()
    with torch.no_grad():
        logp[0, 0] = torch.nan
    assert not clipped_policy_gradient(logp, old, advantage, MASK, clip_eps=0.2)[0].isfinite()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip_eps": 0.0}, "clip_eps must be > 0"),
        ({"clip_eps_high": -1.0}, "clip_eps_high must be > 0"),
        ({"normaliser": "mean"}, "normaliser must be grpo | dapo | dr_grpo, not 'mean'"),
        ({"normaliser": "dr_grpo"}, "divides by max_tokens"),
        ({"kl_coef": -0.1}, "kl_coef must be >= 0"),
        ({"kl_coef": 0.1}, "needs the log-probabilities of the reference"),
        ({"ref_logp_GT": torch.zeros(1, 3)}, "shapes differ"),
        ({"advantage_G": torch.zeros(3)}, "shapes differ"),
    ],
)
def test_bad_input_is_named(change, message):
    tensors = {"logp_GT": torch.zeros(2, 3), "old_logp_GT": torch.zeros(2, 3)}
    tensors |= {"advantage_G": torch.zeros(2), "mask_GT": torch.ones(2, 3, dtype=torch.bool)}
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        clipped_policy_gradient(**(tensors | {"clip_eps": 0.2} | change))


def test_advantages_use_the_rewards_of_all_attempts():
    last, before = [1.0, 0.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.25]
    seen = before + last
    expected = [(r - statistics.fmean(seen)) / (statistics.stdev(seen) + 1e-4) for r in last]
    found = group_advantages(torch.tensor(last), seen=torch.tensor(seen))
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    unscaled = group_advantages(torch.tensor(last), seen=torch.tensor(seen), scale=False)
    assert unscaled.tolist() == pytest.approx([r - statistics.fmean(seen) for r in last])
    alone = group_advantages(torch.tensor(last))
    assert alone.tolist() == group_advantages(torch.tensor(last), seen=torch.tensor(last)).tolist()
    assert alone.sum().item() == pytest.approx(0, abs=1e-6)


def test_a_group_without_spread_is_silent_unless_another_attempt_differs():
    assert group_advantages(torch.full((7,), 0.1)).tolist() == [0.0] * 7, "exactly, whatever 0.1 * 7 is"
    all_right = group_advantages(torch.ones(3), seen=torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0]))
    assert all_right.min() > 0.9, "solved at the second attempt: everything in it was better than before"
    for bad in (torch.ones(1), torch.ones(2, 2)):
        with pytest.raises(ValueError, match="rewards stand in one row"):
            group_advantages(bad)
    with pytest.raises(ValueError, match="must be finite"):
        group_advantages(torch.tensor([1.0, torch.nan]))
