"""What a completion earns, the setting that says so, and other people's reward functions."""

import pytest

from lib.batches import Problem
from lib.prompts import build_messages, render_prompt, wrap_answer
from lib.rewards import grade_completions, grade_groups, parse_rewards, score_groups
from lib.sampler import Group
from lib.settings import UserError

DEFAULT = "correctness:1 answer_tag:1/3 tail_position:1/3 length_decay(start=10,end=20):1/3"


def make_group(completions, *, answer="4", lengths=None, reasons=None, prompt="2 + 2?", **columns):
    problem = Problem("p", "2 + 2?", answer, "easy", "src", columns)
    ids = [[0] * length for length in lengths or [5] * len(completions)]
    return Group(
        problem,
        prompt,
        [1],
        ids,
        completions,
        reasons or ["stop"] * len(ids),
        [[0.0] * len(row) for row in ids],
    )


def score(spec, group, grader, style="answer_tag"):
    score_groups(parse_rewards(spec, style=style, grader=grader), [group])
    return group


@pytest.mark.parametrize("style", ["answer_tag", "boxed", "think_answer"])
def test_an_ideal_completion_earns_everything(grader, style):
    group = score(DEFAULT, make_group([wrap_answer("4", style, reasoning="2 + 2 = 4.")]), grader, style)
    assert group.reward == [pytest.approx(2.0)]
    assert group.rewards == {"correctness": [1], "answer_tag": [1], "tail_position": [1], "length_decay": [1]}


@pytest.mark.parametrize("style", ["answer_tag", "boxed", "think_answer"])
def test_an_empty_completion_and_the_bare_prompt_earn_nothing(grader, style, tiny_tokenizer):
    rendered = render_prompt(tiny_tokenizer, "2 + 2?", style)
    question = build_messages("2 + 2?", style)[-1]["content"]
    group = make_group(["", " \n", question, rendered], answer="42", prompt=rendered)
    assert score(DEFAULT, group, grader, style).reward == [0.0] * 4


def test_each_part_alone(grader):
    tagged = "<answer>4</answer>"
    group = make_group(
        [tagged, tagged + " Bye.", "4", "<answer>5</answer>", tagged, tagged, tagged],
        lengths=[5, 5, 5, 5, 10, 15, 25],
        reasons=["stop"] * 4 + ["stop", "stop", "length"],
    )
    score(DEFAULT, group, grader)
    assert group.rewards["correctness"] == [1, 1, 0, 0, 1, 1, 1]
    assert group.rewards["answer_tag"] == [1, 1, 0, 1, 1, 1, 1]
    assert group.rewards["tail_position"] == [1, 0, 0, 1, 1, 1, 0], "a clipped completion has no tail"
    assert group.rewards["length_decay"] == [1, 1, 1, 1, 1, 0.5, 0]
    assert group.reward[5] == pytest.approx(1 + 1 / 3 + 1 / 3 + 0.5 / 3)


def test_grades_tell_answer_from_format(grader):
    texts = ["<answer>4</answer>", "It is 4.", "<answer>4</answer> Bye.", "<answer>5</answer>", ""]
    grades = grade_completions(texts, ["4"] * 5, style="answer_tag", grader=grader)
    assert [grade.correct for grade in grades] == [True, False, True, False, False]
    assert [grade.answer_correct for grade in grades] == [True, True, True, False, False]
    assert [grade.formatted for grade in grades] == [True, False, False, True, False]
    groups = grade_groups([make_group(texts[:2]), make_group(texts[2:])], style="answer_tag", grader=grader)
    assert [grade for group in groups for grade in group.grades] == grades


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "cannot read ''"),
        ("correctness", "cannot read 'correctness'"),
        ("correctness:1 oops", "cannot read 'oops'"),
        ("correctnes:1", "no reward is called 'correctnes'; there are correctness, answer_tag"),
        ("correctness:heavy", "'heavy' is no weight"),
        ("correctness:1/0", "'1/0' is no weight"),
        ("correctness:1 correctness:2", "the same name stands there twice"),
        ("length_decay(start=9,end=3):1", "needs 0 <= start < end"),
        ("length_decay(begin=9):1", "no option 'begin'; it takes end, start"),
        ("correctness(x=1):1", "no option 'x'; it takes none"),
        ("length_decay(start):1", "must look like name=value"),
        ("length_decay(start=soon):1", "cannot take start=soon, it is 800 by default"),
        (
            "good_accuracy(ngram=4):1",
            "no option 'ngram'; it takes factor, max_penalty, ngram_size, strict",
        ),
        ("good_accuracy(ngram_size=0):1", "needs a whole ngram_size >= 1"),
        ("good_accuracy(ngram_size=1.5):1", "needs a whole ngram_size >= 1"),
        ("good_accuracy(max_penalty=0.5):1", "max_penalty <= 0 and factor >= 0, not .*max_penalty=0.5"),
        ("good_accuracy(strict=1):1", "cannot take strict=1, it is False by default"),
        ("good_accuracy(factor=-1):1", "factor >= 0, not .*factor=-1"),
        ("nowhere.py:f:1", "no file /.*nowhere.py"),
        ("broken.py:f:1", "cannot be imported"),
        ("mine.py:g:1", "has no function 'g'"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path, monkeypatch, grader, spec, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("def f(:")
    (tmp_path / "mine.py").write_text("def f(completions, **_): return [0.0 for _ in completions]")
    with pytest.raises(UserError, match=message):
        parse_rewards(spec, style="answer_tag", grader=grader)


def test_functions_of_other_people(tmp_path, grader):
    file = tmp_path / "mine.py"
    file.write_text(
        "def trl(prompts, completions, completion_ids, answer, level, **kwargs):\n"
        "    assert len(prompts) == len(completions) == len(completion_ids) == len(answer)\n"
        "    return [None if c == 'skip' else float(len(c) + n) for c, n in zip(completions, level)]\n"
        "def chatty(completions, bonus=0.0):\n"
        "    return [bonus if c[0]['content'].startswith('b') else 0.0 for c in completions]\n"
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    right = (data_source, solution_str, ground_truth) == ('src', 'b', '4')\n"
        "    return {'score': float(right), 'pred': 'b'}\n"
        "def short(completions, **_): return [1.0]\n"
        "def endless(completions, **_): return [float('inf') for _ in completions]\n"
    )
    spec = f"{file}:trl:1 {file}:chatty(chat=true,bonus=0.5):2 {file}:compute_score:10"
    group = score(spec, make_group(["aaa", "b", "skip"], level=2), grader)
    assert group.rewards == {"trl": [5.0, 3.0, None], "chatty": [0, 0.5, 0], "compute_score": [0, 1, 0]}
    assert group.reward == [5.0, 14.0, 0.0]
    with pytest.raises(ValueError, match="short returned 1 values for 3"):
        score(f"{file}:short:1", make_group(["a", "b", "c"]), grader)
    with pytest.raises(ValueError, match="endless returned a value that is not finite"):
        score(f"{file}:endless:1", make_group(["a"]), grader)


REPEATED = [  # a wrong completion, and what it costs at (4, -0.5, 0.1) and at (3, -1, 0.1)
    ("one two three four five six seven eight nine ten", 0, 0),
    ("a b c d " * 5, -0.0382353, -0.0777778),
    ("the " * 100, -0.0494845, -0.0989796),
    ("x y " * 8, -0.0423077, -0.0857143),
    ("A b C d a B c D", -0.0100, -0.0333333),
    (" ".join(f"w{i}" for i in range(20)) + " p q r s p q r s", -0.0020, -0.0076923),
    ("one two three", 0, 0),
    ("one two three four", 0, 0),
    ("", 0, 0),
]


@pytest.mark.parametrize(("text", "default", "of_the_recipe"), REPEATED)
def test_a_wrong_answer_costs_what_it_repeats(grader, text, default, of_the_recipe):
    recipe = "ngram_size=3,max_penalty=-1.0,factor=0.1"
    for options, cost in (
        ("", default),
        ("(strict=true)", default),
        (f"({recipe})", of_the_recipe),
        (f"({recipe},strict=true)", of_the_recipe),
    ):
        group = score(f"good_accuracy{options}:1", make_group([text], answer="42"), grader)
        assert group.reward == [pytest.approx(cost, abs=5e-8)]


def test_a_right_answer_earns_one_however_it_is_said(grader):
    boxed = [
        r"so \boxed{42}",
        "the " * 100 + r"\boxed{42}",
        r"\boxed{1} or \boxed{42}",
        r"\boxed{42} or \boxed{1}",
    ]
    group = score("good_accuracy:1", make_group(boxed, answer="42"), grader, "boxed")
    assert group.reward == [1, 1, 1, 0], "the last box counts"
    half = make_group(
        [r"\boxed{\frac{1}{2}}", r"\boxed{\dfrac{1}{2}}", r"\boxed{\{1, 2\}}"], answer=r"\frac{1}{2}"
    )
    assert score("good_accuracy:1", half, grader, "boxed").reward == [1, 1, 0]
    texts = ["<answer> 42 </answer>", "First some words.\n42", r"\boxed{42}"]
    assert score("good_accuracy:1", make_group(texts, answer="42"), grader).reward == [1, 1, 1]
    strict = score("good_accuracy(strict=true):1", make_group(texts, answer="42"), grader)
    assert strict.reward == [1, 0, 0], "what pass@k counts"


@pytest.mark.parametrize(
    ("text", "earned"),
    [
        (r"so \boxed{42}", 1),
        ("so <answer> 42 </answer>", 1),
        ("First some words.\n42\n\n", 1),
        ("the " * 100 + r"\boxed{42}", 1),
        (r"\boxed{42} as \boxed{1}", 0),
        ("First 42,\nthen <answer>1</answer>\n42", 0),
        ("<answer>42</answer> or \\boxed{1}", 1),  # the prompt's style comes first
        ("42\nor not", 0),
        ("", 0),
    ],
)
def test_what_is_right_where_the_format_is_not_asked_for(grader, text, earned):
    """The spec's examples: a box, a tag, or a bare last line."""
    assert score("good_accuracy:1", make_group([text], answer="42"), grader).reward == [earned]
    if "<answer>" not in text:
        strict = score("good_accuracy(strict=true):1", make_group([text], answer="42"), grader)
        assert strict.reward[0] <= 0


def test_an_unreadable_gold_answer_is_an_error_and_not_a_right_answer(grader):
    with pytest.raises(ValueError, match=r"gold answer '\?\?\?' cannot be read"):
        score("good_accuracy:1", make_group(["<answer>4</answer>"], answer="???"), grader)
    unreadable = make_group(["<answer>???</answer>", "<answer>4</answer>"], answer="4")
    assert score("good_accuracy:1", unreadable, grader).reward == [0, 1], "an unreadable answer is only wrong"
