"""How a token is drawn: from which distribution, and by which random number.

Every draw is a function of (seed, step, problem, attempt, member, position) and of nothing else: each
completion has a key, and the number at a position is hashed from both. So the same completions come out
however rows are batched, and after a resume.

Shape suffixes: N rows, V vocabulary.
"""

import dataclasses
import functools
import hashlib
import math
import re
from dataclasses import dataclass

import torch

from lib.settings import UserError

_MASK64 = 2**64 - 1


@dataclass(frozen=True)
class SamplingParams:
    """How a token is drawn: repetition penalty, temperature, min_p, top_k, top_p, in this order."""

    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 is off
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 256
    phase: str = ""  # "marker: parameters" from behind the marker on, see lib/phases.py; empty is none

    def __post_init__(self):
        parse_phase(self.phase)  # a wrong one is named here, before anything is sampled

    @property
    def is_raw(self):
        """Are tokens drawn from the model's own distribution, as far as these parameters go?"""
        raw, mine = SamplingParams(), vars(self)
        return all(mine[name] == getattr(raw, name) for name, *_ in _LETTERS.values())


_LETTERS = {  # of the short form: field, type, admissible values in words and as a test
    "T": ("temperature", float, ">= 0", lambda value: value >= 0),
    "p": ("top_p", float, "> 0 and <= 1", lambda value: 0 < value <= 1),
    "k": ("top_k", int, ">= 0", lambda value: value >= 0),
    "m": ("min_p", float, ">= 0 and <= 1", lambda value: 0 <= value <= 1),
    "r": ("repetition_penalty", float, "> 0", lambda value: value > 0),
}


def parse_params(text, *, option, base=None):
    """`SamplingParams` from their short form, as in T1.1,p0.99,k20,m0.05,r1.2.

    T temperature, p top_p, k top_k, m min_p, r repetition penalty; what is not said is as in `base` (None:
    neutral). UserError, as `option`, names the piece that is wrong.
    """
    values = {}
    for piece in text.replace(" ", "").split(","):
        found = re.fullmatch(r"([Tpkmr])(\d+\.?\d*|\.\d+)", piece)
        if not found:
            raise UserError(
                f"{option}: cannot read {piece!r} in {text!r}: write it like T1.1,p0.99,k20,m0.05,r1.2"
            )
        name, kind, admitted, holds = _LETTERS[found[1]]
        value = float(found[2])
        if name in values:
            raise UserError(f"{option}: {name} stands there twice in {text!r}")
        if not holds(value) or (kind is int and not value.is_integer()) or not math.isfinite(value):
            what = "a whole number " if kind is int else ""
            raise UserError(
                f"{option}: {name} must be {what}{admitted}, not {found[2]} ({piece!r} in {text!r})"
            )
        values[name] = kind(value)
    return dataclasses.replace(base or SamplingParams(), **values)


@functools.cache
def parse_phase(text):
    """(marker, `SamplingParams` of the second phase) of a setting; ("", None) where it is empty.

    What the setting does not say about the second phase is neutral, not as in the first one. UserError names
    what is wrong.
    """
    if not text.strip():
        return "", None
    marker, colon, params = (part.strip() for part in text.rpartition(":"))
    if not colon or not marker:
        raise UserError(f"--phase {text!r}: write a marker, a colon, parameters, like '</think>: T0.6,p0.95'")
    if not marker.isascii():
        raise UserError(
            f"--phase: the marker {marker!r} must be plain ASCII: other letters may be half a token"
        )
    return marker, parse_params(params, option="--phase", base=SamplingParams())


def mix64(value):
    """One step of splitmix64 (Steele et al. 2014): a bijection of 64-bit integers, neighbours far apart."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def draw_keys(problems, group_size, *, seed, step, attempt):
    """`draw_key` of every completion of a batch; those of a problem are neighbours."""
    return [
        draw_key(seed, step, problem.id, attempt=attempt, member=member)
        for problem in problems
        for member in range(group_size)
    ]


def draw_key(seed, step, problem_id, *, attempt, member):
    """The 64-bit key of one completion's random numbers; also its seed in samplers that take one."""
    key = mix64(seed & _MASK64)
    problem = int.from_bytes(hashlib.blake2b(str(problem_id).encode(), digest_size=8).digest(), "little")
    for part in (step, problem, attempt, member):
        key = mix64(key ^ (part & _MASK64))
    return key


def _uniform(key_N, position):
    """One number in [0, 1) per row [float64], from its key and position: splitmix64 on int64, which wraps."""

    def shifted(value_N, bits):  # a logical shift; that of int64 is arithmetic
        return (value_N >> bits) & ((1 << (64 - bits)) - 1)

    def signed(number):
        return number - 2**64 if number >= 2**63 else number

    value_N = key_N + signed((position + 1) * 0x9E3779B97F4A7C15 & _MASK64)
    value_N = (value_N ^ shifted(value_N, 30)) * signed(0xBF58476D1CE4E5B9)
    value_N = (value_N ^ shifted(value_N, 27)) * signed(0x94D049BB133111EB)
    return shifted(value_N ^ shifted(value_N, 31), 11).double() * 2.0**-53


def filter_logits(logits_NV, params, *, seen_NV=None):
    """Logits of the distribution that is sampled: `params` applied to raw logits, removed tokens at -inf.

    logits_NV  (N, V) float32, not changed
    seen_NV    (N, V) bool, tokens of prompt and completion so far; needed for a repetition penalty other than
               1
    Returns (N, V). Not for temperature 0, where the largest logit is taken (after the penalty).
    """
    if params.repetition_penalty != 1.0:
        penalty = params.repetition_penalty
        scaled_NV = torch.where(logits_NV > 0, logits_NV / penalty, logits_NV * penalty)
        logits_NV = torch.where(seen_NV, scaled_NV, logits_NV)
    if params.temperature == 0:
        return logits_NV
    if params.temperature != 1.0:
        logits_NV = logits_NV / params.temperature
    if params.min_p > 0:
        log_p_NV = logits_NV - logits_NV.amax(dim=-1, keepdim=True)  # relative to the most likely token
        logits_NV = logits_NV.masked_fill(log_p_NV < torch.tensor(params.min_p).log(), -torch.inf)
    if 0 < params.top_k < logits_NV.shape[-1]:
        smallest_N1 = logits_NV.topk(params.top_k, dim=-1).values[:, -1:]
        logits_NV = logits_NV.masked_fill(logits_NV < smallest_N1, -torch.inf)
    if params.top_p < 1:
        sorted_NV, order_NV = logits_NV.sort(dim=-1, descending=True, stable=True)
        p_NV = sorted_NV.softmax(dim=-1)
        behind_NV = p_NV.cumsum(dim=-1) - p_NV >= params.top_p  # the mass before it is enough already
        behind_NV = torch.zeros_like(behind_NV).scatter(-1, order_NV, behind_NV)
        logits_NV = logits_NV.masked_fill(behind_NV, -torch.inf)
    return logits_NV


def draw_tokens(logits_NV, params, key_N, *, position, seen_NV=None):
    """One token per row: the cumulative distribution, inverted at a number that only the key decides."""
    logits_NV = filter_logits(logits_NV, params, seen_NV=seen_NV)
    if params.temperature == 0:
        return logits_NV.argmax(dim=-1)
    cumulative_NV = logits_NV.softmax(dim=-1).double().cumsum(dim=-1)
    threshold_N1 = _uniform(key_N, position)[:, None] * cumulative_NV[:, -1:]
    token_N = torch.searchsorted(cumulative_NV, threshold_N1, right=True)[:, 0]
    return token_N.clamp(max=logits_NV.shape[-1] - 1)
