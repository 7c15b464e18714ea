"""Each anchor against its slow formula, on a LoRA model whose adapter really moves."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lib.anchors import MODES, Anchor, measure_distance
from lib.losses import adpo, anchor_kl, mask_tokens, sequence_logprob
from lib.models import load_adapter_weights, save_adapter
from lib.policy import Policy

LENGTHS = [[5, 9, 1, 7], [3, 3, 12, 2]]
REWARDS = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0]])
DRIFT = 0.03  # nat/token: a threshold that some of the steps below exceed, and not all


@pytest.fixture
def make_policy(toy_model):
    """Policies around copies of the same model: the bare base with a fresh adapter, or a trained one."""

    def make(*, trained=False, budget=10**6, checkpointing=False, dtype=torch.float32):
        torch.manual_seed(3)
        config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(copy.deepcopy(toy_model).to(dtype), config)
        if trained:
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.1)
        policy = Policy(model, None, budget, gradient_checkpointing=checkpointing)
        policy.start_optimizer("adamw", weight_decay=0.0)
        return policy

    return make


def score(scored, logp_NT):
    return sequence_logprob(logp_NT, scored.length_N, reduction="sum").view_as(REWARDS)


def loss_of(scored, anchor_NT):
    loss, _ = adpo(
        score(scored, scored.logp_NT), score(scored, anchor_NT), REWARDS, tau=2.0, reward_temperature=0.5
    )
    mask_NT = mask_tokens(scored.length_N, anchor_NT.shape[1])
    return loss + 0.3 * anchor_kl(scored.logp_NT, anchor_NT, mask_NT)


def update(policy, anchor, groups, rate=3e-3):
    """One update as the script does it: (drift per token, what the anchor said)."""
    scored = policy.logprobs(groups)
    anchor_NT = anchor.logprobs(groups, scored)
    loss_of(scored, anchor_NT).backward()
    policy.backward(scored)
    policy.step(rate, max_grad_norm=1.0)
    drift = measure_distance(scored, anchor_NT, "sum")["token_drift"]
    anchor.follow(drift)
    return drift, anchor_NT


def weights_of(policy):
    return {name: p.detach().clone() for name, p in policy.trainable.items()}


def logprobs_with(policy, weights, groups):
    """What the policy would say with other weights in its adapter."""
    own = weights_of(policy)
    try:
        for name, parameter in policy.trainable.items():
            parameter.data.copy_(weights[name])
        return policy.logprobs(groups, keep_graph=False).logp_NT.detach()
    finally:
        for name, parameter in policy.trainable.items():
            parameter.data.copy_(own[name])


def test_on_policy_is_the_policy_itself_at_the_first_update_and_stays_for_the_batch(make_policy, make_groups):
    policy = make_policy(trained=True)
    anchor = Anchor(policy, "on_policy")
    for seed in (0, 1):
        groups = make_groups(LENGTHS, seed=seed)
        before = policy.logprobs(groups)
        first = anchor.logprobs(groups, before)
        assert torch.equal(first, before.logp_NT)
        assert not first.requires_grad
        drifts = [update(policy, anchor, groups)[0] for _ in range(3)]
        assert drifts[0] == 0
        assert 0 < drifts[1] < drifts[2]
        assert torch.equal(anchor.logprobs(groups, policy.logprobs(groups)), first)
    assert anchor.updates == 0


@pytest.mark.parametrize("trained", [False, True], ids=["from the base", "from an adapter"])
def test_fixed_is_where_training_began(make_policy, make_groups, trained):
    policy = make_policy(trained=trained)
    start = weights_of(policy)
    anchor = Anchor(policy, "fixed", from_adapter=trained)
    adapters = len(policy.model.peft_config)
    assert adapters == (2 if trained else 1), "no second adapter where the base serves"
    for step in range(4):
        groups = make_groups(LENGTHS, seed=step)
        drift, said = update(policy, anchor, groups)
        torch.testing.assert_close(said, logprobs_with(policy, start, groups), atol=1e-5, rtol=1e-5)
    assert drift > 1e-3
    assert anchor.updates == 0


def test_fixed_is_computed_once_per_batch(make_policy, make_groups, monkeypatch):
    policy = make_policy()
    anchor, groups, calls = Anchor(policy, "fixed"), make_groups(LENGTHS), []
    logprobs = policy.logprobs
    monkeypatch.setattr(policy, "logprobs", lambda *a, **k: calls.append(k) or logprobs(*a, **k))
    for _ in range(3):
        update(policy, anchor, groups)
    assert calls.count({"keep_graph": False}) == 1
    assert len(calls) == 4


def test_ema_is_the_slow_average_of_the_weights(make_policy, make_groups):
    policy = make_policy(trained=True)
    slow = {name: weight.double() for name, weight in weights_of(policy).items()}
    anchor = Anchor(policy, "ema", decay=0.8)
    for step in range(6):
        groups = make_groups(LENGTHS, seed=step // 2)  # two updates a batch: the second sees a moved anchor
        expected = logprobs_with(policy, slow, groups)
        drift, said = update(policy, anchor, groups)
        torch.testing.assert_close(said, expected, atol=1e-5, rtol=1e-5)
        assert (drift > 1e-4) == (step > 0)
        for name, weight in weights_of(policy).items():
            slow[name] = 0.8 * slow[name] + 0.2 * weight.double()
    assert anchor.updates == 6


def test_ema_moves_in_float32_below_half_precision(make_policy):
    policy = make_policy(dtype=torch.bfloat16)
    anchor = Anchor(policy, "ema", decay=0.99)
    kept = {name: its for name, (_, its) in anchor._weights.items()}
    assert {its.dtype for its in kept.values()} == {torch.float32}
    for parameter in policy.trainable.values():
        parameter.data.fill_(1.0)
    for its in kept.values():
        its.fill_(1.0)
    for parameter in policy.trainable.values():
        parameter.data.fill_(1.001)  # in bfloat16 one per cent of this vanishes
    for _ in range(200):
        anchor.follow(0.0)
    expected = 1.001 - 0.001 * 0.99**200
    assert all(its.mean().item() == pytest.approx(expected, abs=2e-6) for its in kept.values())


def test_kl_triggered_copies_when_a_full_window_has_drifted(make_policy, make_groups):
    policy = make_policy(trained=True)
    anchor = Anchor(policy, "kl_triggered", threshold=DRIFT, window=3)
    held, window, copies = weights_of(policy), [], []
    for step in range(14):
        groups = make_groups(LENGTHS, seed=step // 2)
        expected = logprobs_with(policy, held, groups)
        drift, said = update(policy, anchor, groups)
        torch.testing.assert_close(said, expected, atol=1e-5, rtol=1e-5)
        window = [*window, drift][-3:]
        if len(window) == 3 and sum(window) / 3 > DRIFT:
            held, window = weights_of(policy), []
            copies.append(step)
    assert anchor.updates == len(copies)
    assert len(copies) > 1
    assert copies != [2, 5, 8, 11], "some full window was near its anchor"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("budget", [10**6, 40, 1], ids=["one pass", "micro-batches", "row by row"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_is_that_of_the_whole_graph(make_policy, make_groups, mode, budget, checkpointing):
    """Micro-batches smaller than a group, an anchor that computes between the passes: the same gradient."""
    policy = make_policy(trained=True, budget=budget, checkpointing=checkpointing)
    anchor = Anchor(policy, mode, decay=0.5, from_adapter=True)
    groups = make_groups(LENGTHS)
    update(policy, anchor, groups)  # the next update is off-policy: p is not 1/G
    scored = policy.logprobs(groups)
    anchor_NT = anchor.logprobs(groups, scored)
    loss_of(scored, anchor_NT).backward()
    policy.backward(scored)
    ours = {name: p.grad.clone() for name, p in policy.trainable.items()}
    policy.optimizer.zero_grad()

    rows = []
    for group in groups:
        for ids in group.completion_ids:
            start = len(group.prompt_ids)
            logits = policy.model(torch.tensor([group.prompt_ids + ids])).logits[0, start - 1 : -1]
            row = logits.log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)]
            rows.append(torch.nn.functional.pad(row, (0, anchor_NT.shape[1] - len(ids))))
    whole = copy.copy(scored)
    whole.logp_NT = torch.stack(rows)
    loss_of(whole, anchor_NT).backward()
    assert len(ours) > 10
    for name, parameter in policy.trainable.items():
        torch.testing.assert_close(ours[name], parameter.grad, atol=2e-6, rtol=1e-4, msg=name)
    assert max(gradient.abs().max() for gradient in ours.values()) > 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_a_restored_anchor_goes_on_exactly(make_policy, make_groups, mode, tmp_path):
    def make():
        policy = make_policy(trained=True)
        return policy, Anchor(policy, mode, from_adapter=True, decay=0.7, window=3, threshold=DRIFT)

    def run(policy, anchor, steps):
        for step in steps:
            groups = make_groups(LENGTHS, seed=step)
            for _ in range(2):
                update(policy, anchor, groups)

    whole, whole_anchor = make()
    run(whole, whole_anchor, range(6))
    first, first_anchor = make()
    run(first, first_anchor, range(2))
    save_adapter(first.model, tmp_path)
    assert not (tmp_path / "anchor").exists(), "a checkpoint is a plain adapter: the anchor is in its state"
    tensors, anchor_tensors = (copy.deepcopy(part.state_tensors()) for part in (first, first_anchor))
    second, second_anchor = make()
    load_adapter_weights(second.model, tmp_path)
    second.load_state_tensors(tensors)
    second_anchor.load_state_tensors(anchor_tensors)
    run(second, second_anchor, range(2, 6))
    for name, weight in weights_of(whole).items():
        assert torch.equal(weight, weights_of(second)[name]), name
    for name, tensor in whole_anchor.state_tensors().items():
        assert torch.equal(tensor, second_anchor.state_tensors()[name]), name
    assert (whole_anchor.updates > 0) == (mode in ("ema", "kl_triggered"))


@pytest.mark.parametrize("mode", MODES)
def test_the_anchor_is_never_trained_and_leaves_the_policy_in_charge(make_policy, make_groups, mode):
    policy = make_policy(trained=True)
    names = set(policy.trainable)
    anchor = Anchor(policy, mode, from_adapter=True)
    groups = make_groups(LENGTHS)
    alone = policy.logprobs(groups, keep_graph=False).logp_NT.detach().clone()
    anchor.logprobs(groups, policy.logprobs(groups))
    assert torch.equal(policy.logprobs(groups, keep_graph=False).logp_NT, alone)
    assert {name for name, p in policy.model.named_parameters() if p.requires_grad} == names
    update(policy, anchor, groups)
    assert all(its.grad is None for _, its in anchor._weights.values())


@pytest.mark.parametrize("wrong", [{"mode": "frozen"}, {"decay": 1.1}, {"threshold": 0.0}, {"window": 0}])
def test_a_wrong_argument_is_named(make_policy, wrong):
    with pytest.raises(ValueError, match="anchor"):
        Anchor(make_policy(), **({"mode": "ema"} | wrong))
