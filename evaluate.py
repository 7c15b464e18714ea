"""Sample k answers per problem with a model or a checkpoint, and report pass@k.

    python evaluate.py --model runs/grdpo                           # the best checkpoint of a run
    python evaluate.py --model data/tiny-qwen3 --samples 10         # the base it started from
    python evaluate.py --model Qwen/Qwen3-1.7B --data my_problems.jsonl --max-new-tokens 2000

pass@k is the probability that at least one of k samples is right: the answer extracted in the prompt's style
equals the gold answer. Beside it stand right answers whatever the format, and right format, so that the two
can be told apart. Prompt style and thinking flag are those the checkpoint was trained with, unless set here.
"""

import json
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lib.batches import load_problems
from lib.checkpoints import write_json, write_parquet
from lib.draws import SamplingParams
from lib.grading import Grader
from lib.models import load_model, load_tokenizer, locate_model
from lib.passk import PASS_K, summarise
from lib.prompts import build_messages, encode_prompt, find_style
from lib.rewards import grade_groups
from lib.sampler import TransformersSampler
from lib.settings import UserError, run_script

# --- what is evaluated
MODEL = "data/tiny-qwen3"  # model, adapter or run folder, or a hub id
DATA = "data/tiny/test.jsonl"  # problems: .jsonl or .parquet file, or a hub id
MAX_PROBLEMS: int | None = None  # >= 1, only the first so many; none is all
OUTPUT: str | None = None  # folder for responses.parquet and summary.json; none is evaluations/MODEL-DATA

# --- how it is sampled
SAMPLES = 10  # >= 1, answers per problem
TEMPERATURE = 0.7  # >= 0, 0 is greedy
TOP_P = 1.0  # > 0 and <= 1, sample from the smallest set of tokens with this much probability
TOP_K = 0  # >= 0, sample from so many most likely tokens; 0 is off
MIN_P = 0.0  # >= 0 and <= 1, drop tokens less likely than this share of the likeliest
MAX_NEW_TOKENS: int | None = None  # >= 1, tokens per answer; none takes the checkpoint's, else 1000
PROMPT: str | None = None  # answer_tag | boxed | think_answer: none takes the checkpoint's, else answer_tag
SYSTEM_PROMPT: str | None = None  # text before the problem; none takes the checkpoint's, else nothing
THINKING: bool | None = None  # Qwen3's thinking flag; none takes the checkpoint's, else the template's
SEED = 1  # every draw is a function of it

# --- how it runs
ROWS = 1024  # >= 1, answers decoded at once: memory against speed
GRADING_SECONDS = 5.0  # > 0, wall-clock limit for comparing one answer [s]


def evaluate_problems(sampler, problems, *, ask, samples, params, grade, seed):
    """Sample `samples` answers to every problem and grade them: a list of graded groups.

    ask     problem text -> prompt token ids
    grade   fills the grades of groups (`rewards.grade_groups` with style and grader bound)
    The draws use step -1, so that no training step shares them.
    """
    groups, right = [], []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console()
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("evaluating", total=len(problems))
        batch = max(1, sampler.max_rows // samples)
        for start in range(0, len(problems), batch):
            chosen = problems[start : start + batch]
            prompts = [ask(problem.problem) for problem in chosen]
            sampled = sampler.sample(chosen, prompts, params, group_size=samples, seed=seed, step=-1)
            groups += grade(sampled)
            right += [one.correct for group in sampled for one in group.grades]
            bar.update(
                task, advance=len(chosen), description=f"evaluating, pass@1 {sum(right) / len(right):.3f}"
            )
    return groups


def summarise_groups(groups):
    """The summary (see `passk.summarise`) of graded groups."""
    return summarise(
        [
            {
                "correct": [grade.correct for grade in group.grades],
                "answer_correct": [grade.answer_correct for grade in group.grades],
                "formatted": [grade.formatted for grade in group.grades],
                "answers": [grade.answer for grade in group.grades],
                "timed_out": [grade.timed_out for grade in group.grades],
                "unparsed": [grade.unparsed for grade in group.grades],
                "tokens": [len(ids) for ids in group.completion_ids],
                "clipped": [reason == "length" for reason in group.finish_reasons],
            }
            for group in groups
        ]
    )


def save_evaluation(folder, groups, *, style):
    """Write responses.parquet (verl's columns and ours) and summary.json to `folder`; return the summary."""
    rows = [
        {
            "data_source": group.problem.source,
            "prompt": build_messages(group.problem.problem, style),
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": group.problem.answer},
            "extra_info": {
                "index": group.problem.id,
                "tier": group.problem.tier,
                "problem": group.problem.problem,
            },
            "responses": group.completions,
            "response_tokens": [len(ids) for ids in group.completion_ids],
            "finish_reasons": group.finish_reasons,
        }
        for group in groups
    ]
    summary = summarise_groups(groups)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_parquet(folder / "responses.parquet", rows, metadata={"prompt": style})
    write_json(folder / "summary.json", summary)
    return summary


def main():
    # Cheap failures first: nothing is loaded before names, data and gold answers are known to be good.
    place = locate_model(MODEL)
    trained = place.sampling or {}
    style = find_style(PROMPT or trained.get("prompt", "answer_tag")).name
    system = trained.get("system", "") if SYSTEM_PROMPT is None else SYSTEM_PROMPT
    thinking = trained.get("thinking") if THINKING is None else THINKING
    folder = Path(OUTPUT or Path("evaluations") / f"{Path(MODEL).name}-{Path(DATA).stem}").expanduser()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is a file; it must be a folder")
    with Grader(seconds=GRADING_SECONDS) as grader:
        problems = load_problems(DATA, grader=grader)[:MAX_PROBLEMS]
        tokenizer = load_tokenizer(place)
        ask = partial(encode_prompt, tokenizer, style=style, system=system, thinking=thinking)
        params = SamplingParams(
            temperature=TEMPERATURE,
            top_p=TOP_P,
            top_k=TOP_K,
            min_p=MIN_P,
            max_new_tokens=MAX_NEW_TOKENS or trained.get("max_new_tokens", 1000),
        )
        groups = evaluate_problems(
            TransformersSampler(load_model(place), tokenizer, max_rows=ROWS),
            problems,
            ask=ask,
            samples=SAMPLES,
            params=params,
            grade=partial(grade_groups, style=style, grader=grader),
            seed=SEED,
        )
    summary = save_evaluation(folder, groups, style=style)
    print(
        f"{MODEL}: {len(problems)} problems x {SAMPLES} samples at temperature {TEMPERATURE:g}, style {style}"
    )
    for k in PASS_K:
        if k <= SAMPLES:
            low, high = summary[f"pass@{k}_ci95"]
            print(f"  pass@{k:<3d} {summary[f'pass@{k}']:.3f}   95 % interval {low:.3f} to {high:.3f}")
    rest = ("answer_and_format", "answer", "format", "mean_length", "clipped", "timeouts", "unparsed")
    print("  " + json.dumps({key: round(summary[key], 3) for key in rest})[1:-1].replace('"', ""))
    print(f"answers: {folder / 'responses.parquet'}")


if __name__ == "__main__":
    run_script(main)
