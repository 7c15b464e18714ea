"""The equations, against numbers worked out by hand and against slow loops that say the same."""

import math

import pytest
import torch

from lib.losses import better_worse_pairs, grdpo, sequence_logprob


def grdpo_by_loops(s_PG, reward_PG, *, beta, pairs, min_better_reward=None):
    """The definition, pair by pair, in plain Python numbers."""
    group_losses = []
    for s, reward in zip(s_PG.tolist(), reward_PG.tolist(), strict=True):
        ranked = sorted(range(len(s)), key=lambda i: -reward[i])  # sorted() is stable
        upper, lower = ranked[: len(s) // 2], ranked[len(s) // 2 :]
        candidates = [(w, l) for w in upper for l in lower]  # noqa: E741
        if pairs == "ordered":
            candidates = [(w, l) for w in range(len(s)) for l in range(len(s))]  # noqa: E741
        losses = [
            -math.log(1 / (1 + math.exp(-beta * (s[w] - s[lo]))))
            for w, lo in candidates
            if reward[w] > reward[lo] and (min_better_reward is None or reward[w] >= min_better_reward)
        ]
        if losses:
            group_losses.append(sum(losses) / len(losses))
    return sum(group_losses) / len(group_losses) if group_losses else 0.0


@pytest.mark.parametrize("pairs", ["halves", "ordered"])
@pytest.mark.parametrize("size", [2, 3, 7, 20])
@pytest.mark.parametrize("minimum", [None, 0.6])
def test_grdpo_equals_the_double_loop(pairs, size, minimum):
    torch.manual_seed(size)
    s_PG = torch.randn(4, size, dtype=torch.float64) * 3
    reward_PG = torch.randint(0, 4, (4, size)).double() / 3
    reward_PG[3] = 1.0  # a group without a pair
    loss = grdpo(s_PG, reward_PG, beta=0.7, pairs=pairs, min_better_reward=minimum)
    expected = grdpo_by_loops(s_PG, reward_PG, beta=0.7, pairs=pairs, min_better_reward=minimum)
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    assert expected > 0


def test_grdpo_by_hand():
    # rewards 2, 1, 0, 0: upper half {0, 1}, lower half {2, 3}; s equal: four pairs, each log 2
    s_PG = torch.zeros(1, 4, requires_grad=True)
    loss = grdpo(s_PG, torch.tensor([[2.0, 1.0, 0.0, 0.0]]), beta=0.5)
    assert loss.item() == pytest.approx(math.log(2))
    loss.backward()
    # dL/ds_w = -(beta/N) * sum over its 2 pairs of sigmoid(0) = -(0.5/4) * 2 * 0.5
    assert s_PG.grad.tolist() == [pytest.approx([-0.125, -0.125, 0.125, 0.125])]


def test_the_gradient_is_that_of_the_spec():
    torch.manual_seed(1)
    s_PG = torch.randn(1, 9, dtype=torch.float64, requires_grad=True)
    reward_PG = torch.randint(0, 3, (1, 9)).double()
    beta = 1.3
    grdpo(s_PG, reward_PG, beta=beta, pairs="ordered").backward()
    pair_GG = reward_PG[0][:, None] > reward_PG[0]
    pull_GG = torch.sigmoid(-beta * (s_PG[0][:, None] - s_PG[0])) * pair_GG
    expected_G = (beta / pair_GG.sum()) * (pull_GG.sum(0) - pull_GG.sum(1))
    torch.testing.assert_close(s_PG.grad[0], expected_G.detach())
    assert abs(s_PG.grad.sum().item()) < 1e-12


def test_ties_keep_the_order_of_sampling():
    # all equal but the last: it leads the upper half, and completion 0 follows it there
    pairs = better_worse_pairs(torch.tensor([[1.0, 1.0, 1.0, 2.0]]))
    assert pairs.nonzero().tolist() == [[0, 3, 1], [0, 3, 2]]


def test_the_middle_of_an_odd_group_is_in_the_lower_half():
    pairs = better_worse_pairs(torch.tensor([[3.0, 2.0, 1.0]]))
    assert pairs.nonzero().tolist() == [[0, 0, 1], [0, 0, 2]]


def test_the_original_rule_drops_pairs_below_the_minimum():
    pairs = better_worse_pairs(torch.tensor([[2.0, 1.0, 0.0]]), pairs="ordered", min_better_reward=1.1)
    assert pairs.nonzero().tolist() == [[0, 0, 1], [0, 0, 2]]


def test_only_the_order_of_rewards_matters():
    s_PG = torch.randn(3, 8, dtype=torch.float64)
    reward_PG = torch.randint(0, 4, (3, 8)).double()
    assert grdpo(s_PG, reward_PG, beta=1.0) == grdpo(s_PG, reward_PG.exp() * 7 - 3, beta=1.0)


def test_groups_without_pairs_are_silent_and_do_not_dilute():
    s_PG = torch.randn(2, 4, requires_grad=True)
    reward_PG = torch.tensor([[1.0, 1.0, 1.0, 1.0], [2.0, 1.0, 0.0, 0.0]])
    loss = grdpo(s_PG, reward_PG, beta=1.0)
    alone = grdpo(s_PG[1:], reward_PG[1:], beta=1.0)
    assert loss == alone
    loss.backward()
    assert s_PG.grad[0].abs().max() == 0
    assert s_PG.grad[1].abs().min() > 0
    empty = torch.randn(1, 4, requires_grad=True)
    nothing = grdpo(empty, reward_PG[:1], beta=1.0)
    nothing.backward()
    assert nothing == 0
    assert empty.grad.abs().max() == 0


def test_huge_margins_stay_finite():
    s_PG = torch.tensor([[-1e6, 1e6]], requires_grad=True)
    loss = grdpo(s_PG, torch.tensor([[1.0, 0.0]]), beta=1.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(s_PG.grad).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": 0.0}, "beta must be > 0"),
        ({"beta": -1.0}, "beta must be > 0"),
        ({"pairs": "all"}, "pairs is halves or ordered"),
        ({"s_PG": torch.zeros(1, 3)}, "shapes differ"),
        ({"s_PG": torch.zeros(1, 1), "reward_PG": torch.zeros(1, 1)}, "at least two completions"),
        ({"s_PG": torch.tensor([[0.0, float("nan")]])}, "log-probabilities must be finite"),
        ({"reward_PG": torch.tensor([[0.0, float("inf")]])}, "rewards must be finite"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"s_PG": torch.zeros(1, 2), "reward_PG": torch.tensor([[1.0, 0.0]]), "beta": 1.0} | change
    with pytest.raises(ValueError, match=message):
        grdpo(arguments.pop("s_PG"), arguments.pop("reward_PG"), **arguments)


def test_sequence_logprob_ignores_what_stands_behind_a_row():
    logp_NT = torch.tensor([[-1.0, -2.0, float("nan")], [-3.0, float("inf"), 5.0], [1.0, 1.0, 1.0]])
    length_N = torch.tensor([2, 1, 0])
    assert sequence_logprob(logp_NT, length_N, reduction="sum").tolist() == [-3.0, -3.0, 0.0]
    assert sequence_logprob(logp_NT, length_N, reduction="mean").tolist() == [-1.5, -3.0, 0.0]
    with pytest.raises(ValueError, match="mean or sum"):
        sequence_logprob(logp_NT, length_N, reduction="median")
