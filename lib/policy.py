"""The model that learns: its log-probabilities, and a backward pass that never holds all logits.

Losses over groups couple all completions of a step. Instead of keeping one graph per completion, the gradient
takes two passes, exact and with the memory of one micro-batch:

    1. `logprobs`   log-probabilities of all rows, without a graph
    2. the caller   the loss of that small tensor, differentiated: dL/dlogp
    3. `backward`   sum(dL/dlogp * logp), back-propagated micro-batch by micro-batch

Where all rows together fit into the token budget of one micro-batch, the graph of pass 1 is kept and pass 3
runs no second forward. Where memory runs out the micro-batch is done again in smaller ones.

Shape suffixes: N rows (completions), T completion tokens, B rows and L columns of a micro-batch, M completion
tokens of a micro-batch, H hidden.
"""

import math
import resource
from dataclasses import dataclass, field

import torch

from lib.microbatches import TokenBudget, count_padded
from lib.settings import UserError
from lib.vocabulary import find_kernel, measure_logps, pull_logps


@dataclass
class Scored:
    """Token log-probabilities of completions, as the leaf of a loss.

    logp_NT   (N, T) [nat], requires grad; 0 behind a row's length
    length_N  (N,) completion tokens
    later     the log-probabilities are 0 for now: `Policy.backward` fills them in, nan where it computed none

    Call `loss.backward()`, then `Policy.backward(scored)`.
    """

    logp_NT: torch.Tensor
    length_N: torch.Tensor
    rows: list = field(repr=False)  # (prompt ids, completion ids)
    graphs: list = field(repr=False)  # that were kept, a micro-batch each: (row indices, hidden_MH, targets)
    stamp: tuple = field(repr=False)  # mode and version of the weights at the time
    later: bool = False
    rounding: torch.dtype = torch.float32  # see `Policy.rounding`


def learning_rate_at(step, total_steps, *, peak, schedule, warmup):
    """Learning rate of optimizer step `step` (counted from 0).

    schedule   constant | cosine (down to 0 behind the last step)
    warmup     share of the steps in which the rate rises linearly to `peak`

    >>> [round(learning_rate_at(s, 10, peak=1.0, schedule="cosine", warmup=0.2), 3) for s in (0, 1, 2, 6, 9)]
    [0.5, 1.0, 1.0, 0.5, 0.038]
    """
    warmup_steps = math.ceil(warmup * total_steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    if schedule != "cosine":
        raise ValueError(f"schedule is constant or cosine, not {schedule!r}")
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps)))


def _flatten(nested, path=""):
    """(path, value) of everything in dicts of dicts; paths are keys joined by dots."""
    for key, value in nested.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def find_optimizer(name):
    """The class of `adamw`, or of `adamw_8bit` from bitsandbytes; UserError if that is not installed."""
    if name == "adamw":
        return torch.optim.AdamW
    if name != "adamw_8bit":
        raise ValueError(f"optimizer is adamw or adamw_8bit, not {name!r}")
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise UserError(
            f"--optimizer {name}: not installed; pip install bitsandbytes, or --optimizer adamw"
        ) from None
    return AdamW8bit


class Policy:
    """A causal LM whose trainable parameters are its adapter (or whatever requires grad).

    model                  a transformers causal LM, usually a PEFT model; it must have no active dropout:
                           both passes must compute the same function
    tokenizer              kept beside it for those who save or sample
    tokens_per_microbatch  padded tokens in one forward: memory against speed
    gradient_checkpointing recompute activations in backward: less memory, about a third more time
    hidden_states          (B, L) token ids -> (B, L, H) what the head reads; None asks the model's decoder

    `token_budget` is `tokens_per_microbatch`, or what is left of it after memory ran out.
    """

    def __init__(
        self, model, tokenizer, tokens_per_microbatch, *, gradient_checkpointing=False, hidden_states=None
    ):
        dropouts = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Dropout) and m.p > 0]
        if dropouts:
            raise ValueError(f"dropout must be 0 for the two passes to agree; it is on in {dropouts[0]}")
        if gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.model, self.tokenizer = model, tokenizer
        self.causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.head = self.causal_lm.get_output_embeddings()
        self.trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = None
        self._budget = TokenBudget(tokens_per_microbatch, list(self.trainable.values()))
        self._hidden_states = hidden_states or self._ask_decoder
        self._kernel = find_kernel(self.head)

    @property
    def device(self):
        return self.causal_lm.device

    @property
    def rounding(self):
        """The data type by whose rounding two ways to compute a log-probability may differ: that of the base,
        and bfloat16 for a base in 4 bits, which has one kernel for a row and another for many.
        """
        in_4bit = getattr(self.causal_lm, "is_loaded_in_4bit", False)
        return torch.bfloat16 if in_4bit else self.causal_lm.dtype

    @property
    def token_budget(self):
        return self._budget.tokens

    def logprobs(self, groups, *, keep_graph=True, later=False):
        """`Scored` of all completions of all groups, one row each, in their order.

        keep_graph   False where no backward pass follows
        later        True where the gradient of the loss cannot depend on them, as where each completion is
                     measured from itself: where the rows do not fit into one micro-batch, that saves pass 1
        """
        rows = [(group.prompt_ids, ids) for group in groups for ids in group.completion_ids]
        length_N = torch.tensor([len(ids) for _, ids in rows], device=self.device)
        logp_NT = torch.zeros(len(rows), max(1, int(length_N.max())), device=self.device)
        self.model.train()  # gradient checkpointing is only active in this mode
        scored = Scored(logp_NT, length_N, rows, [], self._stamp(), rounding=self.rounding)
        budget = self._budget.tokens
        fits = count_padded(self._budget.plan(rows, range(len(rows))), rows) <= budget
        keep = keep_graph and fits and bool(self.trainable)
        scored.later = later and not fits

        def measure(part):  # memory that ran out ends the keeping of graphs
            self._measure(part, scored, keep_graph=keep and budget == self._budget.tokens)

        if not scored.later:
            self._budget.work_off(rows, range(len(rows)), measure, held=scored.graphs)
        logp_NT.requires_grad_()
        return scored

    def backward(self, scored):
        """Add the gradient of the loss to the parameters, given `scored.logp_NT.grad`.

        Rows without a weight cost nothing. Raises RuntimeError if the weights or the mode changed in between:
        the gradient would belong to another function.
        """
        if scored.stamp != self._stamp():
            raise RuntimeError("the weights or the training mode changed between the two passes")
        weight_NT = scored.logp_NT.grad
        if weight_NT is None:
            raise RuntimeError("call loss.backward() before Policy.backward: there is no dL/dlogp yet")
        if scored.later:
            scored.logp_NT.detach().fill_(math.nan)
        pushed = [i for i, has_weight in enumerate((weight_NT != 0).any(dim=1).tolist()) if has_weight]
        if not pushed:  # nobody is pushed: no gradient at all, so that the optimizer's momentum rests as well
            scored.graphs.clear()
            return
        done = set()
        while scored.graphs:
            if self._budget.attempt(self._pull_kept, scored):
                done.update(scored.graphs.pop(0)[0])
            else:
                self._budget.shrink(scored.rows, range(len(scored.rows)), held=scored.graphs)

        def pull(part):
            self._pull(part, scored, self._forward(part, scored.rows))

        rest = [i for i in pushed if i not in done]
        self._budget.work_off(scored.rows, rest, pull, held=scored.graphs)

    def start_optimizer(self, name, *, weight_decay):
        """Start the optimizer called `name` (see `find_optimizer`) over the trainable parameters."""
        self.optimizer = find_optimizer(name)(
            list(self.trainable.values()), lr=0.0, weight_decay=weight_decay
        )

    def step(self, learning_rate, *, max_grad_norm):
        """One optimizer step on the accumulated gradient, clipped; the gradient is zero afterwards.

        Returns the norm before clipping. Where it is not finite nothing is changed: the caller counts it.
        """
        norm = torch.nn.utils.clip_grad_norm_(list(self.trainable.values()), max_grad_norm).item()
        if math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def memory_metrics(self):
        """Peak memory, and the tokens of a micro-batch that are left of the setting."""
        return {"memory/peak_gib": peak_memory_gib(self.device), "memory/token_budget": self.token_budget}

    def state_tensors(self):
        """Everything beside the adapter that continues a run exactly: optimizer moments and random states."""
        tensors = {"rng.cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        for path, value in _flatten(self.optimizer.state_dict()["state"]):
            # 8-bit optimizers count their steps in plain numbers
            kind = "optimizer" if torch.is_tensor(value) else "number"
            tensors[f"{kind}.{path}"] = torch.as_tensor(value).clone()  # some share a table
        return tensors

    def load_state_tensors(self, tensors):
        """Restore what `state_tensors` returned, into an optimizer started with the same settings."""
        state = self.optimizer.state_dict()
        for name, value in tensors.items():
            kind, _, rest = name.partition(".")
            if kind in ("optimizer", "number"):
                index, *nested, last = rest.split(".")
                place = state["state"].setdefault(int(index), {})
                for key in nested:
                    place = place.setdefault(key, {})
                place[last] = value.item() if kind == "number" else value
        self.optimizer.load_state_dict(state)
        torch.set_rng_state(tensors["rng.cpu"])
        if "rng.cuda" in tensors and self.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["rng.cuda"], self.device)

    def _stamp(self):
        return self.model.training, tuple(p._version for p in self.trainable.values())

    def _ask_decoder(self, ids_BL):
        return self.causal_lm.get_decoder()(input_ids=ids_BL, use_cache=False).last_hidden_state

    def _forward(self, part, rows):
        """Hidden states that predict the completion tokens of these rows: (M, H), and the tokens: (M,).

        Rows are padded on the right and no mask is passed: causal attention never looks to the right, so
        padding cannot matter, and the fastest attention kernels apply.
        """
        chosen = [rows[i] for i in part]
        totals = [len(prompt) + len(ids) for prompt, ids in chosen]
        padded = [[*prompt, *ids, *[0] * (max(totals) - len(prompt) - len(ids))] for prompt, ids in chosen]
        ids_BL, end_B = torch.tensor(padded), torch.tensor(totals)
        start_B = torch.tensor([len(prompt) for prompt, _ in chosen])
        column_L = torch.arange(ids_BL.shape[1])
        target_M = ids_BL[(column_L >= start_B[:, None]) & (column_L < end_B[:, None])].to(self.device)
        predicting_BL = (column_L >= start_B[:, None] - 1) & (column_L < end_B[:, None] - 1)
        hidden_BLH = self._hidden_states(ids_BL.to(self.device))
        return hidden_BLH[predicting_BL.to(self.device)], target_M

    def _measure(self, part, scored, *, keep_graph):
        with torch.set_grad_enabled(keep_graph):
            hidden_MH, target_M = self._forward(part, scored.rows)
        self._note(part, scored, measure_logps(self.head, hidden_MH, target_M, kernel=self._kernel))
        if hidden_MH.requires_grad:
            scored.graphs.append((part, hidden_MH, target_M))

    def _note(self, part, scored, logp_M):
        """Write the log-probabilities of these rows to their place."""
        for i, logp_t in zip(part, logp_M.split(scored.length_N[part].tolist()), strict=True):
            row_T = scored.logp_NT.detach()[i]
            row_T[: len(logp_t)], row_T[len(logp_t) :] = logp_t, 0.0

    def _pull_kept(self, scored):
        part, *predicted = scored.graphs[0]
        self._pull(part, scored, predicted)

    def _pull(self, part, scored, predicted):
        """Back-propagate sum(weight * logp) of these rows: through the vocabulary, then the model once."""
        (hidden_MH, target_M), lengths = predicted, scored.length_N.tolist()
        weight_M = torch.cat([scored.logp_NT.grad[i, : lengths[i]] for i in part])
        logp_M, gradient_MH = pull_logps(
            self.head, hidden_MH, target_M, weight_M=weight_M, kernel=self._kernel
        )
        hidden_MH.backward(gradient_MH)
        if scored.later:
            self._note(part, scored, logp_M)


def peak_memory_gib(device):
    """Peak memory of this process [GiB]: of the card on CUDA, resident otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
