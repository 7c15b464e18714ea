"""The anchored listwise loss: vectors of the original code, slow loops, and what it ignores."""

import json
import math
from pathlib import Path

import pytest
import torch

from lib.losses import adpo, anchor_kl, mask_tokens, reward_target

VECTORS = {
    vector["name"]: vector for vector in json.loads((Path(__file__).parent / "adpo_vectors.json").read_text())
}
PLAIN = {"tau": 0.8, "reward_temperature": 0.5}
MODES = [
    PLAIN,
    PLAIN | {"adaptive_tau": "original"},
    PLAIN | {"adaptive_tau": "inverted", "adaptive_tau_alpha": 1.0, "adaptive_tau_min": 0.1},
    PLAIN | {"scale_rewards": "batch", "std_floor": 0.01},
    PLAIN | {"scale_rewards": "none", "drop_failed": True},
]


def by_loops(s_PG, anchor_PG, reward_PG, **settings):
    """Loss and dL/ds from the definition, group by group, in plain Python numbers."""
    get = settings.get
    everything = [reward for group in reward_PG.tolist() for reward in group]
    losses, pushes = [], []
    for s, anchor, reward in zip(s_PG.tolist(), anchor_PG.tolist(), reward_PG.tolist(), strict=True):
        if get("drop_failed") and max(reward) <= 0:
            pushes.append(None)
            continue
        mean, scaled = sum(reward) / len(reward), {"group": reward, "batch": everything}
        scale = 1.0
        if get("scale_rewards", "group") != "none":
            values = scaled[get("scale_rewards", "group")]
            middle = sum(values) / len(values)
            std = math.sqrt(sum((value - middle) ** 2 for value in values) / (len(values) - 1))
            scale = max(std, get("std_floor", 0.0)) + 1e-8
        weights = [math.exp((r - mean) / scale / settings["reward_temperature"]) for r in reward]
        q = [weight / sum(weights) for weight in weights]
        share = -sum(x * math.log(x + 1e-8) for x in q) / math.log(len(q))
        alpha, tau = get("adaptive_tau_alpha", 0.5), settings["tau"]
        factor = {"off": 1, "original": 1 - alpha * share, "inverted": 1 - alpha * (1 - share)}
        mode = get("adaptive_tau", "off")
        tau = tau if mode == "off" else max(get("adaptive_tau_min", 0.05), tau * factor[mode])
        powers = [math.exp((x - a) / tau) for x, a in zip(s, anchor, strict=True)]
        p = [power / sum(powers) for power in powers]
        losses.append(-sum(x * math.log(y) for x, y in zip(q, p, strict=True)))
        pushes.append([(y - x) / tau for x, y in zip(q, p, strict=True)])
    kept = max(1, len(losses))
    gradient = [[0.0] * s_PG.shape[1] if row is None else [x / kept for x in row] for row in pushes]
    return sum(losses) / kept, gradient


def call(s_PG, anchor_PG, reward_PG, **settings):
    """(loss, dL/ds, info) in float64."""
    s_PG = torch.as_tensor(s_PG, dtype=torch.float64).clone().requires_grad_()
    anchor_PG, reward_PG = (torch.as_tensor(x, dtype=torch.float64) for x in (anchor_PG, reward_PG))
    loss, info = adpo(s_PG, anchor_PG, reward_PG, **settings)
    loss.backward()
    return loss.item(), s_PG.grad, info


def random_groups(problems=4, size=5, seed=0):
    torch.manual_seed(seed)
    s_PG = -50 + 5 * torch.randn(problems, size, dtype=torch.float64)
    anchor_PG = s_PG + torch.randn(problems, size, dtype=torch.float64)
    reward_PG = torch.randint(0, 3, (problems, size)).double() / 2
    reward_PG[0] = 0.0  # a failed problem, where all are equal
    return s_PG, anchor_PG, reward_PG


@pytest.mark.parametrize(
    ("name", "tolerance"), [("V1", 1e-7), ("V2", 1e-7), ("V4", 1e-7), ("V6", 1e-7), ("V8", 1e-5)]
)
def test_vectors_of_the_original(name, tolerance):
    vector = VECTORS[name]
    rows = [
        torch.tensor(vector[key], dtype=torch.float64).view(-1, vector["G"])
        for key in ("s", "anchor", "reward")
    ]
    loss, gradient, info = call(*rows, **vector["settings"])
    assert loss == pytest.approx(vector["loss"], abs=tolerance)
    assert gradient.flatten().tolist() == pytest.approx(vector["gradient"], abs=tolerance)
    assert info["tau_P"].tolist() == pytest.approx(vector["tau"], abs=tolerance)
    for key in ("q", "p"):
        expected = torch.tensor(vector[key], dtype=torch.float64)
        torch.testing.assert_close(info[f"{key}_PG"], expected, atol=tolerance, rtol=0)


def test_unequal_groups_are_rejected_where_the_original_cut_them():
    vector, whole = VECTORS["V10"], VECTORS["V4"]
    s, anchor, reward = (torch.tensor(vector[key], dtype=torch.float64) for key in ("s", "anchor", "reward"))
    with pytest.raises(ValueError, match="groups of equal size"):
        adpo(s, anchor, reward, **vector["settings"])
    ragged = [list(x.split(4)) for x in (s, anchor, reward)]
    with pytest.raises(ValueError, match="groups of equal size"):
        adpo(*ragged, **vector["settings"])
    loss, gradient, _ = call(*(x[:8].view(2, 4) for x in (s, anchor, reward)), **vector["settings"])
    assert loss == pytest.approx(whole["loss"], abs=1e-7)
    assert gradient.flatten().tolist() == pytest.approx(vector["gradient"][:8], abs=1e-7)


@pytest.mark.parametrize("settings", MODES)
@pytest.mark.parametrize("size", [2, 5, 16])
def test_loss_and_gradient_equal_the_slow_loop(settings, size):
    groups = random_groups(size=size, seed=size)
    loss, gradient, _ = call(*groups, **settings)
    expected, expected_gradient = by_loops(*groups, **settings)
    assert loss == pytest.approx(expected, abs=1e-10)
    torch.testing.assert_close(gradient, torch.tensor(expected_gradient, dtype=torch.float64))
    torch.testing.assert_close(gradient.sum(dim=1), torch.zeros(4, dtype=torch.float64))
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("settings", MODES)
def test_a_constant_added_to_a_group_changes_nothing(settings):
    s_PG, anchor_PG, reward_PG = random_groups()
    constant_P1 = torch.tensor([[3.0], [-40.0], [0.0], [700.0]], dtype=torch.float64)
    loss, gradient, _ = call(s_PG, anchor_PG, reward_PG, **settings)
    for other in ((s_PG + constant_P1, anchor_PG), (s_PG, anchor_PG + constant_P1)):
        again, again_gradient, _ = call(*other, reward_PG, **settings)
        assert again == pytest.approx(loss, abs=1e-9)
        torch.testing.assert_close(again_gradient, gradient)


@pytest.mark.parametrize("scale", ["group", "batch"])
def test_rewards_count_up_to_an_affine_map(scale):
    s_PG, anchor_PG, reward_PG = random_groups()
    loss, gradient, _ = call(s_PG, anchor_PG, reward_PG, scale_rewards=scale, **PLAIN)
    again, again_gradient, _ = call(s_PG, anchor_PG, 7 * reward_PG - 2, scale_rewards=scale, **PLAIN)
    assert again == pytest.approx(loss, abs=1e-6)
    torch.testing.assert_close(again_gradient, gradient, atol=1e-6, rtol=1e-6)


def test_scale_rewards_means_what_its_names_say():
    """Groups with spreads of different size: the same target under group, not so under batch and none."""
    reward_PG = torch.tensor([[0.0, 1.0, 0.0, 1.0], [0.0, 0.1, 0.0, 0.1]], dtype=torch.float64)
    target = {
        scale: reward_target(reward_PG, reward_temperature=0.5, scale_rewards=scale)
        for scale in ("group", "batch", "none")
    }
    torch.testing.assert_close(target["group"][0], target["group"][1], atol=1e-6, rtol=0)
    for scale, divisor in (("batch", reward_PG.std() + 1e-8), ("none", 1.0)):
        expected = (reward_PG / divisor / 0.5).softmax(dim=1)  # centring cannot change a softmax
        torch.testing.assert_close(target[scale], expected)
        assert target[scale][0, 1] > target[scale][1, 1] + 0.1


def test_a_tiny_spread_is_not_blown_up_behind_the_floor():
    vector = VECTORS["V8"]
    rows = [torch.tensor([vector[key]], dtype=torch.float64) for key in ("s", "anchor", "reward")]
    *_, blown_up = call(*rows, **vector["settings"])
    *_, floored = call(*rows, **vector["settings"], std_floor=0.01)
    assert blown_up["q_PG"].min() < 0.01
    assert (floored["q_PG"] - 0.25).abs().max() < 0.03
    *_, ordinary = call([[0.0] * 4], [[0.0] * 4], [[1.0, 0.0, 0.0, 0.0]], std_floor=0.01, **PLAIN)
    assert ordinary["q_PG"].max() > 0.9, "a spread above the floor is as before"


def test_permuting_a_group_permutes_its_gradient():
    s_PG, anchor_PG, reward_PG = random_groups()
    order = torch.tensor([3, 0, 4, 1, 2])
    loss, gradient, _ = call(s_PG, anchor_PG, reward_PG, **PLAIN)
    permuted = call(s_PG[:, order], anchor_PG[:, order], reward_PG[:, order], **PLAIN)
    assert permuted[0] == pytest.approx(loss)
    torch.testing.assert_close(permuted[1], gradient[:, order])


def test_the_loss_is_ln_g_where_the_anchor_is_the_policy():
    s_PG, _, reward_PG = random_groups(size=8)
    loss, gradient, info = call(s_PG, s_PG, reward_PG, **PLAIN)
    assert loss == pytest.approx(math.log(8), abs=1e-12)
    torch.testing.assert_close(gradient, (1 / 8 - info["q_PG"]) / 0.8 / 4)
    assert gradient[0].abs().max() < 1e-12, "equal rewards, no push"


def test_a_pair_is_soft_dpo():
    """G = 2: softplus(D) - q_1 * D with D = u_1 - u_2 and q_1 = sigmoid((z_1 - z_2) / reward_temperature)."""
    s, anchor, reward = [[-3.0, -5.0]], [[-4.0, -4.5]], [[1.0, 0.0]]
    loss, _, info = call(s, anchor, reward, **PLAIN)
    difference = torch.tensor((1.0 - -0.5) / 0.8, dtype=torch.float64)
    q_1 = torch.sigmoid(torch.tensor(math.sqrt(2) / 0.5, dtype=torch.float64))
    expected = torch.nn.functional.softplus(difference) - q_1 * difference
    assert loss == pytest.approx(expected.item(), abs=1e-6)
    assert info["q_PG"][0, 0].item() == pytest.approx(q_1.item(), abs=1e-6)


def test_failed_problems_can_be_dropped_and_do_not_dilute():
    s_PG, anchor_PG, reward_PG = random_groups()
    loss, gradient, info = call(s_PG, anchor_PG, reward_PG, drop_failed=True, **PLAIN)
    alone, alone_gradient, _ = call(s_PG[1:], anchor_PG[1:], reward_PG[1:], **PLAIN)
    assert info["dropped_P"].tolist() == [True, False, False, False]
    assert loss == pytest.approx(alone, abs=1e-12)
    assert gradient[0].abs().max() == 0
    torch.testing.assert_close(gradient[1:], alone_gradient)
    nothing, no_gradient, _ = call(s_PG[:1], anchor_PG[:1], -reward_PG[:1], drop_failed=True, **PLAIN)
    assert nothing == 0
    assert no_gradient.abs().max() == 0


def test_far_from_the_anchor_everything_stays_finite():
    s_PG = torch.tensor([[-1e5, 1e5, 0.0]], requires_grad=True)
    loss, info = adpo(s_PG, torch.zeros(1, 3), torch.tensor([[1.0, 0.0, 0.0]]), **PLAIN)
    loss.backward()
    assert all(torch.isfinite(x).all() for x in (loss, s_PG.grad, info["p_PG"]))


def test_constants_of_a_micro_batch_give_the_gradient_of_the_whole():
    """The streaming form: with c = dL/ds as constants, sum(c * s) may be taken in any pieces."""
    s_PG, anchor_PG, reward_PG = random_groups()
    weight = torch.randn(3, dtype=torch.float64, requires_grad=True)
    features = torch.randn(4, 5, 3, dtype=torch.float64)
    adpo(s_PG + features @ weight, anchor_PG, reward_PG, **PLAIN)[0].backward()
    whole, weight.grad = weight.grad, None
    _, c_PG, _ = call((s_PG + features @ weight).detach(), anchor_PG, reward_PG, **PLAIN)
    for piece in torch.arange(20).split(3):  # smaller than a group, across its borders
        (c_PG.flatten()[piece] * (features @ weight).flatten()[piece]).sum().backward()
    torch.testing.assert_close(weight.grad, whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tau": 0.0}, "tau must be > 0"),
        ({"tau": float("nan")}, "tau must be > 0"),
        ({"reward_temperature": -1.0}, "reward_temperature must be > 0"),
        ({"adaptive_tau": "on"}, r"adaptive_tau must be off \| original \| inverted"),
        ({"adaptive_tau_alpha": 1.5}, r"adaptive_tau_alpha must be in \[0, 1\]"),
        ({"adaptive_tau_alpha": -0.1}, r"adaptive_tau_alpha must be in \[0, 1\]"),
        ({"adaptive_tau_min": 0.0}, "adaptive_tau_min must be > 0"),
        ({"scale_rewards": "groups"}, r"scale_rewards must be group \| batch \| none"),
        ({"std_floor": -0.1}, "std_floor must be >= 0"),
        ({"s_PG": torch.zeros(1, 3)}, "shapes differ"),
        ({"anchor_PG": torch.zeros(2, 2)}, "shapes differ"),
        ({key: torch.zeros(1, 1) for key in ("s_PG", "anchor_PG", "reward_PG")}, "at least two completions"),
        ({"s_PG": torch.tensor([[0.0, float("nan")]])}, "log-probabilities must be finite"),
        ({"anchor_PG": torch.tensor([[0.0, float("inf")]])}, "anchor must be finite"),
        ({"reward_PG": torch.tensor([[0.0, float("inf")]])}, "rewards must be finite"),
    ],
)
def test_bad_input_is_named(change, message):
    tensors = {"s_PG": torch.zeros(1, 2), "anchor_PG": torch.zeros(1, 2), "reward_PG": torch.eye(2)[:1]}
    with pytest.raises(ValueError, match=message):
        adpo(**(tensors | PLAIN | change))


def test_anchor_kl_equals_the_slow_sum_and_ignores_what_is_masked():
    torch.manual_seed(0)
    logp_GT = -torch.rand(3, 4, dtype=torch.float64)
    anchor_GT = -torch.rand(3, 4, dtype=torch.float64)
    mask_GT = mask_tokens(torch.tensor([4, 2, 0]), 4)
    with torch.no_grad():
        logp_GT[1, 2:], anchor_GT[2] = -torch.inf, torch.nan
    logp_GT.requires_grad_()
    kl = anchor_kl(logp_GT, anchor_GT, mask_GT)
    kl.backward()
    total, places = 0.0, [(0, t) for t in range(4)] + [(1, 0), (1, 1)]
    for g, t in places:
        d = anchor_GT[g, t].item() - logp_GT[g, t].item()
        total += (math.exp(d) - d - 1) / 6
        assert logp_GT.grad[g, t].item() == pytest.approx((1 - math.exp(d)) / 6)
    assert kl.item() == pytest.approx(total)
    assert logp_GT.grad[~mask_GT].abs().max() == 0
    assert anchor_kl(logp_GT, logp_GT, torch.zeros(3, 4, dtype=torch.bool)) == 0
    with pytest.raises(ValueError, match="shapes differ"):
        anchor_kl(logp_GT, anchor_GT[:1], mask_GT)
