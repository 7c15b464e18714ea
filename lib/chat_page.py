"""What the chat page shows, as plain values: messages, numbers, curves. The widgets are elsewhere."""

import functools
import html
import inspect
import json
import re

import gradio as gr
import pandas

from lib.checkpoints import write_json
from lib.conversation import AS_TYPED, find_answer
from lib.prompts import PROMPT_STYLES, split_thinking
from lib.settings import UserError

LATEX = [
    {"left": left, "right": right, "display": display}
    for left, right, display in (
        ("$$", "$$", True),
        ("\\[", "\\]", True),
        ("\\(", "\\)", False),
        ("$", "$", False),
    )
]
_CODE_OR_MATH = re.compile(
    r"(```.*?```|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$|\\\[.*?\\\]|\\\(.*?\\\))", re.DOTALL
)
_REASONS = {"length": "cut at the token limit", "stopped": "stopped by you"}

# Panels of the Run tab: title, and metrics or the head of their names. The rest gets a panel per head.
PANELS = (
    ("reward", ("reward", "reward_std")),
    ("share of answers", ("completions/correct", "completions/answer_correct", "completions/formatted")),
    ("held-out problems", ("eval/pass@1", "eval/pass@10", "eval/answer")),
    ("reward by part", "rewards/"),
    ("reward by tier", "tier/"),
    ("length [tokens]", ("completions/mean_length", "eval/mean_length")),
    ("clipped at the token limit", ("completions/clipped_ratio", "eval/clipped")),
    ("gradient norm", ("grad_norm",)),
    ("loss", ("loss",)),
)
NAMES = {
    "reward": "mean",
    "reward_std": "spread in a group",
    "completions/correct": "right",
    "completions/answer_correct": "right, any format",
    "completions/formatted": "right format",
    "completions/mean_length": "training",
    "completions/clipped_ratio": "training",
    "eval/answer": "right, any format",
    "eval/mean_length": "held-out",
    "eval/clipped": "held-out",
}
LAYOUT = {"fill_width": True, "delete_cache": (600, 3600)}  # files for download are deleted after an hour [s]
STYLE = "#plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); }"
MAX_POINTS = 400  # of a curve that are drawn


def warn(error):
    """Show a mistake as a message in the page."""
    gr.Warning(html.escape(str(error)), duration=10)


def report_errors(handler):
    """An event handler whose UserErrors are shown in the page, while every widget stays as it is."""

    @functools.wraps(handler)
    def handle(*inputs):
        try:
            return handler(*inputs)
        except UserError as error:
            warn(error)
            return gr.skip()

    @functools.wraps(handler)
    def stream(*inputs):
        try:
            yield from handler(*inputs)
        except UserError as error:
            warn(error)
            yield gr.skip()

    return stream if inspect.isgeneratorfunction(handler) else handle


def show_text(text):
    """A completion as Markdown: its formulas and code as they are, its tags visible as text."""
    pieces = _CODE_OR_MATH.split(text)
    pieces[::2] = [re.sub(r"<(?=[/!A-Za-z])", "&lt;", piece) for piece in pieces[::2]]
    return "".join(pieces)


def show_answer(message, *, style, verdict=""):
    """An answer as chat messages: its thinking folded away, then what it says, then what was found in it.

    message   content, and what else `Answer.record` knows
    verdict   what grading says about it
    """
    thinking, rest, over = split_thinking(message["content"], opened=bool(message.get("opened")))
    shown, growing = [], message.get("finish_reason", "stop") is None
    if thinking:
        status = "pending" if growing and not over else "done"
        folded = {"title": "Thinking", "status": status}
        shown.append({"role": "assistant", "content": show_text(thinking), "metadata": folded})
    notes = [] if growing else describe_answer(message, style)
    notes = [verdict] * bool(verdict) + notes
    tail = f"\n\n<small>{' · '.join(notes)}</small>" if notes else ""
    shown.append({"role": "assistant", "content": (show_text(rest) or "…") + tail})
    return shown


def describe_answer(message, style):
    """The extracted answer and the numbers of an answer, in a few words each."""
    found = find_answer(message["content"], style)
    missing = "no answer found" if style == AS_TYPED else f"no answer in the form {wrapping(style)}"
    notes = [f"<b>answer: {html.escape(found)}</b>" if found is not None else missing]
    if message.get("tokens"):
        notes.append(f"{message['tokens']} tokens")
    if message.get("tokens") and message.get("seconds"):
        notes.append(f"{message['tokens'] / message['seconds']:.0f} tokens/s")
    return notes + [_REASONS[reason] for reason in (message.get("finish_reason"),) if reason in _REASONS]


def wrapping(style):
    """How an answer is written in a prompt style, for display."""
    chosen = PROMPT_STYLES[style]
    return html.escape(f"{chosen.opening}…{chosen.closing}")


def show_conversation(conversation, *, style, growing=None):
    """A conversation, and the answer in progress where there is one, as chat messages."""
    shown = []
    for message in conversation.messages:
        if message["role"] == "user":
            shown.append({"role": "user", "content": show_text(message["content"])})
        else:
            shown += show_answer(message, style=style)
    return shown + (show_answer(vars(growing) | {"content": growing.text}, style=style) if growing else [])


def show_samples(answers, grades, *, style):
    """Several answers to one question, numbered; with grades (or none) each says whether it is right."""
    shown = []
    for number, answer in enumerate(answers):
        verdict = f"sample {number + 1}" if len(answers) > 1 else ""
        if grades:
            grade = grades[number]
            verdict = ("✓ right" if grade.correct else "✗ wrong") + (f" · {verdict}" if verdict else "")
            if grade.answer_correct and not grade.correct:
                verdict = verdict.replace("✗ wrong", "✗ right number, wrong form")
        shown += show_answer(vars(answer) | {"content": answer.text}, style=style, verdict=verdict)
    return shown


def describe_share(name, grades):
    """The heading of one side of a comparison."""
    if not grades:
        return f"### {name}"
    right, loose = sum(grade.correct for grade in grades), sum(grade.answer_correct for grade in grades)
    also = f", {loose} of {len(grades)} in any form" if loose != right else ""
    return f"### {name}: {right} of {len(grades)} right ({right / len(grades):.0%}){also}"


def smooth(values, weight):
    """An exponential moving average that starts unbiased; `weight` 0 changes nothing, towards 1 flattens.

    >>> smooth([1.0, 1.0, 4.0], 0.5)
    [1.0, 1.0, 2.7142857142857144]
    """
    total = mass = 0.0
    smoothed = []
    for value in values:
        total = weight * total + (1 - weight) * value
        mass = weight * mass + (1 - weight)
        smoothed.append(total / mass)
    return smoothed


def list_panels(curves):
    """(title, metric names) of every panel that has something to show.

    curves   lines of metrics by run name
    """
    known = dict.fromkeys(name for lines in curves.values() for line in lines for name in line)
    panels, shown = [], {"step", "num_tokens", "skipped_steps", "learning_rate", "step_time"}
    for title, wanted in PANELS:
        names = [n for n in known if n.startswith(wanted)] if isinstance(wanted, str) else wanted
        names = [name for name in names if name in known]
        shown |= {
            *names,
            *(name for name in known if name.startswith(("completions/", "eval/", "reward/", "frac_"))),
        }
        panels += [(title, names)] if names else []
    rest = {}
    for name in known:
        if name not in shown:
            rest.setdefault(name.partition("/")[0] if "/" in name else "other", []).append(name)
    return panels + list(rest.items())


def draw_panel(curves, names, smoothing):
    """A table (step, value, curve) of some metrics of some runs, smoothed and thinned."""
    parts = []
    for run, lines in curves.items():
        for name in names:
            points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
            if not points:
                continue
            steps, values = zip(*points, strict=True)
            every = -(-len(points) // MAX_POINTS)
            label = NAMES.get(name, re.sub("/(mean|reward)$", "", name.partition("/")[2]) or name)
            label = " · ".join([run] * (len(curves) > 1) + [label] * (len(names) > 1)) or label
            kept = {"step": steps[::-every][::-1], "value": smooth(values, smoothing)[::-every][::-1]}
            parts.append(pandas.DataFrame(kept | {"curve": label}))
    return pandas.concat(parts) if parts else pandas.DataFrame({"step": [], "value": [], "curve": []})


def describe_run(name, lines, state):
    """One line about a run: how far it is, and how it does.

    state   as `runs.read_state` returns it
    """
    step, total, finished = state
    if not lines:
        return f"**{name}** has not finished its first step yet."
    words = [
        f"**{name}**: step {step}" + (f" of {total}" if total else "") + (", finished" if finished else "")
    ]
    scores = [(line["eval/pass@1"], line["step"]) for line in lines if line.get("eval/pass@1") is not None]
    if scores:
        best = max(scores, key=lambda score: score[0])
        words.append(f"held-out pass@1 {scores[0][0]:.2f} at first, {best[0]:.2f} at best (step {best[1]})")
    words.append(f"reward {lines[0]['reward']:.2f} → {lines[-1]['reward']:.2f}")
    return " · ".join(words)


def describe_sample(row, rewards):
    """A completion's facts as Markdown: right or wrong, extracted against gold, reward by part."""
    found, gold = row["extracted"], row["answer"]
    facts = [
        ("verdict", {True: "✓ right", False: "✗ wrong"}.get(row["correct"], "not graded")),
        ("extracted answer", "none in the asked form" if found is None else f"`{found}`"),
        ("gold answer", f"`{gold}`"),
        ("tokens", f"{row['tokens']}" + {"length": " (cut at the limit)"}.get(row["finish_reason"], "")),
    ]
    if row["reward"] is not None:
        parts = ", ".join(f"{name} {row[name]:g}" for name in rewards if row.get(name) is not None)
        facts.append(("reward", f"**{row['reward']:.3f}**, from {parts}"))
    if row["advantage"] is not None:
        facts.append(("push (advantage)", f"{row['advantage']:+.4f}"))
    facts.append(("problem", f"`{row['problem_id']}`" + (f", {row['tier']}" if row["tier"] else "")))
    return "  \n".join(f"**{name}** {text}" for name, text in facts)


def read_preferences(path, defaults):
    """(what was remembered, a note) from a JSON file; a damaged one counts as none, and the note says so.

    defaults   settings by name: a remembered value of another type counts as damage
    """
    empty = {"model": None, "settings": {}, "system_prompts": []}
    try:
        saved = json.loads(path.read_text())
    except FileNotFoundError:
        return empty, ""
    except (OSError, ValueError):
        saved = None
    if isinstance(saved, dict) and _is_sound(empty | saved, defaults):
        return empty | saved, ""
    return empty, f"The remembered settings in {path} are damaged and were ignored."


def _is_sound(saved, defaults):
    """Are these preferences of the form that `write_preferences` leaves?"""
    kinds = {float: (int, float), type(None): (bool, type(None))}
    settings, prompts = saved["settings"], saved["system_prompts"]
    if not isinstance(settings, dict) or not isinstance(prompts, list):
        return False
    sound = all(
        name in defaults and isinstance(value, kinds.get(type(defaults[name]), type(defaults[name])))
        for name, value in settings.items()
    )
    known = settings.get("prompt", AS_TYPED) in (AS_TYPED, *PROMPT_STYLES)
    return sound and known and all(isinstance(prompt, str) for prompt in prompts)


def write_preferences(path, preferences):
    """Remember something for the next start."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, preferences)
