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


def measure_resampling(tries, trained, is_good_enough):
    """Metrics of the attempts of one step.

    tries     a list per problem: the groups of its attempts, in order
    trained   those of all these groups that are learned from
    resample/attempts counts groups beyond the first; given_up, problems that were never good enough;
    solve_rate_a, the share of the problems of attempt a (from 0) that it solved.
    """
    solved = [[is_good_enough(group) for group in groups] for groups in tries]
    tokens, kept = (
        sum(len(ids) for group in groups for ids in group.completion_ids)
        for groups in ([group for groups in tries for group in groups], trained)
    )
    metrics = {
        "resample/attempts": sum(len(groups) - 1 for groups in tries),
        "resample/solved_by_resampling": sum(one[-1] and not one[0] for one in solved),
        "resample/given_up": sum(not one[-1] for one in solved),
        "resample/wasted_tokens": tokens - kept,
    }
    for attempt in range(max(map(len, tries))):
        metrics[f"resample/solve_rate_{attempt}"] = fmean(
            one[attempt] for one in solved if len(one) > attempt
        )
    return metrics
