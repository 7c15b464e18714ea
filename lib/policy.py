"""The model that learns: its log-probabilities, and a backward pass that never holds all logits.

Losses over groups couple all completions of a step. Instead of keeping one graph per completion, the gradient
takes two passes, exact and with the memory of one micro-batch:

    1. `logprobs`   log-probabilities of all rows, without a graph
    2. the caller   the loss of that small tensor, differentiated: dL/dlogp
    3. `backward`   sum(dL/dlogp * logp), back-propagated micro-batch by micro-batch

Where all rows together fit into the token budget of one micro-batch, the graph of pass 1 is kept and pass 3
runs no second forward. The vocabulary is only ever computed for a chunk of positions, its gradient with it.

Shape suffixes: N rows (completions), T completion tokens, B rows and L columns of a micro-batch, M completion
tokens of a micro-batch, H hidden, V vocabulary.
"""

import math
import resource
from dataclasses import dataclass, field

import torch

from lib.settings import UserError

CHUNK_BYTES = 2**27  # float32 logits built at once; about four times this is the workspace
BUSY_TOKENS = 1024  # a forward of so many tokens costs the same per token as a larger one


@dataclass
class Scored:
    """Token log-probabilities of completions, as the leaf of a loss.

    logp_NT   (N, T) [nat], requires grad; 0 behind a row's length
    length_N  (N,) completion tokens

    Call `loss.backward()`, then `Policy.backward(scored)`.
    """

    logp_NT: torch.Tensor
    length_N: torch.Tensor
    rows: list = field(repr=False)  # (prompt ids, completion ids)
    graphs: list = field(
        repr=False
    )  # of the micro-batches whose graph was kept: (row indices, hidden_MH, targets)
    stamp: tuple = field(repr=False)  # mode and version of the weights at the time


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


def plan_microbatches(lengths, *, budget):
    """Row indices of each micro-batch: similar lengths together, at most `budget` padded tokens in one.

    A row longer than the budget gets a micro-batch of its own. A micro-batch that is large enough to keep the
    machine busy ends where the next row would pad it by more than a tenth.

    >>> plan_microbatches([3, 9, 2, 4], budget=9)
    [[2, 0], [3], [1]]
    """
    batches, real = [], 0  # real: tokens of the last micro-batch without its padding
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        padded = lengths[index] * (len(batches[-1]) + 1) if batches else 0
        wasteful = padded >= BUSY_TOKENS and padded > 1.1 * (real + lengths[index])
        if batches and padded <= budget and not wasteful:
            batches[-1].append(index)
            real += lengths[index]
        else:
            batches.append([index])
            real = lengths[index]
    return batches


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
    """

    def __init__(self, model, tokenizer, tokens_per_microbatch, *, gradient_checkpointing=False):
        dropouts = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Dropout) and m.p > 0]
        if dropouts:
            raise ValueError(f"dropout must be 0 for the two passes to agree; it is on in {dropouts[0]}")
        if gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.model, self.tokenizer = model, tokenizer
        self.tokens_per_microbatch = tokens_per_microbatch
        self.causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = None

    @property
    def device(self):
        return self.causal_lm.device

    @property
    def dtype(self):
        """What the base computes in."""
        return self.causal_lm.dtype

    def logprobs(self, groups, *, keep_graph=True):
        """`Scored` of all completions of all groups, one row each, in their order.

        keep_graph   False where no backward pass follows
        """
        rows = [(group.prompt_ids, ids) for group in groups for ids in group.completion_ids]
        length_N = torch.tensor([len(ids) for _, ids in rows], device=self.device)
        logp_NT = torch.zeros(len(rows), max(1, int(length_N.max())), device=self.device)
        self.model.train()  # gradient checkpointing is only active in this mode
        totals = [len(prompt) + len(ids) for prompt, ids in rows]
        plan = plan_microbatches(totals, budget=self.tokens_per_microbatch)
        fits = (
            sum(len(places) * max(totals[i] for i in places) for places in plan) <= self.tokens_per_microbatch
        )
        graphs = []
        for indices in plan:
            with torch.set_grad_enabled(keep_graph and fits and bool(self.trainable)):
                hidden_MH, target_M = self._forward([rows[i] for i in indices])
            with torch.no_grad():
                logp_M = torch.cat([self._chunk_logp(*chunk) for chunk in self._chunks(hidden_MH, target_M)])
            for i, logp_t in zip(indices, logp_M.split([len(rows[i][1]) for i in indices]), strict=True):
                logp_NT[i, : len(logp_t)] = logp_t
            if hidden_MH.requires_grad:
                graphs.append((indices, hidden_MH, target_M))
        return Scored(logp_NT.requires_grad_(), length_N, rows, graphs, self._stamp())

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
        lengths = scored.length_N.tolist()
        pushed = [i for i, has_weight in enumerate((weight_NT != 0).any(dim=1).tolist()) if has_weight]
        if not pushed:  # nobody is pushed: no gradient at all, so that the optimizer's momentum rests as well
            scored.graphs.clear()
            return
        if scored.graphs:
            for indices, hidden_MH, target_M in scored.graphs:
                self._pull(hidden_MH, target_M, torch.cat([weight_NT[i, : lengths[i]] for i in indices]))
            scored.graphs.clear()
            return
        totals = [len(scored.rows[i][0]) + lengths[i] for i in pushed]
        for places in plan_microbatches(totals, budget=self.tokens_per_microbatch):
            indices = [pushed[place] for place in places]
            hidden_MH, target_M = self._forward([scored.rows[i] for i in indices])
            self._pull(hidden_MH, target_M, torch.cat([weight_NT[i, : lengths[i]] for i in indices]))

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

    def state_tensors(self):
        """Everything beside the adapter that continues a run exactly: optimizer moments and random states."""
        tensors = {"rng.cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": value.contiguous() for key, value in moments.items()}
        return tensors

    def load_state_tensors(self, tensors):
        """Restore what `state_tensors` returned, into an optimizer started with the same settings."""
        state = self.optimizer.state_dict()
        for name, value in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "optimizer":
                index, _, key = rest.partition(".")
                state["state"].setdefault(int(index), {})[key] = value
        self.optimizer.load_state_dict(state)
        torch.set_rng_state(tensors["rng.cpu"])
        if "rng.cuda" in tensors and self.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["rng.cuda"], self.device)

    def _stamp(self):
        return self.model.training, tuple(p._version for p in self.trainable.values())

    def _forward(self, rows):
        """Hidden states that predict the completion tokens of these rows: (M, H), and the tokens: (M,).

        Rows are padded on the right and no mask is passed: causal attention never looks to the right, so
        padding cannot matter, and the fastest attention kernels apply.
        """
        totals = [len(prompt) + len(ids) for prompt, ids in rows]
        ids_BL = torch.tensor(
            [
                prompt + ids + [0] * (max(totals) - total)
                for (prompt, ids), total in zip(rows, totals, strict=True)
            ]
        )
        start_B = torch.tensor([len(prompt) for prompt, _ in rows])
        end_B = torch.tensor(totals)
        column_L = torch.arange(ids_BL.shape[1])
        target_M = ids_BL[(column_L >= start_B[:, None]) & (column_L < end_B[:, None])].to(self.device)
        predicting_BL = (column_L >= start_B[:, None] - 1) & (column_L < end_B[:, None] - 1)
        decoder = self.causal_lm.get_decoder()
        hidden_BLH = decoder(input_ids=ids_BL.to(self.device), use_cache=False).last_hidden_state
        return hidden_BLH[predicting_BL.to(self.device)], target_M

    def _chunks(self, *tensors_M):
        size = max(1, CHUNK_BYTES // (4 * self.causal_lm.config.vocab_size))
        return zip(*(tensor_M.split(size) for tensor_M in tensors_M), strict=True)

    def _chunk_logp(self, hidden_CH, target_C):
        logits_CV = self.causal_lm.get_output_embeddings()(hidden_CH).float()
        return logits_CV.gather(1, target_C[:, None])[:, 0] - logits_CV.logsumexp(dim=-1)

    def _pull(self, hidden_MH, target_M, weight_M):
        """Back-propagate sum(weight * logp): the vocabulary chunk by chunk, then the model once."""
        gradients = []
        for hidden_CH, target_C, weight_C in self._chunks(hidden_MH.detach(), target_M, weight_M):
            hidden_CH = hidden_CH.requires_grad_()
            (self._chunk_logp(hidden_CH, target_C) * weight_C).sum().backward()
            gradients.append(hidden_CH.grad)
        hidden_MH.backward(torch.cat(gradients))


def peak_memory_gib(device):
    """Peak memory of this process [GiB]: of the card on CUDA, resident otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
