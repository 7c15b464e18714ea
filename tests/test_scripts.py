"""Whole scripts, as a user runs them: on the shipped model, by subprocess, offline."""

import functools
import json
import math
import os
import signal
import subprocess
import sys
import time

import pyarrow.parquet
import pytest

from lib.runlog import read_metrics
from tests.conftest import ROOT, TINY

SMALL = {
    "--max-steps": "4",
    "--group-size": "4",
    "--eval-samples": "2",
    "--eval-every": "2",
    "--save-every": "1",
    "--report-to": "none",
}
# What each script adds: few problems, and in the second one all the state that there can be.
OWN = {
    "train_grdpo.py": {"--easy": "1", "--hard": "0"},
    "train_adpo.py": {"--problems-per-step": "3", "--anchor": "ema", "--updates-per-batch": "2"},
    "train_adagrpo.py": {
        "--problems-per-step": "3",
        "--updates-per-batch": "2",
        "--schedule": "1: 1xT1.1,p0.99; 3: 2xT1.3",
        "--phase": "<answer>: T0.5",
    },
}
CLOCKS = ("step_time", "time/", "memory/", "perf/")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three small files of problems from the shipped ones: arguments that name them."""
    folder = tmp_path_factory.mktemp("data")
    words = []
    for name, count in (("train", 12), ("valid", 4), ("test", 4)):
        lines = (ROOT / "data" / "tiny" / f"{name}.jsonl").read_text().splitlines(keepends=True)
        step = len(lines) // count
        (folder / f"{name}.jsonl").write_text("".join(lines[::step][:count]))
        words += [f"--{name}-data", str(folder / f"{name}.jsonl")]
    return words


def run(*words, check=True, cwd=ROOT, **options):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    process = subprocess.run(
        [sys.executable, *map(str, words)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        **options,
    )
    assert not check or process.returncode == 0, process.stdout + process.stderr
    return process


def small(script="train_grdpo.py", **changes):
    """Arguments of a run of four small steps."""
    settings = {f"--{key.replace('_', '-')}": str(value) for key, value in changes.items()}
    return [word for pair in (SMALL | OWN[script] | settings).items() for word in pair]


def train(folder, data, *words, script="train_grdpo.py", check=True, **changes):
    return run(script, "--output-dir", folder, *data, *small(script, **changes), *words, check=check)


def timeless(folder):
    """What a run has written, without what depends on the clock: metrics, completions, adapter weights."""
    metrics = [
        {name: value for name, value in line.items() if not name.startswith(CLOCKS)}
        for line in read_metrics(folder)
    ]
    completions = [
        pyarrow.parquet.read_table(path).to_pylist()
        for path in sorted((folder / "completions").glob("*.parquet"))
    ]
    weights = (folder / "checkpoints" / "step_000004" / "adapter_model.safetensors").read_bytes()
    evaluations = [
        (folder / "evaluation" / name / "summary.json").read_text() for name in ("before", "after")
    ]
    return metrics, completions, weights, evaluations


@pytest.fixture(scope="module")
def finish(tmp_path_factory, data):
    """Runs of four steps that nobody disturbed, by script: (folder, output)."""

    @functools.cache
    def once(script):
        folder = tmp_path_factory.mktemp("runs") / script
        return folder, train(folder, data, script=script).stdout

    return once


@pytest.fixture(scope="module")
def finished(finish):
    return finish("train_grdpo.py")


@pytest.mark.parametrize("script", sorted(path.name for path in ROOT.glob("*.py")))
def test_help_lists_every_setting(script):
    shown = run(script, "--help").stdout
    from lib.settings import read_settings

    assert all(f"{setting.option} " in shown for setting in read_settings((ROOT / script).read_text()))
    assert f"python {script}" in shown


def test_a_run_shows_its_steps_and_ends_with_the_table(finished):
    folder, output = finished
    lines = output.splitlines()
    assert [line for line in lines if line.startswith("step ")][3].startswith("step    4  reward ")
    assert "held-out pass@1" in output
    for row in (
        "pass@1",
        "right answer, whatever the format",
        "right format",
        "mean length",
        "clipped share",
    ):
        assert any(row in line for line in lines)
    for place in ("curves.png", "checkpoints/best"):
        assert (folder / place).exists()
        assert str(folder / place) in output
    assert "\x1b" not in output, "no colours in a file"


def test_a_finished_run_prints_its_table_again(finished, data):
    folder, output = finished
    again = train(folder, data).stdout
    again = again[again.index("4 test problems x 2 samples") :]
    assert output.endswith(again)


@pytest.mark.parametrize("script", OWN)
def test_the_same_seed_gives_the_same_run_bit_for_bit(finish, data, tmp_path, script):
    folder, _ = finish(script)
    train(tmp_path / "again", data, script=script)
    assert timeless(tmp_path / "again") == timeless(folder)
    train(tmp_path / "other", data, script=script, seed=2)
    assert timeless(tmp_path / "other")[2] != timeless(folder)[2]


@pytest.mark.parametrize("script", OWN)
def test_a_run_killed_twenty_times_is_the_undisturbed_run(finish, data, tmp_path, script):
    words = ["--output-dir", tmp_path / "killed", *data, *small(script)]
    shown = run("tests/resume_driver.py", script, 20, 1, *words, timeout=1200).stdout
    statuses = [int(word) for word in shown.splitlines()[-1].split()[1:]]
    assert statuses[-1] == 0
    assert statuses.count(-signal.SIGKILL) >= 18, statuses
    assert timeless(tmp_path / "killed") == timeless(finish(script)[0])


def test_ctrl_c_saves_and_says_how_to_continue(finished, data, tmp_path):
    words = small()
    command = [sys.executable, "train_grdpo.py", "--output-dir", tmp_path / "r", *data, *words]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step    1"):
            process.send_signal(signal.SIGINT)
            break
    rest, errors = process.communicate(timeout=120)
    assert process.returncode == 130, rest + errors
    assert "start the same command again to continue" in errors
    assert "Traceback" not in errors
    assert len(read_metrics(tmp_path / "r")) < 4
    train(tmp_path / "r", data)
    assert timeless(tmp_path / "r") == timeless(finished[0])


def test_the_second_process_on_a_folder_is_refused(data, tmp_path):
    words = small()
    command = [
        sys.executable,
        "train_grdpo.py",
        "--output-dir",
        tmp_path / "r",
        *data,
        *words,
        "--max-steps",
        "500",
    ]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "r" / "settings.json").exists():
        time.sleep(0.1)
    second = train(tmp_path / "r", data, "--max-steps", "500", check=False)
    first.kill()
    first.wait()
    assert second.returncode == 2
    assert "in use by another process" in second.stderr


def test_a_full_disk_ends_with_one_line_and_the_last_checkpoint_intact(finished, data, tmp_path):
    """A limit on the size of a file stands in for the disk: the optimizer's state does not fit."""
    train(tmp_path / "r", data, max_steps=4, save_every=4, eval_every=4)
    code = (
        "import resource, runpy, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))\n"
        "sys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    words = small()
    process = run("-c", code, "train_grdpo.py", "--output-dir", tmp_path / "full", *data, *words, check=False)
    assert process.returncode == 2, process.stdout + process.stderr
    assert process.stderr.splitlines()[-1].startswith("error: no space left while writing")
    assert "Traceback" not in process.stderr
    train(tmp_path / "full", data)
    assert timeless(tmp_path / "full") == timeless(finished[0])


def test_evaluate_reads_a_run_an_adapter_and_a_model(finished, tmp_path):
    folder, _ = finished
    small = ["--samples", "3", "--max-problems", "3", "--max-new-tokens", "24"]
    for name, model in (("run", folder), ("adapter", folder / "checkpoints" / "step_000002"), ("base", TINY)):
        shown = run("evaluate.py", "--model", model, "--output", tmp_path / name, *small).stdout
        assert "pass@1 " in shown
        assert "pass@2 " in shown
        assert "pass@5" not in shown
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {
        "problems",
        "samples",
        "pass@1",
        "pass@1_ci95",
        "answer_and_format",
        "timeouts",
        "unparsed",
    } <= set(summary)
    table = pyarrow.parquet.read_table(tmp_path / "run" / "responses.parquet")
    verl = ["data_source", "prompt", "ability", "reward_model", "extra_info", "responses"]
    assert table.column_names[:6] == verl
    assert [len(row) for row in table["responses"].to_pylist()] == [3, 3, 3]


def test_scripts_run_from_anywhere(tmp_path):
    words = ["--samples", "1", "--max-problems", "1", "--max-new-tokens", "8"]
    run(ROOT / "evaluate.py", *words, cwd=tmp_path)
    assert (tmp_path / "evaluations" / "tiny-qwen3-test" / "summary.json").exists()


MISTAKES = [
    (["--betta", "1"], "unknown option --betta; did you mean --beta?"),
    (["--beta", "0"], "--beta 0.0: must be > 0"),
    (["--beta", "-1"], "--beta -1.0: must be > 0"),
    (["--beta", "steep"], "--beta steep: must be a number"),
    (["--group-size", "1"], "--group-size 1: must be >= 2"),
    (["--group-size", "many"], "--group-size many: must be a whole number"),
    (["--temperature", "0"], "--temperature 0.0: must be > 0"),
    (["--learning-rate", "0"], "--learning-rate 0.0: must be > 0"),
    (["--learning-rate", "nan"], "--learning-rate nan: must be > 0"),
    (["--lr-schedule", "linear"], "--lr-schedule linear: must be one of constant | cosine"),
    (["--warmup", "2"], "--warmup 2.0: must be >= 0 and <= 1"),
    (["--pairs", "all"], "--pairs all: must be one of halves | ordered"),
    (["--prompt", "xml"], "--prompt xml: must be one of answer_tag | boxed | think_answer"),
    (["--report-to", "wandb"], "pip install wandb, or --report-to none"),
    (["--optimizer", "adamw_8bit"], "pip install bitsandbytes"),
    (["--rewards", "korrectness:1"], "no reward is called 'korrectness'"),
    (["--rewards", "correctness:much"], "'much' is no weight"),
    (["--rewards", "nowhere.py:f:1"], "no file"),
    (["--rewards", "length_decay(start=9,end=1):1"], "needs 0 <= start < end"),
    (["--model", "nowhere/at/all"], "model not found"),
    (["--model", "data"], "is no model, adapter or run folder: it has no config.json"),
    (["--model", "{adapter}"], "belongs to another base"),
    (["--train-data", "nowhere.jsonl"], "data not found"),
    (["--train-data", "{bad_row}"], "row 2: field answer: missing"),
    (["--train-data", "{bad_gold}"], "cannot be read as mathematics"),
    (["--train-data", "README.md"], "problems are read from .jsonl and .parquet files"),
    (["--hard", "5000"], "tier hard has"),
    (["--max-prompt-tokens", "3"], "every prompt is longer"),
    (["@recipes/none.args"], "recipe not found"),
    (["--output-dir", "lib"], "is not empty and not a run"),
    (["--lora-targets", "no_such_layer"], "--lora-targets no_such_layer"),
    (["--max-steps", "0"], "--max-steps 0: must be >= 1"),
]


@pytest.fixture(scope="module")
def broken_things(tmp_path_factory):
    """Files with mistakes in them, by name."""
    folder = tmp_path_factory.mktemp("mistakes")
    good = '{"problem": "1 + 1?", "answer": "2"}\n'
    (folder / "row.jsonl").write_text(good + '{"problem": "x"}\n')
    (folder / "gold.jsonl").write_text(good + '{"problem": "x", "answer": "???"}\n')
    adapter = folder / "adapter"
    adapter.mkdir()
    import safetensors.torch
    import torch
    from peft import LoraConfig

    LoraConfig(
        r=4, target_modules=["q_proj"], base_model_name_or_path=str(TINY), task_type="CAUSAL_LM"
    ).save_pretrained(adapter)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    safetensors.torch.save_file({name: torch.zeros(4, 999)}, adapter / "adapter_model.safetensors")
    return {"bad_row": folder / "row.jsonl", "bad_gold": folder / "gold.jsonl", "adapter": adapter}


@pytest.mark.parametrize(("words", "message"), MISTAKES, ids=[" ".join(words) for words, _ in MISTAKES])
def test_every_mistake_is_one_line_and_exit_code_2(
    words, message, broken_things, tmp_path, monkeypatch, capsys
):
    """In this process, to save the imports: `run_script` is all that a script does."""
    import train_grdpo

    monkeypatch.chdir(ROOT)
    words = [word.format(**broken_things) if word.startswith("{") else word for word in words]
    output = [] if "--output-dir" in words else ["--output-dir", str(tmp_path / "r")]
    check_mistake(train_grdpo, [*output, *words], message, capsys)


def check_mistake(script, words, message, capsys):
    from lib.settings import current_settings, run_script

    before = current_settings(script.main)
    with pytest.raises(SystemExit) as caught:
        run_script(script.main, words)
    script.__dict__.update(before)
    assert caught.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1, error
    assert error[0].startswith("error: ")
    assert message in error[0]


@pytest.mark.parametrize(
    ("option", "value", "admitted"),
    [
        ("--tau", "0", "must be > 0"),
        ("--tau", "-1", "must be > 0"),
        ("--reward-temperature", "0", "must be > 0"),
        ("--adaptive-tau", "on", "must be one of off | original | inverted"),
        ("--adaptive-tau-alpha", "1.5", "must be >= 0 and <= 1"),
        ("--adaptive-tau-alpha", "-0.1", "must be >= 0 and <= 1"),
        ("--adaptive-tau-min", "0", "must be > 0"),
        ("--group-size", "1", "must be >= 2"),
        ("--scale-rewards", "std", "must be one of group | batch | none"),
        ("--std-floor", "-1", "must be >= 0"),
        ("--anchor", "moving", "must be one of on_policy | fixed | ema | kl_triggered"),
        ("--ema-decay", "1.1", "must be >= 0 and <= 1"),
        ("--drift-threshold", "0", "must be > 0"),
        ("--anchor-kl-coef", "-0.1", "must be >= 0"),
        ("--updates-per-batch", "0", "must be >= 1"),
        ("--logprob-reduction", "max", "must be one of sum | mean"),
        ("--rewards", "good_accuracy(ngram_size=0):1", "needs a whole ngram_size >= 1"),
    ],
)
def test_settings_of_the_anchored_loss_are_checked_before_anything_loads(
    option, value, admitted, tmp_path, capsys
):
    import train_adpo

    words = ["--model", "nowhere/at/all", "--output-dir", str(tmp_path / "r"), option, value]
    check_mistake(train_adpo, words, admitted, capsys)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("option", "value", "admitted"),
    [
        ("--good-enough", "right > 1", "write it like 'correct >= 1' or 'reward > 0.5'"),
        ("--good-enough", "correct >= 9", "would hold for no group of 8 completions"),
        ("--schedule", "2xT1.0", "write a step, a colon, rows"),
        ("--schedule", "1: 2xT1.0,q3", "cannot read 'q3'"),
        ("--max-resamples", "-1", "must be >= 0"),
        ("--train-on", "first", "must be one of last | all"),
        ("--scale-rewards", "std", "must be one of group | none"),
        ("--clip-eps", "0", "must be > 0 and < 1"),
        ("--clip-eps", "1", "must be > 0 and < 1"),
        ("--clip-eps-high", "0", "must be > 0"),
        ("--kl-coef", "-0.1", "must be >= 0"),
        ("--normaliser", "bnpo", "must be one of grpo | dapo | dr_grpo"),
        ("--updates-per-batch", "0", "must be >= 1"),
        ("--repetition-penalty", "0", "must be > 0"),
        ("--phase", "</think>", "write a marker, a colon, parameters"),
    ],
)
def test_settings_of_further_attempts_are_checked_before_anything_loads(
    option, value, admitted, tmp_path, capsys
):
    import train_adagrpo

    words = ["--model", "nowhere/at/all", "--output-dir", str(tmp_path / "r"), option, value]
    check_mistake(train_adagrpo, words, admitted, capsys)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("anchor", ["on_policy", "fixed", "ema", "kl_triggered"])
def test_every_anchor_trains_and_says_what_it_does(data, tmp_path, anchor):
    """Two updates a batch: the second one is off-policy, and the anchor shows in the metrics."""
    words = ["--anchor", anchor, "--drift-threshold", "1e-6", "--anchor-kl-coef", "0.1", "--drop-failed"]
    shown = train(tmp_path / "r", data, *words, script="train_adpo.py", save_every=4, eval_every=4).stdout
    assert shown.count("the loss is ln 4 = 1.386 whatever is learned") == 1
    metrics = read_metrics(tmp_path / "r")
    assert metrics[-1]["adpo/anchor_updates"] == {"ema": 8}.get(anchor, 0), "ten steps fill a window"
    for line in metrics:
        assert line["adpo/anchor_drift"] > line["adpo/token_drift"] > 0
        assert line["adpo/kl_penalty"] >= 0
        assert line["adpo/anchor_kl"] > 0
        assert line["adpo/mean_tau"] == pytest.approx(0.8)
        assert 0 < line["adpo/target_entropy"] <= math.log(4) + 1e-6
        assert 0 <= line["adpo/dropped_prompts"] <= 3


def test_the_loss_of_on_policy_updates_is_ln_g_and_an_adapter_can_be_trained_on(data, tmp_path):
    once = {"updates_per_batch": 1, "save_every": 4, "eval_every": 4}
    train(tmp_path / "r", data, "--anchor", "on_policy", script="train_adpo.py", **once)
    for line in read_metrics(tmp_path / "r"):
        assert line["loss"] == pytest.approx(math.log(4), abs=1e-6)
        assert line["adpo/anchor_drift"] == line["adpo/anchor_kl"] == 0
    words = ["--anchor", "fixed", "--model", tmp_path / "r"]
    train(tmp_path / "further", data, *words, script="train_adpo.py", max_steps=1, **once)
    first = read_metrics(tmp_path / "further")[0]
    assert first["adpo/anchor_drift"] < 1e-3, "the anchor is the adapter that training began from"


def test_a_mistake_is_answered_without_a_traceback_within_seconds():
    started = time.perf_counter()
    process = run("train_grdpo.py", "--beta", "0", check=False)
    assert process.returncode == 2
    assert process.stderr == "error: --beta 0.0: must be > 0\n"
    assert time.perf_counter() - started < 60
