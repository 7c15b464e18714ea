"""What a completion earns: named parts, weights, and reward functions of your own.

    REWARDS = "correctness:1 answer_tag:1/3 tail_position:1/3 length_decay(start=800,end=1000):1/3"

One entry is `name(option=value,...):weight`; `path/to/file.py:function:weight` takes a function of your own,
in TRL's signature (keywords prompts, completions, completion_ids, answer, the other columns; a list of all
completions of a step in return) or in verl's (`compute_score(data_source, solution_str, ground_truth, ...)`).
"""

import ast
import functools
import importlib.util
import inspect
import math
import re
from dataclasses import dataclass
from fractions import Fraction

from lib.marker_rewards import MARKER_REWARDS
from lib.prompts import ends_with_answer, extract_answer, extract_any_answer, has_format, is_echo
from lib.settings import UserError, find_path

_ENTRY = re.compile(r"(?P<name>[^\s()]+\.py:\w+|\w+)(?:\((?P<options>[^)]*)\))?:(?P<weight>[^\s:()]+)")


@dataclass(frozen=True)
class Reward:
    """A named part of the total: weight times what `function` returns."""

    name: str
    weight: float
    function: object


@dataclass(frozen=True)
class Grade:
    """What there is to say about one completion: training, evaluation and re-grading all ask here."""

    answer: str | None  # extracted in the prompt's style
    correct: bool  # that answer is right
    answer_correct: bool  # the answer a reader would see is right, whatever the format
    formatted: bool
    timed_out: bool
    unparsed: bool


def grade_completions(completions, golds, *, style, grader):
    """One `Grade` per completion, graded against its gold answer."""
    strict = [extract_answer(text, style) for text in completions]
    seen = [
        extract_any_answer(text, style) if own is None else own
        for text, own in zip(completions, strict, strict=True)
    ]
    verdicts = grader.grade(strict + seen, [*golds, *golds])
    return [
        Grade(answer, one.correct, other.correct, has_format(text, style), one.timed_out, one.unparsed)
        for text, answer, one, other in zip(
            completions, strict, verdicts[: len(strict)], verdicts[len(strict) :], strict=True
        )
    ]


def grade_groups(groups, *, style, grader):
    """Fill `grades` of every group (sampled, or read from a file), and return the groups."""
    texts = [text for group in groups for text in group.completions]
    golds = [group.problem.answer for group in groups for _ in group.completions]
    grades = iter(grade_completions(texts, golds, style=style, grader=grader))
    for group in groups:
        group.grades = [next(grades) for _ in group.completions]
    return groups


def correctness(*, completions, answer, style, grader, **_):
    """1 if the last answer in the prompt's style equals the gold answer, else 0."""
    answers = [extract_answer(text, style) for text in completions]
    return [float(verdict.correct) for verdict in grader.grade(answers, answer)]


def answer_tag(*, completions, style, **_):
    """1 if there is an answer in the prompt's style (a closed, non-empty tag or box), else 0."""
    return [float(extract_answer(text, style) is not None) for text in completions]


def tail_position(*, completions, finish_reasons, style, **_):
    """1 if the answer is the last thing in the completion and the model stopped by itself, else 0."""
    return [
        float(reason == "stop" and ends_with_answer(text, style))
        for text, reason in zip(completions, finish_reasons, strict=True)
    ]


def length_decay(*, completions, completion_ids, prompts, problem, style, start=800, end=1000, **_):
    """1 up to `start` completion tokens, falling linearly to 0 at `end`.

    Saying nothing, or the prompt again, is short and earns 0 all the same.
    """
    return [
        0.0
        if is_echo(text, prompt, asked, style=style)
        else min(1.0, max(0.0, (end - len(ids)) / (end - start)))
        for text, ids, prompt, asked in zip(completions, completion_ids, prompts, problem, strict=True)
    ]


def good_accuracy(
    *, completions, style, grader, ngram_size=4, max_penalty=-0.5, factor=0.1, strict=False, **columns
):
    """1 for a right answer; a wrong one earns 0, or less the more it repeats itself.

        wrong:  factor * max_penalty * (1 - different n-grams / n-grams)

    n-grams are of `ngram_size` words in lower case. The last answer in the prompt's style counts; if there is
    none and not `strict`, a box, a tag or the last line, as in its source (wk222/TRL-ADPO and its verl port).
    ValueError for a gold answer that cannot be read as mathematics: there it made every answer right.
    """
    golds = columns["answer"]
    verdicts = grader.grade([extract_answer(text, style, strict=strict) for text in completions], golds)
    doubtful = [gold for gold, verdict in zip(golds, verdicts, strict=True) if verdict.unparsed]
    for index in grader.find_unparsable(doubtful):
        raise ValueError(f"the gold answer {doubtful[index]!r} cannot be read as mathematics")
    return [
        1.0 if verdict.correct else factor * max_penalty * measure_repetition(text, ngram_size)
        for text, verdict in zip(completions, verdicts, strict=True)
    ]


def measure_repetition(text, size):
    """Share of the word n-grams of a text that have stood there before."""
    words = text.lower().split()
    ngrams = [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


_FUNCTIONS = (correctness, answer_tag, tail_position, length_decay, good_accuracy, *MARKER_REWARDS)
BUILT_IN = {function.__name__: function for function in _FUNCTIONS}
_ADMITTED = {  # what the options of a function must satisfy: in words, and as a test
    "length_decay": ("0 <= start < end", lambda o: 0 <= o["start"] < o["end"]),
    "good_accuracy": (
        "a whole ngram_size >= 1, max_penalty <= 0 and factor >= 0",
        lambda o: (
            type(o["ngram_size"]) is int and o["ngram_size"] >= 1 > 0 >= o["max_penalty"] <= o["factor"]
        ),
    ),
}


def parse_rewards(spec, *, style, grader):
    """The rewards that a setting names, ready to be called: a list of `Reward`.

    style, grader   what the built-in functions are bound to
    UserError names the entry that is wrong: an unknown name or option, a bad weight, a missing file.
    """
    rewards, position = [], 0
    for match in _ENTRY.finditer(spec):
        if spec[position : match.start()].strip():
            break
        position = match.end()
        name, options = match["name"], _read_options(match)
        try:
            weight = float(Fraction(match["weight"]))
        except (ValueError, ZeroDivisionError):
            raise UserError(f"--rewards: {match['weight']!r} is no weight: {match.group()!r}") from None
        if ".py:" in name:
            function, name = _load_function(name, options), name.rpartition(":")[2]
        elif name in BUILT_IN:
            _check_options(name, options)
            function = functools.partial(BUILT_IN[name], style=style, grader=grader, **options)
        else:
            raise UserError(
                f"--rewards: no reward is called {name!r}; there are {', '.join(BUILT_IN)}, or file.py:name"
            )
        rewards.append(Reward(name, weight, function))
    if spec[position:].strip() or not rewards:
        raise UserError(f"--rewards: cannot read {spec[position:].strip()!r}: write name:weight")
    names = [reward.name for reward in rewards]
    if len(set(names)) < len(names):
        raise UserError("--rewards: the same name stands there twice")
    return rewards


def _read_options(match):
    options = {}
    for item in filter(None, (match["options"] or "").replace(" ", "").split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise UserError(f"--rewards: option {item!r} of {match['name']} must look like name=value")
        try:
            options[key] = {"true": True, "false": False}.get(value.lower())
            options[key] = ast.literal_eval(value) if options[key] is None else options[key]
        except (ValueError, SyntaxError):
            options[key] = value
    return options


def _check_options(name, options):
    """UserError for an option that a built-in function does not take, or a value it cannot work with."""
    defaults = BUILT_IN[name].__kwdefaults__ or {}
    unknown = sorted(set(options) - set(defaults))
    if unknown:
        takes = f"takes {', '.join(sorted(defaults))}" if defaults else "takes none"
        raise UserError(f"--rewards: {name} has no option {unknown[0]!r}; it {takes}")
    for key, value in options.items():
        if isinstance(value, str) or isinstance(value, bool) != isinstance(defaults[key], bool):
            raise UserError(f"--rewards: {name} cannot take {key}={value}, it is {defaults[key]} by default")
    admitted, holds = _ADMITTED.get(name, ("", lambda o: True))
    if not holds(defaults | options):
        found = ", ".join(f"{key}={value}" for key, value in (defaults | options).items())
        raise UserError(f"--rewards: {name} needs {admitted}, not {found}")


def import_function(place, option):
    """The function that `file.py:name` stands for; UserError says, as `option`, what is not there."""
    file_name, _, function_name = place.rpartition(":")
    file = find_path(file_name)
    if not file.is_file():
        raise UserError(f"{option}: no file {file}")
    module_spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except (SyntaxError, ImportError) as error:
        raise UserError(f"{option}: {file} cannot be imported: {error}") from None
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"{option}: {file} has no function {function_name!r}")
    return function


def _load_function(place, options):
    """A user's reward function from `file.py:name`, as one in TRL's signature."""
    function = import_function(place, "--rewards")
    chat = options.pop("chat", False)
    if "solution_str" in inspect.signature(function).parameters:
        return functools.partial(_call_verl, function, options)
    return functools.partial(_call_trl, function, options, chat)


def _call_verl(function, options, *, completions, answer, source, extra_info=None, **_):
    """Call verl's one-sample function for each completion; a dict counts by its `score`."""
    scores = []
    for i, text in enumerate(completions):
        info = extra_info[i] if extra_info else None
        score = function(
            data_source=source[i], solution_str=text, ground_truth=answer[i], extra_info=info, **options
        )
        scores.append(score["score"] if isinstance(score, dict) else score)
    return scores


def _call_trl(function, options, chat, *, prompts, completions, **columns):
    """Call TRL's function with everything there is, or with what it asks for if it takes no `**kwargs`."""
    if chat:
        completions = [[{"role": "assistant", "content": text}] for text in completions]
        prompts = [[{"role": "user", "content": text}] for text in prompts]
    given = {"prompts": prompts, "completions": completions, **columns, **options}
    parameters = inspect.signature(function).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        given = {parameter.name: given[parameter.name] for parameter in parameters if parameter.name in given}
    return function(**given)


def score_groups(rewards, groups):
    """Fill `rewards` (by name) and `reward` (the weighted total) of every group.

    None from a reward function means "does not apply": no part of the total, None in the log.
    Raises ValueError naming the function that returned too few or too many rewards, or one not finite.
    """
    columns = _gather_columns(groups)
    count = len(columns["completions"])
    totals, parts = [0.0] * count, {}
    for reward in rewards:
        values = [None if value is None else float(value) for value in reward.function(**columns)]
        if len(values) != count:
            raise ValueError(f"reward {reward.name} returned {len(values)} values for {count} completions")
        if not all(value is None or math.isfinite(value) for value in values):
            raise ValueError(f"reward {reward.name} returned a value that is not finite")
        totals = [total + reward.weight * (value or 0.0) for total, value in zip(totals, values, strict=True)]
        parts[reward.name] = values
    start = 0
    for group in groups:
        end = start + len(group.completions)
        group.rewards = {name: values[start:end] for name, values in parts.items()}
        group.reward = totals[start:end]
        start = end


def _gather_columns(groups):
    """What the functions are called with: lists over all completions of all groups."""
    problems = [group.problem for group in groups for _ in group.completions]
    keys = sorted({key for problem in problems for key in problem.columns})
    return {key: [problem.columns.get(key) for problem in problems] for key in keys} | {
        "prompts": [group.prompt for group in groups for _ in group.completions],
        "completions": [text for group in groups for text in group.completions],
        "completion_ids": [ids for group in groups for ids in group.completion_ids],
        "finish_reasons": [reason for group in groups for reason in group.finish_reasons],
        "problem": [problem.problem for problem in problems],
        "answer": [problem.answer for problem in problems],
        "tier": [problem.tier for problem in problems],
        "source": [problem.source for problem in problems],
    }
