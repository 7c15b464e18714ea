"""Problems and steps: bad rows are named, and what a step works on is a function of (seed, step) alone."""

import json
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest

from lib.batches import Problem, Steps, drop_long_prompts, load_problems
from lib.settings import UserError
from tests.conftest import SHARED


def write_rows(path, rows):
    path.write_text(
        "".join(json.dumps(row) + "\n" if not isinstance(row, str) else row + "\n" for row in rows)
    )
    return path


def make_problems(**tiers):
    return [Problem(f"{tier}{n}", "?", "1", tier) for tier, count in tiers.items() for n in range(count)]


def test_jsonl_and_parquet_and_verl_are_the_same_problems(tmp_path):
    rows = [
        {"problem": "1 + 1?", "answer": "2", "tier": "easy", "id": "a", "source": "s", "level": 3},
        {"problem": "2 + 2?", "answer": 4, "tier": None, "id": 7, "source": "s", "level": 5},
    ]
    verl = [
        {
            "data_source": row["source"],
            "prompt": [{"role": "system", "content": "x"}, {"role": "user", "content": row["problem"]}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(row["answer"])},
            "extra_info": {"split": "train", "index": 0},
        }
        for row in rows
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(verl), tmp_path / "verl.parquet")
    first = load_problems(write_rows(tmp_path / "rows.jsonl", rows))
    assert [(p.id, p.answer, p.tier, p.source) for p in first] == [
        ("a", "2", "easy", "s"),
        ("7", "4", "", "s"),
    ]
    assert first[0].columns == {"level": 3}
    second = load_problems(tmp_path / "verl.parquet")
    assert [(p.problem, p.answer, p.source) for p in second] == [("1 + 1?", "2", "s"), ("2 + 2?", "4", "s")]
    assert second[0].columns["extra_info"] == {"split": "train", "index": 0}


GOOD = {"problem": "1 + 1?", "answer": "2"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([GOOD, {"problem": "x"}], "row 2: field answer: missing; the row has problem"),
        ([{"question": "x", "answer": "1"}], "row 1: field problem: missing"),
        ([GOOD, {"problem": " ", "answer": "1"}], "row 2: field problem: must be a text that is not empty"),
        ([{"problem": "x", "answer": ""}], "row 1: field answer: must be a text"),
        ([{"problem": "x", "answer": ["1"]}], "row 1: field answer: must be a text"),
        ([{"problem": "x", "answer": True}], "row 1: field answer: must be a text"),
        ([GOOD | {"tier": "extreme"}], "row 1: field tier: must be one of easy, medium, hard"),
        ([GOOD | {"id": "a"}, GOOD | {"id": "a"}], "row 2: field id: 'a' is that of row 1 already"),
        ([GOOD, "{not json"], "row 2: not a JSON object"),
        (["[1, 2]"], "row 1: not a JSON object"),
        ([], "has no rows"),
        (
            [{"reward_model": {}, "prompt": [{"role": "user", "content": "x"}]}],
            "field reward_model: has no ground_truth",
        ),
        (
            [{"reward_model": {"ground_truth": "1"}, "prompt": "x"}],
            "field prompt: must be a list of messages",
        ),
        ([GOOD, GOOD | {"answer": "???"}], "row 2: field answer: '\\?\\?\\?' cannot be read as mathematics"),
    ],
)
def test_a_bad_row_is_named_with_file_row_and_field(tmp_path, grader, rows, message):
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match=message) as caught:
        load_problems(path, grader=grader)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.jsonl", "data not found: /.*nowhere.jsonl"),
        ("no/such-data-set", "hub data set no/such-data-set did not load"),
        ("notes.txt", "problems are read from .jsonl and .parquet"),
        ("broken.parquet", "is not a parquet file"),
    ],
)
def test_missing_and_unreadable_data(tmp_path, monkeypatch, name, message):
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "broken.parquet").write_text("x")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        load_problems(name)


COUNTS = {"easy": 2, "medium": 2, "hard": 1}


def test_a_step_is_a_function_of_seed_and_number_alone():
    problems = make_problems(easy=7, medium=11, hard=5)
    forward = [Steps(problems, COUNTS, seed=3)[k] for k in range(60)]
    steps = Steps(problems, COUNTS, seed=3)
    assert [steps[k] for k in reversed(range(60))] == forward[::-1]
    assert [Steps(problems, COUNTS, seed=4)[k] for k in range(60)] != forward
    assert Counter(p.tier for p in forward[17]) == COUNTS


@pytest.mark.parametrize(("size", "count"), [(7, 2), (7, 3), (5, 5), (6, 4), (9, 2), (3, 1), (11, 8)])
def test_every_pass_has_each_problem_once_and_no_step_one_twice(size, count):
    steps = Steps(make_problems(medium=size), {"medium": count}, seed=1)
    given = [problem.id for k in range(size * 12) for problem in steps[k]]
    for k in range(size * 12):
        assert len(set(given[k * count : (k + 1) * count])) == count
    passes = [given[start : start + size] for start in range(0, len(given), size)]
    assert all(len(set(one)) == size for one in passes)
    assert len({tuple(one) for one in passes}) > 1 or size == count == 1


def test_an_epoch_is_one_pass_over_the_medium_tier():
    assert Steps(make_problems(easy=50, medium=11, hard=5), COUNTS, seed=1).epoch_steps == 6
    assert Steps(make_problems(**{"": 12}), {None: 5}, seed=1).epoch_steps == 3


def test_a_tier_smaller_than_its_count_is_an_error():
    with pytest.raises(UserError, match="tier hard has 1 problems, but a step takes 2"):
        Steps(make_problems(easy=5, medium=5, hard=1), COUNTS | {"hard": 2}, seed=1)
    with pytest.raises(UserError, match="at least one problem"):
        Steps(make_problems(easy=5), {"easy": 0}, seed=1)


def test_long_prompts_are_dropped_and_counted(capsys):
    problems = make_problems(easy=3)
    lengths = {"?": 4}
    assert drop_long_prompts(problems, lambda text: [0] * lengths[text], limit=4) == problems
    assert capsys.readouterr().out == ""
    mixed = [*problems, Problem("long", "!", "1")]
    assert drop_long_prompts(mixed, lambda text: [0] * (9 if text == "!" else 4), limit=4) == problems
    assert "dropped 1 of 4 problems" in capsys.readouterr().out
    with pytest.raises(UserError, match="the shortest has 4 tokens"):
        drop_long_prompts(problems, lambda text: [0] * 4, limit=3)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the published split is not here")
def test_the_published_split():
    tiers = json.loads((SHARED / "grdpo_question_in_levels.json").read_text())
    problems = [
        Problem(str(row["Index"]), row["problem"], row["answer"], tier)
        for tier, rows in tiers.items()
        for row in rows
    ]
    assert Counter(p.tier for p in problems) == {"easy": 70, "medium": 229, "hard": 220}
    steps = Steps(problems, COUNTS, seed=1)
    assert steps.epoch_steps == 115
    seen = [problem for k in range(115) for problem in steps[k]]
    assert len({p.id for p in seen if p.tier == "medium"}) == 229
    assert all(len({p.id for p in steps[k]}) == 5 for k in range(500))
