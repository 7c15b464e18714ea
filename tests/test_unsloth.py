"""unsloth as the engine, the real package and its CPU backend: the same numbers as PEFT, and a whole run.

It changes transformers when it is imported: everything here happens in processes of its own. Skipped where it
is not installed; `.ci/run` installs it in an environment of its own.
"""

import importlib.util
import json
import shutil
import subprocess
import sys

import pytest
import torch

from lib.models import load_model, load_trainable, locate_model, save_adapter
from lib.policy import Policy
from tests.conftest import ROOT, TINY

NOT_INSTALLED = "unsloth is not installed: pip install -r requirements-unsloth-cpu.txt, see .ci/run"
pytestmark = [
    pytest.mark.unsloth,
    pytest.mark.skipif(importlib.util.find_spec("unsloth") is None, reason=NOT_INSTALLED),
]

MEASURE = """
import json, sys
from types import SimpleNamespace
from lib.engines import choose_engines, load_policy
engines = choose_engines("unsloth", "transformers")
from lib.memory import Workload
from lib.models import load_tokenizer, locate_model
place = locate_model(sys.argv[1])
how = {"gradient_checkpointing": sys.argv[3] == "True", "adapter": place.adapter}
work = Workload(4096, 256, 4, lora_rank=8, **how)
policy = load_policy(engines, place, load_tokenizer(place), work=work, alpha=16.0, seed=0)
group = SimpleNamespace(**json.loads(open(sys.argv[2]).read()))
scored = policy.logprobs([group])
scored.logp_NT.sum().backward()
policy.backward(scored)
norm = sum(p.grad.square().sum().item() for p in policy.trainable.values()) ** 0.5
print("RESULT", json.dumps({"logp": scored.logp_NT.tolist(), "norm": norm}))
"""


@pytest.mark.parametrize("checkpointing", [False, True])
def test_both_engines_compute_the_same(tmp_path, tokenizer, make_groups, checkpointing):
    model = load_trainable(locate_model(TINY), "all-linear", rank=8, alpha=16.0, seed=0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    save_adapter(model, tmp_path / "adapter")
    [group] = make_groups([[5, 9, 1, 30]], vocabulary=500)
    (tmp_path / "group.json").write_text(
        json.dumps({"prompt_ids": group.prompt_ids, "completion_ids": group.completion_ids})
    )
    policy = Policy(model, tokenizer, 4096)
    scored = policy.logprobs([group])
    scored.logp_NT.sum().backward()
    policy.backward(scored)
    norm = sum(p.grad.square().sum().item() for p in policy.trainable.values()) ** 0.5
    command = [sys.executable, "-c", MEASURE, tmp_path / "adapter", tmp_path / "group.json", checkpointing]
    ended = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    [line] = [line for line in ended.stdout.splitlines() if line.startswith("RESULT")]
    theirs = json.loads(line.removeprefix("RESULT"))
    torch.testing.assert_close(torch.tensor(theirs["logp"]), scored.logp_NT.detach(), atol=1e-4, rtol=0)
    assert theirs["norm"] == pytest.approx(norm, rel=1e-3)


def test_two_steps_are_trained_and_anybody_loads_the_adapter(tmp_path):
    words = [
        "--engine",
        "unsloth",
        "--max-steps",
        2,
        "--eval-every",
        2,
        "--eval-samples",
        1,
        "--group-size",
        8,
    ]
    words += ["--gradient-checkpointing", "--report-to", "none", "--output-dir", tmp_path / "run"]
    ended = subprocess.run(
        [sys.executable, "train_grdpo.py", *map(str, words)], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["grad_norm"] > 0 for line in metrics)
    assert all(line["sampling/sampling_logp_difference/mean"] < 1e-5 for line in metrics)
    model = load_model(locate_model(tmp_path / "run" / "checkpoints" / "step_000002"))
    moved = [p.abs().max().item() for name, p in model.named_parameters() if "lora_B" in name]
    assert len(moved) == 28
    assert all(value > 0 for value in moved)
    assert not list(ROOT.glob("unsloth_compiled_cache*")), "nothing is written beside the scripts"


def test_a_base_in_4_bits_is_trained_and_resumed_with_8_bit_moments(tmp_path):
    """Two steps at once, and one and another after a stop in between, end in the same adapter."""
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    words = ["--engine", "peft", "--load-in-4bit", "--max-steps", 2, "--eval-samples", 1, "--group-size", 4]
    words += ["--optimizer", "adamw_8bit", "--report-to", "none", "--save-every", 1, "--eval-every", 2]
    runs = [tmp_path / "whole", tmp_path / "stopped"]
    for run in runs:
        command = [sys.executable, "train_grdpo.py", *map(str, words), "--output-dir", str(run)]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr[-2000:]
        if run is runs[1] and (run / "checkpoints" / "step_000002").exists():
            break
    # as if killed behind step 1: its second checkpoint and its results were never written
    for name in ("checkpoints/step_000002", "checkpoints/best", "evaluation/after", "summary.json"):
        path = runs[1] / name
        path.unlink() if path.is_symlink() or path.is_file() else shutil.rmtree(path)
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    first, second = (run / "checkpoints" / "step_000002" / "adapter_model.safetensors" for run in runs)
    assert first.read_bytes() == second.read_bytes()
