"""Each benchmark runs at toy size and prints what it promises; the times themselves are not tested."""

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.conftest import ROOT


def run_json(script, *words):
    command = [sys.executable, ROOT / "benchmarks" / script, "--json", *words]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout)


def test_a_grdpo_step_has_the_gradient_of_the_pair_loop():
    results = run_json("grdpo_step.py", "--group-size", "5", "--repeats", "1")
    assert len(results) == 2
    for result in results.values():
        assert result["cosine"] > 0.9999
        assert result["pair_loop_s"] > 0
        assert result["speedup_two_passes"] > 0


def test_adaptive_and_fixed_groups_spend_the_same_tokens():
    words = "--tokens 1500 --seeds 1 --samples 2 --test-problems 2 --arms adaptive fixed_8"
    script = "-- --problems-per-step 4 --schedule 1:2xT1.0 --max-new-tokens 40"
    result = run_json("adaptive_vs_fixed.py", *words.split(), *script.split())
    assert [run["arm"] for run in result["runs"]] == ["adaptive", "fixed_8"]
    for run in result["runs"]:
        assert 1500 <= run["tokens"] <= 1500 + 4 * 3 * 8 * 40, "one step too many at most"
        assert run["learning_rate"] == 8e-4, "constant from the first step on"
        assert 0 <= run["after"]["hard"]["pass@1"] <= 1
        assert run["after"]["medium"]["samples"] == 2
    steps = [run["steps"] for run in result["runs"]]
    assert steps[0] < steps[1], "further attempts cost tokens"
    assert set(result["before"]) == {"medium", "hard"}


def test_learning_reports_each_seed():
    words = "--seeds 1 2 -- --max-steps 2 --group-size 4 --easy 1 --medium 0 --hard 0 --eval-samples 1"
    result = run_json("learning.py", *words.split())
    assert [run["seed"] for run in result["runs"]] == [1, 2]
    assert all(run["steps"] == 2 and "pass@1" in run["after"] for run in result["runs"])


def test_memory_is_flat_in_the_vocabulary():
    rows = run_json("memory.py", "--tokens", "2048", "--vocabularies", "16000", "64000")["rows"]
    assert [(row["tokens"], row["vocabulary"]) for row in rows] == [(2048, 64000), (2048, 16000)]
    full, ours = ([row[f"{way}_gib"] for row in rows] for way in ("full", "ours"))
    assert full[0] > 3 * 2048 * 64000 * 4 / 2**30, "several copies of the logits"
    assert full[0] > 2.5 * full[1]
    assert max(ours) < 0.6
    assert abs(ours[0] - ours[1]) < 0.25 * (full[0] - full[1])


def test_the_step_for_a_card_runs_on_a_toy():
    result = run_json("gpu_step.py", "--toy")
    assert len(result["rows"]) == 2 * 2 * 2
    for row in result["rows"]:
        assert row["seconds"] > 0
        assert 0 < row["utilisation"] < 1
        assert row["peak_gib"] > 0
        assert (row["token_budget"] is not None) == (row["way"] == "ours")


@pytest.mark.skipif(not find_spec("trl"), reason="TRL is not installed: pip install -r requirements-dev.txt")
def test_a_step_is_measured_beside_trl():
    words = "--steps 2 --problems 2 --group-size 4 --max-new-tokens 6 --threads 1"
    result = run_json("step_time.py", *words.split())
    for one in (result, result["full_length"]):
        assert one["range"][0] <= one["ratio_to_trl"] <= one["range"][1]
        for side in ("trl", "ours"):
            parts = one[side]
            assert parts["step_s"] > parts["learn_s"] > 0
            assert parts["sample_s"] > 0
            assert parts["mean_length"] <= 6
    assert result["full_length"]["trl"]["mean_length"] == result["full_length"]["ours"]["mean_length"] == 6
