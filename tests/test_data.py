"""The shipped problems and the text behind the tiny model: disjoint, held out, right, and made by the
scripts.
"""

import json
import random
import subprocess
import sys
from collections import Counter

import pytest

from lib.batches import load_problems
from lib.prompts import has_format
from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "data"))

from tiny_text import KINDS, QUESTIONS, Sum, draw_sum, near_miss

FILES = {name: load_problems(ROOT / "data" / "tiny" / f"{name}.jsonl") for name in ("train", "valid", "test")}


def find_sum(text):
    """The calculation behind a question, found by trying every wording."""
    numbers = [int(word) for word in "".join(c if c.isdigit() else " " for c in text).split()]
    for op, wordings in QUESTIONS.items():
        for wording in range(len(wordings)):
            if Sum(*numbers[:1], op, *numbers[1:], wording).question == text:
                return Sum(numbers[0], op, numbers[1], wording)
    raise AssertionError(f"no wording fits {text}")


@pytest.mark.parametrize("name", FILES)
def test_answers_are_right_and_tiers_of_equal_size(name, grader):
    problems = FILES[name]
    assert all(str(find_sum(problem.problem).answer) == problem.answer for problem in problems)
    assert not grader.find_unparsable([problem.answer for problem in problems])
    assert len(set(Counter(problem.tier for problem in problems).values())) == 1
    assert {problem.tier for problem in problems} == {"easy", "medium", "hard"}


def test_no_calculation_is_in_two_files_and_the_held_out_ones_are_held_out():
    keys = {
        name: {(one.a, one.op, one.b) for one in (find_sum(problem.problem) for problem in problems)}
        for name, problems in FILES.items()
    }
    assert sum(map(len, keys.values())) == len(set().union(*keys.values())) == sum(map(len, FILES.values()))
    assert len(FILES["test"]) >= 60
    for name in FILES:
        held_out = [find_sum(problem.problem).held_out for problem in FILES[name]]
        assert not any(held_out) if name == "train" else all(held_out)


def test_steps_end_in_the_answer_and_every_equation_holds():
    rng = random.Random(0)
    for _ in range(500):
        one = draw_sum(rng)
        equations = one.steps.rstrip(".").split(", ")
        for equation in equations:
            left, right = equation.split(" = ")
            assert eval(left) == int(right)
        assert int(equations[-1].split(" = ")[1]) == one.answer
        assert near_miss(one.answer, rng) != one.answer
        assert one.answer >= 0


def test_about_an_eighth_is_held_out():
    rng = random.Random(1)
    drawn = [one for one in (draw_sum(rng) for _ in range(6000)) if max(one.a, one.b) > 9]
    share = sum(one.held_out for one in drawn) / len(drawn)
    assert 0.08 < share < 0.18
    assert sum(kind[0] for kind in KINDS) == 100


def test_the_model_maker_runs_and_writes_a_loadable_model(tmp_path):
    words = ["--text-steps", "2", "--habit-steps", "2", "--batch-size", "4"]
    script = ROOT / "data" / "make_tiny_model.py"
    subprocess.run(
        [sys.executable, script, "--output", tmp_path / "m", *words], check=True, capture_output=True
    )
    import make_tiny_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert AutoModelForCausalLM.from_pretrained(tmp_path / "m").config.model_type == "qwen3"
    shipped = (ROOT / "data" / "tiny-qwen3" / "tokenizer.json").read_text()
    assert (tmp_path / "m" / "tokenizer.json").read_text() == shipped, "the shipped tokenizer is the script's"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    rng = random.Random(0)
    examples = [make_tiny_model.draw_example(tokenizer, rng) for _ in range(300)]
    well_formed = sum(has_format(completion, "answer_tag") for _, completion in examples) / len(examples)
    assert 0.03 < well_formed < 0.3, "badly behaved, not hopeless"
    assert all(json.dumps(prompt) for prompt, _ in examples)
