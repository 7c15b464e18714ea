"""pass@k against counting every subset, and the summary by hand."""

from itertools import combinations

import pytest

from lib.passk import (
    bootstrap_interval,
    compare_pairs,
    list_k,
    majority_correct,
    pass_at_k,
    summarise,
    summarise_by,
)


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


@pytest.mark.parametrize(
    ("samples", "ks"), [(1, [1]), (3, [1, 2, 3]), (10, [1, 2, 5, 10]), (64, [1, 2, 5, 10, 20, 50, 64])]
)
def test_which_k_are_worth_printing(samples, ks):
    assert list_k(samples) == ks


def test_a_paired_difference_is_surer_than_two_separate_numbers():
    """Problems half hard, half easy, one sample in two better in each: by hand +0.5, with no spread."""
    base = [make_row([i >= 10, False]) for i in range(20)]
    better = [make_row([i >= 10, True]) for i in range(20)]
    difference = compare_pairs(better, base)
    assert difference["problems"] == 20
    assert (difference["pass@1"], difference["pass@1_ci95"]) == (0.5, [0.5, 0.5])
    assert difference["pass@2"] == 0.5
    low, high = difference["pass@2_ci95"]
    assert low < 0.5 < high
    assert compare_pairs(base, better)["pass@1"] == -0.5


def test_summaries_by_label():
    rows = [make_row([True]), make_row([False]), make_row([True])]
    parts = summarise_by(rows, ["easy", "hard", ""])
    assert {name: one["pass@1"] for name, one in parts.items()} == {"easy": 1, "hard": 0, "other": 1}
    assert summarise_by(rows, ["", "", ""]) == {}


def test_lengths_and_what_nobody_knows():
    rows = [make_row([True] * 5, tokens=[1, 2, 3, 4, 100]), make_row([True] * 5, clipped=None)]
    summary = summarise(rows, intervals=False)
    assert summary["length_p50"] == 10
    assert "clipped" not in summary
    assert "pass@1_ci95" not in summary
