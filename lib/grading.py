"""Are two math answers equal? A fast path for plain cases, math-verify in killable processes for the rest.

math-verify's own time limit is an alarm signal: it works in the main thread only, and not at all while C code
computes a huge power. So every comparison here runs in a child process that can be killed:

    this process  --JSON lines-->  supervisor (imports math-verify once)  --fork-->  child (does the work)

A child that overruns its wall-clock limit is killed and forked anew in milliseconds, because the supervisor
has imported everything already. `Grader` may be used from several threads; verdicts are cached.

Both are in grading_worker.py.
"""

import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter, OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from queue import SimpleQueue

CACHE_SIZE = 200_000  # verdicts kept
MAX_ANSWER = 2000  # characters; what is longer is no answer to be read as mathematics
STRIKES = 2  # an answer that ran out of time against so many gold answers is not tried against another
_WORKER = Path(__file__).with_name("grading_worker.py")

_NUMBER = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")
_FRACTION = re.compile(r"([+-]?)\s*(?:\\frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}|(\d+)\s*/\s*(\d+))")


@dataclass(frozen=True)
class Verdict:
    """What became of one comparison. `unparsed`: there was an answer, but not one to read as mathematics."""

    correct: bool = False
    unparsed: bool = False
    timed_out: bool = False


def normalise(answer):
    """An answer without the decorations that never change its value.

    >>> normalise(" $\\\\dfrac{1}{2}$. ")
    '\\\\frac{1}{2}'
    """
    text = " ".join(answer.split())
    while text.endswith(".") or (len(text) > 1 and text[0] == text[-1] == "$") or text.startswith("\\("):
        if text.endswith("."):
            text = text[:-1].rstrip()
        elif text[0] == "$":
            text = text[1:-1].strip()
        else:
            text = text[2:].removesuffix("\\)").strip()
    return text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")


def compare_plain(gold, answer):
    """True or False where strings or plain numbers decide, None where it takes mathematics.

    Two different decimals stay undecided: math-verify forgives rounding in the seventh digit.
    """
    gold, answer = normalise(gold), normalise(answer)
    if gold and gold == answer:
        return True
    values = [_read_number(text) if len(text) <= 40 else None for text in (gold, answer)]
    if None in values:
        return None
    if values[0] == values[1]:
        return True
    return None if "." in gold + answer else False


def _read_number(text):
    """The exact value of a number or of a fraction of two whole numbers, else None."""
    if _NUMBER.fullmatch(text):
        return Fraction(text.replace(",", ""))
    parts = _FRACTION.fullmatch(text)
    if not parts or not int(parts[3] or parts[5]):
        return None
    return Fraction(int(parts[1] + (parts[2] or parts[4])), int(parts[3] or parts[5]))


class Grader:
    """Grades answers in a pool of killable worker processes, started when first needed.

    workers   processes that compare in parallel; None takes the number of cores, at most 8
    seconds   wall-clock limit for one comparison [s]
    judge     None is this module's own rule; "string" compares texts; "math_verify" (its parse and verify as
              they are) or "file.py:function" decide alone, in the workers and under their limits

    `timeouts` and `unparsed` count the verdicts given so far, cached ones included. Close it, or use it in
    `with`.
    """

    def __init__(self, *, workers=None, seconds=5.0, judge=None):
        self.seconds = seconds
        self.timeouts = self.unparsed = 0
        self._judge = judge
        self._strikes = Counter()  # by answer: gold answers against which it ran out of time
        self._workers = workers or max(1, min(8, len(os.sched_getaffinity(0))))
        self._cache = OrderedDict()
        self._lock = threading.Lock()
        self._idle = None  # supervisors waiting for work; None until the first is needed
        self._threads = None

    def grade(self, answers, golds):
        """One `Verdict` per (answer, gold) pair; an answer of None (nothing was found) is simply wrong."""
        pairs = list(zip(golds, answers, strict=True))
        verdicts = {pair: self._recall(*pair) for pair in set(pairs)}
        open_pairs = [pair for pair in dict.fromkeys(pairs) if verdicts[pair] is None]
        verdicts.update(zip(open_pairs, self._ask_all(open_pairs), strict=True))
        with self._lock:
            for pair in open_pairs:
                self._cache[pair] = verdicts[pair]
            while len(self._cache) > CACHE_SIZE:
                self._cache.popitem(last=False)
            results = [verdicts[pair] for pair in pairs]
            self.timeouts += sum(verdict.timed_out for verdict in results)
            self.unparsed += sum(verdict.unparsed for verdict in results)
        return results

    def find_unparsable(self, golds):
        """Indices of gold answers that cannot be read as mathematics: nothing would ever equal them."""
        hard = [i for i, gold in enumerate(golds) if not _NUMBER.fullmatch(normalise(gold))]
        verdicts = self._ask_all([(golds[i], None) for i in hard])
        return [i for i, verdict in zip(hard, verdicts, strict=True) if verdict.unparsed or verdict.timed_out]

    def close(self):
        """End the worker processes; the next call would start them again."""
        with self._lock:
            idle, self._idle = self._idle, None
            if self._threads:
                self._threads.shutdown()
                self._threads = None
        ending = []
        while idle is not None and not idle.empty():
            ending.append(idle.get())
        ending = [supervisor for supervisor in ending if supervisor is not None]
        for supervisor in ending:  # all of them first: they end at the same time
            supervisor.stdin.close()
        for supervisor in ending:
            supervisor.wait()
            supervisor.stdout.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _recall(self, gold, answer):
        if answer is None or not answer.strip():
            return Verdict()
        if self._judge == "string":
            return Verdict(correct=normalise(gold) == normalise(answer))
        plain = compare_plain(gold, answer) if self._judge is None else None
        if plain is not None:
            return Verdict(correct=plain)
        if len(answer) > MAX_ANSWER and len(answer) > 2 * len(gold):
            return Verdict(unparsed=True)
        with self._lock:
            return self._cache.get((gold, answer))

    def start(self):
        """Start the worker processes now: they import math-verify while the caller reads its files."""
        if self._judge != "string":
            self._open_threads(self._start_supervisor)
        return self

    def _open_threads(self, make_supervisor=lambda: None):
        with self._lock:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(self._workers, thread_name_prefix="grader")
                self._idle = SimpleQueue()
                for _ in range(self._workers):
                    self._idle.put(make_supervisor())  # None is a place for one that has not been started
            return self._threads

    def _start_supervisor(self):
        words = [sys.executable, str(_WORKER), str(self.seconds), *filter(None, [self._judge])]
        return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def _ask_all(self, pairs):
        if not pairs:
            return []
        return list(self._open_threads().map(self._ask, pairs))

    def _ask(self, pair):
        if self._strikes[pair[1]] >= STRIKES and pair[1] is not None:
            return Verdict(timed_out=True)
        idle = self._idle
        supervisor = idle.get()
        try:
            if supervisor is None or supervisor.poll() is not None:
                supervisor = self._start_supervisor()
            supervisor.stdin.write(json.dumps(pair).encode() + b"\n")
            supervisor.stdin.flush()
            line = supervisor.stdout.readline()
        finally:
            idle.put(supervisor)
        if not line:
            raise RuntimeError("the grading process ended: is math-verify installed (requirements.txt)?")
        verdict = Verdict(**json.loads(line))
        with self._lock:
            self._strikes[pair[1]] += verdict.timed_out
        return verdict
