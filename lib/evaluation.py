"""An evaluation that can be interrupted: sample answers to problems, grade them, keep them, sum them up.

    settings.json       what is evaluated and how; with other settings the folder is refused
    answers.jsonl       one line per batch while it runs, written and synced before the next one begins
    responses.parquet   the answers: verl's columns, `responses`, token counts, finish reasons, verdicts
    summary.json        the numbers; its presence says that the evaluation is finished

Every draw is a function of the seed and the problem, and a batch is kept whole or not at all: killed at any
moment and started again, an evaluation loses no problem, repeats none, and ends in the same answers.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lib.checkpoints import disk_errors_named, find_damage, write_json, write_parquet
from lib.draws import SamplingParams
from lib.models import load_adapter_weights, load_model, locate_model
from lib.passk import summarise
from lib.prompts import build_messages
from lib.regrading import row_of
from lib.rewards import Grade
from lib.sampler import Group, TransformersSampler
from lib.settings import UserError, find_path

EVAL_TEMPERATURE = 0.7  # of evaluations, where neither a person nor a checkpoint says otherwise
EVAL_TOKENS = 1000
OWN_FILES = ("settings.json", "answers.jsonl", "responses.parquet", "summary.json", "*.png", "curve.json")


def evaluate_problems(sampler, problems, *, journal=None, **how):
    """Sample answers to every problem and grade them: a list of graded groups.

    how   `ask` (problem text -> prompt token ids), `samples` per problem, `params`, `grade` (fills the grades
          of groups: `rewards.grade_groups` with style and grader bound), `seed`
    journal   a `Journal`: what it holds is not done again, and what is done is kept in it
    The draws use step -1, so that no training step shares them.
    """
    groups = journal.recall(problems) if journal else []
    batch, begun, started = max(1, sampler.max_rows // how["samples"]), len(groups), time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console()
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("evaluating", total=len(problems), completed=begun)
        while len(groups) < len(problems):
            done = _answer(sampler, problems[len(groups) : len(groups) + batch], **how)
            groups += done
            right = [one.correct for group in groups for one in group.grades]
            text = f"evaluating, pass@1 {sum(right) / len(right):.3f}"
            bar.update(task, advance=len(done), description=text)
            if journal:
                journal.keep(done)
                left = (time.monotonic() - started) / (len(groups) - begun) * (len(problems) - len(groups))
                if not console.is_terminal:
                    print(
                        f"{text}, {len(groups)}/{len(problems)} problems, {left:.0f} s left", file=sys.stderr
                    )
    return groups


def _answer(sampler, problems, *, ask, samples, params, grade, seed):
    prompts = [ask(problem.problem) for problem in problems]
    return grade(sampler.sample(problems, prompts, params, group_size=samples, seed=seed, step=-1))


def summarise_groups(groups):
    """The summary (see `passk.summarise`) of graded groups."""
    return summarise(
        [
            row_of(
                group.grades,
                [len(ids) for ids in group.completion_ids],
                [reason == "length" for reason in group.finish_reasons],
            )
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
            "correct": [grade.correct for grade in group.grades],
        }
        for group in groups
    ]
    summary = summarise_groups(groups)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_parquet(folder / "responses.parquet", rows, metadata={"prompt": style})
    write_json(folder / "summary.json", summary)
    return summary


class Journal:
    """The folder of one evaluation, opened for writing by this process alone.

    settings   JSON values: whatever changes an answer. UserError lists what differs from an earlier start
    fresh      delete what an earlier evaluation wrote here, and start over

    `finished` says that there is nothing left to do.
    """

    def __init__(self, folder, settings, *, fresh=False):
        self.folder = Path(folder).expanduser().absolute()
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"--output {self.folder} is a file; it must be a folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.folder} is in use by another process") from None
        for name in OWN_FILES if fresh else ():
            for path in self.folder.glob(name):
                path.unlink()
        try:
            self._compare(json.loads(json.dumps(settings)))
        except UserError:
            os.close(self._lock)
            raise
        self.finished = (self.folder / "summary.json").is_file()
        self._path = self.folder / "answers.jsonl"

    def _compare(self, settings):
        path = self.folder / "settings.json"
        if not path.is_file():
            if any((self.folder / name).exists() for name in ("responses.parquet", "summary.json")):
                raise UserError(f"{self.folder} holds other results; choose another --output, or --fresh")
            return write_json(path, settings)
        old = json.loads(path.read_text())
        changed = [
            f"{name}: {old.get(name)} -> {settings.get(name)}"
            for name in sorted(old.keys() | settings.keys())
            if old.get(name) != settings.get(name)
        ]
        if changed:
            raise UserError(
                f"{self.folder} is another evaluation ({'; '.join(changed)}): "
                "--fresh starts over, --output takes another folder"
            )

    def recall(self, problems):
        """The groups that are there already; half a line at the end, left by a kill, is cut off."""
        groups, end = [], 0
        text = self._path.read_bytes() if self._path.is_file() else b""
        while (newline := text.find(b"\n", end)) >= 0:
            for row in json.loads(text[end:newline]):
                grades = [Grade(**grade) for grade in row.pop("grades")]
                problem = problems[len(groups)]
                if row.pop("id") != problem.id:
                    raise UserError(f"{self._path} is not about these problems: --fresh starts over")
                groups.append(Group(problem, sampler_logps=[], grades=grades, **row))
            end = newline + 1
        if end < len(text):
            os.truncate(self._path, end)
        return groups

    def keep(self, groups):
        """Append one batch of graded groups, and have it on the disk before returning."""
        names = ("prompt", "prompt_ids", "completion_ids", "completions", "finish_reasons")
        rows = [
            {"id": group.problem.id, "grades": [dataclasses.asdict(grade) for grade in group.grades]}
            | {name: getattr(group, name) for name in names}
            for group in groups
        ]
        with disk_errors_named(self._path), open(self._path, "ab") as file:
            file.write(json.dumps(rows).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def finish(self, groups, *, style):
        """Write the results; from now on the evaluation is finished. Returns the summary."""
        summary = save_evaluation(self.folder, groups, style=style)
        self._path.unlink(missing_ok=True)
        return summary

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.close(self._lock)


def choose_sampling(trained, changes):
    """`SamplingParams` from what a checkpoint says, what a person says, and the defaults; the later wins.

    trained   the values of sampling.json; whatever is a field of `SamplingParams` counts
    changes   values by name; None is not said
    """
    names = {field.name for field in dataclasses.fields(SamplingParams)}
    values = {"temperature": EVAL_TEMPERATURE, "max_new_tokens": EVAL_TOKENS}
    values |= {name: value for name, value in trained.items() if name in names}
    return SamplingParams(**values | {name: value for name, value in changes.items() if value is not None})


def list_checkpoints(run, wanted):
    """[(step, place)] of a run's checkpoints, 0 being the base; `wanted` is all, or 0,10,20, or base,best.

    UserError names a checkpoint that is not there or damaged.
    """
    folder = find_path(run) / "checkpoints"
    steps = {int(path.name[5:]): path for path in sorted(folder.glob("step_*")) if path.name[5:].isdigit()}
    if not steps:
        raise UserError(f"--checkpoints: {folder} has no checkpoint; --model must be a run folder")
    if (folder / "best").is_dir():
        steps["best"] = folder / "best"
    names = [0, *(step for step in steps if step != "best")] if wanted == "all" else []
    for name in [] if names else wanted.replace(",", " ").split():
        names.append(0 if name == "base" else int(name) if name.isdigit() else name)
        if names[-1] not in (0, *steps):
            raise UserError(f"--checkpoints {name}: the run has 0 (base), {', '.join(map(str, steps))}")
    places = []
    for name in dict.fromkeys(names):
        if name == 0:
            adapter = locate_model(next(iter(steps.values())))
            places.append((0, dataclasses.replace(adapter, adapter=None)))
            continue
        if damage := find_damage(steps[name]):
            raise UserError(f"--checkpoints: {steps[name]} is damaged: {damage}")
        step = int(steps[name].resolve().name[5:]) if name == "best" else name
        places.append((step, locate_model(steps[name])))
    return places


class Engine:
    """One model in memory that answers as its base or as any adapter of it: adapters are swapped.

    places     what it will be asked to be; the first with an adapter is loaded, when first asked
    max_rows   answers decoded at once
    """

    def __init__(self, places, tokenizer, *, max_rows):
        self._tokenizer, self._max_rows = tokenizer, max_rows
        self._first = next((place for place in places if place.adapter), places[0])
        self._place = self._model = None

    def _load(self, place):
        self._model = None  # the one before makes room first
        self._model, self._place = load_model(place), place

    @contextlib.contextmanager
    def answering_as(self, place):
        """A sampler that is the model at `place`."""
        if self._model is None:
            self._load(self._first)
        if place.base != self._place.base or (place.adapter and _shape(place) != _shape(self._place)):
            self._load(place)
        elif place.adapter and place.adapter != self._place.adapter:
            load_adapter_weights(self._model, place.adapter)
            self._place = place
        is_off = self._place.adapter and not place.adapter
        with self._model.disable_adapter() if is_off else contextlib.nullcontext():
            yield TransformersSampler(self._model, self._tokenizer, max_rows=self._max_rows)


def _shape(place):
    """What of an adapter must be equal for its weights to be swapped; None without one."""
    if not place.adapter:
        return None
    config = json.loads((place.adapter / "adapter_config.json").read_text())
    targets = config["target_modules"]
    saved = config.get("modules_to_save") or []
    return config["r"], config["lora_alpha"], sorted(targets), sorted(saved), config.get("use_rslora")
