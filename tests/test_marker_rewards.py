"""The rewards of the adaptive-sampling experiments: what each pays, in every prompt style."""

import pytest

from lib.prompts import PROMPT_STYLES, wrap_answer
from tests.test_rewards import make_group, score

ALL = "format_exact:1 format_approximate:1 answer_match:1 number_match:1"


@pytest.mark.parametrize("style", PROMPT_STYLES)
@pytest.mark.parametrize("gold", ["4", "-1,234", "2/3", r"\frac{2}{3}", "0.5"])
def test_an_ideal_completion_earns_each_in_full(grader, style, gold):
    group = score(
        ALL, make_group([wrap_answer(gold, style, reasoning="so 1 + 1.")], answer=gold), grader, style
    )
    marks = {"answer_tag": 2, "boxed": 1, "think_answer": 3}[style]
    assert group.rewards == {
        "format_exact": [3],
        "format_approximate": [0.5 * marks],
        "answer_match": [5],
        "number_match": [4],
    }
    assert group.reward == [12 + 0.5 * marks]


@pytest.mark.parametrize("style", PROMPT_STYLES)
def test_saying_nothing_or_the_example_again_loses_everywhere(grader, style):
    group = score(ALL, make_group(["", PROMPT_STYLES[style].example]), grader, style)
    assert group.rewards["format_exact"] == [0, 0]
    assert max(group.rewards["format_approximate"]) < 0
    assert group.rewards["answer_match"] == [-4.5, -4.5]
    assert group.rewards["number_match"] == [-2.5, -2.5]


def test_format_counts_marks_and_wants_each_once(grader):
    texts = [
        "<think>a</think><answer>4</answer>",
        "a</think><answer>4</answer>",  # the template wrote <think>
        "a<answer>4</answer>",
        "<think>a</think><answer>4",
        "a</think>b</think><answer>4</answer>",
        "<think>a</think><answer>4</answer> bye",
    ]
    group = score(ALL, make_group(texts), grader, "think_answer")
    assert group.rewards["format_exact"] == [3, 3, 0, 0, 0, 0]
    assert group.rewards["format_approximate"] == [1.5, 1.5, 0.5, 0.5, 0.5, 1.5]


@pytest.mark.parametrize(
    ("answer", "gold", "match", "number"),
    [
        ("50", "50", 5, 4),
        (" 50 ", "50", 3.5, 4),
        ("50.0", "50", 3.5, 4),
        ("50 apples", "50", None, 4),  # the grader decides about units
        ("55", "50", 2, -1.5),
        ("-45", "-50", 2, -1.5),
        ("40", "50", 1.5, -1.5),
        ("39", "50", -2.5, -1.5),
        ("-50", "50", -2.5, -1.5),
        ("1", "0", -2.5, -1.5),
        ("x", "50", -4.5, -2.5),
        ("9" * 5000, "50", -4.5, -2.5),
        (r"\dfrac{1}{2}", r"\frac{1}{2}", 3.5, 4),
        ("x+1", "x+1", 5, None),
        ("1+x", "x+1", 3.5, None),
        ("7", "x+1", -2.5, None),
    ],
)
def test_what_an_answer_is_worth(grader, answer, gold, match, number):
    group = score(ALL, make_group([f"<answer>{answer}</answer>"], answer=gold), grader)
    if match is not None:
        assert group.rewards["answer_match"] == [match]
    if number is not None or gold == "x+1":
        assert group.rewards["number_match"] == [number]


def test_the_half_point_is_for_a_number_that_stands_behind_the_thinking(grader):
    texts = [
        "<think>so 4</think><answer>4</answer>",
        "<think>so <answer>4</answer></think> that is it.",
        "<think>so <answer>4</answer>",
        "<think>a</think><answer>4</answer> or rather 5",
    ]
    group = score("number_match:1", make_group(texts), grader)
    assert group.reward == [4, 3.5, 3.5, 3.5]
    opened = make_group(["so <answer>4</answer>", "4</think><answer>4</answer>"], prompt="2 + 2?<think>\n")
    assert score("number_match:1", opened, grader).reward == [3.5, 4]
