"""What the prepare scripts share: rows from anywhere, what is kept and why not, splits, files, a report.

A script says how one row of its data set becomes a problem (`convert`); `prepare` does the rest:

    1. read the rows of a local file (.parquet, .jsonl, .json; verl's five columns too) or of a hub data set
    2. convert each; drop what cannot be used, duplicates, and what stands in the file AGAINST, too
    3. drop gold answers that math-verify cannot read; verdicts are kept on the way, so that it resumes
    4. cut train and validation rows from what is left, write them, and a .meta.json beside each

A local file is read to its end, and the report counts all of it. A hub data set is streamed, and no further
than the rows asked for need: DAPO's has every problem a hundred times.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import re
from collections import Counter
from pathlib import Path

from lib.batches import iterate_hub, load_problems
from lib.checkpoints import write_file, write_json, write_parquet
from lib.contamination import find_contaminated, normalise_text
from lib.grading import Grader
from lib.settings import UserError, find_path

CHUNK = 500  # rows whose gold answers are checked between two saves
# verl's own scripts append these to the problem; here the prompt is chosen when training.
_VERL_TAIL = re.compile(
    r"\s*Let's think step by step and output the final answer (within \\boxed\{\}|after \"####\")\.\s*$"
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The settings that every prepare script has."""

    source: str  # local file or hub id
    output: str  # folder
    splits: dict  # {"train": "0:519"}: rows of what is kept, as a slice; None is all, "" is nothing
    split: str = "train"  # of a hub data set
    config: str | None = None  # of a hub data set
    revision: str | None = None  # of a hub data set
    against: str | None = None  # test problems that must not be among those kept
    format: str = "jsonl"  # or verl-parquet
    options: dict = dataclasses.field(default_factory=dict)  # what else the script was told


def prepare(plan, convert):
    """Prepare a data set: returns {split: path}, prints what was kept and what was dropped and why.

    convert   row -> (problem dict with `problem`, `answer` and what else is known, None) or (None, reason)
    Done already with the same settings and source, it only prints the report again.
    """
    folder = find_path(plan.output)
    folder.mkdir(parents=True, exist_ok=True)
    ranges = {name: _read_range(text) for name, text in plan.splits.items() if text != ""}
    said = json.loads(json.dumps(dataclasses.asdict(plan))) | {"source_sha256": _hash_source(plan.source)}
    suffix = "parquet" if plan.format == "verl-parquet" else "jsonl"
    paths = {name: folder / f"{name}.{suffix}" for name in ranges}
    metas = {name: folder / f"{name}.meta.json" for name in ranges}
    if all(path.is_file() and metas[name].is_file() for name, path in paths.items()):
        meta = json.loads(next(iter(metas.values())).read_text())
        if meta["settings"] == said:
            _print_report(meta, paths, "already prepared")
            return paths
    strangers = [path for name, path in paths.items() if path.is_file() and not metas[name].is_file()]
    if strangers:
        raise UserError(f"{strangers[0]} was not written by a prepare script: choose another --output")
    kept, dropped, total = _select(plan, convert, folder)
    reasons = Counter(reason for _, reason in dropped)
    parts = {name: kept[part] for name, part in ranges.items()}
    texts = {name: [row["problem"] for row in rows] for name, rows in parts.items()}
    overlap = (
        len(find_contaminated(texts["train"], texts["valid"])) if texts.keys() >= {"train", "valid"} else 0
    )
    for name, rows in parts.items():
        if not rows:
            why = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common(3))
            raise UserError(
                f"{name} rows {plan.splits[name] or ':'}: there are only {len(kept)} problems in {total} rows"
                + f" (dropped: {why})" * bool(why)
            )
        write_problems(paths[name], rows, split=name, verl=suffix == "parquet")
        meta = {"source": plan.source, "revision": plan.revision, "settings": said, "rows_read": total}
        meta |= {"kept": len(kept), "dropped": dict(reasons), "dropped_rows": dropped[:1000]}
        meta |= {"split": name, "problems": len(rows), "valid_problems_in_train": overlap}
        write_json(metas[name], meta)
    (folder / "checked.jsonl").unlink(missing_ok=True)
    _print_report(meta, paths, "prepared")
    return paths


def _select(plan, convert, folder):
    """(problems kept, [(row number from 1, reason)], rows read)."""
    kept, dropped, seen, ids, number = [], [], {}, {}, 0
    wanted = _count_wanted(plan)
    rows = enumerate(iterate_rows(plan), start=1)
    with Grader() as grader, open(folder / "checked.jsonl", "a+") as file:
        known = _read_verdicts(file)
        while len(kept) < wanted and (chunk := list(itertools.islice(rows, CHUNK))):
            new = []
            for number, row in chunk:
                if not isinstance(row, dict):
                    raise UserError(f"{plan.source}, row {number}: not a JSON object")
                problem, reason = _convert_row(row, convert)
                if problem and seen.setdefault(normalise_text(problem["problem"]), number) != number:
                    problem, reason = None, "duplicate"
                if not problem:
                    dropped.append((number, reason))
                    continue
                if problem.get("id") is None or problem["id"] in ids:  # its own id where that is unique
                    problem = problem | {"id": f"row{number}"}
                ids[problem["id"]] = number
                new.append((number, problem))
            _check_answers([problem["answer"] for _, problem in new], known, grader=grader, file=file)
            in_test = find_seen([problem["problem"] for _, problem in new], plan.against)
            for index, (row_number, problem) in enumerate(new):
                reason = None if known[problem["answer"]] else "math-verify cannot read the answer"
                reason = reason or in_test.get(index)
                kept += [] if reason else [problem]
                dropped += [(row_number, reason)] if reason else []
    return kept, sorted(dropped), number


def _count_wanted(plan):
    """How many problems are enough: of a hub data set those up to the end of the last range."""
    ends = [_read_range(text).stop for text in plan.splits.values() if text != ""]
    return math.inf if find_path(plan.source).is_file() or None in ends else max(ends, default=0)


def _convert_row(row, convert):
    problem, reason = convert(_open_verl(row))
    if problem and not (str(problem["problem"]).strip() and str(problem["answer"]).strip()):
        return None, "problem or answer is empty"
    return problem, reason


def find_seen(texts, against):
    """{index: "in FILE, by text"} of the problems that stand in the file of test problems, too."""
    if not against or not texts:
        return {}
    found = find_contaminated([problem.problem for problem in _load_test(against)], texts)
    return {index: f"in {Path(against).name}, by {how}" for index, _, how in found}


_load_test = functools.lru_cache(maxsize=1)(load_problems)


def _read_verdicts(file):
    """{gold answer: can it be read?} from before a kill; the file is left ready for more."""
    file.seek(0)
    text, known = file.read(), {}
    for line in text.splitlines():
        try:
            known |= json.loads(line)
        except json.JSONDecodeError:  # the half line of a kill
            continue
    file.write("\n" if text and not text.endswith("\n") else "")
    return known


def _check_answers(answers, known, *, grader, file):
    """Add to `known` which answers math-verify can read, and write that down."""
    todo = [answer for answer in dict.fromkeys(answers) if answer not in known]
    if todo:
        bad = set(grader.find_unparsable(todo))
        found = {answer: index not in bad for index, answer in enumerate(todo)}
        file.write(json.dumps(found) + "\n")
        file.flush()
        known |= found


def iterate_rows(plan):
    """The rows of a local file, or of a hub data set (streamed: nothing is held in memory at once)."""
    file = find_path(plan.source)
    if file.is_file() and file.suffix == ".parquet":
        import pyarrow.parquet

        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1000):
            yield from batch.to_pylist()
    elif file.is_file() and file.suffix in (".jsonl", ".json"):
        with open(file, encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    yield from [json.loads(line)] if line.strip() else []
                except json.JSONDecodeError as error:
                    raise UserError(f"{file}, row {number}: not a JSON object ({error.msg})") from None
    elif file.exists():
        raise UserError(f"{file}: rows are read from a .parquet or .jsonl file, or from a hub data set")
    else:
        how = {"config": plan.config, "split": plan.split, "revision": plan.revision}
        yield from iterate_hub(plan.source, file, streaming=True, **how)


def _open_verl(row):
    """A row of verl's five columns with `problem` and `answer` beside them; another row as it is."""
    if "reward_model" not in row or "problem" in row:
        return row
    asked = [message["content"] for message in row["prompt"] if message["role"] == "user"]
    problem = _VERL_TAIL.sub("", asked[-1]) if asked else ""
    return row | {"problem": problem, "answer": row["reward_model"]["ground_truth"]}


def write_problems(path, rows, *, split, verl):
    """Write problems as JSONL, or as parquet in verl's five columns; what else a row holds is kept."""
    if not verl:
        write_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return
    own = ("problem", "answer", "source")
    write_parquet(
        path,
        [
            {
                "data_source": row.get("source", ""),
                "prompt": [{"role": "user", "content": row["problem"]}],
                "ability": "math",
                "reward_model": {"style": "rule", "ground_truth": str(row["answer"])},
                "extra_info": {"split": split, "index": index}
                | {name: value for name, value in row.items() if name not in own},
            }
            for index, row in enumerate(rows)
        ],
    )


def _read_range(text):
    """The slice that "0:519" or ":100" stands for; None is everything."""
    if text is None:
        return slice(None)
    match = re.fullmatch(r"\s*(\d*)\s*:\s*(\d*)\s*", text)
    if not match:
        raise UserError(f"rows {text}: must look like 0:519, with the end not included")
    return slice(*(int(part) if part else None for part in match.groups()))


def _hash_source(source):
    file = find_path(source)
    if not file.is_file():
        return None
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _print_report(meta, paths, what):
    share = meta["kept"] / max(1, meta["rows_read"])
    print(f"{what}: kept {meta['kept']} of {meta['rows_read']} rows ({share:.1%}) of {meta['source']}")
    for reason, count in sorted(meta["dropped"].items(), key=lambda pair: -pair[1]):
        rows = [str(number) for number, why in meta["dropped_rows"] if why == reason]
        shown = ", ".join(rows[:20]) + (", ..." if count > 20 else "")
        print(f"  dropped {count}: {reason} (row {shown})")
    if meta["valid_problems_in_train"]:
        print(
            f"  note: {meta['valid_problems_in_train']} validation problems are in train by text or 13-gram"
        )
    for name, path in paths.items():
        print(f"  {name}: {path}")
