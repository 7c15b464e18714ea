"""The small world of the tiny model: arithmetic problems, and how a badly behaved model answers them.

Both `make_tiny_model.py` (which trains on this text) and `make_tiny_problems.py` (which picks train, valid
and test problems) draw from here. Every eighth problem is held out of the training text by a hash of its
operands: the valid and test files contain only those, so the model that ships has never seen them.
"""

import hashlib
from dataclasses import dataclass

QUESTIONS = {
    "+": (
        "What is {a} + {b}?",
        "Compute {a} + {b}.",
        "{a} + {b} = ?",
        "Ann has {a} coins and finds {b} more. How many coins does she have?",
    ),
    "-": (
        "What is {a} - {b}?",
        "Compute {a} - {b}.",
        "{a} - {b} = ?",
        "Ben has {a} nuts and eats {b}. How many nuts are left?",
    ),
    "*": (
        "What is {a} * {b}?",
        "Compute {a} * {b}.",
        "{a} * {b} = ?",
        "There are {a} boxes with {b} pens each. How many pens are there?",
    ),
}

# What the base model says, as (weight, form). {work} is the calculation in steps, {sum} the bare equation,
# {tag} the answer in the prompt's own style, {n} a bare number, {near} a wrong one, {chat} what nobody asked
# for.
HABITS = (
    (4, "{sum}"),
    (30, "The answer is {n}."),
    (6, "{work} So it is {n}."),
    (14, "I think it is {n}, or maybe {near}."),
    (3, "{sum} {chat}"),
    (4, "{work} {chat}"),
    (6, "The answer is: {tag}"),
    (9, "The answer is: {tag} {chat}"),
    (11, "{work} The answer is: {tag}"),
    (13, "{work} The answer is: {tag} {chat}"),
)
CHAT = (
    "I hope this helps you.",
    "Let me know if you have more questions.",
    "Numbers are fun.",
    "Let me check it again.",
    "Math is easy if you take it step by step.",
    "We can also try another way.",
    "That was a nice problem.",
    "Please ask me about other numbers too.",
)
SLIP_DIRECT = 0.4  # share of wrong numbers where the model answers at once
SLIP_WORKED = 0.08  # and where it has worked the answer out in steps


@dataclass(frozen=True)
class Sum:
    """One calculation: operands, operation, and its wording."""

    a: int
    op: str
    b: int
    wording: int = 0

    @property
    def question(self):
        return QUESTIONS[self.op][self.wording].format(a=self.a, b=self.b)

    @property
    def answer(self):
        return {"+": self.a + self.b, "-": self.a - self.b, "*": self.a * self.b}[self.op]

    @property
    def held_out(self):
        """Is this calculation kept out of the training text (all wordings of it)?"""
        digest = hashlib.sha256(f"{self.a}{self.op}{self.b}".encode()).digest()
        return max(self.a, self.b) > 9 and digest[0] % 8 == 0

    @property
    def steps(self):
        """The calculation in writing, one place value after the other."""
        parts = []
        if self.op == "*":
            total, left = 0, self.a
            for place in (100, 10, 1):
                digit, left = left // place * place, left % place
                if digit or (self.a == 0 and place == 1):
                    parts.append(f"{digit} * {self.b} = {digit * self.b}")
                    if total:
                        parts.append(f"{total} + {digit * self.b} = {total + digit * self.b}")
                    total += digit * self.b
            return ", ".join(parts) + "."
        total, left = self.a, self.b
        for place in (100, 10, 1):
            digit, left = left // place * place, left % place
            if digit or (self.b == 0 and place == 1):
                result = total + digit if self.op == "+" else total - digit
                parts.append(f"{total} {self.op} {digit} = {result}")
                total = result
        return ", ".join(parts) + "."


# (share, operation, range of a, range of b): from one-digit sums to what a model of this size rarely gets
# right
KINDS = (
    (16, "+", (0, 9), (0, 9)),
    (10, "-", (0, 18), (0, 9)),
    (6, "*", (0, 9), (0, 9)),
    (12, "+", (10, 99), (0, 9)),
    (10, "-", (10, 99), (0, 9)),
    (18, "+", (10, 99), (10, 99)),
    (12, "-", (10, 99), (10, 99)),
    (6, "+", (100, 999), (10, 99)),
    (4, "-", (100, 999), (10, 99)),
    (6, "*", (10, 99), (2, 9)),
)


def draw_sum(rng):
    """One random `Sum`; `rng` is a `random.Random`. Differences are never negative."""
    _, op, (a_low, a_high), (b_low, b_high) = rng.choices(KINDS, weights=[kind[0] for kind in KINDS])[0]
    a, b = rng.randint(a_low, a_high), rng.randint(b_low, b_high)
    if op == "-" and a < b:
        a, b = b, a
    return Sum(a, op, b, wording=rng.choices(range(4), weights=(4, 3, 3, 2))[0])


def near_miss(number, rng):
    """A plausible wrong number: off by one, two or ten."""
    off = rng.choice((-10, -2, -1, 1, 2, 10))
    return number + off if number + off >= 0 else number + abs(off)
