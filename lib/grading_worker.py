"""The processes in which answers are compared: a supervisor, and the child that it kills and forks anew.

    python lib/grading_worker.py SECONDS [JUDGE]     one JSON pair [gold, answer] a line in, one verdict out

`grading.Grader` starts it; nothing else does.
"""

import contextlib
import functools
import importlib.util
import inspect
import json
import logging
import os
import re
import resource
import select
import signal
import sys

MEMORY_LIMIT = 4 * 2**30  # bytes of address space a child may take: 9**9**9**9 ends here, not in the swap

_COMMAND = re.compile(r"\\(?:text|mathrm|mbox)\s*\{[^{}]*\}|\\[a-zA-Z]+")
# more than one bare formula:
_WORDS = re.compile(r"[$=]|[A-Za-z]{2}|\d\s+[A-Za-z]\b|\b[A-Za-z]\s+\d|^[^(\[{]*,")


@functools.lru_cache(maxsize=1024)  # the same gold answer comes back with every completion
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


def _judge_raw(gold, answer):
    """math-verify as it is, on the two texts as they are: the judge called math_verify."""
    from math_verify import parse, verify

    gold_parsed, parsed = (parse(text, parsing_timeout=None) for text in (gold, answer))
    correct = bool(gold_parsed and parsed) and verify(gold_parsed, parsed, timeout_seconds=None)
    return {"correct": correct, "unparsed": not parsed}


def load_judge(place):
    """A judge of one's own from `file.py:function`; the function may call the gold answer `gold`,
    `ground_truth` or `target`, else it is its second argument. It returns a truth value or a number."""
    file, _, name = place.rpartition(":")
    spec = importlib.util.spec_from_file_location("own_judge", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name)
    names = list(inspect.signature(function).parameters)
    gold_first = bool(names) and names[0] in ("gold", "ground_truth", "target")

    def judge(gold, answer):
        return {"correct": function(*((gold, answer) if gold_first else (answer, gold))) > 0}

    return judge


def _work(requests, replies, *, seconds, judge):
    """The child: judge until the pipe closes. A limit on CPU time ends it where nobody is left to kill it."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    with os.fdopen(requests) as lines, os.fdopen(replies, "w") as out:
        for line in lines:
            used = resource.getrusage(resource.RUSAGE_SELF)
            limit = int(used.ru_utime + used.ru_stime + seconds) + 2
            resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
            try:
                reply = judge(*json.loads(line))
            except (RecursionError, MemoryError):  # deep or huge expressions: the answer is unreadable
                reply = {"unparsed": True}
            out.write(json.dumps(reply) + "\n")
            out.flush()


class _Child:
    """A forked worker and the two pipes to it."""

    def __init__(self, seconds, judge):
        request_end, self.requests = os.pipe()
        self.replies, reply_end = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.requests)
            os.close(self.replies)
            status = 1
            with contextlib.suppress(KeyboardInterrupt):
                _work(request_end, reply_end, seconds=seconds, judge=judge)
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


def supervise(seconds, place="standard"):
    """Answer requests on standard input until it closes; never runs an answer itself."""
    import math_verify  # noqa: F401  here, once: every child inherits it

    logging.disable(logging.WARNING)  # it warns, at every call, that somebody else must keep the time: we do

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the script, which then closes our input
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what a library prints must not end up among the replies
    judge = {"standard": _judge, "math_verify": _judge_raw}.get(place) or load_judge(place)
    _judge("\\frac{1}{2}", "x+1")  # what is imported and built at the first formula: children inherit it, too
    child = _Child(seconds, judge)
    for line in sys.stdin.buffer:
        reply = child.ask(line, seconds)
        if reply is None:
            child.kill()
            child = _Child(seconds, judge)
            reply = json.dumps({"timed_out": True}).encode() + b"\n"
        try:
            replies.write(reply)
        except BrokenPipeError:  # who asked is gone
            break
    child.kill()
    os._exit(0)  # taking sympy apart, module by module, takes longer than grading ten answers


if __name__ == "__main__":
    supervise(float(sys.argv[1]), *sys.argv[2:])
