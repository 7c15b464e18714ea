"""The loop of train_adagrpo.py: which problems are sampled again, what is learned from, and GRPO in it."""

from itertools import pairwise

import pyarrow.parquet
import pytest
import torch

import train_adagrpo
from lib.batches import Steps, load_problems
from lib.draws import SamplingParams
from lib.models import load_tokenizer, load_trainable, locate_model
from lib.policy import learning_rate_at
from lib.prompts import encode_prompt
from lib.rewards import grade_groups, parse_rewards, score_groups
from lib.runlog import read_metrics
from lib.sampler import TransformersSampler
from lib.settings import current_settings, run_script
from tests.conftest import ROOT, TINY

STEPS, PROBLEMS, SIZE = 3, 3, 4
REWARDS = "correctness:1 answer_tag:1/3"


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Arguments that name two problems to evaluate: this is about training."""
    file = tmp_path_factory.mktemp("few") / "few.jsonl"
    file.write_text("".join((ROOT / "data/tiny/test.jsonl").read_text().splitlines(keepends=True)[:2]))
    return ["--valid-data", str(file), "--test-data", str(file), "--eval-samples", "1", "--report-to", "none"]


@pytest.fixture
def train(few, tmp_path):
    """Run the script in this process: a function from arguments to its metrics and completions by step."""

    def once(*words, name="r"):
        before = current_settings(train_adagrpo.main)
        sizes = ["--max-steps", STEPS, "--problems-per-step", PROBLEMS, "--group-size", SIZE]
        folder = ["--output-dir", tmp_path / name, "--rewards", REWARDS, "--warmup", 0]
        try:
            run_script(train_adagrpo.main, [*map(str, [*sizes, *folder]), *few, *words])
        finally:
            train_adagrpo.__dict__.update(before)
        files = sorted((tmp_path / name / "completions").glob("*.parquet"))
        return read_metrics(tmp_path / name), [pyarrow.parquet.read_table(file).to_pylist() for file in files]

    return once


def grpo_by_loops(grader, *, kl_coef, count):
    """GRPO as a plain loop: (loss, gradient norm) per step, log-probabilities row by row."""
    place = locate_model(TINY)
    model = load_trainable(place, "all-linear", rank=16, alpha=32.0, seed=1)
    tokenizer = load_tokenizer(place)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0)
    steps = Steps(load_problems("data/tiny/train.jsonl"), {None: PROBLEMS}, seed=1)
    sampler = TransformersSampler(model, tokenizer)
    rewards = parse_rewards(REWARDS, style="answer_tag", grader=grader)
    history = []
    for step in range(1, count + 1):
        prompts = [encode_prompt(tokenizer, problem.problem, "answer_tag") for problem in steps[step - 1]]
        params = SamplingParams(max_new_tokens=64)
        groups = sampler.sample(steps[step - 1], prompts, params, group_size=SIZE, seed=1, step=step)
        score_groups(rewards, grade_groups(groups, style="answer_tag", grader=grader))
        tokens = sum(len(ids) for group in groups for ids in group.completion_ids)
        loss = 0.0
        for group in groups:
            reward_G = torch.tensor(group.reward)
            advantage_G = (reward_G - reward_G.mean()) / (reward_G.std() + 1e-4)
            for ids, advantage in zip(group.completion_ids, advantage_G.tolist(), strict=True):
                logp_T = row_logprobs(model, group.prompt_ids, ids)
                with model.disable_adapter(), torch.no_grad():
                    d_T = row_logprobs(model, group.prompt_ids, ids)
                d_T = d_T - logp_T
                ratio_T = (logp_T - logp_T.detach()).exp()
                loss = loss + (kl_coef * (d_T.exp() - d_T - 1) - ratio_T * advantage).sum() / tokens
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step - 1, count, peak=8e-4, schedule="cosine", warmup=0)
        optimizer.step()
        optimizer.zero_grad()
        history.append((loss.item(), norm))
    return history


def row_logprobs(model, prompt, ids):
    logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]


@pytest.mark.parametrize("kl_coef", [0.0, 0.04])
def test_without_further_attempts_it_is_grpo(train, grader, kl_coef):
    """The same numbers as a plain loop that knows nothing of schedules, micro-batches and two passes."""
    metrics, completions = train("--max-resamples", "0", "--kl-coef", str(kl_coef), "--max-steps", "2")
    expected = grpo_by_loops(grader, kl_coef=kl_coef, count=2)
    assert any(norm > 0 for _, norm in expected)
    for line, (loss, norm) in zip(metrics, expected, strict=True):
        assert line["loss"] == pytest.approx(loss, abs=2e-5)
        assert line["grad_norm"] == pytest.approx(norm, rel=2e-3, abs=1e-5)
        assert line["resample/attempts"] == line["resample/wasted_tokens"] == 0
        assert line["clip_ratio/region_mean"] == line["sampling/tempered_fraction"] == 0
        assert ("kl" in line) == (kl_coef > 0)
        assert "resample/solve_rate_1" not in line
    assert {row["attempt"] for step in completions for row in step} == {0}


def test_only_what_is_not_solved_is_sampled_again_and_the_last_group_is_learned_from(train):
    metrics, completions = train("--schedule", "1: 1xT1.0; 2: 2xT1.3,p0.95; 3: ", "--train-on", "last")
    again = 0
    for number, (line, rows) in enumerate(zip(metrics, completions, strict=True), start=1):
        allowed = {1: 1, 2: 2, 3: 0}[number]
        tokens = kept = tempered = attempts = 0
        for problem in {row["problem_id"] for row in rows}:
            mine = [row for row in rows if row["problem_id"] == problem]
            last = max(row["attempt"] for row in mine)
            solved = [any(r["correct"] for r in mine if r["attempt"] == a) for a in range(last + 1)]
            assert not any(solved[:-1]), "a solved problem is not sampled again"
            assert solved[-1] or last == allowed, "one that is not solved is, as long as there are rows"
            again += last
            attempts += last
            seen = torch.tensor([row["reward"] for row in mine])
            scale = seen.std() + 1e-4
            for row in mine:
                expected = (row["reward"] - seen.mean()) / scale if row["attempt"] == last else 0.0
                assert row["advantage"] == pytest.approx(float(expected), abs=1e-5)
                tokens += row["tokens"]
                kept += row["tokens"] * (row["attempt"] == last)
                tempered += row["tokens"] * (row["attempt"] == last > 0) * (number == 2)
            texts = [{row["completion"] for row in mine if row["attempt"] == a} for a in range(last + 1)]
            assert all(one != other for one, other in pairwise(texts)), "drawn anew"
        assert line["completions/tokens"] == tokens
        assert line["resample/wasted_tokens"] == tokens - kept
        assert line["resample/attempts"] == attempts
        assert line["sampling/tempered_fraction"] == pytest.approx(tempered / kept)
    assert again > 2, "the base does not solve these problems at once"
    assert metrics[-1]["num_tokens"] == sum(line["completions/tokens"] for line in metrics)


def test_all_attempts_can_be_learned_from_and_several_updates_clip(train):
    words = ["--schedule", "1: 2xT1.0", "--updates-per-batch", "3", "--learning-rate", "0.01"]
    metrics, completions = train(*words, "--train-on", "all", "--kl-coef", "0", "--normaliser", "dr_grpo")
    assert all(line["resample/wasted_tokens"] == 0 for line in metrics)
    assert sum(line["resample/attempts"] for line in metrics) > 0
    pushed = [row["advantage"] for step in completions for row in step if row["attempt"] == 0]
    assert any(pushed), "first attempts are pushed as well"
    assert max(line["clip_ratio/region_mean"] for line in metrics) > 0.01
    assert all("kl" not in line for line in metrics)


def test_a_reward_can_be_the_condition_and_the_base_stays_in_the_cache(train, monkeypatch):
    """Every group earns more than -1: nothing is sampled again. Without KL no second forward is made.

    Counted are the calls that keep a graph, one per update, and the others: the reference's, and those that
    compare sampler and policy before step 1.
    """
    from lib.policy import Policy

    calls = []
    logprobs = Policy.logprobs
    monkeypatch.setattr(
        Policy, "logprobs", lambda *a, **k: calls.append(k.get("keep_graph", True)) or logprobs(*a, **k)
    )
    metrics, _ = train("--good-enough", "reward > -1", "--kl-coef", "0", "--updates-per-batch", "2")
    assert all(line["resample/attempts"] == line["resample/given_up"] == 0 for line in metrics)
    assert sum(calls) == 2 * STEPS
    before_step_1 = len(calls) - sum(calls)
    calls.clear()
    train("--good-enough", "reward > -1", "--updates-per-batch", "2", name="kl")
    assert sum(calls) == 2 * STEPS
    assert len(calls) - sum(calls) == STEPS + before_step_1, "the reference is computed once per batch"
