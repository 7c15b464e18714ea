"""Completions that a run or an evaluation has written: filtered, sorted, a page at a time.

They stay on disk. Of all rows only the small columns are read; the texts are read for the page that is shown.
"""

import contextlib
import functools
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow
import pyarrow.compute as compute
import pyarrow.parquet

from lib.grading import Grader
from lib.prompts import PROMPT_STYLES, extract_answer
from lib.runs import read_settings_of
from lib.settings import UserError

TEXTS = ("prompt", "completion")
# What is known of every completion, beside rewards by part. An evaluation has no reward and no advantage.
FACTS = ("step", "problem_id", "tier", "answer", "correct", "reward", "advantage", "tokens", "finish_reason")
PLACE = ("file", "row", "member")  # where a completion is: its file, the row in it, its number in that row
BATCH_ROWS = 500  # problems of an evaluation whose answers are in memory at once while they are graded


@dataclass(frozen=True)
class Samples:
    """Completions, some or all of what a folder holds.

    table     a row per completion: FACTS, the rewards, PLACE
    files     paths by number, for PLACE
    rewards   names of the columns that are parts of the reward
    style     the prompt style they were asked in
    """

    table: pyarrow.Table
    files: tuple
    rewards: tuple
    style: str

    def select(self, *, problem="", tier="", right=None, low=None, high=None):
        """Those that match; a condition that is not given matches all.

        problem    part of the problem's id
        right      True or False
        low, high  bounds of the reward, both included
        """
        table, conditions = self.table, []
        if problem:
            conditions.append(compute.match_substring(table["problem_id"], problem, ignore_case=True))
        if tier:
            conditions.append(compute.equal(table["tier"], tier))
        if right is not None:
            conditions.append(compute.equal(table["correct"], right))
        if low is not None:
            conditions.append(compute.greater_equal(table["reward"], low))
        if high is not None:
            conditions.append(compute.less_equal(table["reward"], high))
        if conditions:
            table = table.filter(functools.reduce(compute.and_, conditions))
        return replace(self, table=table)

    def page(self, number, rows, *, sort="", descending=False):
        """Page `number` (from 0) as a list of dicts: FACTS, rewards, TEXTS, and an `id` to `open` it by."""
        keys = [(sort, "descending" if descending else "ascending")] if sort else []
        keys += [(name, "ascending") for name in PLACE]
        chosen = compute.sort_indices(self.table, keys)[number * rows : (number + 1) * rows]
        return self._with_texts(self.table.take(chosen).to_pylist())

    def open(self, name):
        """The completion whose `id` is `name`, with what was `extracted` from it. UserError if it is gone."""
        words = str(name).split("-")
        if len(words) != len(PLACE) or not all(word.isdigit() for word in words):
            raise UserError(f"there is no sample {name!r}")
        conditions = [
            compute.equal(self.table[key], int(word)) for key, word in zip(PLACE, words, strict=True)
        ]
        found = self.table.filter(functools.reduce(compute.and_, conditions)).to_pylist()
        if not found:
            raise UserError(f"sample {name} is not here any more")
        row = self._with_texts(found)[0]
        return row | {"extracted": extract_answer(row["completion"], self.style)}

    def tiers(self):
        """The tiers there are, in alphabetical order."""
        return sorted(filter(None, compute.unique(self.table["tier"]).to_pylist()))

    def _with_texts(self, rows):
        for file in sorted({row["file"] for row in rows}):
            mine = [row for row in rows if row["file"] == file]
            try:
                with _open_parquet(self.files[file]) as opened:
                    found = _read_texts(opened, [row["row"] for row in mine])
            except FileNotFoundError:
                raise UserError(f"{self.files[file]} is gone: the run was started again") from None
            for row, texts in zip(mine, found, strict=True):
                row["id"] = "-".join(str(row[key]) for key in PLACE)
                row |= _texts_of(texts, row["member"])
        return rows


def list_steps(folder):
    """Steps of a run whose completions are there, newest first; none for an evaluation."""
    return [step for step, _ in _list_files(folder)]


def _list_files(folder):
    files = (Path(folder) / "completions").glob("completions_*.parquet")
    return sorted(((int(file.stem.partition("_")[2]), file) for file in files), reverse=True)


def load_samples(folder, step=None):
    """The completions of an evaluation, or of one step (or all) of a run. UserError names a damaged file."""
    folder = Path(folder)
    if (folder / "responses.parquet").is_file():
        path = folder / "responses.parquet"
        return _load_evaluation(path, path.stat().st_mtime_ns)
    files = sorted(file for number, file in _list_files(folder) if step in (None, number))
    parts, found = [], []
    for file in files:
        with contextlib.suppress(FileNotFoundError):  # the run was continued from an older step just now
            part = _load_step(file, file.stat().st_mtime_ns)
            parts.append(part.append_column("file", pyarrow.array([len(found)] * len(part), pyarrow.int64())))
            found.append(file)
    if not found:
        raise UserError(f"{folder} has no completions" + (f" of step {step}" if step is not None else ""))
    table = pyarrow.concat_tables(parts, promote_options="permissive")
    rewards = tuple(name for name in table.column_names if name not in (*FACTS, *PLACE))
    return Samples(table, tuple(found), rewards, _style_of(folder))


@functools.lru_cache(maxsize=20_000)
def _load_step(path, _time):
    """The small columns of one step's completions."""
    with _open_parquet(path) as file:
        names = [name for name in file.schema_arrow.names if name not in TEXTS]
        table = file.read(names)
    for name in FACTS:
        if name not in names:
            table = table.append_column(name, pyarrow.nulls(len(table)))
    table = table.append_column("row", pyarrow.array(range(len(table)), pyarrow.int64()))
    return table.append_column("member", pyarrow.array([0] * len(table), pyarrow.int64()))


@functools.lru_cache(maxsize=4)
def _load_evaluation(path, _time):
    """The small columns of an evaluation, a row per answer; what another tool wrote is graded on the way."""
    columns = {name: [] for name in (*FACTS, *PLACE)}
    with _open_parquet(path) as file, Grader() as grader:
        named = (file.schema_arrow.metadata or {}).get(b"prompt", b"").decode()
        style, names, number = named or "answer_tag", file.schema_arrow.names, 0
        if style not in PROMPT_STYLES:
            style = "answer_tag"
        is_graded = bool(named) and "correct" in names
        names = [name for name in names if name not in ("prompt", *["responses"] * is_graded)]
        for batch in file.iter_batches(BATCH_ROWS, columns=names):
            problems = batch.to_pylist()
            if not is_graded:
                _grade_problems(problems, style, grader)
            for problem in problems:
                for member, facts in enumerate(_facts(problem)):
                    row = facts | {"file": 0, "row": number, "member": member}
                    for name, values in columns.items():
                        values.append(row.get(name))
                number += 1
    table = pyarrow.table(columns)
    for name in ("tier", "problem_id"):
        index = table.column_names.index(name)
        table = table.set_column(index, name, table[name].cast(pyarrow.string()))
    return Samples(table, (path,), (), style)


def _gold(problem):
    return str((problem.get("reward_model") or {}).get("ground_truth", ""))


def _grade_problems(problems, style, grader):
    """Put `correct`, a verdict per answer, into rows of an evaluation."""
    answers = [extract_answer(text, style) for problem in problems for text in problem["responses"]]
    golds = [_gold(problem) for problem in problems for _ in problem["responses"]]
    verdicts = iter(grader.grade(answers, golds))
    for problem in problems:
        problem["correct"] = [next(verdicts).correct for _ in problem["responses"]]


def _facts(problem):
    """What an evaluation says about each answer to a problem; of other tools' files, what is there."""
    extra, right = problem.get("extra_info") or {}, problem["correct"]
    nothing = [None] * len(right)
    tokens, reasons = problem.get("response_tokens") or nothing, problem.get("finish_reasons") or nothing
    known = {"problem_id": str(extra.get("index", "")), "tier": extra.get("tier"), "answer": _gold(problem)}
    for count, reason, correct in zip(tokens, reasons, right, strict=True):
        yield known | {"tokens": count, "finish_reason": reason, "correct": correct}


@contextlib.contextmanager
def _open_parquet(path):
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield file
    except (pyarrow.ArrowInvalid, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise UserError(f"{path} is damaged: {str(error).splitlines()[0]}") from None


def _read_texts(file, rows):
    """The text columns of some rows of a parquet file (their numbers): a dict each, read by row group."""
    names = [name for name in (*TEXTS, "responses") if name in file.schema_arrow.names]
    found, start = {}, 0
    for group in range(file.num_row_groups):
        end = start + file.metadata.row_group(group).num_rows
        mine = [row for row in rows if start <= row < end]
        if mine:
            table = file.read_row_group(group, names).take([row - start for row in mine])
            found |= zip(mine, table.to_pylist(), strict=True)
        start = end
    return [found[row] for row in rows]


def _texts_of(texts, member):
    if "responses" not in texts:
        return {name: texts[name] for name in TEXTS}
    turns = texts.get("prompt") or []
    return {
        "prompt": "\n\n".join(turn["content"] for turn in turns) if isinstance(turns, list) else str(turns),
        "completion": texts["responses"][member],
    }


def _style_of(run):
    """The prompt style in a run's settings."""
    style = read_settings_of(run).get("PROMPT")
    return style if style in PROMPT_STYLES else "answer_tag"
