"""pass@k, majority votes, and how sure one can be of them.

Everything here works on one row per problem, so that evaluate.py, check_eval.py and the training scripts
print numbers of the same origin.
"""

from collections import Counter
from statistics import fmean

import numpy as np

LENGTH_PERCENTILES = (10, 50, 90, 99)


def pass_at_k(samples, correct, k):
    """Probability that at least one of k samples, drawn without replacement from those there are, is right.

        pass@k = 1 - C(n - c, k) / C(n, k)

    samples, correct   n and c, counts
    k                  1 <= k <= n
    Returns a float in [0, 1]. Raises ValueError if k or c is out of range.
    Source: Chen et al. 2021, "Evaluating Large Language Models Trained on Code", equation 1.

    >>> pass_at_k(10, 1, 5)
    0.5
    """
    if not 1 <= k <= samples or not 0 <= correct <= samples:
        raise ValueError(f"pass@{k} of {correct} right in {samples} samples is not defined")
    all_wrong = 1.0
    for i in range(k):
        all_wrong *= max(samples - correct - i, 0) / (samples - i)
    return 1.0 - all_wrong


def majority_correct(answers, correct):
    """Is the most frequent answer right? Missing answers (None) do not vote; a tie goes to the earliest.

    answers, correct   lists of equal length: what was answered, and whether it was right
    """
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return False
    return correct[answers.index(votes.most_common(1)[0][0])]


def bootstrap_interval(values, *, draws=2000, seed=0, level=0.95):
    """Percentile bootstrap interval of a mean over problems: (low, high).

    values   one number per problem; the problems are what is drawn again
    """
    return bootstrap_intervals([values], draws=draws, seed=seed, level=level)[0]


def bootstrap_intervals(columns, *, draws=2000, seed=0, level=0.95):
    """`bootstrap_interval` of several columns over the same problems, from the same draws."""
    values_CP = np.asarray(columns, dtype=np.float64)
    rng, count = np.random.default_rng(seed), values_CP.shape[1]
    means_DC = np.stack([values_CP[:, rng.integers(count, size=count)].mean(axis=1) for _ in range(draws)])
    tail = (1 - level) / 2
    low_C, high_C = np.quantile(means_DC, (tail, 1 - tail), axis=0, method="nearest")
    return list(zip(low_C.tolist(), high_C.tolist(), strict=True))


def list_k(samples):
    """The k of pass@k that are worth printing for n samples: 1, 2, 5, 10, 20, 50, ... and n itself.

    >>> list_k(16)
    [1, 2, 5, 10, 16]
    """
    steps = [digit * 10**power for power in range(len(str(samples))) for digit in (1, 2, 5)]
    return sorted({k for k in steps if k <= samples} | {samples})


def summarise(rows, *, intervals=True):
    """Everything one evaluation has to say, as a flat dict of numbers (intervals are pairs).

    rows   one dict per problem, each value a list over its samples: `correct` (the answer in the prompt's
           style is right), `answer_correct` (right whatever the format), `formatted`, `tokens` (length, in
           whatever unit), `clipped` (None where nobody knows), `answers`, `timed_out`, `unparsed`
    Returns pass@k for k in `list_k` of the smallest number of samples, maj@n, avg@n, means and quantiles.
    Raises ValueError if there is nothing to summarise.
    """
    if not rows or not all(row["correct"] for row in rows):
        raise ValueError("nothing to summarise: no problem, or a problem without samples")
    samples = min(len(row["correct"]) for row in rows)
    columns = {f"pass@{k}": pass_column(rows, k) for k in list_k(samples)}
    columns[f"maj@{samples}"] = [majority_correct(row["answers"], row["correct"]) for row in rows]
    columns[f"avg@{samples}"] = columns["pass@1"]
    columns["answer_and_format"] = [
        fmean(c and f for c, f in zip(row["correct"], row["formatted"], strict=True)) for row in rows
    ]
    columns["answer"] = [fmean(row["answer_correct"]) for row in rows]
    columns["format"] = [fmean(row["formatted"]) for row in rows]
    summary = {"problems": len(rows), "samples": samples}
    ranges = bootstrap_intervals(list(columns.values())) if intervals else [None] * len(columns)
    for (name, values), limits in zip(columns.items(), ranges, strict=True):
        summary[name] = fmean(values)
        if limits:
            summary[f"{name}_ci95"] = list(limits)
    summary["mean_length"] = fmean(fmean(row["tokens"]) for row in rows)
    lengths = [length for row in rows for length in row["tokens"]]
    for percent in LENGTH_PERCENTILES:
        summary[f"length_p{percent}"] = float(np.percentile(lengths, percent))
    if all(row["clipped"] is not None for row in rows):
        summary["clipped"] = fmean(fmean(row["clipped"]) for row in rows)
    summary["timeouts"] = sum(sum(row["timed_out"]) for row in rows)
    summary["unparsed"] = sum(sum(row["unparsed"]) for row in rows)
    return summary


def pass_column(rows, k):
    """pass@k of each problem."""
    return [pass_at_k(len(row["correct"]), sum(row["correct"]), k) for row in rows]


def summarise_by(rows, labels):
    """A `summarise` for each label (tier, data source); {} where there are none. No label is "other"."""
    if not any(labels):
        return {}
    names = list(dict.fromkeys(label or "other" for label in labels))
    return {
        name: summarise([row for row, label in zip(rows, labels, strict=True) if (label or "other") == name])
        for name in names
    }


def compare_pairs(rows, base_rows):
    """How much better `rows` are than `base_rows`, which answer the same problems in the same order.

    Problem by problem, so that what makes a problem hard for both is no noise: the interval is that of the
    mean difference, and narrower than two separate ones suggest. Returns a flat dict: `problems`, and
    `pass@k` (the difference) with `pass@k_ci95` for each k both have; `answer` and `format` likewise.
    """
    samples = min(len(row["correct"]) for row in [*rows, *base_rows])
    columns = {f"pass@{k}": [pass_column(side, k) for side in (rows, base_rows)] for k in list_k(samples)}
    for name, column in (("answer", "answer_correct"), ("format", "formatted")):
        columns[name] = [[fmean(row[column]) for row in side] for side in (rows, base_rows)]
    changes = [[ours - theirs for ours, theirs in zip(*sides, strict=True)] for sides in columns.values()]
    result = {"problems": len(rows)}
    for name, change, limits in zip(columns, changes, bootstrap_intervals(changes), strict=True):
        result |= {name: fmean(change), f"{name}_ci95": list(limits)}
    return result
