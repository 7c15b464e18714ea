"""The ability test that makes easy, medium and hard: what can a small model solve, what only a large one?

    easy     the small model has at least MIN_RIGHT right answers among its samples
    medium   only the large one has
    hard     neither has

    python data/assign_tiers.py --data problems.jsonl --small Qwen/Qwen2.5-1.5B-Instruct \\
        --large Qwen/Qwen2.5-3B-Instruct --output problems_with_tiers.jsonl
    python data/assign_tiers.py --small small.json --large large.json --output tiers.jsonl   # saved answers
    python data/assign_tiers.py --large runs/grdpo                                           # the tiny model

SMALL and LARGE are models (sampled here, resumed where interrupted) or saved answers in any format that
check_eval.py reads (no model is loaded). Written are the problems with `tier`, `small_pass_rate` and
`large_pass_rate`, and a .meta.json; a problem that one side has no answers to is dropped and counted.
"""

import sys
from collections import Counter
from functools import partial
from pathlib import Path
from statistics import fmean

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[:2]]

from preparing import find_seen, write_problems  # noqa: E402

from lib.batches import TIERS, load_problems  # noqa: E402
from lib.checkpoints import write_json  # noqa: E402
from lib.grading import Grader  # noqa: E402
from lib.regrading import pair_up  # noqa: E402
from lib.responses import read_responses  # noqa: E402
from lib.rewards import grade_groups  # noqa: E402
from lib.settings import UserError, current_settings, find_path, run_script  # noqa: E402

# --- what is read
DATA: str | None = None  # problems; none takes those of the saved answers, else data/tiny/train.jsonl
SMALL = "data/tiny-qwen3"  # model, adapter or run folder, hub id, or saved answers
LARGE = "data/tiny-qwen3"  # the same, of the abler model
AGAINST: str | None = None  # test problems: whatever stands there, too, is dropped

# --- the test
SAMPLES = 10  # >= 1, answers per problem and model
MIN_RIGHT = 1  # >= 1, so many right answers are solving a problem
COUNT = "in_style"  # in_style | any_format: which right answers count
TEMPERATURE = 0.7  # >= 0, of the samples
MAX_NEW_TOKENS = 1000  # >= 1, tokens per answer
PROMPT: str | None = None  # answer_tag | boxed | think_answer: none takes the file's, else answer_tag
SEED = 1  # every draw is a function of it
ROWS = 1024  # >= 1, answers decoded at once

# --- what is written
OUTPUT = "data/tiers/problems.jsonl"  # file; answers of models go to a folder beside it
FORMAT = "jsonl"  # jsonl | verl-parquet


def has_answers(path):
    """Is this saved answers (else a model)?"""
    place = find_path(path)
    return place.is_file() or (place / "responses.parquet").is_file()


def sample_answers(model, folder, problems, grader):
    """Let a model answer the problems, into an evaluation folder that resumes."""
    from lib.evaluation import Engine, Journal, choose_sampling, evaluate_problems
    from lib.models import load_tokenizer, locate_model
    from lib.prompts import encode_prompt
    from lib.provenance import hash_input

    place, style = locate_model(model), PROMPT or "answer_tag"
    tokenizer = load_tokenizer(place)
    params = choose_sampling({}, {"temperature": TEMPERATURE, "max_new_tokens": MAX_NEW_TOKENS})
    how = {"ask": partial(encode_prompt, tokenizer, style=style), "samples": SAMPLES, "params": params}
    how |= {"grade": partial(grade_groups, style=style, grader=grader), "seed": SEED}
    adapter = place.adapter and hash_input(place.adapter / "adapter_model.safetensors")
    said = {"model": place.base, "adapter": adapter, "style": style, "samples": SAMPLES, "seed": SEED}
    said |= vars(params) | {"problems": [problem.id for problem in problems]}
    with Journal(folder, said) as journal:
        if not journal.finished:
            with Engine([place], tokenizer, max_rows=ROWS).answering_as(place) as sampler:
                groups = evaluate_problems(sampler, problems, journal=journal, **how)
            journal.finish(groups, style=style)


def classify(small, large, *, min_right):
    """The tier of a problem from the two lists of right and wrong answers.

    >>> classify([True, False], [False, False], min_right=1), classify([False], [True], min_right=1)
    ('easy', 'medium')
    """
    if sum(small) >= min_right:
        return "easy"
    return "medium" if sum(large) >= min_right else "hard"


def drop_seen(items, text_of):
    """(those that are not in AGAINST, {text: where it was seen} of the others)."""
    texts = [text_of(item) for item in items]
    seen = find_seen(texts, AGAINST)
    left = [item for index, item in enumerate(items) if index not in seen]
    return left, {texts[index]: reason for index, reason in seen.items()}


def write_result(rows, meta, output):
    """Write the problems and their .meta.json, and print how many are in each tier."""
    output.parent.mkdir(parents=True, exist_ok=True)
    write_problems(output, rows, split="train", verl=FORMAT == "verl-parquet")
    counts = Counter(row["tier"] for row in rows)
    write_json(output.with_suffix(".meta.json"), meta | {"problems": len(rows), "tiers": counts})
    print(", ".join(f"{counts[tier]} {tier}" for tier in TIERS) + f": {output}")
    for side in ("small", "large"):
        rate = fmean(row[f"{side}_pass_rate"] for row in rows)
        print(f"  {side} model: {rate:.3f} of its answers are right")
    for reason, count in meta["dropped"].items():
        print(f"  dropped {count} problems: {reason}")


def main():
    output = find_path(OUTPUT)
    saved = [has_answers(path) for path in (SMALL, LARGE)]
    if SMALL == LARGE:
        raise UserError("--small and --large are the same: name the abler model or its answers as --large")
    sides = []
    with Grader() as grader:
        data = DATA or (None if all(saved) else "data/tiny/train.jsonl")
        problems = load_problems(data, grader=grader) if data else []
        problems, dropped = drop_seen(problems, lambda one: one.problem)
        for name, path, is_saved in zip(("small", "large"), (SMALL, LARGE), saved, strict=True):
            if not is_saved:
                folder = output.with_name(output.stem + "_answers") / name
                sample_answers(path, folder, problems, grader)
                path = folder
            answered, style = read_responses(path, style=PROMPT)
            sides.append(grade_groups(answered, style=style, grader=grader))
    small, large = sides
    pairs, rows, known = pair_up(small, large), [], {one.problem: one for one in problems}
    one_sided = len(small) + len(large) - 2 * len(pairs)
    pairs, more = drop_seen(pairs, lambda pair: small[pair[0]].problem.problem)
    for i, j in pairs:
        problem = known.get(small[i].problem.problem, small[i].problem)
        right = [
            [grade.correct if COUNT == "in_style" else grade.answer_correct for grade in one.grades]
            for one in (small[i], large[j])
        ]
        row = {"id": problem.id, "problem": problem.problem, "answer": problem.answer}
        row |= {"source": problem.source, "tier": classify(*right, min_right=MIN_RIGHT)}
        row |= {"small_pass_rate": fmean(right[0]), "large_pass_rate": fmean(right[1])}
        rows.append(problem.columns | row)
    if not rows:
        raise UserError(
            "the two sides have no problem in common" + ", or all are in --against" * bool(AGAINST)
        )
    meta = {"source": [SMALL, LARGE], "revision": None, "settings": current_settings(main)}
    reasons = Counter((dropped | more).values()) + Counter({"only one side has answers to it": one_sided})
    write_result(rows, meta | {"dropped": reasons}, output)


if __name__ == "__main__":
    run_script(main)
