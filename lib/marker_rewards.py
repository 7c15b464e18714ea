"""The four rewards of the adaptive-sampling experiments: format and answer, each in an exact and a soft form.

Together an ideal completion earns 3 + 0.5 per mark + 5 + 4. Source: whaaaaaatt/adaGRPO. Differs: the marks
are those of the prompt's style; there the prompt asked for others, and the exact form could never be paid.
"""

import re

from lib.grading import normalise, read_number
from lib.prompts import count_marks, extract_answer, find_written, has_format, split_thinking

_NUMBER = re.compile(
    r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+|/[1-9]\d*)?|[+-]?\\[dt]?frac\{\d+\}\{[1-9]\d*\}"
)


def format_exact(*, completions, style, **_):
    """3 for a completion that is well formed in the prompt's style, else 0."""
    return [3.0 * has_format(text, style) for text in completions]


def format_approximate(*, completions, style, **_):
    """0.5 for each mark of the style that stands there exactly once, -0.5 for each that does not."""
    return [
        sum(0.5 if count == 1 else -0.5 for count in count_marks(text, style).values())
        for text in completions
    ]


def answer_match(*, completions, answer, style, grader, **_):
    """5 for the gold answer letter by letter, 3.5 for an equal one, less for a number near it, else a loss.

    2 within 10 %, 1.5 within 20 %, -2.5 for another number, -4.5 for no answer or one that is no number.
    Equal is what the grader says, blanks around it aside; nothing is near a gold answer that is no number.
    """
    found = [find_written(text, style) for text in completions]
    verdicts = grader.grade([own for own, _ in found], answer)
    return [
        5.0 if written == gold else 3.5 if verdict.correct else _score_distance(own, gold)
        for (own, written), gold, verdict in zip(found, answer, verdicts, strict=True)
    ]


def _score_distance(answer, gold):
    """What a wrong answer earns for being near."""
    value, truth = (read_number(normalise(text or "")) for text in (answer, gold))
    if value is None:
        return -4.5
    distance = abs(value - truth) if truth is not None else None
    if distance is None or distance > abs(truth) / 5:
        return -2.5
    return 2.0 if distance <= abs(truth) / 10 else 1.5


def number_match(*, completions, answer, prompts, style, **_):
    """3.5 if the first number of the answer is the gold one, and 0.5 more if it also ends what was written.

    The half is for the same number being the last one behind the thinking, so that an answer that stands in
    the thinking only does not earn it. -1.5 for another number, -2.5 for none. None, which is no part of the
    total, where the gold answer is no number.
    """
    scores = []
    for text, gold, prompt in zip(completions, answer, prompts, strict=True):
        truth = read_number(normalise(gold))
        numbers = _find_numbers(extract_answer(text, style) or "")
        if truth is None:
            scores.append(None)
        elif not numbers:
            scores.append(-2.5)
        elif numbers[0] != truth:
            scores.append(-1.5)
        else:
            _, rest, _ = split_thinking(text, opened=prompt.rstrip().endswith("<think>"))
            scores.append(3.5 + 0.5 * (_find_numbers(rest)[-1:] == [truth]))
    return scores


def _find_numbers(text):
    values = [read_number(normalise(found)) for found in _NUMBER.findall(text)]
    return [value for value in values if value is not None]


MARKER_REWARDS = (format_exact, format_approximate, answer_match, number_match)
