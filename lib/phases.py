"""Two phases of a completion: sampled one way up to a marker, another way from behind it on.

    "</think>: T0.6,p0.95"     think boldly, then write the answer conservatively
    "<answer>: T0"             greedy within the answer

A completion is in its second phase from the token behind the marker to its end, each for itself. Only tokens
that were generated count: a marker in the prompt is part of no completion. It is found in the text of the
tokens as they come, so that it may be several tokens, or begin or end within one.
"""

import functools

from lib.draws import parse_phase


def token_texts(tokenizer):
    """A function from a token id to its text, special tokens included, that remembers what it was asked."""

    @functools.cache
    def text_of(token_id):
        return tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    return text_of


class PhaseTracker:
    """Whether one completion has its marker behind it.

    marker   a text
    text_of  token id -> its text, see `token_texts`

    `behind` is False until the marker is complete, and True from then on.
    """

    __slots__ = ("_marker", "_tail", "_text_of", "behind")

    def __init__(self, marker, text_of):
        self._marker, self._text_of = marker, text_of
        self._tail, self.behind = "", False

    def push(self, token_id):
        """Take the next token of the completion; returns `behind`."""
        if not self.behind:
            text = self._tail + self._text_of(token_id)
            self.behind = self._marker in text
            self._tail = text[max(0, len(text) - len(self._marker) + 1) :]  # may be the marker's beginning
        return self.behind


def measure_tempering(groups, attempts, text_of):
    """The share of tokens that were not drawn from the model's own distribution: a metric by name.

    attempts   the `SamplingParams` of each attempt; a group's own are those at its `attempt`
    Tempered, truncated, penalised: of such tokens the ratio of log-probabilities knows nothing.
    """
    tokens = sum(len(ids) for group in groups for ids in group.completion_ids)
    raw = sum(count_raw_tokens(group.completion_ids, attempts[group.attempt], text_of) for group in groups)
    return {"sampling/tempered_fraction": 1 - raw / tokens}


def count_raw_tokens(rows, params, text_of):
    """How many tokens of completions (lists of ids) sampled by `params` were drawn as the model has them."""
    marker, later = parse_phase(params.phase)
    if later is None or later.is_raw == params.is_raw:
        return sum(map(len, rows)) if params.is_raw else 0
    first = 0
    for ids in rows:
        tracker = PhaseTracker(marker, text_of)
        first += next((i for i, token in enumerate(ids, start=1) if tracker.push(token)), len(ids))
    return first if params.is_raw else sum(map(len, rows)) - first
