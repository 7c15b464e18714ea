"""vLLM, started in this process: for a run beside its policy, or for an evaluation by itself.

vLLM is imported when it is started. Nothing is sent anywhere: its usage statistics are off.
"""

import contextlib
import json
import os

import torch

from lib.models import choose_device, choose_dtype, load_config
from lib.settings import UserError, shorten_reason
from lib.vllm_sampler import VllmSampler

MEMORY_SHARE = 0.85  # of a card, where vLLM has it for itself
CPU_CACHE_GIB = 1  # keys and values on a machine without a card [GiB]
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # the adapter ranks vLLM has kernels for
_SURROUNDINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process: the policy's card, and its errors
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the runner that machines without a card have, too: the tested one
    "VLLM_CPU_KVCACHE_SPACE": str(CPU_CACHE_GIB),
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}


def set_surroundings():
    """Set the environment that vLLM reads when it is imported, where nobody has set it: also before unsloth
    imports it."""
    for name, value in _SURROUNDINGS.items():
        os.environ.setdefault(name, value)


def start_vllm(base, *, dtype, context, max_rank, memory_share=MEMORY_SHARE, sleeps=False, four_bit=False):
    """A vLLM engine on a base model.

    base          model folder or hub id
    dtype         a torch dtype: the policy's, or the two disagree
    context       prompt and completion together, at most [tokens]
    max_rank      the largest rank of an adapter it will be given
    memory_share  of the card, for its weights and its cache
    sleeps        give its memory back between two calls of `VllmSampler.sample` (on a card)
    UserError where it does not start: not installed, too little memory, an architecture it does not know.
    """
    set_surroundings()
    from vllm import LLM

    from lib.vllm_phases import PhaseProcessor

    if max_rank > _RANKS[-1]:
        raise UserError(f"vLLM serves adapters up to rank {_RANKS[-1]}, and this one has {max_rank}")
    on_card = torch.cuda.is_available()
    options = {"gpu_memory_utilization": memory_share, "enable_sleep_mode": sleeps}
    if not on_card:  # a prompt in pieces would rewind the seeds' generators, which those of a CPU cannot
        options = {"enable_chunked_prefill": False, "max_num_batched_tokens": max(8192, context)}
    if four_bit:
        options["quantization"] = "bitsandbytes"
    try:
        return LLM(
            str(base),
            dtype=dtype,
            max_model_len=context,
            enable_lora=True,
            max_loras=1,
            max_lora_rank=next(rank for rank in _RANKS if rank >= max_rank),
            enforce_eager=not on_card,
            generation_config="vllm",  # sampling is what we say, not what the model's author suggests
            logits_processors=[PhaseProcessor],
            disable_log_stats=True,
            **options,
        )
    except (ValueError, RuntimeError, OSError) as error:
        raise UserError(
            f"vLLM did not start with {base}: {shorten_reason(error)}. On a full card, lower "
            "--sampler-memory or --tokens-per-microbatch; --sampler transformers needs no second copy"
        ) from None


class VllmEngine:
    """One vLLM engine that answers as its base or as any adapter of it, as `evaluation.Engine` does.

    places         `models.ModelPlace`s it will be asked to be
    context        prompt and completion together, at most [tokens]
    max_rows       completions that a caller had better ask for at once
    memory_share   of the card
    Another base takes the place of the one before.
    """

    def __init__(self, places, tokenizer, *, context, max_rows, memory_share=MEMORY_SHARE):
        self._places, self._tokenizer, self._context = places, tokenizer, context
        self._max_rows, self._memory_share = max_rows, memory_share
        self._base = self._sampler = None

    @contextlib.contextmanager
    def answering_as(self, place):
        """A sampler that is the model at `place`."""
        if place.base != self._base:
            self._start(place)
        self._sampler.serve(place.adapter)
        yield self._sampler

    def _start(self, place):
        if self._sampler:
            self._sampler.close()
        self._base = self._sampler = None
        adapters = [one.adapter for one in self._places if one.adapter and one.base == place.base]
        llm = start_vllm(
            place.base,
            dtype=choose_dtype(choose_device()),
            context=self._context,
            max_rank=max(map(_read_rank, adapters), default=1),
            memory_share=self._memory_share,
        )
        config = load_config(place)
        self._sampler = VllmSampler(llm, self._tokenizer, config, max_rows=self._max_rows)
        self._base = place.base


def _read_rank(adapter):
    """The rank of a saved adapter; UserError if it has more than LoRA matrices."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    if config.get("modules_to_save"):
        raise UserError(
            f"--sampler vllm: in {adapter} {config['modules_to_save'][0]} was trained whole, which vLLM does "
            "not take from an adapter; --sampler transformers"
        )
    return config["r"]
