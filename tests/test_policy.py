"""The gradient machine: two passes must be the gradient of the whole graph, and padding must never matter."""

import math
import os
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lib import vocabulary
from lib.agreement import compare
from lib.losses import grdpo, sequence_logprob
from lib.microbatches import plan_microbatches
from lib.policy import Policy, learning_rate_at
from lib.settings import UserError

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
    monkeypatch.setattr(vocabulary, "CHUNK_BYTES", 4 * 60 * 5)  # five positions a chunk
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
    monkeypatch.setattr(policy, "_forward", lambda part, rows: seen.append(len(part)) or forward(part, rows))
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


class ScarceMemory:
    """Makes a decoder run out of memory: in its n-th forward pass, or halfway through a backward pass."""

    def __init__(self, model, *, forward=(), backward=(), error=torch.OutOfMemoryError):
        self.fail = {"forward": set(forward), "backward": set(backward)}
        self.calls = {"forward": 0, "backward": 0}
        self.error = error
        layer = next(module for name, module in model.named_modules() if name.endswith("layers.0"))
        self.hook = layer.register_forward_hook(self._forward)

    def _count(self, kind):
        self.calls[kind] += 1
        if self.calls[kind] in self.fail[kind]:
            raise self.error("DefaultCPUAllocator: can't allocate memory")

    def _forward(self, layer, arguments, output):
        self._count("forward")
        if output.requires_grad:  # the layers above have their gradients when this is called
            output.register_hook(lambda gradient: self._count("backward"))


def learn(policy, groups, **options):
    scored = policy.logprobs(groups, **options)
    loss = grdpo_of(scored)
    loss.backward()
    policy.backward(scored)
    return scored


@pytest.mark.parametrize(
    ("budget", "failures", "left"),
    [
        (60, {"forward": [2]}, 28),  # pass 1, the second micro-batch: three rows of 19 tokens
        (60, {"forward": [1, 2]}, 9),  # the first one, and a half of it again: two rows of 9 tokens
        (60, {"forward": [4]}, 28),  # pass 3, forward
        (60, {"backward": [1]}, 27),  # pass 3, halfway through the first micro-batch
        (60, {"backward": [2]}, 28),  # and with a gradient already there
        (10**6, {"forward": [1]}, 76),  # one pass: forward, with its graph
        (10**6, {"backward": [1]}, 76),  # one pass: backward
    ],
)
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_out_of_memory_changes_no_gradient(toy_model, make_groups, capsys, budget, failures, left, error):
    groups = make_groups(LENGTHS)
    model = add_adapter(toy_model, **ORIGINAL)
    undisturbed = Policy(model, None, tokens_per_microbatch=budget)
    logp_NT = learn(undisturbed, groups).logp_NT.detach()
    expected = gradients(model)
    model.zero_grad()

    memory = ScarceMemory(model, error=error, **failures)
    policy = Policy(model, None, tokens_per_microbatch=budget)
    scored = learn(policy, groups)
    assert all(memory.calls[kind] >= max(calls) for kind, calls in failures.items()), "it did run out"
    assert capsys.readouterr().out.count("out of memory") == sum(map(len, failures.values()))
    assert policy.token_budget == policy.memory_metrics()["memory/token_budget"] == left
    torch.testing.assert_close(scored.logp_NT.detach(), logp_NT, atol=1e-6, rtol=1e-6)
    assert set(gradients(model)) == set(expected)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-5, msg=name)

    model.zero_grad()  # the smaller budget stays
    memory.fail = {"forward": set(), "backward": set()}
    learn(policy, groups)
    assert policy.token_budget == left


def test_only_the_micro_batch_that_failed_is_done_again(toy_model, make_groups):
    model = add_adapter(toy_model)
    memory = ScarceMemory(model, forward=[2])
    policy = Policy(model, None, tokens_per_microbatch=60)
    rows, hidden_states = [], policy._hidden_states
    policy._hidden_states = lambda ids_BL: rows.append(len(ids_BL)) or hidden_states(ids_BL)
    policy.logprobs(make_groups(LENGTHS), keep_graph=False)
    assert memory.calls["forward"] == len(rows)
    assert sum(rows) == 8 + rows[1], "every row once, and those that failed once more"


def test_a_completion_that_does_not_fit_alone_is_one_line(toy_model, make_groups):
    model = add_adapter(toy_model)
    ScarceMemory(model, forward=range(1, 99))
    with pytest.raises(UserError, match=r"one completion, 7 tokens .* lower --max-new-tokens"):
        Policy(model, None, tokens_per_microbatch=60).logprobs(make_groups(LENGTHS))


def test_another_error_is_none_of_memory(toy_model, make_groups):
    model = add_adapter(toy_model)
    memory = ScarceMemory(model, backward=[1], error=ValueError)
    policy = Policy(model, None, tokens_per_microbatch=60)
    with pytest.raises(ValueError, match="allocate"):
        learn(policy, make_groups(LENGTHS))
    assert policy.token_budget == 60
    assert memory.calls["backward"] == 1


@pytest.mark.parametrize("budget", [10**6, 60])
def test_logprobs_that_no_gradient_depends_on_come_later(toy_model, make_groups, budget):
    """On-policy, a loss of logp - logp: its value is known beforehand, and so is its gradient."""
    groups = make_groups(LENGTHS)
    model = add_adapter(toy_model)
    policy = Policy(model, None, tokens_per_microbatch=budget)
    weight_N = torch.tensor([0.5, -1.0, 0.0, 2.0, 0.0, 1.0, -0.3, 0.1])

    def push(**options):
        model.zero_grad()
        scored = policy.logprobs(groups, **options)
        s_N = (scored.logp_NT - scored.logp_NT.detach()).sum(dim=1)
        (s_N.exp() * weight_N).sum().backward()
        policy.backward(scored)
        return scored, gradients(model)

    memory = ScarceMemory(model)
    first, expected = push()
    forwards = memory.calls["forward"]
    later, ours = push(later=True)
    assert memory.calls["forward"] - forwards < forwards or budget == 10**6
    assert later.later == (budget == 60)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-5, msg=name)
    known_N = weight_N != 0 if later.later else torch.ones(8, dtype=torch.bool)
    torch.testing.assert_close(later.logp_NT[known_N], first.logp_NT[known_N], atol=1e-6, rtol=1e-6)
    assert later.logp_NT[~known_N].isnan().all()
    agreement = compare(groups, later, tolerance=math.inf)["sampling/sampling_logp_difference/max"]
    assert agreement == pytest.approx(first.logp_NT[known_N].abs().max().item(), abs=1e-5)


def test_hidden_states_may_come_from_elsewhere(toy_model, make_groups):
    model = add_adapter(toy_model)
    plain = Policy(model, None, tokens_per_microbatch=60)
    asked = []

    def hidden_states(ids_BL):
        asked.append(ids_BL)
        return model.get_base_model().model(input_ids=ids_BL, use_cache=False).last_hidden_state

    other = Policy(model, None, tokens_per_microbatch=60, hidden_states=hidden_states)
    groups = make_groups(LENGTHS)
    assert torch.equal(other.logprobs(groups).logp_NT, plain.logprobs(groups).logp_NT)
    assert asked
