"""The run folder: what is refused, what is cut back, and that a checkpoint is whole or not there."""

import json
import os
import shutil
import subprocess
import sys

import pyarrow.parquet
import pytest
import torch
from peft import LoraConfig, get_peft_model

from lib.checkpoints import find_damage
from lib.policy import Policy
from lib.rewards import Grade
from lib.runlog import RunLog, read_metrics
from lib.settings import UserError
from tests.conftest import ROOT

SETTINGS = {"BETA": 1.0, "SAVE_EVERY": 5, "MAX_STEPS": None}


@pytest.fixture
def policy(toy_model):
    model = get_peft_model(toy_model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    policy = Policy(model, None, tokens_per_microbatch=100)
    policy.start_optimizer("adamw", weight_decay=0.0)
    train_a_little(policy)
    return policy


def train_a_little(policy):
    for index, parameter in enumerate(policy.trainable.values()):
        parameter.grad = torch.full_like(parameter, 0.1 * (index + 1))
    policy.step(0.01, max_grad_norm=1.0)


def open_run(folder, **changes):
    given = {"script": "train_x.py", "settings": SETTINGS, "inputs": ["some/data-set"], "report_to": "none"}
    return RunLog(folder, **(given | changes))


@pytest.fixture
def groups(make_groups):
    groups = make_groups([[3, 4], [2, 2]])
    for group in groups:
        group.reward, group.advantage = [1.0, 0.0], [0.5, -0.5]
        group.rewards = {"correctness": [1.0, None]}
        group.grades = [Grade("4", True, True, True, False, False)] * 2
    return groups


METRICS = {"loss": 0.5, "grad_norm": 1.0, "reward": 0.25, "completions/tokens": 11}
SAMPLING = {"prompt": "boxed", "temperature": 0.7}


def log_steps(run, steps, groups, policy, *, save_every=2):
    for step in steps:
        run.log_step(step, METRICS, groups)
        if step % save_every == 0:
            run.keep_best(step, {"pass@1": 0.1 * (step % 5), "mean_length": 3.0})
            run.save(step, policy, sampling=SAMPLING)


def close(run):
    """What the end of a process does."""
    run._metrics_file.close()
    run._lock.close()


def test_a_run_writes_what_the_design_says(tmp_path, policy, groups):
    run = open_run(tmp_path / "r", report_to="tensorboard")
    log_steps(run, [1, 2, 3, 4], groups, policy)
    record = json.loads((tmp_path / "r" / "settings.json").read_text())
    assert record["settings"] == SETTINGS
    assert record["script"] == "train_x.py"
    assert record["versions"]["torch"] == torch.__version__
    assert record["threads"] == torch.get_num_threads()
    lines = read_metrics(tmp_path / "r")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["num_tokens"] for line in lines] == [11, 22, 33, 44]
    table = pyarrow.parquet.read_table(tmp_path / "r" / "completions" / "completions_00003.parquet")
    assert table.column_names[:7] == [
        "step", "problem_id", "prompt", "completion", "correctness", "reward", "advantage"
    ]  # fmt: skip
    assert table.num_rows == 4
    assert table["correctness"].to_pylist() == [1.0, None, 1.0, None]
    checkpoint = tmp_path / "r" / "checkpoints" / "step_000004"
    names = {"adapter_config.json", "adapter_model.safetensors", "sampling.json"}
    assert {path.name for path in checkpoint.iterdir()} == names | {
        "trainer_state.json",
        "trainer_state.safetensors",
    }
    assert json.loads((checkpoint / "sampling.json").read_text()) == SAMPLING
    assert (tmp_path / "r" / "checkpoints" / "best").resolve() == checkpoint
    assert list((tmp_path / "r" / "tensorboard").glob("events.out.*"))


def test_resume_restores_weights_moments_and_counters_exactly(tmp_path, policy, groups, toy_model):
    run = open_run(tmp_path / "r")
    log_steps(run, [1, 2], groups, policy)
    saved = {name: p.detach().clone() for name, p in policy.trainable.items()}
    train_a_little(policy)
    expected = {name: p.detach().clone() for name, p in policy.trainable.items()}
    log_steps(run, [3], groups, policy)
    close(run)

    again = open_run(tmp_path / "r")
    assert again.start == 2
    assert again.state["num_tokens"] == 22
    policy.start_optimizer("adamw", weight_decay=0.0)
    again.restore(policy)
    assert all(torch.equal(p, saved[name]) for name, p in policy.trainable.items())
    train_a_little(policy)
    assert all(torch.equal(p, expected[name]) for name, p in policy.trainable.items()), (
        "moments are back, too"
    )


def test_what_lies_behind_the_checkpoint_is_cut_off(tmp_path, policy, groups):
    run = open_run(tmp_path / "r")
    log_steps(run, [1, 2, 3], groups, policy)
    close(run)
    with open(tmp_path / "r" / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "los')  # killed in the middle of a line
    (tmp_path / "r" / "checkpoints" / ".writing-step_000004").mkdir()
    again = open_run(tmp_path / "r")
    assert (
        [line["step"] for line in read_metrics(tmp_path / "r")]
        == [1, 2]
        == [line["step"] for line in again.metrics]
    )
    assert [path.name for path in sorted((tmp_path / "r" / "completions").iterdir())] == [
        "completions_00001.parquet",
        "completions_00002.parquet",
    ]
    assert not (tmp_path / "r" / "checkpoints" / ".writing-step_000004").exists()


@pytest.mark.parametrize("damage", ["cut", "flip", "missing", "no state", "bad json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path, policy, groups, capsys, damage):
    run = open_run(tmp_path / "r")
    log_steps(run, [1, 2, 3, 4], groups, policy)
    close(run)
    newest = tmp_path / "r" / "checkpoints" / "step_000004"
    weights, state = newest / "adapter_model.safetensors", newest / "trainer_state.json"
    if damage == "cut":
        os.truncate(weights, 100)
    elif damage == "flip":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    elif damage == "missing":
        weights.unlink()
    elif damage == "no state":
        state.unlink()
    else:
        state.write_text("{")
    again = open_run(tmp_path / "r")
    assert again.start == 2
    assert "step_000004 is damaged" in capsys.readouterr().err
    log_steps(again, [3, 4], groups, policy)
    assert find_damage(newest) is None, "a complete one takes its place"


def test_refusals(tmp_path, policy, groups):
    folder = tmp_path / "r"
    run = open_run(folder)
    log_steps(run, [1, 2], groups, policy)
    with pytest.raises(UserError, match="in use by another process"):
        open_run(folder)
    close(run)
    with pytest.raises(
        UserError, match=r"BETA 1\.0 -> 2\.0; --fresh starts over here, --output-dir keeps both"
    ):
        open_run(folder, settings=SETTINGS | {"BETA": 2.0})
    with pytest.raises(
        UserError, match="some/data-set 'some/data-set' -> None, some/other None -> 'some/other'"
    ):
        open_run(folder, inputs=["some/other"])
    with pytest.raises(UserError, match=r"is a run of train_x.py, not of train_y.py"):
        open_run(folder, script="train_y.py")
    close(open_run(folder, settings=SETTINGS | {"SAVE_EVERY": 1}))
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.tex").write_text("x")
    with pytest.raises(UserError, match="is not empty and not a run"):
        open_run(other)
    with pytest.raises(UserError, match="cannot be made"):
        open_run(other / "chapter.tex")
    (folder / "settings.json").write_text("{")
    with pytest.raises(UserError, match="is damaged: --fresh starts over"):
        open_run(folder)


def test_fresh_deletes_its_own_files_only(tmp_path, policy, groups):
    run = open_run(tmp_path / "r")
    log_steps(run, [1, 2], groups, policy)
    close(run)
    for name in ("notes.txt", "checkpoints/mine.txt", "completions/mine.csv"):
        (tmp_path / "r" / name).write_text("keep me")
    fresh = open_run(tmp_path / "r", settings=SETTINGS | {"BETA": 3.0}, fresh=True)
    assert fresh.start == 0
    kept = {str(path.relative_to(tmp_path / "r")) for path in (tmp_path / "r").rglob("*") if path.is_file()}
    own = {"settings.json", "metrics.jsonl", "lock"}
    assert kept == own | {"notes.txt", "checkpoints/mine.txt", "completions/mine.csv"}


def test_steps_without_a_finite_gradient_are_counted_and_three_stop_the_run(tmp_path, groups, capsys):
    run = open_run(tmp_path / "r")
    sick = METRICS | {"loss": float("nan"), "grad_norm": float("inf")}
    for step, metrics in enumerate([sick, sick, METRICS, sick, sick], start=1):
        run.log_step(step, metrics, groups)
    assert [line["skipped_steps"] for line in read_metrics(tmp_path / "r")] == [1, 2, 2, 3, 4]
    assert read_metrics(tmp_path / "r")[0]["loss"] is None
    assert "step 1 skipped" in capsys.readouterr().err
    with pytest.raises(UserError, match="three steps in a row had no finite gradient"):
        run.log_step(6, sick, groups)
    assert len(list((tmp_path / "r" / "kept").glob("*.parquet"))) == 5


def test_the_best_is_the_highest_and_among_equals_the_shortest(tmp_path, policy):
    run = open_run(tmp_path / "r")
    for step, (score, length) in enumerate(
        [(0.5, 9.0), (0.7, 9.0), (0.7, 5.0), (0.7, 7.0), (0.6, 1.0)], start=1
    ):
        run.keep_best(step, {"pass@1": score, "mean_length": length})
    assert run.state["best_step"] == 3


def test_a_full_disk_is_one_line_and_the_old_file_stays(tmp_path):
    """A limit on the size of files, in a process of its own, is a disk that is full at that size."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import resource\n"
        "from lib.checkpoints import write_file\n"
        "from lib.settings import UserError\n"
        "write_file(sys.argv[2], b'old')\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n    write_file(sys.argv[2], b'x' * 5000)\n"
        "except UserError as error:\n    print(error)\n"
    )
    target = tmp_path / "file"
    shown = subprocess.run(
        [sys.executable, "-c", code, ROOT, target], capture_output=True, text=True, check=True
    ).stdout
    assert shown.startswith(f"no space left while writing {target}")
    assert target.read_bytes() == b"old"


def test_a_missing_reporter_is_one_line(tmp_path):
    if shutil.which("wandb"):
        pytest.skip("wandb is installed")
    with pytest.raises(UserError, match="pip install wandb, or --report-to none"):
        open_run(tmp_path / "r", report_to="wandb")
