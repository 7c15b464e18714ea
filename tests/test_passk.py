"""pass@k against counting every subset, and the summary by hand."""

from itertools import combinations

import pytest

from lib.passk import bootstrap_interval, majority_correct, pass_at_k, summarise


@pytest.mark.parametrize("samples", [1, 2, 5, 10])
def test_pass_at_k_equals_counting_every_subset(samples):
    for correct in range(samples + 1):
        outcomes = [True] * correct + [False] * (samples - correct)
        for k in range(1, samples + 1):
            subsets = list(combinations(outcomes, k))
            assert pass_at_k(samples, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize("bad", [(10, 1, 0), (10, 1, 11), (10, 11, 1), (10, -1, 1)])
def test_undefined_pass_at_k(bad):
    with pytest.raises(ValueError, match="not defined"):
        pass_at_k(*bad)


def test_majority():
    assert majority_correct(["4", "5", "4", None], [True, False, True, False])
    assert not majority_correct(["5", "4", "4", "5"], [False, True, True, False]), (
        "a tie goes to the earliest"
    )
    assert not majority_correct([None, None], [False, False])


def test_the_interval_holds_the_mean_and_narrows():
    few, many = [0.0, 1.0] * 10, [0.0, 1.0] * 500
    low, high = bootstrap_interval(few)
    assert low < 0.5 < high
    narrow_low, narrow_high = bootstrap_interval(many)
    assert high - low > 3 * (narrow_high - narrow_low)
    assert bootstrap_interval(few) == (low, high), "seeded"


def make_row(correct, **changes):
    n = len(correct)
    return {
        "correct": correct,
        "answer_correct": correct,
        "formatted": [True] * n,
        "answers": ["4" if right else "5" for right in correct],
        "timed_out": [False] * n,
        "unparsed": [False] * n,
        "tokens": [10] * n,
        "clipped": [False] * n,
    } | changes


def test_summary_by_hand():
    rows = [
        make_row([True, False], formatted=[False, True], tokens=[5, 7], clipped=[True, False]),
        make_row(
            [False, False], answer_correct=[True, False], timed_out=[True, True], unparsed=[False, True]
        ),
    ]
    summary = summarise(rows)
    assert summary["problems"], summary["samples"] == (2, 2)
    assert summary["pass@1"] == 0.25
    assert summary["pass@2"] == 0.5
    assert "pass@5" not in summary
    assert summary["maj@2"] == 0.5
    assert summary["answer_and_format"] == 0.0
    assert summary["answer"] == 0.5
    assert summary["format"] == 0.75
    assert summary["mean_length"] == 8.0
    assert summary["clipped"] == 0.25
    assert summary["timeouts"] == 2
    assert summary["unparsed"] == 1
    assert summary["pass@1_ci95"][0] <= 0.25 <= summary["pass@1_ci95"][1]


def test_nothing_to_summarise():
    with pytest.raises(ValueError, match="nothing to summarise"):
        summarise([])
    with pytest.raises(ValueError, match="nothing to summarise"):
        summarise([make_row([])])
