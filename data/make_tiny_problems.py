"""Make data/tiny/{train,valid,test}.jsonl: problems in three tiers, graded by what the tiny model can do.

    python data/make_tiny_problems.py

The ability test of the GRDPO experiments in small: the model answers each candidate 20 times (temperature
0.7), and the share of right answers, whatever their format, among those that state one decides:

    easy    at least 0.75       medium   0.35 to 0.65       hard   at most 0.2

Train problems are calculations the model may have met in its own training; valid and test problems are held
out of it (`Sum.held_out`), and no calculation stands in two files, in whatever wording.
"""

import argparse
import json
import random
import sys
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from tiny_text import draw_sum  # noqa: E402

from lib.batches import Problem  # noqa: E402
from lib.checkpoints import write_file  # noqa: E402
from lib.draws import SamplingParams  # noqa: E402
from lib.evaluation import evaluate_problems  # noqa: E402
from lib.grading import Grader  # noqa: E402
from lib.models import load_model, load_tokenizer, locate_model  # noqa: E402
from lib.prompts import encode_prompt, extract_any_answer  # noqa: E402
from lib.rewards import grade_groups  # noqa: E402
from lib.sampler import TransformersSampler  # noqa: E402

TIERS = {"easy": (0.75, 1.0), "medium": (0.35, 0.65), "hard": (0.0, 0.2)}
SIZES = {"train": 100, "valid": 20, "test": 30}  # problems per tier
SAMPLES = 20


def draw_candidates(rng, *, train, held_out):
    """Different calculations: `train` that the model may know, `held_out` that it has never seen."""
    wanted, found, seen = {False: train, True: held_out}, {False: [], True: []}, set()
    while any(len(found[kind]) < wanted[kind] for kind in wanted):
        one = draw_sum(rng)
        key = (one.a, one.op, one.b)
        if key not in seen and len(found[one.held_out]) < wanted[one.held_out]:
            seen.add(key)
            found[one.held_out].append(one)
    return found[False], found[True]


def measure_ability(model_path, sums, *, seed):
    """Share of right answers per calculation, among the completions that state an answer at all."""
    place = locate_model(model_path)
    tokenizer = load_tokenizer(place)
    problems = [Problem(f"{one.a}{one.op}{one.b}", one.question, str(one.answer)) for one in sums]
    with Grader() as grader:
        groups = evaluate_problems(
            TransformersSampler(load_model(place), tokenizer),
            problems,
            ask=partial(encode_prompt, tokenizer, style="answer_tag"),
            samples=SAMPLES,
            params=SamplingParams(temperature=0.7, max_new_tokens=48),
            grade=partial(grade_groups, style="answer_tag", grader=grader),
            seed=seed,
        )
    ability = []
    for group in groups:
        stated = [extract_any_answer(text, "answer_tag") is not None for text in group.completions]
        ability.append(sum(grade.answer_correct for grade in group.grades) / max(1, sum(stated)))
    return ability


def write_problems(path, chosen):
    """One JSON object a line; `chosen` is a list of (tier, calculation)."""
    lines = [
        {
            "id": f"{path.stem}-{tier}-{number:03d}",
            "problem": one.question,
            "answer": str(one.answer),
            "tier": tier,
        }
        for number, (tier, one) in enumerate(chosen)
    ]
    write_file(path, "".join(json.dumps(line) + "\n" for line in lines))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(HERE / "tiny-qwen3"))
    parser.add_argument("--output", type=Path, default=HERE / "tiny")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)

    train, held_out = draw_candidates(random.Random(options.seed), train=1500, held_out=700)
    ability = measure_ability(options.model, train + held_out, seed=options.seed)
    by_tier = {
        (tier, kind): [one for one, share in zip(train + held_out, ability, strict=True)
                       if low <= share <= high and one.held_out == kind]
        for tier, (low, high) in TIERS.items()
        for kind in (False, True)
    }  # fmt: skip
    options.output.mkdir(parents=True, exist_ok=True)
    taken = dict.fromkeys(by_tier, 0)
    for name, size in SIZES.items():
        chosen = []
        for tier in TIERS:
            pool, start = by_tier[tier, name != "train"], taken[tier, name != "train"]
            if len(pool) < start + size:
                raise SystemExit(f"{name}: only {len(pool) - start} candidates of tier {tier}, {size} needed")
            chosen += [(tier, one) for one in pool[start : start + size]]
            taken[tier, name != "train"] += size
        write_problems(options.output / f"{name}.jsonl", chosen)
    for (tier, kind), pool in by_tier.items():
        print(f"{tier}, {'held out' if kind else 'known'}: {len(pool)} candidates")


if __name__ == "__main__":
    main()
