"""check_eval.py as a user runs it: known numbers, JSON and nothing else, comparisons, other graders."""

import json
import os
import subprocess
import sys
import time

import pytest

import check_eval
from lib.prompts import build_messages
from lib.settings import current_settings, run_script
from tests.conftest import ROOT, SHARED

FILES = {size: SHARED / f"grdpo_validation_qwen2.5-{size}.json" for size in ("1.5b", "3b")}
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the published completions are not here")
CONTRACT = {"problems", "samples", "pass@1", "pass@2", "answer_and_format", "answer", "format"} | {
    "mean_length",
    "timeouts",
    "unparsed",
}


@pytest.fixture
def check(capsys):
    """Run the script in this process, to save the imports: what it prints."""
    before = current_settings(check_eval.main)

    def run(*words):
        run_script(check_eval.main, [str(word) for word in words])
        return capsys.readouterr().out

    yield run
    check_eval.__dict__.update(before)


def save(path, rows):
    path.write_text(json.dumps(rows))
    return path


def tagged(*answers):
    return [f"so <answer>{answer}</answer>" for answer in answers]


ROWS = [
    {
        "problem": "a?",
        "answer": "1/2",
        "tier": "easy",
        "generations": tagged("0.5", "3", r"\frac{2}{4}", "7"),
    },
    {
        "problem": "b?",
        "answer": "4",
        "tier": "hard",
        "generations": [*tagged("5", "5"), r"\boxed{4}", "four"],
    },
]


def test_numbers_by_hand(check, tmp_path):
    summary = json.loads(check("--responses", save(tmp_path / "r.json", ROWS), "--json"))
    assert summary.keys() >= CONTRACT
    assert (summary["problems"], summary["samples"]) == (2, 4)
    assert summary["pass@1"] == summary["avg@4"] == pytest.approx((2 / 4 + 0) / 2)
    assert summary["pass@2"] == pytest.approx((1 - 1 / 6) / 2)
    assert summary["pass@4"] == pytest.approx(0.5)
    assert summary["maj@4"] == 0.5
    assert summary["answer"] == pytest.approx((2 / 4 + 1 / 4) / 2)
    assert summary["format"] == pytest.approx((4 / 4 + 2 / 4) / 2)
    assert summary["answer_and_format"] == pytest.approx((2 / 4 + 0) / 2)
    assert summary["pass@1_ci95"][0] <= summary["pass@1"] <= summary["pass@1_ci95"][1]
    assert summary["tiers"]["easy"]["pass@1"] == 0.5
    assert summary["tiers"]["hard"]["pass@4"] == 0
    assert "clipped" not in summary, "nobody knows"
    assert summary["length_p50"] > 0
    assert not summary["length_in_tokens"]


def test_lengths_in_tokens_where_a_tokenizer_is_named(check, tmp_path):
    words = ("--responses", save(tmp_path / "r.json", ROWS), "--json")
    counted = json.loads(check(*words, "--tokenizer", ROOT / "data" / "tiny-qwen3"))
    assert counted["length_in_tokens"]
    assert counted["mean_length"] < json.loads(check(*words))["mean_length"]


def test_the_table_can_be_read(check, tmp_path):
    shown = check("--responses", save(tmp_path / "r.json", ROWS))
    for part in (
        "pass@4",
        "maj@4",
        "easy",
        "hard",
        "right answer, whatever the format",
        "length_p90",
        "style",
    ):
        assert part in shown


def test_two_files_are_compared_in_pairs(check, tmp_path):
    """Some of 20 problems get better: the paired interval is narrower than two separate ones."""
    right, wrong = tagged("1")[0], tagged("0")[0]
    base = [
        {"problem": f"p{i}", "answer": "1", "generations": [right if i % 2 else wrong, wrong]}
        for i in range(20)
    ]
    new = [
        row | {"generations": [row["generations"][0], right if i % 4 else wrong]}
        for i, row in enumerate(base)
    ]
    one, two = save(tmp_path / "new.json", new[::-1]), save(tmp_path / "base.json", [*base, ROWS[0]])
    summary = json.loads(check("--responses", f"{one},{two}", "--json"))
    assert summary["pass@1"] == summary["files"][str(one)]["pass@1"]
    (difference,) = summary["differences"].values()
    assert difference["problems"] == 20
    assert difference["pass@1"] == pytest.approx(15 / 40)
    low, high = difference["pass@1_ci95"]
    assert 0 < low < 15 / 40 < high
    separate = [summary["files"][str(file)]["pass@1_ci95"] for file in (one, two)]
    assert high - low < sum(upper - lower for lower, upper in separate)
    shown = check("--responses", f"{one},{two}")
    assert "on 20 problems" in shown
    assert "better" in shown


@pytest.mark.parametrize(
    ("grader", "right"), [("standard", 2), ("string", 0), ("math_verify", 2), ("{own}", 1)]
)
def test_graders(check, tmp_path, grader, right):
    """0.5 is not the text 1/2; one's own takes nothing but 0.5."""
    own = tmp_path / "own.py"
    own.write_text("def judge(answer, gold):\n    return answer == '0.5' and gold == '1/2'\n")
    words = (
        "--responses",
        save(tmp_path / "r.json", ROWS[:1]),
        "--grader",
        grader.format(own=f"{own}:judge"),
    )
    assert json.loads(check(*words, "--json"))["pass@1"] == right / 4


def test_disagreements_are_shown_and_counted(check, tmp_path):
    words = ("--responses", save(tmp_path / "r.json", ROWS), "--disagreements", 5, "--other-grader", "string")
    shown = check(*words)
    assert "standard and string differ on 2 answers" in shown
    assert "gold '1/2', answer '0.5': right by standard, wrong by string" in shown
    assert json.loads(check(*words, "--json"))["disagreements"] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--responses: name a file or folder"),
        (["--responses", "nowhere.json"], "nowhere.json is not there"),
        (["--responses", "{file}", "--grader", "best"], "--grader best: must be standard, string"),
        (["--responses", "{file}", "--grader", "nowhere.py:f"], "--grader: no file"),
        (["--responses", "{file}", "--grader", "{own}:g"], "has no function 'g'"),
        (["--responses", "{file}", "--grader", "{own}:compute_score"], "function(answer, gold)"),
        (["--responses", "{file}", "--answer-column", "gold"], "row 1: field gold: missing"),
        (["--responses", "{file},{other}"], "have no problem in common"),
        (["--responses", "{file}", "--tokenizer", "nowhere"], "--tokenizer: no file"),
        (["--responses", "{file}", "--prompt", "xml"], "--prompt xml: must be one of"),
    ],
)
def test_mistakes(check, tmp_path, capsys, words, message):
    (tmp_path / "own.py").write_text(
        "def compute_score(data_source, solution_str, ground_truth): return 1.0\n"
    )
    places = {"file": save(tmp_path / "r.json", ROWS[:1]), "other": save(tmp_path / "o.json", ROWS[1:])}
    with pytest.raises(SystemExit) as caught:
        check(*(word.format(own=tmp_path / "own.py", **places) for word in words))
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_hostile_answers_do_not_stop_it_and_are_counted(check, tmp_path):
    """The same bomb against 30 gold answers costs two time limits, not thirty."""
    rows = [{"problem": f"p{i}", "answer": str(i), "generations": tagged("9^{9^{9^{9}}}")} for i in range(30)]
    started = time.perf_counter()
    words = ("--responses", save(tmp_path / "r.json", rows), "--grading-seconds", 1, "--json")
    summary = json.loads(check(*words))
    assert summary["timeouts"] == 30
    assert time.perf_counter() - started < 15


@needs_shared
@pytest.mark.parametrize(("size", "best", "mean"), [("1.5b", 0.10, 0.011), ("3b", 0.60, 0.248)])
def test_the_published_numbers(check, size, best, mean):
    summary = json.loads(check("--responses", FILES[size], "--json"))
    assert summary["pass@10"] == pytest.approx(best)
    assert summary["avg@10"] == pytest.approx(mean)
    assert summary["timeouts"] == 0


@needs_shared
def test_one_json_object_and_nothing_else_without_torch(tmp_path):
    """As a process of its own; torch and transformers are made unimportable."""
    for name in ("torch", "transformers", "datasets"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('not here')\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    words = [sys.executable, "check_eval.py", "--responses", str(FILES["3b"]), "--json"]
    process = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert len(process.stdout.splitlines()) == 1
    assert json.loads(process.stdout)["pass@10"] == pytest.approx(0.6)


def test_a_prompt_example_is_not_an_answer(check, tmp_path):
    """The prompt of the GRDPO experiments before an untagged completion: the example 42 is not its answer."""
    asked = build_messages("c?", "answer_tag")[-1]["content"]
    rows = [{"problem": "c?", "answer": "42", "generations": [asked + "\nI do not know."]}]
    summary = json.loads(check("--responses", save(tmp_path / "r.json", rows), "--json"))
    assert summary["pass@1"] == summary["answer"] == summary["format"] == 0


def test_each_data_source_has_its_own_column(check, tmp_path):
    rows = [row | {"data_source": name} for row, name in zip(ROWS, ("gsm8k", "math"), strict=True)]
    file = save(tmp_path / "r.json", rows)
    summary = json.loads(check("--responses", file, "--json"))
    assert {name: one["pass@1"] for name, one in summary["data_sources"].items()} == {"gsm8k": 0.5, "math": 0}
    assert "gsm8k" in check("--responses", file)
