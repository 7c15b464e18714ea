"""Two phases of a completion (see `phases`) inside vLLM: a logits processor of its v1 interface.

It runs before the engine's own temperature and filters. Requests with a phase therefore leave those neutral
and carry both parameter sets here (`describe_phases`), which are applied by the same `filter_logits` as in
our own decode loop: the distribution is the same, whichever sampler draws from it.

Imports vLLM, and is imported where an engine is started.
"""

from dataclasses import dataclass

import torch
from transformers import AutoTokenizer
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from lib.draws import SamplingParams, filter_logits, parse_phase
from lib.phases import PhaseTracker, token_texts

_KEY = "phases"  # in the extra arguments of a request


def describe_phases(params):
    """The extra arguments of a request that is sampled by these `SamplingParams`, which have a phase."""
    return {_KEY: vars(params)}


@dataclass
class _Request:
    """A completion that is being sampled: its two parameter sets, and where it stands."""

    params: tuple  # before the marker, behind it
    tracker: PhaseTracker
    prompt_ids: list
    output_ids: list  # vLLM's own list, which grows
    pushed: int = 0

    def catch_up(self):
        """Take the tokens that came since; returns the parameters of the next one."""
        for token in self.output_ids[self.pushed :]:
            if token < 0:  # vLLM's place for a token that is not there yet
                break
            self.tracker.push(token)
            self.pushed += 1
        return self.params[self.tracker.behind]


class PhaseProcessor(LogitsProcessor):
    """Filters the logits of every request that has phases, by the phase it is in."""

    def __init__(self, vllm_config, device, is_pin_memory):
        tokenizer = AutoTokenizer.from_pretrained(vllm_config.model_config.tokenizer)
        self._text_of, self._known = token_texts(tokenizer), len(tokenizer)
        self._requests = {}  # by their row

    def is_argmax_invariant(self):
        return False

    def update_state(self, batch_update):
        process_dict_updates(self._requests, batch_update, self._begin)

    def _begin(self, request, prompt_ids, output_ids):
        asked = (request.extra_args or {}).get(_KEY)
        if asked is None:
            return None
        first = SamplingParams(**asked)
        marker, later = parse_phase(first.phase)
        tracker = PhaseTracker(marker, self._text_of)
        return _Request((first, later), tracker, list(prompt_ids or ()), output_ids)

    def apply(self, logits):
        alike = {}  # rows by parameters: those of a phase are filtered together
        for row, request in self._requests.items():
            alike.setdefault(request.catch_up(), []).append(row)
        for params, rows in alike.items():
            index_N = torch.tensor(rows, device=logits.device)
            known_NV = logits[index_N, : self._known]
            seen_NV = self._mark_seen(rows, known_NV) if params.repetition_penalty != 1.0 else None
            kept_NV = filter_logits(known_NV, params, seen_NV=seen_NV)
            if params.temperature == 0:
                best_N1 = kept_NV.argmax(dim=-1, keepdim=True)
                kept_NV = torch.full_like(kept_NV, -torch.inf).scatter_(1, best_N1, 0.0)
            logits[index_N] = -torch.inf
            logits[index_N, : self._known] = kept_NV
        return logits

    def _mark_seen(self, rows, known_NV):
        """Which tokens stand in the prompt or the completion of each row."""
        seen_NV = torch.zeros_like(known_NV, dtype=torch.bool)
        for mark_V, request in zip(seen_NV, map(self._requests.get, rows), strict=True):
            mark_V[request.prompt_ids + request.output_ids[: request.pushed]] = True
        return seen_NV
