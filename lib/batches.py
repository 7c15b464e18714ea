"""Problems, and which of them a step works on.

A row has `problem` and `answer`, and optionally `tier` (easy, medium, hard), `id` and `source`; verl's
five-column rows are read as they are. Whatever else a row holds reaches the reward functions.
"""

import json
import random
from dataclasses import dataclass, field

import pyarrow.parquet

from lib.settings import UserError, find_path, is_hub_id, shorten_reason

TIERS = ("easy", "medium", "hard")


@dataclass(frozen=True)
class Problem:
    """One problem. `answer` is the gold answer, `columns` what else its row said."""

    id: str
    problem: str
    answer: str
    tier: str = ""
    source: str = ""
    columns: dict = field(default_factory=dict, compare=False, repr=False)


def load_problems(path, *, grader=None, columns=None):
    """Read problems from a JSONL or parquet file, or from a data set of the hub.

    path     a file, or a hub id (`owner/name`, its train split)
    grader   a `grading.Grader`; given one, gold answers that it cannot read as mathematics are an error, too
    columns  {"problem": its name in the file, "answer": ...}; None stands for the usual name
    Returns a list of `Problem`. UserError names the file, the row (counted from 1) and the wrong field.
    """
    rows, name = _read_rows(path)
    problems = [
        _read_problem(_rename(row, columns or {}, f"{name}, row {number}"), number - 1, name)
        for number, row in enumerate(rows, start=1)
    ]
    if not problems:
        raise UserError(f"{name} has no rows")
    seen = {}
    for row, problem in enumerate(problems, start=1):
        if problem.id in seen:
            raise UserError(
                f"{name}, row {row}: field id: {problem.id!r} is that of row {seen[problem.id]} already"
            )
        seen[problem.id] = row
    for index in grader.find_unparsable([problem.answer for problem in problems]) if grader else []:
        answer = problems[index].answer
        raise UserError(
            f"{name}, row {index + 1}: field answer: {answer!r} cannot be read as mathematics; drop the row"
        )
    return problems


def _read_rows(path):
    """(rows, name for messages) of a file or hub data set."""
    file = find_path(path)
    if file.is_file() and file.suffix in (".jsonl", ".json"):
        return _read_json_lines(file), str(file)
    if file.is_file() and file.suffix == ".parquet":
        try:
            return pyarrow.parquet.read_table(file).to_pylist(), str(file)
        except pyarrow.ArrowInvalid as error:
            raise UserError(f"{file} is not a parquet file: {error}") from None
    if file.exists():
        raise UserError(f"{file}: problems are read from .jsonl and .parquet files")
    return list(iterate_hub(path, file, streaming=False)), str(path)


def iterate_hub(name, file, *, streaming, config=None, split="train", revision=None):
    """The rows of a hub data set. UserError where it is none, or where it does not load.

    file        where a setting of this name was looked for first, for messages
    streaming   row after row from the net, nothing kept; else the whole is downloaded once, and kept
    """
    if not is_hub_id(name):
        raise UserError(
            f"data not found: {file} (a .jsonl or .parquet file, or a hub id like open-r1/OpenR1-Math-220k)"
        )
    import datasets  # takes seconds: only where it is needed

    how = {"split": split, "revision": revision, "streaming": streaming}
    try:
        yield from datasets.load_dataset(str(name), config, **how)
    except (OSError, ValueError) as error:  # datasets' own errors derive from these, offline ones too
        reason = shorten_reason(error)
        raise UserError(
            f"data not found: no file {file}, and hub data set {name} did not load: {reason}"
        ) from None


def _read_json_lines(file):
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(f"{file}, row {number}: not a JSON object ({error.msg})") from None
    return rows


def _rename(row, columns, place):
    """A row with our names for the columns that are called otherwise; a dot goes into a nested one."""
    for ours, theirs in columns.items():
        value = row if theirs else None
        for part in theirs.split(".") if theirs else ():
            if not isinstance(value, dict) or part not in value:
                raise UserError(f"{place}: --{ours}-column {theirs}: the row has {', '.join(row)}")
            value = value[part]
        row = row | {ours: value} if theirs else row
    return row


def refuse_duplicates(problems, path):
    """UserError where the same problem is asked twice: it would count twice in every number."""
    seen = {}
    for row, problem in enumerate(problems, start=1):
        first = seen.setdefault(" ".join(problem.problem.split()), row)
        if first != row:
            text = f"{problem.problem[:60]!r}: drop one of them"
            raise UserError(f"{path}, row {row}: field problem: the same as in row {first}: {text}")


def _read_problem(row, index, name):
    """A `Problem` from one row in our own or in verl's schema."""

    def reject(field_name, reason):
        raise UserError(f"{name}, row {index + 1}: field {field_name}: {reason}")

    if not isinstance(row, dict):
        raise UserError(f"{name}, row {index + 1}: not a JSON object")
    if "reward_model" in row and "problem" not in row:
        row = _from_verl(row, reject)
    for key in ("problem", "answer"):
        if key not in row:
            reject(key, f"missing; the row has {', '.join(row) or 'nothing'}")
    answer = row["answer"]
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        answer = str(answer)
    for key, text in (("problem", row["problem"]), ("answer", answer)):
        if not isinstance(text, str) or not text.strip():
            reject(key, f"must be a text that is not empty, not {text!r}")
    tier = row.get("tier") or ""
    if tier not in ("", *TIERS):
        reject("tier", f"must be one of {', '.join(TIERS)}, not {tier!r}")
    columns = {
        key: value for key, value in row.items() if key not in ("id", "problem", "answer", "tier", "source")
    }
    identity = str(index) if row.get("id") is None else str(row["id"])
    return Problem(identity, row["problem"], answer.strip(), tier, str(row.get("source") or ""), columns)


def _from_verl(row, reject):
    """Our fields from verl's: the last user message is the problem, and what else there is stays."""
    messages = row.get("prompt")
    asked = (
        [m.get("content") for m in messages if m.get("role") == "user"] if isinstance(messages, list) else []
    )
    if not asked:
        reject("prompt", "must be a list of messages with one of role user")
    truth = row["reward_model"].get("ground_truth") if isinstance(row["reward_model"], dict) else None
    if truth is None:
        reject("reward_model", "has no ground_truth")
    extra = row.get("extra_info") or {}
    rest = {key: row[key] for key in ("data_source", "ability", "extra_info") if key in row}
    tier = row.get("tier") or extra.get("tier")
    return {"problem": asked[-1], "answer": truth, "source": row.get("data_source"), "tier": tier} | rest


def drop_long_prompts(problems, ask, *, limit):
    """The problems whose prompt has at most `limit` tokens; prints how many were dropped.

    ask   problem text -> prompt token ids
    UserError where nothing is left.
    """
    lengths = [len(ask(problem.problem)) for problem in problems]
    kept = [problem for problem, length in zip(problems, lengths, strict=True) if length <= limit]
    if not kept:
        raise UserError(
            f"--max-prompt-tokens {limit}: every prompt is longer, the shortest has {min(lengths)} tokens"
        )
    if len(kept) < len(problems):
        dropped = len(problems) - len(kept)
        print(f"dropped {dropped} of {len(problems)} problems: prompts of more than {limit} tokens")
    return kept


def longest_prompt(problems, ask):
    """Tokens of the longest prompt among `problems`; `ask` as in `drop_long_prompts`."""
    return max(len(ask(problem.problem)) for problem in problems)


class Steps:
    """What each step works on: `steps[k]` is a list of problems and a function of (seed, k) alone.

    problems   all of them
    counts     problems per step by tier, {"easy": 2, "medium": 2, "hard": 1}; {None: 5} is five of any tier
    seed       each tier is shuffled anew for every pass over it

    Within a pass each problem comes once, and within a step none comes twice: where a step takes the end of
    one pass and the start of the next, the next begins with problems that are not at that end. `epoch_steps`
    is the number of steps in which the base tier (medium, else the first one used) has been seen once.
    Raises UserError if a tier is smaller than its count.
    """

    def __init__(self, problems, counts, *, seed):
        self._tiers = {
            tier: ([problem for problem in problems if tier is None or problem.tier == tier], count)
            for tier, count in counts.items()
            if count
        }
        for tier, (members, count) in self._tiers.items():
            if len(members) < count:
                what = f"tier {tier}" if tier else "the data"
                raise UserError(f"{what} has {len(members)} problems, but a step takes {count} of it")
        if not self._tiers:
            raise UserError(
                "a step needs at least one problem: set --easy, --medium, --hard or --problems-per-step"
            )
        self._seed = seed
        self._orders = {tier: [] for tier in self._tiers}
        members, count = self._tiers.get("medium") or next(iter(self._tiers.values()))
        self.epoch_steps = -(-len(members) // count)

    def __getitem__(self, k):
        if k < 0:
            raise IndexError("steps are counted from 0")
        return [
            members[self._position(tier, k * count + i)]
            for tier, (members, count) in self._tiers.items()
            for i in range(count)
        ]

    def _position(self, tier, n):
        """Index of the n-th problem that this tier gives out."""
        size, orders = len(self._tiers[tier][0]), self._orders[tier]
        while len(orders) <= n // size:
            orders.append(self._shuffle(tier, len(orders)))
        return orders[n // size][n % size]

    def _shuffle(self, tier, number):
        """The order of pass `number`, which depends on the one before it only in the step that spans both."""
        members, count = self._tiers[tier]
        order = list(range(len(members)))
        random.Random(f"{self._seed} {tier} {number}").shuffle(order)
        begun = number * len(members) % count  # problems of the spanning step that the pass before gave
        tail = set(self._orders[tier][-1][-begun:]) if begun else set()
        head = [index for index in order if index not in tail][: count - begun] if begun else []
        taken = set(head)
        return head + [index for index in order if index not in taken]
