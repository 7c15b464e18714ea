"""A sampler that serves other weights than the policy's must not go unnoticed."""

import copy

import pytest
import torch

from lib.agreement import compare, probe_sampler
from lib.models import load_trainable, locate_model
from lib.policy import Policy
from lib.prompts import encode_prompt
from lib.sampler import TransformersSampler
from lib.settings import UserError
from tests.conftest import TINY


@pytest.fixture
def policy(tokenizer):
    model = load_trainable(locate_model(TINY), "all-linear", rank=4, alpha=8.0, seed=0)
    return Policy(model, tokenizer, 4096)


@pytest.fixture
def prompt(tokenizer):
    return encode_prompt(tokenizer, "What is 1 + 1?", style="answer_tag")


def late_sampler(policy, *, updates):
    """A sampler with a copy of the model that takes the adapter over only so many times."""
    twin = copy.deepcopy(policy.model)

    class Late(TransformersSampler):
        left = updates

        def sample(self, *args, **kwargs):
            if self.left > 0:
                self.left -= 1
                twin.load_state_dict(policy.model.state_dict())
            return super().sample(*args, **kwargs)

    return Late(twin, policy.tokenizer)


def test_a_faithful_sampler_passes_and_nothing_is_changed(policy, prompt):
    before = {name: parameter.detach().clone() for name, parameter in policy.trainable.items()}
    random_state = torch.get_rng_state()
    assert probe_sampler(policy, TransformersSampler(policy.model, policy.tokenizer), prompt) < 1e-5
    assert all(torch.equal(parameter, before[name]) for name, parameter in policy.trainable.items())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_both_probes_are_far_from_the_policys_own_adapter(policy, prompt):
    """A sampler that took one adapter over and serves the base since is off by more than bfloat16 rounds."""
    sampler = TransformersSampler(policy.model, policy.tokenizer)
    calls, distances = [], []
    logprobs, sample = policy.logprobs, sampler.sample

    def watched(*args, **kwargs):
        groups = sample(*args, **kwargs)
        if calls:
            now = logprobs(groups, keep_graph=False).logp_NT.detach()
            with policy.model.disable_adapter():  # B is 0: the policy's own is the base
                base = logprobs(groups, keep_graph=False).logp_NT.detach()
            tokens = sum(len(ids) for group in groups for ids in group.completion_ids)
            distances.append(((now - base).abs().sum() / tokens).item())
        calls.append(1)
        return groups

    sampler.sample = watched
    probe_sampler(policy, sampler, prompt)
    assert min(distances[:2]) > 0.1
    assert distances[2] < 1e-5, "its own again"


def test_a_policy_that_computes_nan_is_no_agreement(policy, prompt):
    from types import SimpleNamespace

    groups = [SimpleNamespace(sampler_logps=[[-1.0, -2.0]])]
    scored = SimpleNamespace(logp_NT=torch.tensor([[-1.0, torch.nan]]), rounding=torch.float32, later=False)
    assert all(value != value for value in compare(groups, scored).values()), "nan, not 0"
    with torch.no_grad():
        next(iter(policy.trainable.values())).fill_(torch.nan)
    with pytest.raises(UserError, match="are not finite"):
        probe_sampler(policy, TransformersSampler(policy.model, policy.tokenizer), prompt)


@pytest.mark.parametrize("updates", [0, 1, 2, 3])
def test_a_sampler_that_stays_behind_is_caught(policy, prompt, updates):
    """0: it serves the base. 1, 2: it keeps an adapter. 3: it keeps the last probe."""
    sampler = late_sampler(policy, updates=updates)
    with pytest.raises(UserError, match="disagree about the same tokens by"):
        probe_sampler(policy, sampler, prompt)
    assert all(not p.any() for name, p in policy.trainable.items() if "lora_B" in name), "put back"


def test_a_batch_from_other_weights_stops_the_run(policy, prompt):
    from types import SimpleNamespace

    from lib.draws import SamplingParams

    sampler = TransformersSampler(policy.model, policy.tokenizer)
    how = {"group_size": 4, "seed": 1, "step": 1}
    groups = sampler.sample([SimpleNamespace(id="p")], [prompt], SamplingParams(max_new_tokens=16), **how)
    metrics = compare(groups, policy.logprobs(groups))
    assert 0 < metrics["sampling/sampling_logp_difference/mean"] < 1e-5
    assert metrics["sampling/sampling_logp_difference/max"] < 1e-4
    for name, parameter in policy.trainable.items():
        if "lora_B" in name:
            parameter.data += 0.01
    scored = policy.logprobs(groups)
    with pytest.raises(UserError, match=r"tolerance 0\.0001"):
        compare(groups, scored)
    assert compare(groups, scored, tolerance=10.0)["sampling/sampling_logp_difference/mean"] > 1e-3


def test_rows_that_were_not_computed_are_left_out(policy, prompt):
    from types import SimpleNamespace

    groups = [SimpleNamespace(sampler_logps=[[-1.0, -2.0], [-3.0]])]
    logp_NT = torch.tensor([[-1.5, -2.0], [float("nan"), float("nan")]])
    metrics = compare(
        groups, SimpleNamespace(logp_NT=logp_NT, rounding=torch.float32, later=True), tolerance=1.0
    )
    assert metrics["sampling/sampling_logp_difference/mean"] == pytest.approx(0.25)
