"""pass@k, majority votes, and how sure one can be of them.

Everything here works on one row per problem, so that evaluate.py, check_eval.py and the training scripts
print numbers of the same origin.
"""

import random
from collections import Counter
from statistics import fmean

PASS_K = (1, 2, 5, 10)


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
    rng = random.Random(seed)
    means = sorted(fmean(rng.choices(values, k=len(values))) for _ in range(draws))
    tail = (1 - level) / 2
    return means[int(tail * draws)], means[min(draws - 1, int((1 - tail) * draws))]


def summarise(rows, *, intervals=True):
    """Everything one evaluation has to say, as a flat dict of numbers (intervals are pairs).

    rows   one dict per problem, each value a list over its samples: `correct` (the answer in the prompt's
           style is right), `answer_correct` (right whatever the format), `formatted`, `tokens`, `clipped`,
           `answers`, `timed_out`, `unparsed`
    Returns pass@k for k in PASS_K up to the smallest number of samples, maj@n, and the means.
    Raises ValueError if there is nothing to summarise.
    """
    if not rows or not all(row["correct"] for row in rows):
        raise ValueError("nothing to summarise: no problem, or a problem without samples")
    samples = min(len(row["correct"]) for row in rows)
    summary = {"problems": len(rows), "samples": samples}
    for k in PASS_K:
        if k <= samples:
            values = [pass_at_k(len(row["correct"]), sum(row["correct"]), k) for row in rows]
            summary[f"pass@{k}"] = fmean(values)
            if intervals:
                summary[f"pass@{k}_ci95"] = list(bootstrap_interval(values))
    summary[f"maj@{samples}"] = fmean(majority_correct(row["answers"], row["correct"]) for row in rows)
    both = [[c and f for c, f in zip(row["correct"], row["formatted"], strict=True)] for row in rows]
    summary["answer_and_format"] = fmean(map(fmean, both))
    for name, column in (
        ("answer", "answer_correct"),
        ("format", "formatted"),
        ("mean_length", "tokens"),
        ("clipped", "clipped"),
    ):
        summary[name] = fmean(fmean(row[column]) for row in rows)
    for column in ("timed_out", "unparsed"):
        summary["timeouts" if column == "timed_out" else column] = sum(sum(row[column]) for row in rows)
    return summary
