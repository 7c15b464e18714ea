"""A group of completions per prompt: the contract of a sampler, and the decode loop over transformers.

The loop takes all prompts of a step at once. Each prompt is computed once, its keys and values are shared out
to the G rows of its group, and finished rows leave the batch.

Shape suffixes: P prompts, N = P * G rows still decoding, V vocabulary, L cached columns.
"""

from dataclasses import dataclass, field

import torch

from lib.draws import draw_keys, draw_tokens, parse_phase
from lib.phases import PhaseTracker, token_texts


@dataclass
class Group:
    """A problem and its sampled completions: what travels from the sampler to the run log.

    The lists have one entry per completion. `completion_ids` includes the end token where one was sampled;
    `sampler_logps` are log-probabilities of those ids under the raw model, before temperature and truncation
    [nat].
    """

    problem: object
    prompt: str  # as rendered, special tokens included
    prompt_ids: list
    completion_ids: list
    completions: list
    finish_reasons: list  # "stop": an end token was sampled; "length": the limit was reached
    sampler_logps: list
    rewards: dict = field(default_factory=dict)  # by name, a list each; filled by rewards.score_groups
    reward: list = field(default_factory=list)  # weighted total
    grades: list = field(default_factory=list)  # a rewards.Grade each; filled by rewards.grade_groups
    advantage: list = field(default_factory=list)  # how hard each completion was pushed; filled by the script
    attempt: int = 0  # how often its problem had been sampled before in the same step


def keep_advantages(groups, advantage_PG):
    """Note on every group how hard its completions are pushed: for the log, nothing is computed from it."""
    for group, advantage_G in zip(groups, advantage_PG.tolist(), strict=True):
        group.advantage = advantage_G


def find_end_ids(generation_config, tokenizer):
    """Every token id that ends a completion, sorted: a model may have several, its tokenizer knows one."""
    ends = generation_config.eos_token_id
    ends = ends if isinstance(ends, (list, tuple)) else [ends]
    return sorted({end for end in (*ends, tokenizer.eos_token_id) if end is not None})


def decode_completions(tokenizer, rows, *, end_ids):
    """Plain strings, without the end token but with every other special token the model wrote."""
    bare = [ids[:-1] if ids and ids[-1] in end_ids else ids for ids in rows]
    return tokenizer.batch_decode(bare, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def build_groups(sampler, problems, prompts, *, rows, attempt):
    """One `Group` per problem from a sampler's rows: (token ids, log-probs, ended) of each completion, those
    of a problem together. The sampler lends its tokenizer and its end ids."""
    size, groups = len(rows) // len(problems), []
    for i, (problem, prompt_ids) in enumerate(zip(problems, prompts, strict=True)):
        ids, logps, ended = zip(*rows[i * size : (i + 1) * size], strict=True)
        texts = decode_completions(sampler.tokenizer, ids, end_ids=sampler.end_ids)
        prompt = sampler.tokenizer.decode(prompt_ids, clean_up_tokenization_spaces=False)
        reasons = ["stop" if one else "length" for one in ended]
        groups.append(Group(problem, prompt, prompt_ids, list(ids), texts, reasons, list(logps)))
        groups[-1].attempt = attempt
    return groups


class TransformersSampler:
    """Samples with the model that is being trained, in the process that trains it.

    model       a causal LM of transformers, or a PEFT model around one
    tokenizer   its tokenizer: ids from len(tokenizer) on are never sampled
    max_rows    rows decoded at once; more prompts than fit wait their turn [completions]
    """

    def __init__(self, model, tokenizer, *, max_rows=1024):
        self.model, self.tokenizer, self.max_rows = model, tokenizer, max_rows
        self.text_of = token_texts(tokenizer)
        self.causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.end_ids = find_end_ids(self.causal_lm.generation_config, tokenizer)

    def sample(self, problems, prompts, params, *, group_size, seed, step, attempt=0):
        """Sample `group_size` completions of every prompt: one `Group` per problem, in their order.

        problems   with an `id` each, which enters the draws
        prompts    their token ids
        """
        per_batch = max(1, self.max_rows // group_size)
        was_training = self.model.training
        self.model.eval()
        rows = []
        for start in range(0, len(problems), per_batch):
            chosen = problems[start : start + per_batch]
            keys = draw_keys(chosen, group_size, seed=seed, step=step, attempt=attempt)
            rows += self._decode(prompts[start : start + per_batch], keys, params)
        self.model.train(was_training)
        return build_groups(self, problems, prompts, rows=rows, attempt=attempt)

    def texts(self, rows):
        """`decode_completions` of these token ids."""
        return decode_completions(self.tokenizer, rows, end_ids=self.end_ids)

    def _logits(self, ids, *, last, **kwargs):
        """Raw float32 logits at column `last` of each row; the vocabulary is only computed there."""
        hidden = self.causal_lm.get_decoder()(input_ids=ids, use_cache=True, **kwargs).last_hidden_state
        rows = torch.arange(len(ids), device=ids.device)
        return self.causal_lm.get_output_embeddings()(hidden[rows, last]).float()

    def _start(self, prompts, keys, params):
        """Compute the prompts once and share them out: the rows to decode, and their first logits."""
        from lib.kv_cache import start_cache

        device, group_size = self.causal_lm.device, len(keys) // len(prompts)
        length_P = torch.tensor([len(ids) for ids in prompts], device=device)
        width = int(length_P.max())
        # Prompts stand at the left and need no mask: causal attention never looks at padding to the right.
        ids_PL = torch.tensor([ids + [0] * (width - len(ids)) for ids in prompts], device=device)
        cache = start_cache(self.causal_lm.config)
        logits_PV = self._logits(ids_PL, last=length_P - 1, past_key_values=cache)

        row_N = torch.arange(len(keys), device=device)
        source_N = row_N // group_size
        key_N = torch.tensor([key - 2**64 if key >= 2**63 else key for key in keys], device=device)
        length_N, logits_NV = length_P[source_N], logits_PV[source_N]
        column_L = torch.arange(width + params.max_new_tokens, device=device)
        visible_NL = (column_L < length_N[:, None]) | (column_L >= width)
        seen_NV, (marker, later) = None, parse_phase(params.phase)
        if any(each.repetition_penalty != 1.0 for each in (params, later or params)):
            seen_NV = torch.zeros_like(logits_NV, dtype=torch.bool)
            for row, source in enumerate(source_N.tolist()):
                seen_NV[row, prompts[source]] = True
        trackers = [PhaseTracker(marker, self.text_of) for _ in keys] if later else None
        rows = _Rows(row_N, key_N, length_N, visible_NL, seen_NV, cache, width, trackers)
        rows.keep_cache(source_N)
        return rows, logits_NV

    def _draw(self, logits_NV, rows, params, *, position):
        """One token per row; ids that the tokenizer does not know are never drawn."""
        known = len(self.tokenizer)
        seen_NV = None if rows.seen_NV is None else rows.seen_NV[:, :known]
        token_N = draw_tokens(logits_NV[:, :known], params, rows.key_N, position=position, seen_NV=seen_NV)
        if rows.trackers is not None:
            self._draw_later(logits_NV[:, :known], rows, params, position=position, token_N=token_N)
        if rows.seen_NV is not None:
            rows.seen_NV.scatter_(1, token_N[:, None], True)
        return token_N

    def _draw_later(self, allowed_NV, rows, params, *, position, token_N):
        """Draw the rows that are behind their marker once more, into `token_N`, as their phase asks for."""
        behind = [i for i, tracker in enumerate(rows.trackers) if tracker.behind]
        if behind:
            index = torch.tensor(behind, device=token_N.device)
            seen_NV = None if rows.seen_NV is None else rows.seen_NV[index, : allowed_NV.shape[1]]
            _, later = parse_phase(params.phase)
            token_N[index] = draw_tokens(
                allowed_NV[index], later, rows.key_N[index], position=position, seen_NV=seen_NV
            )
        for tracker, token in zip(rows.trackers, token_N.tolist(), strict=True):
            tracker.push(token)

    def _advance(self, rows, token_N, *, position):
        """The logits behind the tokens that were just drawn at `position`."""
        return self._logits(
            token_N[:, None],
            last=0,
            past_key_values=rows.cache,
            position_ids=(rows.length_N + position)[:, None],
            attention_mask=rows.visible_NL[:, None, None, : rows.width + position + 1],
        )

    @torch.inference_mode()
    def stream(self, prompt, keys, params):
        """Decode one prompt for somebody who watches: the same tokens as `sample`, a position at a time.

        prompt   token ids
        keys     one `draw_key` per completion
        Yields a list per position: the token id of each completion, None where it has ended before. The model
        must be in evaluation mode, and may be used for something else between two positions.
        """
        rows, logits_NV = self._start([prompt], keys, params)
        end_E = torch.tensor(self.end_ids, device=logits_NV.device)
        ended_N = torch.zeros(len(keys), dtype=torch.bool, device=logits_NV.device)
        for position in range(params.max_new_tokens):
            token_N = self._draw(logits_NV, rows, params, position=position)
            pairs = zip(token_N.tolist(), ended_N.tolist(), strict=True)
            yield [None if ended else token for token, ended in pairs]
            ended_N |= torch.isin(token_N, end_E)
            if ended_N.all() or position + 1 == params.max_new_tokens:
                return
            logits_NV = self._advance(rows, token_N, position=position)

    def has_ended(self, ids):
        """Does a completion (token ids) end with an end token?"""
        return bool(ids) and ids[-1] in self.end_ids

    @torch.inference_mode()
    def _decode(self, prompts, keys, params):
        """(token ids, log-probs, finished) of one row per key; rows of a prompt are neighbours."""
        rows, logits_NV = self._start(prompts, keys, params)
        device, limit = logits_NV.device, params.max_new_tokens
        end_E = torch.tensor(self.end_ids, device=device)
        tokens_NT = torch.zeros(len(keys), limit, dtype=torch.long, device=device)
        logps_NT = torch.zeros(len(keys), limit, device=device)
        total_N = torch.full((len(keys),), limit, device=device)
        finished_N = torch.zeros(len(keys), dtype=torch.bool, device=device)
        for position in range(limit):
            token_N = self._draw(logits_NV, rows, params, position=position)
            tokens_NT[rows.row_N, position] = token_N
            chosen_N = logits_NV.gather(1, token_N[:, None])[:, 0]
            logps_NT[rows.row_N, position] = chosen_N - logits_NV.logsumexp(dim=-1)
            ended_N = rows.row_N[torch.isin(token_N, end_E) & ~finished_N[rows.row_N]]
            total_N[ended_N] = position + 1
            finished_N[ended_N] = True
            alive_N = ~finished_N[rows.row_N]
            alive = int(alive_N.sum())
            if alive == 0 or position + 1 == limit:
                break
            # Moving the cache costs about as much as a step: let an eighth of the rows finish first.
            if alive <= len(alive_N) * 7 // 8:
                rows.keep(alive_N.nonzero()[:, 0])
                token_N = token_N[alive_N]
            logits_NV = self._advance(rows, token_N, position=position)
        ids, logps = tokens_NT.tolist(), logps_NT.tolist()
        ends = zip(total_N.tolist(), finished_N.tolist(), strict=True)
        return [(ids[i][:n], logps[i][:n], finished) for i, (n, finished) in enumerate(ends)]


@dataclass
class _Rows:
    """The rows that are still decoding, and what moves with them when others leave."""

    row_N: torch.Tensor  # their place among all rows
    key_N: torch.Tensor
    length_N: torch.Tensor  # tokens of the prompt
    visible_NL: torch.Tensor  # cached columns that belong to the row: all but the padding behind its prompt
    seen_NV: torch.Tensor | None
    cache: object
    width: int  # columns of the longest prompt; completions begin there
    trackers: list | None = None  # a PhaseTracker each, where there are two phases

    def keep_cache(self, index_N):
        for layer in self.cache.layers:
            getattr(layer, "keep_rows", layer.batch_select_indices)(index_N)

    def keep(self, index_N):
        """Keep rows by index."""
        self.keep_cache(index_N)
        self.row_N, self.key_N, self.length_N = (x[index_N] for x in (self.row_N, self.key_N, self.length_N))
        self.visible_NL = self.visible_NL[index_N]
        self.seen_NV = None if self.seen_NV is None else self.seen_NV[index_N]
        self.trackers = self.trackers and [self.trackers[i] for i in index_N.tolist()]
