"""evaluate.py: killed and resumed it is the undisturbed one, checkpoints are swapped, mistakes are named."""

import json
import os
import signal
import subprocess
import sys

import pyarrow.parquet
import pytest
import torch

import evaluate
from lib.batches import Problem, load_problems
from lib.checkpoints import write_checkpoint
from lib.evaluation import Engine, Journal, choose_sampling, list_checkpoints
from lib.models import load_model, load_tokenizer, load_trainable, locate_model
from lib.rewards import Grade
from lib.sampler import Group
from lib.settings import UserError, current_settings, run_script
from tests.conftest import ROOT, TINY

DATA = ROOT / "data" / "tiny" / "test.jsonl"
SMALL = ("--max-new-tokens", "20", "--samples", "2", "--max-problems", "6", "--rows", "4")
SAMPLING = {
    "prompt": "boxed",
    "thinking": None,
    "temperature": 0.3,
    "top_k": 5,
    "max_new_tokens": 16,
    "new": 1,
}


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Run the script in this process, to save the imports: what it prints."""
    before = current_settings(evaluate.main)
    monkeypatch.chdir(tmp_path)

    def call(*words):
        evaluate.__dict__.update(before)
        run_script(evaluate.main, [str(word) for word in words])
        return capsys.readouterr().out

    yield call
    evaluate.__dict__.update(before)


class Stub:
    """What `write_checkpoint` wants of a policy."""

    def __init__(self, model):
        self.model = model

    def state_tensors(self):
        return {"nothing": torch.zeros(1)}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run of two checkpoints: a fresh adapter (the base itself), and one that has been moved far away."""
    folder = tmp_path_factory.mktemp("run")
    model = load_trainable(locate_model(TINY), "all-linear", rank=4, alpha=8, seed=1)
    for step in (1, 2):
        write_checkpoint(
            folder / "checkpoints" / f"step_{step:06d}", Stub(model), state={"step": step}, sampling=SAMPLING
        )
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.5, generator=torch.Generator().manual_seed(step))
    (folder / "checkpoints" / "best").symlink_to("step_000002")
    return folder


def responses(folder):
    return pyarrow.parquet.read_table(folder / "responses.parquet")["responses"].to_pylist()


def test_killed_again_and_again_it_is_the_undisturbed_evaluation(run, tmp_path):
    words = [*SMALL, "--data", DATA, "--max-problems", "60"]  # some 600 events
    run(*words, "--output", tmp_path / "whole")
    command = ["tests/resume_driver.py", "evaluate.py", 8, 3, "--output", tmp_path / "killed", *words]
    process = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    statuses = [int(word) for word in process.stdout.splitlines()[-1].split()[1:]]
    assert statuses[-1] == 0, process.stderr
    assert statuses.count(-signal.SIGKILL) >= 3, statuses
    for name in ("summary.json", "responses.parquet", "settings.json"):
        whole, killed = ((tmp_path / folder / name).read_bytes() for folder in ("whole", "killed"))
        assert whole == killed, name
    assert not (tmp_path / "killed" / "answers.jsonl").exists()


def make_group(problem, text="a"):
    grade = Grade("4", True, True, True, False, False)
    return Group(problem, "p", [1], [[2, 3]], [text], ["stop"], [[0.0, 0.0]], grades=[grade])


@pytest.mark.parametrize("cut", range(1, 200, 13))
def test_a_journal_cut_anywhere_holds_whole_batches_only(tmp_path, cut):
    problems = [Problem(str(i), "2 + 2?", "4") for i in range(3)]
    with Journal(tmp_path, {"a": 1}) as journal:
        for problem in problems:
            journal.keep([make_group(problem)])
    lines = (tmp_path / "answers.jsonl").read_bytes()
    (tmp_path / "answers.jsonl").write_bytes(lines[:-cut])
    with Journal(tmp_path, {"a": 1}) as journal:
        recalled = journal.recall(problems)
        whole = lines[:-cut].count(b"\n")
        assert [group.problem for group in recalled] == problems[:whole]
        assert all(group.grades == make_group(problems[0]).grades for group in recalled)
        for problem in problems[whole:]:
            journal.keep([make_group(problem)])
        assert (tmp_path / "answers.jsonl").read_bytes() == lines


def test_other_settings_are_refused_and_fresh_starts_over(run, tmp_path):
    words = (*SMALL, "--output", tmp_path / "e")
    run(*words)
    before = responses(tmp_path / "e")
    for change in (("--seed", 2), ("--max-problems", 5), ("--temperature", 0.5)):
        with pytest.raises(SystemExit):
            run(*words, *change)
    (tmp_path / "e" / "mine.txt").write_text("not yours")
    run(*words, "--seed", 2, "--fresh")
    assert responses(tmp_path / "e") != before
    assert (tmp_path / "e" / "mine.txt").exists()


def test_a_refusal_lists_old_and_new(tmp_path):
    Journal(tmp_path, {"seed": 1, "same": 2}).__exit__()
    with pytest.raises(UserError, match=r"seed: 1 -> 3\): --fresh starts over") as caught:
        Journal(tmp_path, {"seed": 3, "same": 2})
    assert "same" not in str(caught.value)


def test_one_process_per_folder(tmp_path):
    with Journal(tmp_path, {}), pytest.raises(UserError, match="in use by another process"):
        Journal(tmp_path, {})


def test_a_finished_evaluation_prints_its_table_again(run, tmp_path, monkeypatch):
    words = (*SMALL, "--output", tmp_path / "e")
    first = run(*words)
    monkeypatch.setattr(Engine, "_load", lambda *_: pytest.fail("no model is needed"))
    assert run(*words) == first
    assert "pass@2" in first
    assert (tmp_path / "e" / "pass_at_k.png").read_bytes()[:4] == b"\x89PNG"


def test_progress_says_how_far_and_how_long(tmp_path):
    words = [sys.executable, "evaluate.py", *SMALL, "--output", str(tmp_path / "e")]
    process = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert process.returncode == 0, process.stderr
    lines = [line for line in process.stderr.splitlines() if line.startswith("evaluating, pass@1")]
    assert [line.split(", ")[2] for line in lines] == ["2/6 problems", "4/6 problems", "6/6 problems"]
    assert lines[-1].endswith("0 s left")


def test_sampling_is_the_checkpoints_unless_overridden(run, run_folder, tmp_path):
    run("--model", run_folder, "--max-problems", 1, "--samples", 2, "--output", tmp_path / "e")
    said = json.loads((tmp_path / "e" / "settings.json").read_text())
    assert (said["temperature"], said["top_k"], said["max_new_tokens"], said["style"]) == (
        0.3,
        5,
        16,
        "boxed",
    )
    params = choose_sampling(SAMPLING, {"top_k": 0, "temperature": None})
    assert (params.temperature, params.top_k, params.top_p) == (0.3, 0, 1.0)
    assert choose_sampling({}, {}).temperature == 0.7


def test_the_second_phase_is_the_checkpoints_unless_overridden(run, tmp_path):
    trained = {"phase": "</think>: T0"}
    assert choose_sampling(trained, {"phase": None}).phase == "</think>: T0"
    assert choose_sampling(trained, {"phase": ""}).phase == "", "an empty one switches it off"
    with pytest.raises(UserError, match="--phase: cannot read 'hot'"):
        choose_sampling(trained, {"phase": "</think>: hot"})
    words = ("--max-new-tokens", 40, "--samples", 4, "--max-problems", 2, "--temperature", 1)
    run(*words, "--phase", "<answer>: T0", "--output", tmp_path / "e")
    assert json.loads((tmp_path / "e" / "settings.json").read_text())["phase"] == "<answer>: T0"
    run(*words, "--output", tmp_path / "plain")
    phased, plain = (
        pyarrow.parquet.read_table(tmp_path / name / "responses.parquet")["responses"]
        .combine_chunks()
        .flatten()
        for name in ("e", "plain")
    )
    for one, other in zip(phased.to_pylist(), plain.to_pylist(), strict=True):
        assert one.partition("<answer>")[0] == other.partition("<answer>")[0], "the first phase is the same"


def test_temperature_zero_is_greedy_with_one_sample(run, tmp_path):
    shown = run(*SMALL, "--temperature", 0, "--output", tmp_path / "a")
    assert "x 1 samples at temperature 0" in shown
    run(*SMALL, "--temperature", 0, "--seed", 9, "--output", tmp_path / "b")
    assert responses(tmp_path / "a") == responses(tmp_path / "b"), "no draw, so no seed"
    assert {len(row) for row in responses(tmp_path / "a")} == {1}


def test_the_curve_of_a_run_swaps_adapters_in_one_model(run, run_folder, tmp_path, monkeypatch):
    loads = []
    load = Engine._load
    monkeypatch.setattr(Engine, "_load", lambda *words: (loads.append(1), load(*words))[1])
    words = ("--model", run_folder, "--max-problems", 3, "--samples", 2)
    run(*words, "--checkpoints", "all", "--output", tmp_path / "c")
    assert loads == [1]
    curve = json.loads((tmp_path / "c" / "curve.json").read_text())
    assert [point["step"] for point in curve] == [0, 1, 2]
    assert (tmp_path / "c" / "curve.png").exists()
    base, fresh, moved = (responses(tmp_path / "c" / f"step_{step:06d}") for step in (0, 1, 2))
    assert base == fresh, "an untrained adapter is the base"
    assert moved != base
    run(*words, "--output", tmp_path / "best")
    assert responses(tmp_path / "best") == moved, "loaded on its own it says the same"


def test_the_checkpoints_of_a_list(run_folder):
    assert [step for step, _ in list_checkpoints(run_folder, "base, 2")] == [0, 2]
    assert [step for step, _ in list_checkpoints(run_folder, "best")] == [2]
    with pytest.raises(UserError, match=r"--checkpoints 7: the run has 0 \(base\), 1, 2, best"):
        list_checkpoints(run_folder, "7")
    with pytest.raises(UserError, match="must be a run folder"):
        list_checkpoints(TINY, "all")


def test_an_engine_takes_adapters_of_another_shape_too(run_folder, tmp_path):
    other = load_trainable(locate_model(TINY), "q_proj", rank=2, alpha=8, seed=1)
    write_checkpoint(tmp_path / "other", Stub(other), state={"step": 1}, sampling=SAMPLING)
    places = [locate_model(path) for path in (run_folder, tmp_path / "other", TINY)]
    ids = torch.tensor([[5, 6, 7]])
    engine = Engine(places, load_tokenizer(places[0]), max_rows=4)
    for place in (*places, places[0]):
        with engine.answering_as(place) as sampler, torch.no_grad():
            mine = sampler.model(ids).logits
            assert torch.equal(mine, load_model(place)(ids).logits)


def test_compare_with_the_base_a_model_and_saved_answers(run, run_folder, tmp_path):
    words = ("--model", run_folder, "--max-problems", 4, "--samples", 2)
    shown = run(*words, "--compare", "base", "--output", tmp_path / "a")
    assert "on 4 problems" in shown
    assert "difference" in shown
    assert (tmp_path / "a" / "compared_with" / "responses.parquet").exists()
    again = run(*words, "--compare", tmp_path / "a" / "compared_with", "--output", tmp_path / "b")
    tail = shown.rpartition("on 4 problems")[2].partition("answers:")[0]
    assert again.rpartition("on 4 problems")[2].partition("answers:")[0] == tail
    other = run(*words, "--compare", TINY, "--output", tmp_path / "c")
    assert other.rpartition("on 4 problems")[2].partition("answers:")[0] == tail


def write_rows(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_columns_are_mapped(run, tmp_path):
    row = {"q": {"text": "What is 2 + 2?"}, "gold": 4, "answer": "not this"}
    file = write_rows(tmp_path / "p.jsonl", row)
    words = ("--problem-column", "q.text", "--answer-column", "gold", "--output", tmp_path / "e", *SMALL)
    run("--data", file, *words)
    table = pyarrow.parquet.read_table(tmp_path / "e" / "responses.parquet").to_pylist()
    assert table[0]["reward_model"]["ground_truth"] == "4"
    assert table[0]["extra_info"]["problem"] == "What is 2 + 2?"


def test_contamination_is_reported(run, tmp_path):
    problems = load_problems(DATA)[:2]
    train = write_rows(tmp_path / "train.jsonl", {"problem": problems[1].problem.upper(), "answer": "1"})
    shown = run(*SMALL, "--max-problems", 2, "--train-data", train, "--output", tmp_path / "e")
    assert "1 of 2 problems stand in" in shown
    assert "row 2, by text: row 1 there" in shown


GOOD = {"problem": "1 + 1?", "answer": "2"}


@pytest.mark.parametrize(
    ("rows", "words", "message"),
    [
        ([GOOD, {"problem": "1  + 1?", "answer": "3"}], [], "row 2: field problem: the same as in row 1"),
        (
            [GOOD, {"problem": "x", "answer": " "}],
            [],
            "row 2: field answer: must be a text that is not empty",
        ),
        ([GOOD], ["--problem-column", "q"], "row 1: --problem-column q: the row has problem, answer"),
        ([GOOD], ["--answer-column", "answer.x"], "row 1: --answer-column answer.x: the row has"),
        ([GOOD], ["--checkpoints", "all"], "--model must be a run folder"),
        ([GOOD], ["--compare", "nowhere/at/all"], "model not found"),
        ([GOOD], ["--temperature", "-1"], "--temperature -1.0: must be >= 0"),
        ([GOOD], ["--output", "{file}"], "is a file; it must be a folder"),
    ],
)
def test_mistakes_are_one_line(run, tmp_path, capsys, rows, words, message):
    file = write_rows(tmp_path / "p.jsonl", *rows)
    words = [word.format(file=file) for word in words]
    output = [] if "--output" in words else ["--output", tmp_path / "e"]
    with pytest.raises(SystemExit) as caught:
        run("--data", file, *SMALL, *output, *words)
    assert caught.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert message in error[0]
