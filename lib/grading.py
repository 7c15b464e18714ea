"""Are two math answers equal? A fast path for plain cases, math-verify in killable processes for the rest.

math-verify's own time limit is an alarm signal: it works in the main thread only, and not at all while C code
computes a huge power. So every comparison here runs in a child process that can be killed:

    this process  --JSON lines-->  supervisor (imports math-verify once)  --fork-->  child (does the work)

A child that overruns its wall-clock limit is killed and forked anew in milliseconds, because the supervisor
has imported everything already. `Grader` may be used from several threads; verdicts are cached.

Run as a program (`python lib/grading.py SECONDS`) this file is the supervisor.
"""

import contextlib
import json
import logging
import os
import re
import resource
import select
import signal
import subprocess
import sys
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from queue import SimpleQueue

CACHE_SIZE = 200_000  # verdicts kept
MEMORY_LIMIT = 4 * 2**30  # bytes of address space a child may take: 9**9**9**9 ends here, not in the swap

_NUMBER = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")
_COMMAND = re.compile(r"\\(?:text|mathrm|mbox)\s*\{[^{}]*\}|\\[a-zA-Z]+")
_WORDS = re.compile(
    r"[$=]|[A-Za-z]{2}|\d\s+[A-Za-z]\b|\b[A-Za-z]\s+\d|^[^(\[{]*,"
)  # more than one bare formula


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
    if len(gold) > 40 or len(answer) > 40 or not (_NUMBER.fullmatch(gold) and _NUMBER.fullmatch(answer)):
        return None
    if Fraction(gold.replace(",", "")) == Fraction(answer.replace(",", "")):
        return True
    return None if "." in gold + answer else False


class Grader:
    """Grades answers in a pool of killable worker processes, started when first needed.

    workers   processes that compare in parallel; None takes the number of cores, at most 8
    seconds   wall-clock limit for one comparison [s]

    `timeouts` and `unparsed` count the verdicts given so far, cached ones included. Close it, or use it in
    `with`.
    """

    def __init__(self, *, workers=None, seconds=5.0):
        self.seconds = seconds
        self.timeouts = self.unparsed = 0
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
        while idle is not None and not idle.empty():
            supervisor = idle.get()
            if supervisor is not None:
                supervisor.stdin.close()
                supervisor.wait()
                supervisor.stdout.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _recall(self, gold, answer):
        if answer is None or not answer.strip():
            return Verdict()
        plain = compare_plain(gold, answer)
        if plain is not None:
            return Verdict(correct=plain)
        with self._lock:
            return self._cache.get((gold, answer))

    def _ask_all(self, pairs):
        if not pairs:
            return []
        with self._lock:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(self._workers, thread_name_prefix="grader")
                self._idle = SimpleQueue()
                for _ in range(self._workers):
                    self._idle.put(None)  # a place for a supervisor that has not been started
            threads = self._threads
        return list(threads.map(self._ask, pairs))

    def _ask(self, pair):
        idle = self._idle
        supervisor = idle.get()
        try:
            if supervisor is None or supervisor.poll() is not None:
                supervisor = subprocess.Popen(
                    [sys.executable, __file__, str(self.seconds)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                )
            supervisor.stdin.write(json.dumps(pair).encode() + b"\n")
            supervisor.stdin.flush()
            line = supervisor.stdout.readline()
        finally:
            idle.put(supervisor)
        if not line:
            raise RuntimeError(
                "the grading process ended: is math-verify installed? (pip install -r requirements.txt)"
            )
        return Verdict(**json.loads(line))


def _read_math(text):
    """sympy expressions of an answer: a bare formula as one, all else (12 km, x = 3) as it stands first.

    math-verify looks for numbers in text that is not marked as a formula: it would read 2x+3 as 2, and the
    formula 12 km as 12 times k times m.
    """
    from math_verify import parse

    is_formula = not _WORDS.search(_COMMAND.sub("", text))
    for candidate in (f"${text}$", text) if is_formula else (text, f"${text}$"):
        parsed = parse(candidate, parsing_timeout=None)
        if any(not isinstance(expression, str) for expression in parsed):
            return parsed
    return []


def _judge(gold, answer):
    """Compare one pair in this process, without limits: the body of the child."""
    from math_verify import verify

    gold_parsed = _read_math(gold)
    if answer is None or not gold_parsed:
        return {"unparsed": not gold_parsed}
    parsed = _read_math(answer)
    return {
        "correct": bool(parsed) and verify(gold_parsed, parsed, timeout_seconds=None),
        "unparsed": not parsed,
    }


def _work(requests, replies, seconds):
    """The child: judge until the pipe closes. A limit on CPU time ends it where nobody is left to kill it."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    with os.fdopen(requests) as lines, os.fdopen(replies, "w") as out:
        for line in lines:
            used = resource.getrusage(resource.RUSAGE_SELF)
            limit = int(used.ru_utime + used.ru_stime + seconds) + 2
            resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
            try:
                reply = _judge(*json.loads(line))
            except (
                RecursionError,
                MemoryError,
            ):  # what deep or huge expressions end in: the answer is unreadable
                reply = {"unparsed": True}
            out.write(json.dumps(reply) + "\n")
            out.flush()


class _Child:
    """A forked worker and the two pipes to it."""

    def __init__(self, seconds):
        request_end, self.requests = os.pipe()
        self.replies, reply_end = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.requests)
            os.close(self.replies)
            status = 1
            with contextlib.suppress(KeyboardInterrupt):
                _work(request_end, reply_end, seconds)
                status = 0
            os._exit(status)
        os.close(request_end)
        os.close(reply_end)

    def ask(self, line, seconds):
        """The child's reply, or None where it died or let the time pass."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self.requests, line) if len(line) < 4096 else self._write_all(line)
        ready, _, _ = select.select([self.replies], [], [], seconds)
        reply = os.read(self.replies, 65536) if ready else b""
        return reply or None

    def _write_all(self, line):
        while line:
            line = line[os.write(self.requests, line) :]

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.requests)
        os.close(self.replies)


def supervise(seconds):
    """Answer requests on standard input until it closes; never runs an answer itself."""
    import math_verify  # noqa: F401  here, once: every child inherits it

    logging.disable(logging.WARNING)  # it warns, at every call, that somebody else must keep the time: we do

    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C is for the training script, which then closes our input
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what a library prints must not end up among the replies
    child = _Child(seconds)
    for line in sys.stdin.buffer:
        reply = child.ask(line, seconds)
        if reply is None:
            child.kill()
            child = _Child(seconds)
            reply = json.dumps({"timed_out": True}).encode() + b"\n"
        replies.write(reply)
    child.kill()


if __name__ == "__main__":
    supervise(float(sys.argv[1]))
