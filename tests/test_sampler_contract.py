"""What every sampler promises, whichever package decodes: one contract, each test run over all of them."""

import pytest
import torch

from lib.batches import Problem
from lib.draws import SamplingParams, filter_logits, parse_params, parse_phase
from lib.models import load_trainable, locate_model
from lib.phases import PhaseTracker, token_texts
from lib.policy import Policy
from lib.prompts import encode_prompt
from lib.sampler import TransformersSampler
from tests.conftest import TINY

PROBLEMS = [Problem(f"p{i}", f"Compute {text}.", "0") for i, text in enumerate(("3 + 4", "12 * 11", "5"))]


@pytest.fixture
def policy(tokenizer):
    """The shipped model with an adapter that says something of its own."""
    place = locate_model(TINY)
    model = load_trainable(place, "all-linear", rank=16, alpha=32.0, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.02
    return Policy(model, tokenizer, 4096)


@pytest.fixture(params=["transformers", pytest.param("vllm", marks=pytest.mark.vllm)])
def sampler(request, policy, tokenizer):
    if request.param == "transformers":
        return TransformersSampler(policy.model, tokenizer)
    engine = request.getfixturevalue("vllm_engine")
    from lib.vllm_sampler import VllmSampler

    sampler = VllmSampler(engine, tokenizer, policy.causal_lm.config)
    sampler.follow(policy)
    return sampler


@pytest.fixture
def sample(sampler, tokenizer):
    def draw(chosen=PROBLEMS, *, group_size=8, seed=1, step=1, attempt=0, **options):
        prompts = [encode_prompt(tokenizer, problem.problem, style="answer_tag") for problem in chosen]
        params = SamplingParams(**{"max_new_tokens": 32} | options)
        how = {"group_size": group_size, "seed": seed, "step": step, "attempt": attempt}
        return sampler.sample(chosen, prompts, params, **how)

    return draw


def ids_of(groups):
    return [ids for group in groups for ids in group.completion_ids]


def test_a_group_has_everything_that_travels(sample, sampler, tokenizer):
    groups = sample(max_new_tokens=12)
    assert [group.problem for group in groups] == PROBLEMS
    reasons = set()
    for group in groups:
        assert tokenizer.decode(group.prompt_ids) == group.prompt
        parts = (group.completion_ids, group.completions, group.finish_reasons, group.sampler_logps)
        assert {len(part) for part in parts} == {8}
        for ids, text, reason, logps in zip(*parts, strict=True):
            assert len(ids) == len(logps) <= 12
            assert (reason == "stop") == (ids[-1] in sampler.end_ids)
            assert reason == "stop" or len(ids) == 12
            assert not set(ids[:-1]) & set(sampler.end_ids)
            assert text == tokenizer.decode(ids[:-1] if reason == "stop" else ids)
            reasons.add(reason)
    assert reasons == {"stop", "length"}, "twelve tokens are enough for some and not for others"


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.5, "top_p": 0.9}, {"repetition_penalty": 1.2}, {"temperature": 0.0}]
)
def test_logprobs_are_those_of_the_raw_policy(sample, policy, options):
    groups = sample(**options)
    logp_NT = policy.logprobs(groups, keep_graph=False).logp_NT
    for row, logps in zip(logp_NT, (row for group in groups for row in group.sampler_logps), strict=True):
        torch.testing.assert_close(row[: len(logps)], torch.tensor(logps), atol=1e-4, rtol=0)


def test_a_completion_is_a_function_of_seed_step_problem_and_attempt(sample):
    first = ids_of(sample())
    assert ids_of(sample()) == first
    assert ids_of(sample(PROBLEMS[1:2])) == first[8:16], "whatever it is sampled together with"
    assert ids_of(sample(group_size=3)) == first[0:3] + first[8:11] + first[16:19]
    for changed in ({"seed": 2}, {"step": 2}, {"attempt": 1}):
        other = ids_of(sample(**changed))
        assert sum(a == b for a, b in zip(first, other, strict=True)) < len(first) / 2, changed


def test_the_completions_of_a_group_differ(sample):
    assert len({tuple(ids) for ids in ids_of(sample(PROBLEMS[:1], temperature=1.5))}) == 8


def test_every_end_token_ends_and_unknown_ids_never_come(sample, sampler, tokenizer, policy):
    groups = sample(temperature=2.0, group_size=100)
    rows = ids_of(groups)
    with torch.no_grad():
        asked = [torch.tensor([groups[0].prompt_ids + ids]) for ids in groups[0].completion_ids]
        logits = torch.cat([policy.model(ids).logits[0, ids.shape[1] // 2 :] for ids in asked])
    unknown = (logits / 2.0).softmax(dim=-1)[:, len(tokenizer) :].sum(dim=-1).mean().item()
    assert unknown * sum(map(len, rows)) > 10, "some would come if they were not masked"
    assert max(max(row) for row in rows) < len(tokenizer)
    assert len(sampler.end_ids) == 2
    assert {row[-1] for row in rows if row[-1] in sampler.end_ids} == set(sampler.end_ids)


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-3}]
)
def test_the_filters_narrow_down_to_the_likeliest(sample, policy, options):
    groups = sample(group_size=2, **options)
    for group in groups:
        for ids in group.completion_ids:
            row = torch.tensor([group.prompt_ids + ids])
            with torch.no_grad():
                logits = policy.model(row).logits[0, len(group.prompt_ids) - 1 : -1]
            assert logits.argmax(dim=-1).tolist() == ids


def test_behind_the_marker_the_second_phase_holds_to_the_end(sample, policy, tokenizer):
    """Freely up to the first " is", greedily from there on; each row switches where its own marker is."""
    groups = sample(group_size=16, temperature=1.3, phase="is: T0")
    text_of, switches, strayed = token_texts(tokenizer), set(), 0
    for group in groups:
        for ids in group.completion_ids:
            tracker = PhaseTracker("is", text_of)
            switch = next((i for i, token in enumerate(ids, start=1) if tracker.push(token)), len(ids))
            with torch.no_grad():
                row = torch.tensor([group.prompt_ids + ids])
                best = policy.model(row).logits[0, len(group.prompt_ids) - 1 : -1].argmax(dim=-1).tolist()
            assert ids[switch:] == best[switch:]
            switches.add(switch if switch < len(ids) - 1 else None)
            strayed += ids[:switch] != best[:switch]
    assert len(switches - {None}) >= 2, "several places, and more than a token behind them"
    assert strayed > 20, "the first phase is not greedy"


@pytest.mark.parametrize(("first", "later"), [("T1.5,p0.5", "T0.3"), ("T1.5,k3", "r1.3"), ("T1.5", "m0.2")])
def test_each_phase_has_its_own_filters(sample, policy, tokenizer, first, later):
    """No token lies outside what `filter_logits` leaves of the policy's logits in its phase."""
    params = parse_params(first, option="-", base=SamplingParams(max_new_tokens=32, phase=f"is: {later}"))
    _, behind = parse_phase(params.phase)
    [group] = sample(PROBLEMS[:1], group_size=16, **vars(params))
    for ids in group.completion_ids:
        tracker, row = PhaseTracker("is", token_texts(tokenizer)), torch.tensor([group.prompt_ids + ids])
        with torch.no_grad():
            logits = policy.model(row).logits[0, len(group.prompt_ids) - 1 : -1, : len(tokenizer)].float()
        for place, token in enumerate(ids):
            seen = torch.zeros_like(logits[:1], dtype=torch.bool)
            seen[0, group.prompt_ids + ids[:place]] = True
            now = behind if tracker.behind else params
            assert filter_logits(logits[place : place + 1], now, seen_NV=seen)[0, token] > -torch.inf
            tracker.push(token)


def test_completions_follow_the_weights(sample, policy):
    before = ids_of(sample())
    with torch.no_grad():
        for name, parameter in policy.trainable.items():
            if "lora_B" in name:
                parameter.mul_(-3.0)
    groups = sample()
    assert ids_of(groups) != before
    logp_NT = policy.logprobs(groups, keep_graph=False).logp_NT
    row = torch.tensor(groups[0].sampler_logps[0])
    torch.testing.assert_close(logp_NT[0, : len(row)].detach(), row, atol=1e-4, rtol=0)


def test_tokens_come_as_often_as_their_probability_says(sample, policy, tokenizer):
    """Chi-squared of 600 first tokens, and of as many second ones behind the likeliest first."""
    [group] = sample(PROBLEMS[:1], group_size=600, max_new_tokens=2, temperature=0.8)
    firsts = torch.tensor([ids[0] for ids in group.completion_ids])
    favourite = int(firsts.mode().values)
    seconds = torch.tensor([ids[1] for ids in group.completion_ids if ids[0] == favourite and len(ids) == 2])
    for behind, tokens in (([], firsts), ([favourite], seconds)):
        with torch.no_grad():
            logits = policy.model(torch.tensor([group.prompt_ids + behind])).logits[0, -1].float()
        logits[len(tokenizer) :] = -torch.inf
        expected = (logits / 0.8).softmax(dim=-1) * len(tokens)
        counted = torch.bincount(tokens, minlength=len(expected))
        often = expected >= 5
        chi2 = ((counted - expected)[often] ** 2 / expected[often]).sum().item()
        freedom = max(1, int(often.sum()) - 1)
        assert len(tokens) > 100
        assert chi2 < freedom + 5 * (2 * freedom) ** 0.5, (chi2, freedom)
