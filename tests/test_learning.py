"""It learns: a short run on easy problems must raise what it is paid for, by a margin, and selection must be
honest.
"""

import json
import subprocess
import sys
from statistics import fmean

from lib.runlog import read_metrics
from tests.conftest import ROOT


def test_thirty_steps_raise_the_reward_and_held_out_pass_at_1(tmp_path):
    words = "--max-steps 30 --easy 3 --medium 0 --hard 0 --group-size 12 --eval-every 15 --report-to none"
    command = [sys.executable, "train_grdpo.py", "--output-dir", tmp_path / "r", *words.split()]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    metrics = read_metrics(tmp_path / "r")
    first, last = metrics[:5], metrics[-5:]
    for name, margin in (("reward", 0.3), ("completions/formatted", 0.3)):
        gain = fmean(line[name] for line in last) - fmean(line[name] for line in first)
        assert gain > margin, f"{name} rose by {gain:.2f}"
    before, after = (
        json.loads((tmp_path / "r" / "evaluation" / name / "summary.json").read_text())
        for name in ("before", "after")
    )
    assert after["pass@1"] > before["pass@1"] + 0.1
    scores = {line["step"]: line["eval/pass@1"] for line in metrics if "eval/pass@1" in line}
    assert set(scores) == {15, 30}
    best = (tmp_path / "r" / "checkpoints" / "best").resolve().name
    assert scores[int(best.removeprefix("step_"))] == max(scores.values())
    agreement = [line["sampling/sampling_logp_difference/max"] for line in metrics]
    assert max(agreement) < 1e-3, "sampler and policy are the same model at every step"
