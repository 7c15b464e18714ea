"""How a token is drawn: from which distribution, and by which random number.

Every draw is a function of (seed, step, problem, attempt, member, position) and of nothing else: each
completion has a key, and the number at a position is hashed from both. So the same completions come out
however rows are batched, and after a resume.

Shape suffixes: N rows, V vocabulary.
"""

import hashlib
from dataclasses import dataclass

import torch

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


def mix64(value):
    """One step of splitmix64 (Steele et al. 2014): a bijection of 64-bit integers, neighbours far apart."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


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
