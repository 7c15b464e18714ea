"""The gradient machine: two passes must be the gradient of the whole graph, and padding must never matter."""

import math
import os
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lib import policy as policy_module
from lib.losses import grdpo, sequence_logprob
from lib.policy import Policy, learning_rate_at, plan_microbatches

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ORIGINAL = {
    "target_modules": ["gate_proj", "up_proj", "down_proj", "lm_head"],
    "modules_to_save": ["embed_tokens", "norm"],
}
LENGTHS = [[5, 9, 1, 7], [3, 3, 12, 2]]
REWARDS = torch.tensor([[1.0, 0.0, 0.5, 0.0], [0.0, 1.0, 1.0, 0.2]])


def add_adapter(model, **options):
    """LoRA with B that is not zero, so that every gradient is alive."""
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, **({"target_modules": ALL} | options))
    peft_model = get_peft_model(model, config)
    torch.manual_seed(3)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return peft_model


def whole_graph_logps(model, groups):
    """Manual gather over full logits, one row at a time, no padding, one graph for everything."""
    rows = []
    for group in groups:
        for ids in group.completion_ids:
            logits = model(torch.tensor([group.prompt_ids + ids])).logits[0]
            start = len(group.prompt_ids)
            predicted = logits[start - 1 : start - 1 + len(ids)].log_softmax(-1)
            rows.append(predicted[torch.arange(len(ids)), torch.tensor(ids)])
    return rows


def grdpo_of(scored):
    s_N = sequence_logprob(scored.logp_NT, scored.length_N)
    return grdpo(s_N.view_as(REWARDS), REWARDS, beta=1.0)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("budget", [10**6, 40, 1], ids=["one pass", "micro-batches", "row by row"])
@pytest.mark.parametrize("options", [{}, ORIGINAL], ids=["all linear", "lm_head and embeddings"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_autograd_through_the_full_graph(
    toy_model, make_groups, monkeypatch, budget, options, checkpointing
):
    monkeypatch.setattr(policy_module, "CHUNK_BYTES", 4 * 60 * 5)  # five positions a chunk
    model = add_adapter(toy_model, **options)
    groups = make_groups(LENGTHS)
    s_PG = torch.stack([row.mean() for row in whole_graph_logps(model, groups)]).view_as(REWARDS)
    loss = grdpo(s_PG, REWARDS, beta=1.0)
    loss.backward()
    expected = gradients(model)
    model.zero_grad()

    policy = Policy(model, None, tokens_per_microbatch=budget, gradient_checkpointing=checkpointing)
    scored = policy.logprobs(groups)
    assert bool(scored.graphs) == (budget == 10**6)  # one ordinary pass where all rows fit
    ours = grdpo_of(scored)
    ours.backward()
    policy.backward(scored)
    assert ours.item() == pytest.approx(loss.item(), abs=1e-6)
    assert set(gradients(model)) == set(expected)
    assert len(expected) > 10
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-5, msg=name)
        assert gradient.abs().max() > 0, name


def test_logprobs_equal_a_manual_gather(toy_model, make_groups):
    groups = make_groups(LENGTHS)
    scored = Policy(toy_model, None, tokens_per_microbatch=50).logprobs(groups, keep_graph=False)
    expected = whole_graph_logps(toy_model, groups)
    assert scored.length_N.tolist() == [length for group in LENGTHS for length in group]
    for row, length, manual in zip(scored.logp_NT, scored.length_N, expected, strict=True):
        torch.testing.assert_close(row[:length].detach(), manual.detach(), atol=1e-5, rtol=1e-5)
        assert row[length:].abs().sum() == 0


def test_padding_never_matters(toy_model, make_groups):
    short, long = make_groups([[4, 4], [4, 40]])
    policy = Policy(toy_model, None, tokens_per_microbatch=10**6)
    alone = policy.logprobs([short]).logp_NT[:, :4]
    beside_a_long_one = policy.logprobs([short, long]).logp_NT[:2, :4]
    torch.testing.assert_close(alone, beside_a_long_one, atol=1e-6, rtol=1e-6)


def test_a_token_that_equals_the_pad_id_counts_like_any_other(toy_model, make_groups):
    group = make_groups([[3, 3]])[0]
    group.completion_ids[0][-1] = 59  # EOS is the pad token of this model
    scored = Policy(toy_model, None, tokens_per_microbatch=10**6).logprobs([group])
    manual = whole_graph_logps(toy_model, [group])[0]
    torch.testing.assert_close(scored.logp_NT[0], manual, atol=1e-5, rtol=1e-5)


def test_changed_weights_between_the_passes_are_noticed(toy_model, make_groups):
    policy = Policy(add_adapter(toy_model), None, tokens_per_microbatch=40)
    scored = policy.logprobs(make_groups(LENGTHS))
    grdpo_of(scored).backward()
    with torch.no_grad():
        next(iter(policy.trainable.values())).mul_(1.01)
    with pytest.raises(RuntimeError, match="changed between the two passes"):
        policy.backward(scored)


def test_backward_without_a_loss_is_refused(toy_model, make_groups):
    policy = Policy(add_adapter(toy_model), None, tokens_per_microbatch=40)
    with pytest.raises(RuntimeError, match=r"loss\.backward"):
        policy.backward(policy.logprobs(make_groups(LENGTHS)))


def test_dropout_is_refused(toy_model):
    config = LoraConfig(r=2, lora_dropout=0.1, target_modules=ALL)
    with pytest.raises(ValueError, match="dropout must be 0"):
        Policy(get_peft_model(toy_model, config), None, tokens_per_microbatch=40)


def test_rows_without_a_weight_run_no_second_forward(toy_model, make_groups, monkeypatch):
    policy = Policy(add_adapter(toy_model), None, tokens_per_microbatch=40)
    scored = policy.logprobs(make_groups(LENGTHS))
    scored.logp_NT.grad = torch.zeros_like(scored.logp_NT)
    scored.logp_NT.grad[2, 0] = 1.0
    seen = []
    forward = policy._forward
    monkeypatch.setattr(policy, "_forward", lambda rows: seen.append(len(rows)) or forward(rows))
    policy.backward(scored)
    assert seen == [1]


def test_a_gradient_that_is_not_finite_changes_nothing(toy_model):
    policy = Policy(add_adapter(toy_model), None, tokens_per_microbatch=40)
    policy.start_optimizer("adamw", weight_decay=0.0)
    before = {name: p.detach().clone() for name, p in policy.trainable.items()}
    for parameter in policy.trainable.values():
        parameter.grad = torch.full_like(parameter, float("nan"))
    assert not math.isfinite(policy.step(1.0, max_grad_norm=1.0))
    assert all(torch.equal(p, before[name]) for name, p in policy.trainable.items())
    assert all(p.grad is None for p in policy.trainable.values())


def test_the_gradient_is_clipped_and_the_rate_applied(toy_model):
    policy = Policy(add_adapter(toy_model), None, tokens_per_microbatch=40)
    policy.start_optimizer("adamw", weight_decay=0.0)
    before = {name: p.detach().clone() for name, p in policy.trainable.items()}
    for parameter in policy.trainable.values():
        parameter.grad = torch.ones_like(parameter)
    count = sum(p.numel() for p in policy.trainable.values())
    assert policy.step(0.25, max_grad_norm=1.0) == pytest.approx(math.sqrt(count), rel=1e-4)
    # the first AdamW step moves every weight by the learning rate against the sign of its gradient
    for name, parameter in policy.trainable.items():
        torch.testing.assert_close(parameter, before[name] - 0.25, atol=1e-4, rtol=0)


def test_microbatches_hold_every_row_once_within_the_budget():
    lengths = [7, 3, 90, 12, 12, 5, 31, 8]
    batches = plan_microbatches(lengths, budget=40)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(len(b) * max(lengths[i] for i in b) <= 40 or len(b) == 1 for b in batches)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_the_learning_rate_warms_up_and_never_leaves_its_range(schedule):
    rates = [learning_rate_at(s, 50, peak=2.0, schedule=schedule, warmup=0.1) for s in range(50)]
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert all(0 < rate <= 2.0 for rate in rates)
    assert rates[-1] == 2.0 if schedule == "constant" else rates[-1] < 0.02
    with pytest.raises(ValueError, match="constant or cosine"):
        learning_rate_at(9, 10, peak=1.0, schedule="linear", warmup=0)


def test_three_hundred_steps_do_not_grow_the_memory(toy_model, make_groups):
    policy = Policy(add_adapter(toy_model), None, tokens_per_microbatch=60)
    policy.start_optimizer("adamw", weight_decay=0.0)
    resident = []
    for step in range(300):
        scored = policy.logprobs(make_groups(LENGTHS, seed=step))
        grdpo_of(scored).backward()
        policy.backward(scored)
        policy.step(1e-4, max_grad_norm=1.0)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        resident.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
    assert resident[-1] - resident[50] < 30, "MiB"
