"""The schedule of further attempts, the condition that ends them, and what is said about them."""

from types import SimpleNamespace

import pytest

from lib.draws import SamplingParams
from lib.resampling import measure_resampling, parse_condition, parse_schedule, rows_at, sort_attempts
from lib.settings import UserError

BASE = SamplingParams(repetition_penalty=1.2, max_new_tokens=9, phase="a: T0")
LAST_COMMIT = (
    "1: 2xT1.0; 100: 2xT1.0 2xT1.1,p0.99; 300: 4xT1.0 4xT1.1,p0.99; 700: 5xT1.0 6xT1.1,p0.99 5xT1.3,p0.97"
)


def test_the_schedule_of_the_original():
    schedule = parse_schedule(LAST_COMMIT, base=BASE)
    assert [(first, len(rows)) for first, rows in schedule] == [(1, 2), (100, 4), (300, 8), (700, 16)]
    row = rows_at(schedule, 10**6)[-1]
    assert (row.temperature, row.top_p, row.repetition_penalty, row.max_new_tokens) == (1.3, 0.97, 1.2, 9)
    assert row.phase == "a: T0", "what a row does not say is as in the first attempt"
    assert [len(rows_at(schedule, step)) for step in (1, 99, 100, 299, 300, 699, 700)] == [
        2,
        2,
        4,
        4,
        8,
        8,
        16,
    ]
    capped = parse_schedule(LAST_COMMIT, base=BASE, limit=3)
    assert rows_at(capped, 100) == rows_at(schedule, 100)[:3]
    assert rows_at(parse_schedule(LAST_COMMIT, base=BASE, limit=0), 700) == []


def test_a_schedule_may_begin_late_end_or_be_empty():
    schedule = parse_schedule(" 200: T1.1 ; 300: ", base=BASE)
    assert [len(rows_at(schedule, step)) for step in (199, 200, 300)] == [0, 1, 0]
    assert rows_at(parse_schedule("", base=BASE), 5) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2xT1.0", "cannot read '2xT1.0': write a step, a colon, rows"),
        ("0: T1", "cannot read '0: T1'"),
        ("one: T1", "cannot read 'one: T1'"),
        ("10: T1; 5: T1", "step 5 must come after step 10"),
        ("10: T1; 10: T1", "step 10 must come after step 10"),
        ("1: 0xT1", "'0' in '0xT1' is no number of attempts"),
        ("1: manyxT1", "'many' in 'manyxT1' is no number of attempts"),
        ("1: 2xZ1", "--schedule: cannot read 'Z1'"),
        ("1: 2x", "cannot read ''"),
        ("1: T0", "at temperature 0 a whole group is one answer"),
        ("1: T1,p2", "top_p must be > 0 and <= 1"),
    ],
)
def test_a_wrong_schedule_is_named(text, message):
    with pytest.raises(UserError, match=message):
        parse_schedule(text, base=BASE)


def make_group(*correct, reward=None, tokens=2, problem="p", advantage=0.0):
    return SimpleNamespace(
        problem=SimpleNamespace(id=problem),
        grades=[SimpleNamespace(correct=bool(right)) for right in correct],
        reward=reward or list(map(float, correct)),
        completion_ids=[[0] * tokens for _ in correct],
        advantage=[advantage] * len(correct),
    )


@pytest.mark.parametrize(
    ("condition", "good", "bad"),
    [
        ("correct >= 1", make_group(0, 1, 0), make_group(0, 0, 0)),
        ("correct>=2", make_group(0, 1, 1), make_group(0, 1, 0)),
        ("correct > 1", make_group(0, 1, 1), make_group(0, 1, 0)),
        ("reward > 0.5", make_group(0, 0, reward=[-1.0, 0.6]), make_group(1, 1, reward=[0.5, 0.5])),
        ("reward >= -1.5", make_group(0, 0, reward=[-2.0, -1.5]), make_group(0, 0, reward=[-2.0, -1.6])),
    ],
)
def test_the_condition(condition, good, bad):
    is_good_enough = parse_condition(condition, group_size=3)
    assert is_good_enough(good)
    assert not is_good_enough(bad)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "write it like 'correct >= 1' or 'reward > 0.5'"),
        ("correct", "cannot read 'correct'"),
        ("right >= 1", "cannot read"),
        ("correct = 1", "cannot read"),
        ("correct >= 4", "would hold for no group of 3 completions"),
        ("correct > 3", "would hold for no group"),
        ("correct >= 0", "would hold for every group"),
    ],
)
def test_a_wrong_condition_is_named(text, message):
    with pytest.raises(UserError, match=message):
        parse_condition(text, group_size=3)


def test_metrics_of_the_attempts():
    once, thrice, never = ({"problem": name} for name in "abc")
    groups = [make_group(1, 0, **once), make_group(0, 0, tokens=3, **thrice), make_group(0, 0, **never)]
    groups += [make_group(0, 0, tokens=5, **thrice), make_group(0, 0, **never)]
    groups += [make_group(1, 1, advantage=0.5, **thrice), make_group(0, 0, **never)]
    assert [len(tries) for tries in sort_attempts(groups)] == [1, 3, 3]
    assert sort_attempts(groups)[1] == [groups[1], groups[3], groups[5]]
    good = parse_condition("correct >= 1", group_size=2)
    metrics = measure_resampling(groups, [groups[0], groups[5], groups[6]], good)
    wasted = 2 * 3 + 2 * 5 + 2 * 2 + 2 * 2
    assert metrics == {
        "completions/tokens": wasted + 3 * 2 * 2,
        "frac_advantage_zero": pytest.approx(2 / 3),
        "resample/attempts": 4,
        "resample/solved_by_resampling": 1,
        "resample/given_up": 1,
        "resample/wasted_tokens": wasted,
        "resample/solve_rate_0": pytest.approx(1 / 3),
        "resample/solve_rate_1": 0,
        "resample/solve_rate_2": 0.5,
    }
    assert measure_resampling(groups, groups, good)["resample/wasted_tokens"] == 0
