"""The prepare scripts on small files of the real data sets' schemas, and the ability test by hand."""

import importlib.util
import json
import signal
import subprocess
import sys
import time

import pyarrow
import pyarrow.parquet
import pytest

from lib.batches import load_problems
from lib.contamination import find_contaminated, list_runs, normalise_text
from lib.grading import Grader
from lib.settings import run_script
from tests.conftest import ROOT, SHARED

OPENR1 = SHARED / "openr1_math_verifiable_2514.jsonl"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the published data is not here")


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "data" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def script(capsys):
    """Run a script of data/ in this process: what it prints."""

    def run(name, *words):
        run_script(load_script(name).main, [str(word) for word in words])
        return capsys.readouterr().out

    return run


def write(path, rows):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def openr1(i, **changes):
    row = {"problem": f"What is {i} plus {i}?", "solution": "...", "answer": str(2 * i), "uuid": f"u{i}"}
    row |= {"problem_type": "Algebra", "question_type": "math-word-problem", "source": "olympiads"}
    return row | {"generations": ["..."]} | changes


def dapo(i, text="What is {i} plus {i}?"):
    before = (
        "Solve the following math problem step by step. The last line of your response should be of the form "
        "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
    )
    after = '\n\nRemember to put your answer on its own line after "Answer:".'
    return {
        "data_source": "math_dapo",
        "prompt": [{"role": "user", "content": before + text.format(i=i) + after}],
        "ability": "MATH",
        "reward_model": {"ground_truth": str(2 * i), "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": f"id{i}"},
    }


def math(i, level, solution="so $\\boxed{{1}}$ or rather $\\boxed{{\\frac{{{i}}}{{7}}}}$."):
    return {"problem": f"Find {i}.", "level": level, "type": "Algebra", "solution": solution.format(i=i)}


CASES = {
    "prepare_openr1": (
        [
            openr1(1),
            openr1(2, answer="???"),
            openr1(1),
            openr1(3, question_type="proof"),
            openr1(4),
            openr1(5, answer=""),
        ],
        ["--train", "0:1", "--valid", "1:2"],
        {"train": [("What is 1 plus 1?", "2")], "valid": [("What is 4 plus 4?", "8")]},
        [
            "dropped 1: duplicate (row 3)",
            "1: math-verify cannot read the answer (row 2)",
            "a proof (row 4)",
            "problem or answer is empty (row 6)",
            "kept 2 of 6 rows (33.3%)",
        ],
    ),
    "prepare_dapo": (
        [dapo(1), dapo(1), dapo(2, "{i} \u52a0 {i} \u7b49\u4e8e\u591a\u5c11?"), dapo(3), dapo(4)],
        ["--train", "0:2", "--valid", "2:"],
        {
            "train": [("What is 1 plus 1?", "2"), ("What is 3 plus 3?", "6")],
            "valid": [("What is 4 plus 4?", "8")],
        },
        ["dropped 1: duplicate (row 2)", "dropped 1: not English (row 3)"],
    ),
    "prepare_math": (
        [
            math(1, "Level 5"),
            math(2, "Level 1"),
            math(3, "Level ?"),
            math(4, "Level 4", "no box"),
            math(5, "Level 3"),
        ],
        [],
        {"train": [("Find 1.", r"\frac{1}{7}"), ("Find 5.", r"\frac{5}{7}")]},
        ["dropped 1: level 1 (row 2)", "level unknown (row 3)", "no box in the solution (row 4)"],
    ),
    "prepare_gsm8k": (
        [
            {"question": "How many?", "answer": "He has <<1+1=2>>\n#### 1,002"},
            {"question": "And?", "answer": "2"},
        ],
        [],
        {"train": [("How many?", "1002")]},
        ["no #### in the answer (row 2)"],
    ),
}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", CASES)
def test_what_is_kept_and_what_is_dropped(script, tmp_path, name, suffix):
    rows, words, expected, said = CASES[name]
    source = write(tmp_path / f"source.{suffix}", rows)
    words = ("--source", source, "--output", tmp_path / "out", *words)
    shown = script(name, *words)
    for line in said:
        assert line in shown
    for split, problems in expected.items():
        path = tmp_path / "out" / f"{split}.jsonl"
        assert [(row["problem"], row["answer"]) for row in read(path)] == problems
        assert [(one.problem, one.answer) for one in load_problems(path)] == problems
        meta = json.loads((tmp_path / "out" / f"{split}.meta.json").read_text())
        assert (meta["source"], meta["rows_read"], meta["problems"]) == (
            str(source),
            len(rows),
            len(problems),
        )
        assert len(meta["dropped_rows"]) == sum(meta["dropped"].values()) == len(rows) - meta["kept"]
    assert not (tmp_path / "out" / "checked.jsonl").exists()
    assert script(name, *words) == shown.replace("prepared:", "already prepared:")


@pytest.mark.parametrize("name", CASES)
def test_verl_parquet_out_and_in(script, tmp_path, name):
    rows, words, expected, _ = CASES[name]
    source = write(tmp_path / "source.jsonl", rows)
    script(name, "--source", source, "--output", tmp_path / "v", *words, "--format", "verl-parquet")
    path = tmp_path / "v" / "train.parquet"
    table = pyarrow.parquet.read_table(path)
    assert table.column_names == ["data_source", "prompt", "ability", "reward_model", "extra_info"]
    assert [(one.problem, one.answer) for one in load_problems(path)] == expected["train"]
    again = (name, "--source", path, "--output", tmp_path / "again", "--train", ":")
    script(*again, *([] if name in ("prepare_math", "prepare_gsm8k") else ["--valid", ""]))
    read_back = read(tmp_path / "again" / "train.jsonl")
    assert [(row["problem"], row["answer"]) for row in read_back] == expected["train"]
    if name == "prepare_math":
        assert [row["level"] for row in read_back] == [5, 3]


def test_the_files_that_verls_own_scripts_write(script, tmp_path, capsys):
    """They have the answer alone, and say in the prompt how it is to be given."""
    row = {"data_source": "DigitalLearningGmbH/MATH-lighteval", "ability": "math"}
    row |= {
        "reward_model": {"style": "rule", "ground_truth": "4"},
        "extra_info": {"split": "train", "index": 0},
    }
    tails = {
        "prepare_math": "Let's think step by step and output the final answer within \\boxed{}.",
        "prepare_gsm8k": 'Let\'s think step by step and output the final answer after "####".',
    }
    for name, tail in tails.items():
        messages = [{"role": "user", "content": f"What is 2 + 2? {tail}"}]
        source = write(tmp_path / f"{name}.parquet", [row | {"prompt": messages}])
        words = (name, "--source", source, "--output", tmp_path / name)
        script(*words, *(["--levels", ""] if name == "prepare_math" else []))
        found = [(row["problem"], row["answer"]) for row in read(tmp_path / name / "train.jsonl")]
        assert found == [("What is 2 + 2?", "4")]
    with pytest.raises(SystemExit):
        script("prepare_math", "--source", tmp_path / "prepare_math.parquet", "--output", tmp_path / "o")
    assert "only 0 problems in 1 rows (dropped: 1 level unknown)" in capsys.readouterr().err


def test_a_hub_data_set_is_streamed_no_further_than_it_is_needed(script, tmp_path, monkeypatch):
    """Its files lie in a local folder here; how they are read is real."""
    import datasets

    rows = [dapo(i // 3) for i in range(9000)]
    (tmp_path / "hub" / "data").mkdir(parents=True)
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "hub" / "data" / "train.parquet", row_group_size=300)
    real = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *a, **b: real(str(tmp_path / "hub"), *a, **b))
    monkeypatch.chdir(tmp_path)
    shown = script("prepare_dapo", "--output", tmp_path / "o", "--train", ":200", "--valid", "200:210")
    assert "of 1000 rows" in shown, "two chunks hold the 210 problems that are wanted"
    assert len(read(tmp_path / "o" / "train.jsonl")) == 200
    assert read(tmp_path / "o" / "valid.jsonl")[0]["problem"] == "What is 200 plus 200?"
    shown = script("prepare_dapo", "--output", tmp_path / "all", "--train", ":", "--valid", "")
    assert "kept 3000 of 9000 rows" in shown


def test_a_killed_preparation_does_not_check_twice(script, tmp_path, monkeypatch):
    count = 400
    source = write(tmp_path / "s.jsonl", [openr1(i, answer=f"x+{i}") for i in range(count)])
    words = ["--source", source, "--train", ":", "--valid", "", "--output"]
    code = f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'data')]}\n"
    code += "import preparing, prepare_openr1 as script, lib.settings; preparing.CHUNK = 4; "
    code += "lib.settings.run_script(script.main)"
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, words), str(tmp_path / "o")])
    checked = tmp_path / "o" / "checked.jsonl"
    end = time.monotonic() + 60
    while not checked.is_file() or checked.read_text().count("\n") < 3:
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    known = [answer for line in checked.read_text().splitlines() for answer in json.loads(line)]
    assert 12 <= len(known) < count
    assert not (tmp_path / "o" / "train.jsonl").exists()
    with open(checked, "a") as file:
        file.write('{"x+399": tr')  # where the kill comes in the middle of a line
    asked, real = [], Grader.find_unparsable
    monkeypatch.setattr(
        Grader, "find_unparsable", lambda self, golds: asked.extend(golds) or real(self, golds)
    )
    script("prepare_openr1", *words, tmp_path / "o")
    assert sorted(asked + known) == sorted(f"x+{i}" for i in range(count)), "each once"
    script("prepare_openr1", *words, tmp_path / "whole")
    assert (tmp_path / "o" / "train.jsonl").read_bytes() == (tmp_path / "whole" / "train.jsonl").read_bytes()


def test_it_is_deterministic_and_new_settings_prepare_anew(script, tmp_path):
    source = write(tmp_path / "s.jsonl", [openr1(i) for i in range(1, 6)])
    words = ("--source", source, "--valid", "", "--train")
    for name in ("a", "b"):
        script("prepare_openr1", *words, ":3", "--output", tmp_path / name)
    assert (tmp_path / "a" / "train.jsonl").read_bytes() == (tmp_path / "b" / "train.jsonl").read_bytes()
    script("prepare_openr1", *words, ":2", "--output", tmp_path / "a")
    assert len(read(tmp_path / "a" / "train.jsonl")) == 2


LONG = "A train leaves the town at noon and drives with forty miles an hour to the sea; when does it arrive"


def test_test_problems_are_kept_out(script, tmp_path):
    test = write(tmp_path / "test.jsonl", [openr1(1), openr1(9, problem=LONG + " there?")])
    rows = [openr1(1), openr1(2), openr1(3, problem="Bob asks: " + LONG + ", says Ann?")]
    shown = script(
        "prepare_openr1", "--source", write(tmp_path / "s.jsonl", rows), "--output", tmp_path / "o",
        "--train", ":", "--valid", "", "--against", test,
    )  # fmt: skip
    assert "dropped 1: in test.jsonl, by text (row 1)" in shown
    assert "dropped 1: in test.jsonl, by 13-gram (row 3)" in shown
    assert [row["id"] for row in read(tmp_path / "o" / "train.jsonl")] == ["u2"]


@pytest.mark.parametrize(
    ("train", "test", "found"),
    [
        (["What is 2 + 3?"], ["what is $2+3$"], [(0, 0, "text")]),
        (["What is 2 + 3?"], ["What is 2 - 3?"], []),
        (["x", LONG], ["So: " + LONG.upper()], [(0, 1, "13-gram")]),
        ([" ".join(LONG.split()[:12])], [LONG], []),
        ([" ".join(LONG.split()[:13])], [LONG], [(0, 0, "13-gram")]),
        ([], ["x"], []),
        (["x"], [], []),
    ],
)
def test_contamination(train, test, found):
    assert find_contaminated(train, test) == found


def test_runs_by_hand():
    assert list_runs("a B, c d", length=3) == {"a b c", "b c d"}
    assert list_runs("a b", length=3) == set()
    assert normalise_text("  A\n b!") == "a b !"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--source", "nowhere.parquet"], "data not found"),
        (["--source", "no-such/data-set"], "did not load"),
        (["--source", "{list}"], "row 1: not a JSON object"),
        (["--source", "{broken}"], "row 2: not a JSON object"),
        (["--source", "{good}", "--train", "one"], "rows one: must look like 0:519"),
        (["--source", "{good}", "--valid", "50:60"], "valid rows 50:60: there are only 2 problems"),
        (["--source", "{good}", "--output", "{taken}"], "was not written by a prepare script"),
        (["--source", "{good}", "--format", "csv"], "--format csv: must be one of"),
    ],
)
def test_mistakes(script, tmp_path, capsys, words, message):
    (tmp_path / "taken").mkdir()
    write(tmp_path / "taken" / "train.jsonl", [])
    places = {
        "list": write(tmp_path / "list.jsonl", [[1]]),
        "good": write(tmp_path / "good.jsonl", [openr1(1), openr1(2)]),
        "broken": tmp_path / "broken.jsonl",
        "taken": tmp_path / "taken",
    }
    places["broken"].write_text(json.dumps(openr1(1)) + "\n{")
    given = ["--output", tmp_path / "o", "--train", ":", "--valid", ""]
    with pytest.raises(SystemExit) as caught:
        script("prepare_openr1", *given, *(word.format(**places) for word in words))
    assert caught.value.code == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1


@needs_shared
def test_openr1_as_the_grdpo_experiments_split_it(script, tmp_path):
    shown = script("prepare_openr1", "--source", OPENR1, "--output", tmp_path)
    meta = json.loads((tmp_path / "train.meta.json").read_text())
    assert meta["kept"] >= 0.98 * 2514
    assert f"kept {meta['kept']} of 2514 rows" in shown
    levels = json.loads((SHARED / "grdpo_question_in_levels.json").read_text())
    original = {row["problem"] for rows in levels.values() for row in rows}
    assert {row["problem"] for row in read(tmp_path / "train.jsonl")} == original
    answered = json.loads((SHARED / "grdpo_validation_qwen2.5-3b.json").read_text())
    assert [row["problem"] for row in read(tmp_path / "valid.jsonl")] == [row["problem"] for row in answered]


def answers(*texts):
    return [f"<answer>{text}</answer>" for text in texts]


def test_tiers_by_hand(script, tmp_path):
    small = {
        "a": answers(1, 0),
        "b": answers(0, 0),
        "c": answers(0, 0),
        "d": ["it is 1", "1"],
        "e": answers(1, 1),
    }
    large = {"a": answers(0, 0), "b": answers(0, 1), "c": answers(0, 0), "d": answers(0, 0), "f": answers(1)}
    for name, side in (("small", small), ("large", large)):
        rows = [{"problem": key, "answer": "1", "generations": texts} for key, texts in side.items()]
        write(tmp_path / f"{name}.jsonl", rows)
    words = ["--small", tmp_path / "small.jsonl", "--large", tmp_path / "large.jsonl", "--output"]
    shown = script("assign_tiers", *words, tmp_path / "t.jsonl")
    assert "1 easy, 1 medium, 2 hard" in shown
    assert "dropped 2 problems" in shown
    rows = {row["problem"]: row for row in read(tmp_path / "t.jsonl")}
    assert {key: row["tier"] for key, row in rows.items()} == {
        "a": "easy",
        "b": "medium",
        "c": "hard",
        "d": "hard",
    }
    assert (rows["a"]["small_pass_rate"], rows["b"]["large_pass_rate"]) == (0.5, 0.5)
    meta = json.loads((tmp_path / "t.meta.json").read_text())
    assert meta["tiers"] == {"easy": 1, "medium": 1, "hard": 2}
    shown = script("assign_tiers", *words, tmp_path / "u.jsonl", "--count", "any_format", "--min-right", 2)
    assert "1 easy, 0 medium, 3 hard" in shown, "only d's answers without a tag are right twice"
    test = write(
        tmp_path / "test.jsonl", [{"problem": " A.", "answer": "1"}, {"problem": "x", "answer": "1"}]
    )
    shown = script("assign_tiers", *words, tmp_path / "w.jsonl", "--against", test)
    assert "0 easy, 1 medium, 2 hard" in shown
    assert "dropped 1 problems: in test.jsonl, by text" in shown
    data = write(tmp_path / "data.jsonl", [{"id": "mine", "problem": "a", "answer": "1", "note": "kept"}])
    script("assign_tiers", *words, tmp_path / "v.parquet", "--data", data, "--format", "verl-parquet")
    assert {one.problem: one.tier for one in load_problems(tmp_path / "v.parquet")}["b"] == "medium"


@needs_shared
def test_tiers_of_the_published_answers(script, tmp_path):
    """Against a loop without the grader of this project: math-verify on the last tag, one by one."""
    import logging
    import re

    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    solved = {}
    for size in ("1.5b", "3b"):
        for row in json.loads((SHARED / f"grdpo_validation_qwen2.5-{size}.json").read_text()):
            golds, right = [parse(row["answer"]), parse(f"${row['answer']}$")], False
            for text in row["generations"]:
                own = text.partition(row["problem"])[2]
                tags = [tag.strip() for tag in re.findall(r"<answer>(.*?)</answer>", own, re.DOTALL)]
                tags = [tag for tag in tags if tag]
                for answer in [tags[-1], f"${tags[-1]}$"] if tags else []:
                    right = right or any(verify(gold, parse(answer)) for gold in golds)
            solved[size, row["problem"]] = right
    paths = [SHARED / f"grdpo_validation_qwen2.5-{size}.json" for size in ("1.5b", "3b")]
    script("assign_tiers", "--small", paths[0], "--large", paths[1], "--output", tmp_path / "t.jsonl")
    given = {row["problem"]: row["tier"] for row in read(tmp_path / "t.jsonl")}
    expected = {
        problem: "easy" if right else "medium" if solved["3b", problem] else "hard"
        for (size, problem), right in solved.items()
        if size == "1.5b"
    }
    assert given == expected


def test_tiers_with_the_tiny_model_alone(script, tmp_path):
    """The model, and itself with a fresh adapter: sampled, saved beside the output, not sampled again."""
    from lib.models import load_trainable, locate_model, save_adapter

    model = load_trainable(locate_model(ROOT / "data" / "tiny-qwen3"), "all-linear", rank=2, alpha=4, seed=1)
    save_adapter(model, tmp_path / "adapter")
    data = tmp_path / "data.jsonl"
    lines = (ROOT / "data" / "tiny" / "train.jsonl").read_text().splitlines(keepends=True)[:4]
    data.write_text("".join(lines))
    words = ("--data", data, "--large", tmp_path / "adapter", "--samples", 2, "--max-new-tokens", 24)
    shown = script("assign_tiers", *words, "--output", tmp_path / "t.jsonl")
    rows = read(tmp_path / "t.jsonl")
    assert [row["id"] for row in rows] == [json.loads(line)["id"] for line in lines]
    assert all(row["small_pass_rate"] == row["large_pass_rate"] for row in rows), (
        "a fresh adapter is the base"
    )
    assert not any(row["tier"] == "medium" for row in rows)
    assert (tmp_path / "t_answers" / "large" / "responses.parquet").exists()
    assert script("assign_tiers", *words, "--output", tmp_path / "t.jsonl") == shown


def test_both_sides_the_same_is_a_mistake(script, capsys):
    with pytest.raises(SystemExit):
        script("assign_tiers")
    assert "--small and --large are the same" in capsys.readouterr().err
