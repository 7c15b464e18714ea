"""The decode loop: the same completions however they are batched, the distribution that was asked for, and
log-probabilities that are the policy's.
"""

from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from lib.draws import SamplingParams, draw_key, draw_tokens, filter_logits, mix64
from lib.policy import Policy
from lib.sampler import TransformersSampler

VOCABULARY = 55  # ids that the toy tokenizer knows; the model has 60 rows


class ToyTokenizer:
    """Ids as decimal numbers."""

    eos_token_id = 54

    def __len__(self):
        return VOCABULARY

    def decode(self, ids, **_):
        return " ".join(map(str, ids))

    def batch_decode(self, rows, **_):
        return [self.decode(ids) for ids in rows]


PROBLEMS = [SimpleNamespace(id=f"p{number}") for number in range(4)]
PROMPTS = [[3, 9, 4], [8, 1, 1, 20, 7, 30, 2], [12], [5, 5, 6, 40]]


@pytest.fixture
def sampler(toy_model):
    toy_model.generation_config.eos_token_id = [53, 54]
    return TransformersSampler(toy_model, ToyTokenizer())


def sample(sampler, *, chosen=slice(None), group_size=6, seed=1, step=1, **options):
    params = SamplingParams(**{"max_new_tokens": 24} | options)
    problems, prompts = PROBLEMS[chosen], PROMPTS[chosen]
    return sampler.sample(problems, prompts, params, group_size=group_size, seed=seed, step=step)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6, "top_p": 0.8},
        {"top_k": 5, "min_p": 0.02},
        {"repetition_penalty": 1.3},
        {"temperature": 0},
    ],
)
def test_the_same_completions_however_they_are_batched(sampler, options):
    together = sample(sampler, **options)
    alone = [sample(sampler, chosen=slice(i, i + 1), **options)[0] for i in range(4)]
    sampler.max_rows = 12
    in_twos = sample(sampler, **options)
    assert [g.completion_ids for g in together] == [g.completion_ids for g in alone]
    assert [g.completion_ids for g in together] == [g.completion_ids for g in in_twos]
    smaller = sample(sampler, group_size=2, **options)
    assert [g.completion_ids[:2] for g in together] == [g.completion_ids for g in smaller]


def test_a_draw_depends_on_seed_step_problem_and_member(sampler):
    base = sample(sampler)
    assert sample(sampler)[0].completion_ids == base[0].completion_ids
    assert sample(sampler, seed=2)[0].completion_ids != base[0].completion_ids
    assert sample(sampler, step=2)[0].completion_ids != base[0].completion_ids
    assert len({tuple(ids) for ids in base[0].completion_ids}) > 1
    keys = {
        draw_key(s, t, p, attempt=a, member=m)
        for s in (0, 1)
        for t in (0, 1)
        for p in "ab"
        for a in (0, 1)
        for m in (0, 1)
    }
    assert len(keys) == 32


def test_the_samplers_logprobs_are_the_policys(sampler, toy_model):
    groups = sample(sampler, temperature=0.7, top_p=0.9)
    scored = Policy(toy_model, None, tokens_per_microbatch=10**6).logprobs(groups, keep_graph=False)
    sampled = [logps for group in groups for logps in group.sampler_logps]
    for row, logps in zip(scored.logp_NT.tolist(), sampled, strict=True):
        assert row[: len(logps)] == pytest.approx(logps, abs=1e-4)


def test_greedy_is_the_argmax_of_a_plain_forward(sampler, toy_model):
    group = sample(sampler, temperature=0, group_size=2, chosen=slice(1, 2))[0]
    ids = list(PROMPTS[1])
    for token in group.completion_ids[0]:
        logits = toy_model(torch.tensor([ids])).logits[0, -1, :VOCABULARY]
        assert token == int(logits.argmax())
        ids.append(token)
    assert group.completion_ids[0] == group.completion_ids[1]


def test_every_end_token_ends_and_stays_in_the_ids(sampler):
    groups = sample(sampler, group_size=200, chosen=slice(0, 2), max_new_tokens=40)
    ends = Counter()
    for group in groups:
        for ids, text, reason in zip(
            group.completion_ids, group.completions, group.finish_reasons, strict=True
        ):
            assert not set(ids[:-1]) & {53, 54}
            assert reason == ("stop" if ids[-1] in (53, 54) else "length")
            assert len(ids) <= 40
            assert reason == "stop" or len(ids) == 40
            assert text == " ".join(map(str, ids[:-1] if reason == "stop" else ids))
            ends[ids[-1] if reason == "stop" else reason] += 1
    assert ends[53] > 0
    assert ends[54] > 0


def test_ids_beyond_the_tokenizer_are_never_sampled(sampler):
    groups = sample(sampler, group_size=300, max_new_tokens=6, temperature=5.0)
    assert max(max(ids) for group in groups for ids in group.completion_ids) < VOCABULARY


def test_finished_rows_leave_the_batch(sampler, monkeypatch):
    sizes = []
    logits = sampler._logits
    monkeypatch.setattr(sampler, "_logits", lambda ids, **kw: sizes.append(len(ids)) or logits(ids, **kw))
    groups = sample(sampler, group_size=50, max_new_tokens=60)
    assert sizes[0] == 4, "each prompt is computed once"
    alive = [
        sum(len(ids) > step for g in groups for ids in g.completion_ids) for step in range(1, len(sizes))
    ]
    assert sizes[1] == 200
    assert all(size <= max(count * 8 / 7 + 1, count) for size, count in zip(sizes[1:], alive, strict=True))


def test_draws_follow_the_distribution():
    logits_V = torch.tensor([2.0, 1.0, 0.0, -1.0, -torch.inf])
    rows = 20_000
    key_N = torch.tensor([mix64(i) - 2**63 for i in range(rows)])
    params = SamplingParams(temperature=0.8)
    counts = torch.bincount(
        draw_tokens(logits_V.repeat(rows, 1), params, key_N, position=3), minlength=5
    ).double()
    expected = (logits_V.double() / 0.8).softmax(0) * rows
    assert counts[4] == 0
    chi_square = ((counts - expected)[:4] ** 2 / expected[:4]).sum().item()
    assert chi_square < 16.3  # 99.9 % of a chi-square with 3 degrees of freedom


def test_positions_of_a_row_are_independent():
    key_N = torch.tensor([mix64(5) - 2**63])
    draws = [
        draw_tokens(torch.zeros(1, 100), SamplingParams(), key_N, position=t).item() for t in range(3000)
    ]
    mean = sum(draws) / len(draws)
    assert mean == pytest.approx(49.5, abs=2.0)
    spread = sum((a - mean) ** 2 for a in draws)
    assert abs(sum((a - mean) * (b - mean) for a, b in pairwise(draws)) / spread) < 0.06


LOGITS = torch.tensor([[0.5, 0.25, 0.15, 0.07, 0.03]]).log()


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 2}, [0, 1]),
        ({"top_p": 0.5}, [0]),
        ({"top_p": 0.51}, [0, 1]),
        ({"top_p": 0.76}, [0, 1, 2]),
        ({"min_p": 0.2}, [0, 1, 2]),
        ({"min_p": 0.4, "top_p": 0.99}, [0, 1]),
        ({"temperature": 0.5, "top_p": 0.9}, [0, 1]),  # squared: 0.736, 0.184, 0.066, ...
    ],
)
def test_filters_keep_the_tokens_they_promise(options, kept):
    filtered = filter_logits(LOGITS, SamplingParams(**options))
    assert torch.isfinite(filtered[0]).nonzero()[:, 0].tolist() == kept
    if "temperature" not in options:
        assert torch.equal(filtered[0, kept], LOGITS[0, kept])


def test_the_repetition_penalty_divides_or_multiplies_by_sign():
    seen_NV = torch.tensor([[True, True, False]])
    filtered = filter_logits(
        torch.tensor([[2.0, -1.0, 3.0]]), SamplingParams(repetition_penalty=2.0), seen_NV=seen_NV
    )
    assert filtered.tolist() == [[1.0, -2.0, 3.0]]
