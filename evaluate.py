"""Sample k answers per problem with a model or a checkpoint, and report pass@k.

    python evaluate.py --model runs/grdpo                              # the best checkpoint of a run
    python evaluate.py --model runs/grdpo --compare base               # and is it better than its base?
    python evaluate.py --model runs/grdpo --checkpoints all            # pass@k over the steps of a run
    python evaluate.py --model Qwen/Qwen3-1.7B --data my_problems.jsonl --max-new-tokens 2000
    python evaluate.py --data their.parquet --problem-column question --answer-column final

pass@k is the probability that at least one of k samples is right: the answer extracted in the prompt's style
equals the gold answer. Beside it stand right answers whatever the format, and right format, so that the two
can be told apart. Prompt, thinking and sampling are those the checkpoint was trained with, unless set here.
Interrupted (Ctrl-C, kill -9, power cut) and started again, it goes on where it was; finished, it prints its
table again. `check_eval.py --responses FOLDER` grades the saved answers once more.
"""

from functools import partial
from pathlib import Path

from lib.batches import load_problems, longest_prompt, refuse_duplicates
from lib.checkpoints import write_json
from lib.contamination import find_contaminated
from lib.engines import choose_engines
from lib.evaluation import (  # noqa: F401  part of this script for others
    Engine,
    Journal,
    choose_sampling,
    evaluate_problems,
    list_checkpoints,
    save_evaluation,
    summarise_groups,
)
from lib.grading import Grader
from lib.models import load_tokenizer, locate_model
from lib.prompts import encode_prompt, find_style
from lib.provenance import hash_input
from lib.regrading import compare_files, describe_answered
from lib.responses import read_responses
from lib.rewards import grade_groups
from lib.settings import find_path, run_script
from lib.tables import draw_pass_curves, draw_step_curve, print_difference, print_summary

# --- what is evaluated
MODEL = "data/tiny-qwen3"  # model, adapter or run folder, or a hub id
DATA = "data/tiny/test.jsonl"  # problems: .jsonl or .parquet file, or a hub id
PROBLEM_COLUMN: str | None = None  # its name in DATA where it is not `problem`; a dot goes deeper
ANSWER_COLUMN: str | None = None  # the gold answer's name in DATA where it is not `answer`
MAX_PROBLEMS: int | None = None  # >= 1, only the first so many; none is all
CHECKPOINTS: str | None = None  # all, or steps of a run: 0,10,20 (0 or base is the base; best too)
COMPARE: str | None = None  # base, another model, or a folder of answers: how much better, with an interval
TRAIN_DATA: str | None = None  # training problems: those of DATA that stand there too are reported
OUTPUT: str | None = None  # folder for the results; none is evaluations/MODEL-DATA
FRESH = False  # start over in OUTPUT: deletes what an earlier evaluation wrote there

# --- how it is sampled: none takes what the checkpoint says
SAMPLES = 10  # >= 1, answers per problem
TEMPERATURE: float | None = None  # >= 0, 0 is greedy, one sample; none: the checkpoint's, else 0.7
TOP_P: float | None = None  # > 0 and <= 1, sample from the smallest set of tokens with this much probability
TOP_K: int | None = None  # >= 0, sample from so many most likely tokens; 0 is off
MIN_P: float | None = None  # >= 0 and <= 1, drop tokens less likely than this share of the likeliest
REPETITION_PENALTY: float | None = None  # > 0, 1 is off
MAX_NEW_TOKENS: int | None = None  # >= 1, tokens per answer; none: the checkpoint's, else 1000
PROMPT: str | None = None  # answer_tag | boxed | think_answer: none: the checkpoint's, else answer_tag
SYSTEM_PROMPT: str | None = None  # text before the problem; none: the checkpoint's, else nothing
THINKING: bool | None = None  # Qwen3's thinking flag; none: the checkpoint's, else the template's
SEED = 1  # every draw is a function of it

# --- how it runs
SAMPLER = "auto"  # auto | vllm | transformers: what samples; auto is vllm on a card where it is installed
SAMPLER_MEMORY = 0.85  # > 0 and < 1, share of the card for vLLM: weights and cache
ROWS = 1024  # >= 1, answers decoded at once: memory against speed, and how often they are saved
GRADING_SECONDS = 5.0  # > 0, wall-clock limit for comparing one answer [s]


def read_problems(grader):
    """The problems of DATA, each once, and a word on those that TRAIN_DATA has, too."""
    columns = {"problem": PROBLEM_COLUMN, "answer": ANSWER_COLUMN}
    problems = load_problems(DATA, grader=grader, columns=columns)
    refuse_duplicates(problems, DATA)
    problems = problems[:MAX_PROBLEMS]
    if TRAIN_DATA:
        train = [problem.problem for problem in load_problems(TRAIN_DATA)]
        found = find_contaminated(train, [problem.problem for problem in problems])
        print(f"{len(found)} of {len(problems)} problems stand in {TRAIN_DATA}, too")
        for i, j, how in found[:10]:
            print(f"  row {i + 1}, by {how}: row {j + 1} there: {problems[i].problem[:60]!r}")
    return problems


def choose_how(place, grader, tokenizer):
    """(how to sample and grade, what of it is worth recording): the same for every model of a comparison."""
    trained = place.sampling or {}
    style = find_style(PROMPT or trained.get("prompt", "answer_tag")).name
    system = trained.get("system", "") if SYSTEM_PROMPT is None else SYSTEM_PROMPT
    thinking = trained.get("thinking") if THINKING is None else THINKING
    changes = {"temperature": TEMPERATURE, "top_p": TOP_P, "top_k": TOP_K, "min_p": MIN_P}
    changes |= {"repetition_penalty": REPETITION_PENALTY, "max_new_tokens": MAX_NEW_TOKENS}
    params = choose_sampling(trained, changes)
    samples = 1 if params.temperature == 0 else SAMPLES
    ask = partial(encode_prompt, tokenizer, style=style, system=system, thinking=thinking)
    grade = partial(grade_groups, style=style, grader=grader)
    said = {"style": style, "system": system, "thinking": thinking, "samples": samples, "seed": SEED}
    said |= vars(params) | {"data": hash_input(DATA), "max_problems": MAX_PROBLEMS}
    said |= {"problem_column": PROBLEM_COLUMN, "answer_column": ANSWER_COLUMN}
    return {"ask": ask, "grade": grade, "params": params, "samples": samples, "seed": SEED}, said


def list_jobs(place, folder):
    """[(folder, step or None, model)] to evaluate, and the answers to compare with (a place) or None."""
    if CHECKPOINTS:
        jobs = [
            (folder / f"step_{step:06d}", step, one) for step, one in list_checkpoints(MODEL, CHECKPOINTS)
        ]
    else:
        jobs = [(folder, None, place)]
    if not COMPARE:
        return jobs, None
    if find_path(COMPARE).is_file() or (find_path(COMPARE) / "responses.parquet").is_file():
        return jobs, COMPARE
    other = locate_model(place.base if COMPARE == "base" else COMPARE)
    return [*jobs, (folder / "compared_with", None, other)], folder / "compared_with"


def open_engine(places, tokenizer, *, sampler, context):
    """What answers as each of these models in turn, one base in memory."""
    if sampler == "transformers":
        return Engine(places, tokenizer, max_rows=ROWS)
    from lib.vllm_engine import VllmEngine

    return VllmEngine(places, tokenizer, context=context, max_rows=ROWS, memory_share=SAMPLER_MEMORY)


def evaluate_one(engine, place, folder, *, problems, how, said):
    """Evaluate one model into its folder, or go on with that; nothing is done where it is finished."""
    adapter = place.adapter and hash_input(place.adapter / "adapter_model.safetensors")
    base = str(find_path(place.base)) if find_path(place.base).is_dir() else place.base
    with Journal(folder, said | {"model": base, "adapter": adapter}, fresh=FRESH) as journal:
        if not journal.finished:
            with engine.answering_as(place) as sampler:
                groups = evaluate_problems(sampler, problems, journal=journal, **how)
            journal.finish(groups, style=said["style"])


def report(jobs, theirs, grader):
    """Print and draw what the finished evaluations say; the grader still knows the verdicts."""
    read = {}
    for path in dict.fromkeys([*(folder for folder, _, _ in jobs), *filter(None, [theirs])]):
        answered, style = read_responses(path)
        grade_groups(answered, style=style, grader=grader)
        read[path] = (str(path), answered, *describe_answered(answered, None))
        print_summary(f"{path}, style {style}", read[path][3])
    points = [(step, read[folder][3]) for folder, step, _ in jobs if step is not None]
    first = jobs[0][0]
    if theirs:
        mine = [read[folder] for folder, _, _ in jobs if folder != theirs]
        for name, difference in compare_files([*mine, read[theirs]]).items():
            print_difference(name, difference)
    if points:
        write_json(first.parent / "curve.json", [{"step": step} | one for step, one in points])
        draw_step_curve(first.parent / "curve.png", sorted(points, key=lambda one: one[0]), title=MODEL)
        print(f"curve: {first.parent / 'curve.png'}")
    else:
        draw_pass_curves(first / "pass_at_k.png", {path: one[3] for path, one in read.items()}, title=MODEL)
        print(f"answers: {first / 'responses.parquet'}, curve: {first / 'pass_at_k.png'}")


def main():
    # Cheap failures first: nothing is loaded before names, data and gold answers are known to be good.
    sampler = choose_engines("peft", SAMPLER).sampler
    place = locate_model(MODEL)
    folder = Path(OUTPUT or Path("evaluations") / f"{find_path(MODEL).name}-{Path(DATA).stem}").expanduser()
    jobs, theirs = list_jobs(place, folder)
    with Grader(seconds=GRADING_SECONDS) as grader:
        problems = read_problems(grader)
        tokenizer = load_tokenizer(place)
        how, said = choose_how(place, grader, tokenizer)
        heat = f"temperature {how['params'].temperature:g}"
        print(f"{MODEL}: {len(problems)} problems x {how['samples']} samples at {heat}")
        said |= {} if sampler == "transformers" else {"sampler": sampler}
        context = longest_prompt(problems, how["ask"]) + how["params"].max_new_tokens
        engine = open_engine([one for _, _, one in jobs], tokenizer, sampler=sampler, context=context)
        for path, _, one in jobs:
            evaluate_one(engine, one, path, problems=problems, how=how, said=said)
        report(jobs, theirs, grader)


if __name__ == "__main__":
    run_script(main)
