"""The agreement between prompt, completion and grader.

One place says how a problem is asked, how an answer is written, and how it is found again. Sampling, rewards,
evaluation, re-grading and the chat page all call these functions, so that a prompt can never ask for one
thing while the parser looks for another.

A style is chosen by name (`PROMPT = "answer_tag"`):

    answer_tag     ... <answer>42</answer>                        the prompt of the GRDPO experiments
    boxed          ... \\boxed{42}                                 what Qwen's math models were trained on
    think_answer   <think> ... </think><answer>42</answer>        reasoning kept apart from the answer
"""

import re
from dataclasses import dataclass

_ANSWER_IS = re.compile(r"answer\s*(?:is|:|=)+\s*:?\s*(.+)", re.IGNORECASE)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")


@dataclass(frozen=True)
class PromptStyle:
    """How to ask, and what a well-formed completion looks like."""

    name: str
    instruction: str  # the user message; {problem} is replaced
    example: str  # the example inside the instruction: repeating it is not answering
    opening: str  # what stands directly before an answer
    closing: str  # what stands directly behind it
    thinks: bool = False  # reasoning must stand in <think> ... </think> before the answer


PROMPT_STYLES = {
    style.name: style
    for style in (
        PromptStyle(
            name="answer_tag",
            instruction=(
                "Please solve the following math problem:\n"
                "In the end, provide the final answer, wrapping the answer in the answer tag.\n"
                "Example: `The answer is: <answer>42</answer>`\n\nProblem: {problem}"
            ),
            example="The answer is: <answer>42</answer>`",
            opening="<answer>",
            closing="</answer>",
        ),
        PromptStyle(
            name="boxed",
            instruction=(
                "Solve this problem step by step. Put the final answer in `\\boxed{}`.\n\nProblem: {problem}"
            ),
            example="`\\boxed{}`",
            opening="\\boxed{",
            closing="}",
        ),
        PromptStyle(
            name="think_answer",
            instruction=(
                "Solve this problem. Reason first, then give only the final answer, in this form:\n"
                "`<think>your reasoning</think><answer>42</answer>`\n\nProblem: {problem}"
            ),
            example="<think>your reasoning</think><answer>42</answer>`",
            opening="<answer>",
            closing="</answer>",
            thinks=True,
        ),
    )
}


def find_style(name):
    """Return the `PromptStyle` called `name`; ValueError lists the names there are."""
    if name not in PROMPT_STYLES:
        raise ValueError(f"unknown prompt style {name!r}; there are: {', '.join(PROMPT_STYLES)}")
    return PROMPT_STYLES[name]


def build_messages(problem, style, *, system=""):
    """The conversation that asks `problem` in `style`: a list of {role, content}."""
    user = {"role": "user", "content": find_style(style).instruction.replace("{problem}", problem)}
    return [{"role": "system", "content": system}, user] if system else [user]


def render_prompt(tokenizer, problem, style, *, system="", thinking=None):
    """Render a problem as the exact text the model continues, generation prompt included.

    thinking   True or False is passed to the chat template as `enable_thinking` (Qwen3); None leaves its
               default.
    A tokenizer without a chat template gets the plain messages, one paragraph each.
    """
    return render_messages(tokenizer, build_messages(problem, style, system=system), thinking=thinking)


def render_messages(tokenizer, messages, *, thinking=None):
    """Render a conversation (a list of {role, content}) as the exact text the model continues.

    The same as `render_prompt` for a single problem; longer conversations are for the chat page.
    """
    if not tokenizer.chat_template:
        return "\n\n".join(message["content"] for message in messages) + "\n\n"
    options = {} if thinking is None else {"enable_thinking": thinking}
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)


def encode_prompt(tokenizer, problem, style, *, system="", thinking=None):
    """Token ids of `render_prompt`. The template writes the special tokens, so none are added again."""
    text = render_prompt(tokenizer, problem, style, system=system, thinking=thinking)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def wrap_answer(answer, style, *, reasoning=""):
    """A well-formed completion in `style`: the inverse of `extract_answer`."""
    chosen = find_style(style)
    wrapped = f"{chosen.opening}{answer}{chosen.closing}"
    return f"<think>{reasoning}</think>{wrapped}" if chosen.thinks else reasoning + wrapped


def _last_answer_span(text, style):
    """(start, end, answer) of the last closed, non-empty answer in `text`, or None.

    `end` is behind the closing mark. Linear in the text: a completion may be 100,000 braces.
    """
    spans = _boxes(text) if style.closing == "}" else _tags(text, style)
    return next(((start, end, answer) for start, end, answer in spans if answer), None)


def _tags(text, style):
    """(start, end, content) of each closed tag, last one first."""
    start = text.rfind(style.opening, 0, max(text.rfind(style.closing), 0))
    while start >= 0:
        body = start + len(style.opening)
        end = text.find(style.closing, body)
        yield start, end + len(style.closing), text[body:end].strip()
        start = text.rfind(style.opening, 0, start)


def _boxes(text):
    """(start, end, content) of each balanced \\boxed{...}, last one first; braces inside may nest."""
    open_braces, boxes = [], []
    for brace in re.finditer(r"(?<!\\)[{}]", text):
        if brace.group() == "{":
            open_braces.append(brace.end())
        elif open_braces:
            body = open_braces.pop()
            if text.startswith("\\boxed{", body - len("\\boxed{")) and body >= len("\\boxed{"):
                boxes.append((body - len("\\boxed{"), brace.end(), text[body : brace.start()].strip()))
    return sorted(boxes, reverse=True)


def _without_echo(completion, style):
    return completion.replace(style.example, "") if style.example in completion else completion


def extract_answer(completion, style, *, strict=True):
    """The last answer written in `style`, stripped, or None; not strict, else a box, a tag, or the last line.

    Only closed and non-empty answers count, and the prompt's own example, repeated by the model, does not.

    >>> extract_answer("Is it <answer>4</answer>? No: <answer> 5 </answer>.", "answer_tag")
    '5'
    >>> extract_answer(r"so \\boxed{\\frac{1}{2}}", "boxed")
    '\\\\frac{1}{2}'
    """
    chosen = find_style(style)
    span = _last_answer_span(_without_echo(completion, chosen), chosen)
    if span or strict:
        return span[2] if span else None
    others = filter(None, (extract_answer(completion, name) for name in ("boxed", "answer_tag")))
    return next(others, completion.strip().rpartition("\n")[2].strip() or None)


def extract_any_answer(completion, style):
    """The answer a reader would see, whatever the format: in `style`, else tagged or boxed, else after the
    last "answer is", else the last number. None where there is nothing of the kind.

    Evaluation reports right answers by this rule beside pass@k, so that a gain in format alone can be told
    from a gain in mathematics.
    """
    text = _without_echo(completion, find_style(style))
    for name in (style, *(other for other in PROMPT_STYLES if other != style)):
        answer = extract_answer(text, name)
        if answer is not None:
            return answer
    stated = _ANSWER_IS.findall(text)
    numbers = _NUMBER.findall(stated[-1]) if stated else []
    if numbers:
        return numbers[0]
    if stated and stated[-1].strip(" .`*$"):
        return stated[-1].strip(" .`*$")
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else None


def ends_with_answer(completion, style):
    """Is the last answer the last thing in the completion, white space aside?"""
    chosen = find_style(style)
    text = _without_echo(completion, chosen)
    span = _last_answer_span(text, chosen)
    return span is not None and not text[span[1] :].strip()


def has_format(completion, style):
    """Is this completion well formed: an answer in `style`, nothing behind it, reasoning where it belongs?

    In `think_answer` exactly one `</think>` stands directly before the answer; the opening `<think>` may be
    missing because some chat templates write it into the prompt.
    """
    chosen = find_style(style)
    if not ends_with_answer(completion, style):
        return False
    if not chosen.thinks:
        return True
    before = completion[: _last_answer_span(completion, chosen)[0]].strip()
    return (
        before.endswith("</think>")
        and before.count("</think>") == 1
        and before.count("<think>") <= 1
        and (before.startswith("<think>") or "<think>" not in before)
    )


def strip_prompt(text, prompt):
    """`text` without a leading copy of `prompt`: saved generations of other tools often begin with it."""
    return text[len(prompt) :] if prompt and text.startswith(prompt) else text


def is_echo(completion, prompt, problem, *, style):
    """Does a completion say nothing, or nothing but its own prompt again?

    prompt   the rendered prompt; the user message without its special tokens counts as well
    """
    question = build_messages(problem, style)[-1]["content"]
    return not completion.replace(prompt.strip() or question, "").replace(question, "").strip()
