"""The agreement: what is asked for is what is found, and nothing else is."""

import time

import pytest

from lib.prompts import (
    PROMPT_STYLES,
    build_messages,
    encode_prompt,
    ends_with_answer,
    extract_answer,
    extract_any_answer,
    find_style,
    has_format,
    is_echo,
    render_prompt,
    strip_prompt,
    wrap_answer,
)

STYLES = list(PROMPT_STYLES)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("answer", ["5", "-1.5", r"\frac{1}{2}", r"\{1,\{2\}\}", "x < 3", "$5$"])
def test_round_trip(style, answer):
    completion = wrap_answer(answer, style, reasoning="2 + 3 = 5.")
    assert extract_answer(completion, style) == answer
    assert extract_any_answer(completion, style) == answer
    assert ends_with_answer(completion + "\n ", style)
    assert has_format(completion, style)
    assert not has_format(completion + " I hope this helps.", style)


@pytest.mark.parametrize("style", STYLES)
def test_nothing_and_the_bare_prompt_are_no_answer(style, tiny_tokenizer):
    question = build_messages("How many?", style)[-1]["content"]
    rendered = render_prompt(tiny_tokenizer, "How many?", style)
    for text in ("", "  \n", question, rendered):
        assert extract_answer(text, style) is None
        assert extract_any_answer(text, style) is None
        assert not has_format(text, style)
        assert not ends_with_answer(text, style)
        assert is_echo(text, rendered, "How many?", style=style)
    assert not is_echo("42", rendered, "How many?", style=style)


@pytest.mark.parametrize(
    ("style", "text", "expected"),
    [
        ("answer_tag", "<answer>1</answer> or <answer> 2 </answer>?", "2"),
        ("answer_tag", "<answer>1</answer> then <answer>2", "1"),
        ("answer_tag", "<answer></answer>", None),
        ("answer_tag", "<answer>3</answer><answer> </answer>", "3"),
        ("answer_tag", "</answer>4<answer>", None),
        ("answer_tag", r"\boxed{4}", None),
        ("answer_tag", "<answer>a\nb</answer>", "a\nb"),
        ("boxed", r"\boxed{1} and \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ("boxed", r"\boxed{1} and \boxed{2", "1"),
        ("boxed", r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        ("boxed", r"\boxed{}", None),
        ("boxed", r"\boxed{\boxed{7}}", "7"),
        ("boxed", "<answer>1</answer>", None),
    ],
)
def test_the_last_closed_answer_counts(style, text, expected):
    assert extract_answer(text, style) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("37 + 48 = 85.", "85"),
        ("The answer is 85. Numbers from 1 to 10 are fun.", "85"),
        ("I think it is 85, or maybe 86.", "86"),
        (r"so \boxed{12}", "12"),
        ("The final answer is: -3", "-3"),
        ("The answer is x + 1.", "1"),
        ("The answer is blue.", "blue"),
        ("1,234 in all", "1,234"),
        ("No idea.", None),
    ],
)
def test_a_readers_answer_whatever_the_format(text, expected):
    assert extract_any_answer(text, "answer_tag") == expected


@pytest.mark.parametrize(
    ("text", "formatted"),
    [
        ("<think>a</think><answer>1</answer>", True),
        ("a, as the template has opened it</think>\n\n<answer>1</answer>", True),
        ("<answer>1</answer>", False),
        ("<think>a</think> so <answer>1</answer>", False),
        ("<think>a<answer>1</answer></think>", False),
        ("<think>a</think></think><answer>1</answer>", False),
        ("x <think>a</think><answer>1</answer>", False),
        ("<think>a</think><answer>1</answer> bye", False),
    ],
)
def test_the_form_of_think_answer(text, formatted):
    assert has_format(text, "think_answer") is formatted


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    "hostile",
    ["{" * 100_000, r"\boxed{" * 20_000, "}" * 100_000, "<answer>" * 20_000, "<answer></answer>" * 9_000],
)
def test_hostile_text_takes_no_time(style, hostile):
    started = time.perf_counter()
    assert extract_answer(hostile, style) is None or "{" in hostile
    extract_any_answer(hostile, style)
    has_format(hostile, style)
    assert time.perf_counter() - started < 5


def test_the_chat_template_and_the_thinking_flag(tiny_tokenizer):
    prompt = render_prompt(tiny_tokenizer, "What is 1 + 1?", "answer_tag", system="Be brief.")
    assert prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    assert prompt.endswith("What is 1 + 1?<|im_end|>\n<|im_start|>assistant\n")
    quiet = render_prompt(tiny_tokenizer, "What is 1 + 1?", "answer_tag", thinking=False)
    assert quiet.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    ids = encode_prompt(tiny_tokenizer, "What is 1 + 1?", "answer_tag")
    assert tiny_tokenizer.decode(ids) == render_prompt(tiny_tokenizer, "What is 1 + 1?", "answer_tag")


def test_a_problem_with_braces_is_not_a_format_string():
    assert build_messages(r"Compute \frac{1}{2} {x}", "boxed")[0]["content"].endswith(r"\frac{1}{2} {x}")


def test_unknown_styles_are_named():
    with pytest.raises(ValueError, match="there are: answer_tag, boxed, think_answer"):
        find_style("xml")


def test_a_leading_prompt_is_stripped_and_nothing_else():
    assert strip_prompt("Q: 1? A: 2", "Q: 1?") == " A: 2"
    assert strip_prompt("A: 2", "Q: 1?") == "A: 2"
