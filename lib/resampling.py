"""Which problems are sampled again, how, and what came of it.

    SCHEDULE = "1: 2xT1.0; 100: 2xT1.0 2xT1.1,p0.99"    from step 1 on two more attempts, from 100 on four

A row says how one attempt is sampled, in the short form of `draws.parse_params`; what it does not say is as
in the first attempt. The next step begins with the first attempt again.
"""

import operator
import re
from statistics import fmean

from lib.draws import parse_params
from lib.settings import UserError

_CONDITION = re.compile(r"(correct|reward)\s*(>=|>)\s*(-?\d+\.?\d*|-?\.\d+)")


def parse_schedule(text, *, base, limit=None):
    """[(first step, [SamplingParams of each further attempt])], by step, from its one-line form.

    base    `SamplingParams` of the first attempt
    limit   at most so many further attempts; None is all of them
    UserError names the piece that is wrong.
    """
    schedule = []
    for entry in filter(None, (part.strip() for part in text.split(";"))):
        step, colon, rows = (part.strip() for part in entry.partition(":"))
        if not colon or not step.isdecimal() or int(step) < 1:
            raise UserError(
                f"--schedule: cannot read {entry!r}: write a step, a colon, rows, like 100: 2xT1.0"
            )
        if schedule and int(step) <= schedule[-1][0]:
            raise UserError(f"--schedule: step {step} must come after step {schedule[-1][0]}")
        attempts = []
        for row in rows.split():
            times, _, params = row.rpartition("x")
            if times and (not times.isdecimal() or int(times) < 1):
                raise UserError(f"--schedule: {times!r} in {row!r} is no number of attempts, like 2xT1.0")
            bolder = parse_params(params, option="--schedule", base=base)
            if bolder.temperature == 0:
                raise UserError(f"--schedule: at temperature 0 a whole group is one answer: {row!r}")
            attempts += [bolder] * int(times or 1)
        schedule.append((int(step), attempts[:limit]))
    return schedule


def rows_at(schedule, step):
    """The further attempts that there are at `step`; none before the first entry.

    >>> [rows_at([(1, ["a"]), (9, ["a", "b"])], step) for step in (1, 8, 9)]
    [['a'], ['a'], ['a', 'b']]
    """
    return next((rows for first, rows in reversed(schedule) if first <= step), [])


def parse_condition(text, *, group_size):
    """A function from a scored group to whether it is good enough, of `correct >= 1` or `reward > 0.5`.

    correct   how many completions are right, in the prompt's format
    reward    the largest reward of the group
    UserError says what is wrong.
    """
    found = _CONDITION.fullmatch(text.strip())
    if not found:
        raise UserError(
            f"--good-enough: cannot read {text!r}: write it like 'correct >= 1' or 'reward > 0.5'"
        )
    what, compare, limit = found[1], {">=": operator.ge, ">": operator.gt}[found[2]], float(found[3])
    if what == "correct" and (not compare(group_size, limit) or compare(0, limit)):
        answer = "every" if compare(0, limit) else "no"
        raise UserError(f"--good-enough {text!r} would hold for {answer} group of {group_size} completions")

    def is_good_enough(group):
        value = sum(grade.correct for grade in group.grades) if what == "correct" else max(group.reward)
        return compare(value, limit)

    return is_good_enough


def sort_attempts(groups):
    """A list per problem: the groups of its attempts, in order."""
    tries = {}
    for group in groups:
        tries.setdefault(group.problem.id, []).append(group)
    return list(tries.values())


def measure_resampling(groups, trained, is_good_enough):
    """Metrics of the attempts of one step.

    groups    of all attempts at all problems
    trained   those of them that are learned from
    completions/tokens counts the tokens of all of them; frac_advantage_zero, the trained groups in which
    nothing is pushed;
    resample/attempts counts groups beyond the first; given_up, problems that were never good enough;
    solve_rate_a, the share of the problems of attempt a (from 0) that it solved.
    """
    solved = [[is_good_enough(group) for group in tries] for tries in sort_attempts(groups)]
    tokens, kept = (
        sum(len(ids) for group in some for ids in group.completion_ids) for some in (groups, trained)
    )
    metrics = {
        "completions/tokens": tokens,
        "frac_advantage_zero": fmean(not any(group.advantage) for group in trained),
        "resample/attempts": len(groups) - len(solved),
        "resample/solved_by_resampling": sum(one[-1] and not one[0] for one in solved),
        "resample/given_up": sum(not one[-1] for one in solved),
        "resample/wasted_tokens": tokens - kept,
    }
    for attempt in range(max(map(len, solved))):
        metrics[f"resample/solve_rate_{attempt}"] = fmean(
            one[attempt] for one in solved if len(one) > attempt
        )
    return metrics
