"""What saved answers are worth: graded, summed up, compared in pairs; the same numbers as evaluate.py's."""

import inspect

from lib.grading import Grader
from lib.passk import compare_pairs, summarise, summarise_by
from lib.rewards import import_function
from lib.settings import UserError, find_path


def row_of(grades, lengths, clipped):
    """What `passk.summarise` wants to know about one problem: grades, lengths, and which were cut off."""
    return {
        "correct": [grade.correct for grade in grades],
        "answer_correct": [grade.answer_correct for grade in grades],
        "formatted": [grade.formatted for grade in grades],
        "answers": [grade.answer for grade in grades],
        "timed_out": [grade.timed_out for grade in grades],
        "unparsed": [grade.unparsed for grade in grades],
        "tokens": lengths,
        "clipped": clipped,
    }


def rows_of(answered, *, count=None):
    """(rows for `passk.summarise`, unit of their lengths): tokens where the file or `count` says them.

    count   text -> number of tokens, for files that do not say; without it lengths are characters
    """
    told = all(one.tokens is not None for one in answered)
    measure = count or len
    return [
        row_of(
            one.grades,
            one.tokens if told else [measure(text) for text in one.completions],
            None if one.finish_reasons is None else [reason == "length" for reason in one.finish_reasons],
        )
        for one in answered
    ], "tokens" if told or count else "characters"


def pair_up(answered, others):
    """Indices (i, j) of the same problems in two lists, by text and answer; repeated ones in their order."""
    places = {}
    for j, one in enumerate(others):
        places.setdefault(_identity(one), []).append(j)
    pairs = []
    for i, one in enumerate(answered):
        if places.get(_identity(one)):
            pairs.append((i, places[_identity(one)].pop(0)))
    return pairs


def _identity(one):
    return " ".join(one.problem.problem.split()), one.problem.answer


def count_with(tokenizer):
    """A function from a text to its number of tokens; None without a tokenizer."""
    if tokenizer is None:
        return None
    from tokenizers import Tokenizer

    file = find_path(tokenizer) / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"--tokenizer: no file {file}")
    loaded = Tokenizer.from_file(str(file))
    return lambda text: len(loaded.encode(text, add_special_tokens=False).ids)


def describe_answered(answered, count):
    """(rows, summary) of a graded file; the summary has one of each tier and data source in it."""
    rows, unit = rows_of(answered, count=count)
    summary = summarise(rows) | {"length_in_tokens": unit == "tokens"}
    for name in ("tier", "source"):
        parts = summarise_by(rows, [getattr(one.problem, name) for one in answered])
        if parts:
            summary["tiers" if name == "tier" else "data_sources"] = parts
    return rows, summary


def compare_files(files):
    """What each file is better in than the last one, on the problems they share; {} for a single file."""
    differences, (base_path, base, base_rows, *_) = {}, files[-1]
    for path, answered, rows, *_ in files[:-1]:
        pairs = pair_up(answered, base)
        if not pairs:
            raise UserError(f"{path} and {base_path} have no problem in common: nothing to compare")
        differences[f"{path} - {base_path}"] = compare_pairs(
            [rows[i] for i, _ in pairs], [base_rows[j] for _, j in pairs]
        )
    return differences


def find_disagreements(files, grader, other):
    """(gold, answer, right by `grader`, right by `other`) of each answer on which the two differ, once."""
    pairs = dict.fromkeys(
        (one.problem.answer, grade.answer)
        for _, answered, *_ in files
        for one in answered
        for grade in one.grades
        if grade.answer is not None
    )
    golds, answers = [gold for gold, _ in pairs], [answer for _, answer in pairs]
    sides = [[verdict.correct for verdict in one.grade(answers, golds)] for one in (grader, other)]
    return [row for row in zip(golds, answers, *sides, strict=True) if row[2] != row[3]]


def open_grader(name, *, seconds=5.0):
    """The `Grader` a setting names: standard, string (texts compared), math_verify (its parse and verify, as
    they are), or file.py:function, called as function(answer, gold) in a worker that can be killed."""
    if name in ("standard", "string", "math_verify"):
        return Grader(seconds=seconds, judge=None if name == "standard" else name)
    function = import_function(name, "--grader") if ".py:" in name else None
    if function is None or "solution_str" in inspect.signature(function).parameters:
        kinds = "standard, string, math_verify or file.py:function with function(answer, gold)"
        raise UserError(f"--grader {name}: must be {kinds}")
    file, _, function_name = name.rpartition(":")
    return Grader(seconds=seconds, judge=f"{find_path(file)}:{function_name}")
