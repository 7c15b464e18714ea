"""What a run shows: metrics by hand, the line per step, an alarm when nothing can be learned, the table."""

import json
import re

import pytest
import torch

from lib.agreement import compare
from lib.batches import Problem
from lib.policy import Scored
from lib.report import StepClock, StepLines, draw_curves, measure_groups, print_result
from lib.rewards import Grade
from lib.sampler import Group

RIGHT = Grade("4", True, True, True, False, False)
WRONG = Grade(None, False, False, False, True, True)


def make_group(rewards, grades, *, tier="easy", lengths=(3, 5), reasons=("stop", "length")):
    ids = [[0] * length for length in lengths]
    logps = [[-1.0] * length for length in lengths]
    problem = Problem("p", "2 + 2?", "4", tier)
    group = Group(problem, "2 + 2?", [1], ids, ["a", "b"], list(reasons), logps)
    group.rewards, group.reward, group.grades = {"correctness": rewards}, rewards, grades
    return group


def test_metrics_by_hand():
    groups = [make_group([1.0, 0.0], [RIGHT, WRONG]), make_group([0.5, 0.5], [RIGHT, RIGHT], tier="hard")]
    metrics = measure_groups(groups)
    assert metrics["reward"] == 0.5
    assert metrics["reward_std"] == 0.25
    assert metrics["frac_reward_zero_std"] == 0.5
    assert metrics["rewards/correctness/mean"] == 0.5
    assert metrics["completions/mean_length"] == 4
    assert (metrics["completions/min_length"], metrics["completions/max_length"]) == (3, 5)
    assert metrics["completions/clipped_ratio"] == 0.5
    assert metrics["completions/correct"] == 0.75
    assert metrics["completions/formatted"] == 0.75
    assert metrics["completions/tokens"] == 16
    assert (metrics["reward/timeouts"], metrics["reward/unparsed"]) == (1, 1)
    assert (metrics["tier/easy/reward"], metrics["tier/hard/reward"]) == (0.5, 0.5)


def test_a_reward_that_does_not_apply_is_left_out_of_its_mean():
    group = make_group([1.0, 0.0], [RIGHT, WRONG])
    group.rewards = {"correctness": [1.0, None]}
    assert measure_groups([group])["rewards/correctness/mean"] == 1.0


def test_agreement_ignores_what_stands_behind_a_row():
    logp_NT = torch.tensor([[-1.0, -1.0, -1.5, 77.0, 77.0], [-1.0, -1.0, -1.0, -1.0, -1.25]])
    scored = Scored(logp_NT, torch.tensor([3, 5]), [], [], ())
    agreement = compare([make_group([1.0, 0.0], [RIGHT, WRONG])], scored, tolerance=1.0)
    assert agreement["sampling/sampling_logp_difference/mean"] == pytest.approx(0.75 / 8)
    assert agreement["sampling/sampling_logp_difference/max"] == 0.5


def show(steps, metrics, group, capsys):
    with StepLines(10) as lines:
        for step in steps:
            lines.show(step, metrics, [group])
    return capsys.readouterr().out


def test_three_silent_steps_are_explained_once(capsys):
    group = make_group([0.5, 0.5], [WRONG, WRONG])
    group.completions[0] = "no [tag] here"
    metrics = measure_groups([group]) | {"loss": 0.0, "grad_norm": 0.0, "step_time": 1.0}
    shown = show([1, 2, 3, 4], metrics, group, capsys)
    assert shown.count("nothing to learn from so far") == 1
    for hint in ("'no [tag] here'", "its gold answer     '4'", "clipped             50%", "--max-new-tokens"):
        assert hint in shown
    lively = metrics | {"frac_reward_zero_std": 0.5}
    assert "nothing to learn" not in show([1, 2, 3], lively, group, capsys)


def test_a_line_per_step(capsys):
    group = make_group([1.0, 0.0], [RIGHT, WRONG])
    metrics = measure_groups([group]) | {
        "loss": 0.25,
        "grad_norm": 1.5,
        "step_time": 2.0,
        "eval/pass@1": 0.125,
    }
    line = show([7], metrics, group, capsys).strip()
    assert re.fullmatch(
        r"step +7  reward 0\.500  right 0\.50  \(any format 0\.50\)  format 0\.50  length +4\.0  "
        r"loss 0\.250  grad 1\.50  2\.0 s  held-out pass@1 0\.125",
        line,
    )


def test_the_clock_splits_a_step():
    clock = StepClock()
    clock.lap("sample")
    clock.lap("learn")
    metrics = clock.metrics()
    assert set(metrics) == {"time/sample_s", "time/learn_s", "step_time"}
    assert metrics["step_time"] >= metrics["time/sample_s"] + metrics["time/learn_s"]


def test_the_table_and_where_things_are(tmp_path, capsys):
    summary = {
        "problems": 2,
        "samples": 4,
        "pass@1": 0.25,
        "answer": 0.5,
        "format": 0.1,
        "mean_length": 9.0,
        "clipped": 0,
    }
    for name, change in (("before", 0.0), ("after", 0.5)):
        (tmp_path / "evaluation" / name).mkdir(parents=True)
        path = tmp_path / "evaluation" / name / "summary.json"
        path.write_text(json.dumps(summary | {"pass@1": 0.25 + change}))
    (tmp_path / "summary.json").write_text(json.dumps({"best_step": 40}))
    print_result(tmp_path)
    shown = capsys.readouterr().out
    assert re.search(r"pass@1 .*0\.250 .*0\.750 .*\+0\.500", shown)
    assert "pass@10" not in shown, "four samples have none"
    assert "the checkpoint of step 40" in shown
    assert f"python chat_gui.py --model {tmp_path / 'checkpoints' / 'best'}" in shown


def test_curves_are_a_picture_even_with_gaps(tmp_path):
    lines = [{"step": s, "reward": s / 9, "grad_norm": None if s == 2 else 1.0} for s in range(1, 5)]
    draw_curves(lines, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
