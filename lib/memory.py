"""How much memory a run will take, from the model's config alone, before anything is loaded.

The learn phase is not estimated but run: on PyTorch's meta device, where tensors have shapes and no numbers,
one micro-batch goes forward and backward through the model's real code, its adapter and the vocabulary, while
every storage is counted from its birth to its death. Layers are alike: two and three of them tell the rest.

Sizes are in bytes unless a name says GiB.
"""

import copy
import warnings
import weakref
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from lib.models import add_lora
from lib.settings import UserError, shorten_reason
from lib.vocabulary import pull_logps

GIB = 2**30
CARD_ITSELF = int(0.6 * GIB)  # CUDA's context and the workspaces of its libraries
SLEEPING_SAMPLER = int(0.5 * GIB)  # what stays of a sampler beside the policy while the policy learns
FRAGMENTS = 1.1  # an allocator that works with blocks holds more than is asked of it
QUANTISED = 4.5 / 8  # a weight in 4 bit, with the scale of its block
BYTES_PER_LOGIT = 40  # of a row that is sampled: its logits and what a draw makes of them


def is_out_of_memory(error):
    """Is this exception about memory that ran out, on a card or off it?"""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # what torch says on the CPU, and what cuBLAS says where its workspace does not fit
    return any(words in str(error) for words in ("allocate memory", "CUBLAS_STATUS_ALLOC_FAILED"))


@dataclass(frozen=True)
class Workload:
    """What a run does with its model, as far as memory is concerned; most names are those of settings."""

    tokens_per_microbatch: int
    row_tokens: int  # the longest prompt and completion together
    group_size: int
    sampled_rows: int = 1024  # completions decoded at once, where the card has room for so many
    lora_rank: int = 16
    lora_targets: str = "all-linear"
    modules_to_save: str = ""
    adapter: Path | None = None  # to train on: instead of rank, targets and modules
    optimizer: str = "adamw"
    gradient_checkpointing: bool = False
    load_in_4bit: bool = False
    sampler_memory: float | None = None  # share of the card for a sampler of its own; None: there is none
    shared_weights: bool = False  # that sampler works on the policy's own


@dataclass(frozen=True)
class Ledger:
    """Bytes by name: what is always there, and what comes with the one phase or the other."""

    held: dict
    learning: dict
    sampling: dict
    sampled_rows: int  # completions that may be decoded at once
    card: int | None  # of the whole card; None where there is none

    @property
    def peak_gib(self):
        """The most that is in use at once, by the heavier phase [GiB]."""
        phases = (sum(self.learning.values()), sum(self.sampling.values()))
        return (sum(self.held.values()) + max(phases)) / GIB

    @property
    def fits(self):
        return self.card is None or self.peak_gib * GIB <= self.card

    def lines(self):
        """The ledger as text, one line an entry."""
        phases = (("", self.held), ("learning: ", self.learning), ("sampling: ", self.sampling))
        rows = [(prefix + name, size / GIB) for prefix, part in phases for name, size in part.items()]
        of = f" of {self.card / GIB:.2f}" if self.card else ""
        return [f"{size:7.2f} GiB  {name}" for name, size in rows] + [f"{self.peak_gib:7.2f} GiB{of}  peak"]


def plan_memory(config, work, *, dtype, card=None):
    """The `Ledger` of a run.

    config   of the model, as `AutoConfig` reads it
    dtype    of its weights
    card     memory of the card; None leaves out what only cards need
    """
    rows = max(1, work.tokens_per_microbatch // work.row_tokens)
    two, three = (_count(_with_layers(config, n), work, dtype, rows=rows) for n in (2, 3))
    counts = {name: two[name] + (config.num_hidden_layers - 2) * (three[name] - two[name]) for name in two}
    moments = {"adamw": 2 * counts["adapter"], "adamw_8bit": int(counts["trained"] * 2 * (1 + 4 / 256))}
    held = {name: counts[name] for name in ("weights", "adapter")}
    held |= {"its gradient": counts["adapter"], "optimizer": moments[work.optimizer]}
    learning = {f"forward and backward of {rows * work.row_tokens} tokens": counts["peak"]}
    if card:
        held["the card itself"] = CARD_ITSELF
        learning = {name: int(size * FRAGMENTS) for name, size in learning.items()}
    sampled, size = work.sampled_rows, BYTES_PER_LOGIT * config.vocab_size
    size += work.row_tokens * _cached_token(config, dtype)
    if card:  # at least a group is decoded at once
        sampled = max(work.group_size, min(sampled, int((card - sum(held.values())) / size / FRAGMENTS)))
    sampling = {f"keys, values and logits of {sampled} completions": sampled * size}
    if card and work.sampler_memory:
        learning["the sampler asleep"] = SLEEPING_SAMPLER
        share = int(card * work.sampler_memory) - counts["weights"] * work.shared_weights
        sampling = {f"the sampler's {work.sampler_memory:g} of the card": share}
    return Ledger(held, learning, sampling, sampled, card)


def fit_tokens(config, work, *, dtype, card):
    """How large `tokens_per_microbatch` may be on this card; UserError where not even one completion fits."""
    ledgers = [
        plan_memory(config, replace(work, tokens_per_microbatch=n * work.row_tokens), dtype=dtype, card=card)
        for n in (1, 2)
    ]
    one, two = (sum(ledger.held.values()) + sum(ledger.learning.values()) for ledger in ledgers)
    if one > card or not sum(ledgers[0].held.values()) + sum(ledgers[0].sampling.values()) <= card:
        parts = ", ".join(line.strip() for line in ledgers[0].lines())
        raise UserError(
            f"this run does not fit its card even with one completion at a time ({parts}): it takes a "
            "smaller --model, --max-new-tokens or --group-size, or --gradient-checkpointing"
        )
    return work.row_tokens * (1 + (card - one) // max(1, two - one))


class _Meter(TorchDispatchMode):
    """Counts bytes: every storage that an operation gives birth to, until nobody refers to it."""

    def __init__(self, known):
        super().__init__()
        self.live = self.peak = 0
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, function, types, *call):
        args, kwargs = (*call, None)[:2]
        result = function(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._count, result)
        return result

    def _count(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self._sizes:
            self._sizes[storage._cdata] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, key):
        self.live -= self._sizes.pop(key)


def measure_learning(model, rows, columns):
    """Peak bytes of a forward and a backward pass of rows x columns tokens, beside the weights.

    model   a PEFT model; on the meta device nothing is computed, and attention is counted as a kernel that
            keeps its inputs and its output
    """
    causal_lm = model.get_base_model()
    device = next(model.parameters()).device
    model.train()
    with _Meter([*model.parameters(), *model.buffers()]) as meter:
        ids_BL = torch.zeros(rows, columns, dtype=torch.long, device=device)
        hidden_BLH = causal_lm.get_decoder()(input_ids=ids_BL, use_cache=False).last_hidden_state
        hidden_MH, weight_M = hidden_BLH.flatten(0, 1), torch.zeros(ids_BL.numel(), device=device)
        head = causal_lm.get_output_embeddings()
        gradient_MH = pull_logps(head, hidden_MH, ids_BL.flatten(), weight_M=weight_M)[1]
        hidden_MH.backward(gradient_MH)
    model.zero_grad()
    return meter.peak


class _CountedAttention(torch.autograd.Function):
    """What a fused attention keeps: its inputs, its output, and a number per head and query."""

    @staticmethod
    def forward(ctx, *query_key_value):
        query = query_key_value[0]
        out, sums = torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(*query_key_value, out, sums)
        return out

    @staticmethod
    def backward(ctx, gradient):
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def _attend(_module, *tensors, **_):  # query, key, value, mask
    return _CountedAttention.apply(*tensors[:3]).transpose(1, 2), None


def _build_on_meta(config, work, dtype):
    from peft import PeftConfig, get_peft_model
    from transformers import AttentionInterface, AutoModelForCausalLM

    AttentionInterface.register("counted", _attend)
    try:
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="counted")
            if work.adapter:
                lora = PeftConfig.from_pretrained(work.adapter)
                lora.inference_mode = False
                model = get_peft_model(model, lora)
            else:
                lora = {"rank": work.lora_rank, "alpha": work.lora_rank}  # a scale has no size
                model = add_lora(model, work.lora_targets, work.modules_to_save, **lora)
    except ValueError as error:
        raise UserError(f"--model: {shorten_reason(error)}") from None
    if work.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def _with_layers(config, number):
    config = copy.deepcopy(config)
    config.num_hidden_layers = number
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:number]
    return config


def _count(config, work, dtype, *, rows):
    """Bytes of weights and adapter, numbers that are trained, and peak bytes of a micro-batch."""
    model = _build_on_meta(config, work, dtype)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    frozen = [(name, weight) for name, weight in model.named_parameters() if not weight.requires_grad]
    weights, unpacked = sum(weight.nbytes for _, weight in frozen), 0
    if work.load_in_4bit:
        packed = [weight for name, weight in frozen if weight.ndim == 2 and ".layers." in name]
        weights -= sum(weight.nbytes - int(weight.numel() * QUANTISED) for weight in packed)
        unpacked = max(weight.nbytes for weight in packed)  # to be multiplied with
    return {
        "weights": weights,
        "adapter": sum(parameter.nbytes for parameter in trained),
        "trained": sum(parameter.numel() for parameter in trained),
        "peak": measure_learning(model, rows, work.row_tokens) + unpacked,
    }


def _cached_token(config, dtype):
    """Bytes of keys and values of one token in all layers."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers * 2 * config.num_key_value_heads * width * dtype.itemsize
