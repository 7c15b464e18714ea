"""The contract of a sampler over vLLM, in this process and on the same card as the policy.

vLLM holds a copy of the base (with unsloth on a card it is the same memory) and is given the policy's adapter
as a file: never merged, for bfloat16 loses weights by it, and under a new id each time, with the prefix cache
emptied, for blocks computed with an older adapter would be used again. What vLLM has loaded is compared with
what the policy has at every change (`adapter_checksum`); `agreement` compares what both make of it.

vLLM itself is imported inside functions: it takes long, and not everybody has it.
"""

import contextlib
import gc
import itertools
import json
import tempfile
from pathlib import Path

import safetensors.torch
import torch

from lib.draws import draw_keys
from lib.models import save_adapter
from lib.phases import token_texts
from lib.sampler import build_groups, find_end_ids
from lib.settings import UserError


def adapter_checksum(tensors, *, dtype, scaling=None):
    """A number that changes with any bit of an adapter's LoRA matrices, whatever their order or packing.

    tensors   by name; floating-point
    dtype     what they are held in where the sum is taken
    scaling   of the matrices B ("lora_B" in the name), applied in `dtype`, as vLLM does when it loads
    """
    total = 0
    for name, tensor in tensors.items():
        held = tensor.detach().to(dtype)
        if scaling is not None and "lora_B" in name and scaling != 1:
            held = held * scaling
        bits = held.contiguous().view(torch.int16 if held.element_size() == 2 else torch.int32).long()
        place = torch.arange(1, bits.numel() + 1, device=bits.device) % 65_521
        total += int((bits.flatten() * place).sum())
    return total


def _loaded_checksum(worker, adapter_id):
    """In vLLM's worker: (ids of its adapters, checksum of one of them, its dtype)."""
    manager = worker.model_runner.lora_manager._adapter_manager
    adapter = manager.get_adapter(adapter_id)
    tensors = []
    for layer in adapter.loras.values() if adapter else ():
        for matrices in (layer.lora_a, layer.lora_b):  # lists where vLLM packs, as q, k and v into one
            tensors += [t for t in (matrices if isinstance(matrices, list) else [matrices]) if t is not None]
    dtype = tensors[0].dtype if tensors else torch.float32
    return (
        sorted(manager.list_adapters()),
        adapter_checksum(dict(enumerate(tensors)), dtype=dtype),
        str(dtype),
    )


_IDS = itertools.count(1)  # of adapters, in this process: vLLM does not look at one whose id it has seen
_DRAWN = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class VllmSampler:
    """Samples with vLLM: `sample` as `sampler.TransformersSampler` has it.

    llm         from `start_vllm`, or unsloth's, which shares the policy's base weights
    tokenizer   its tokenizer: ids from len(tokenizer) on are never sampled
    config      of the base model (transformers)
    max_rows    completions that a caller had better ask for at once; vLLM itself queues as many as come
    sleeps      whether the engine was started so that its memory can be given back between two calls
    phases      whether it was started by `vllm_engine`, with what samples in two phases; unsloth's was not
    """

    def __init__(self, llm, tokenizer, config, *, max_rows=4096, sleeps=False, phases=True):
        from transformers import GenerationConfig

        self.llm, self.tokenizer, self.max_rows, self.sleeps = llm, tokenizer, max_rows, sleeps
        self.text_of, self.phases = token_texts(tokenizer), phases
        try:
            generation = GenerationConfig.from_pretrained(config._name_or_path)
        except OSError:  # a model without the file: its config knows the end token
            generation = GenerationConfig.from_model_config(config)
        self.end_ids = find_end_ids(generation, tokenizer)
        self.context = llm.llm_engine.model_config.max_model_len
        self._masked = {i: float("-inf") for i in range(len(tokenizer), config.vocab_size)}
        self._policy = self._stamp = self._request = None
        self._last_id = 0
        if sleeps:
            llm.sleep(level=1)

    def follow(self, policy):
        """From now on, completions come from the present weights of this `policy.Policy`, whatever they are.

        UserError if it trains more than LoRA matrices, which vLLM would not see.
        """
        foreign = [name for name in policy.trainable if "lora_" not in name]
        if foreign:
            raise UserError(
                f"--sampler vllm: {foreign[0]} is trained whole, which vLLM does not take from an adapter; "
                "--modules-to-save '' or --sampler transformers"
            )
        self._policy, self._stamp = policy, None

    def serve(self, folder):
        """From now on, completions come from the adapter saved in `folder`; None is the bare base.

        RuntimeError if vLLM holds something else afterwards than the file does.
        """
        engine, self._request = self.llm.llm_engine, None
        self.llm.reset_prefix_cache()
        for held in engine.list_loras():
            engine.remove_lora(held)
        if folder is not None:
            from vllm.lora.request import LoRARequest

            self._last_id = next(_IDS)
            request = LoRARequest(f"adapter-{self._last_id}", self._last_id, str(folder))
            engine.add_lora(request)
            self._check_loaded(Path(folder), self._last_id)
            self._request = request

    def _check_loaded(self, folder, adapter_id):
        [(ids, loaded, dtype)] = self.llm.collective_rpc(_loaded_checksum, args=(adapter_id,))
        config = json.loads((folder / "adapter_config.json").read_text())
        root = config["r"] ** 0.5 if config.get("use_rslora") else config["r"]
        tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
        dtype = getattr(torch, dtype.removeprefix("torch."))
        if adapter_id not in ids or loaded != adapter_checksum(
            tensors, dtype=dtype, scaling=config["lora_alpha"] / root
        ):
            raise RuntimeError(
                f"vLLM was given adapter {adapter_id} and holds {ids}, with other numbers in it"
            )

    def _sync(self):
        """Give vLLM the policy's adapter where it has changed. Told from its numbers: an optimizer that works
        beside autograd, as 8-bit ones do, leaves no other trace."""
        stamp = adapter_checksum(self._policy.trainable, dtype=torch.float32)
        if stamp != self._stamp:
            with tempfile.TemporaryDirectory(prefix="adapter-") as folder:
                save_adapter(self._policy.model, folder)
                self.serve(folder)
            self._stamp = stamp

    def sample(self, problems, prompts, params, *, group_size, seed, step, attempt=0):
        """Sample `group_size` completions of every prompt: one `Group` per problem, in their order.

        Each completion is a request of its own with its own seed, so that it does not depend on the others.
        """
        from vllm import TokensPrompt
        from vllm.exceptions import VLLMValidationError

        longest = max(map(len, prompts)) + params.max_new_tokens
        if longest > self.context:
            raise UserError(
                f"a prompt and its completion may take {longest} tokens, and vLLM was started for "
                f"{self.context}: lower --max-new-tokens, or drop the longest problems"
            )
        if params.phase and not self.phases:
            raise UserError(f"--phase {params.phase!r}: unsloth's vLLM has one phase; --engine peft has two")
        keys = draw_keys(problems, group_size, seed=seed, step=step, attempt=attempt)
        try:
            requests = [self._describe(params, key) for key in keys]
        except VLLMValidationError as error:  # temperatures above 2, for one
            raise UserError(
                f"vLLM refuses these sampling parameters: {error}; --sampler transformers"
            ) from None
        asked = [
            prompt for ids in prompts for prompt in [TokensPrompt(prompt_token_ids=list(ids))] * group_size
        ]
        with self._awake():
            if self._policy is not None:
                self._sync()
            answered = self.llm.generate(asked, requests, lora_request=self._request, use_tqdm=False)
        rows = []
        for result in answered:
            output = result.outputs[0]
            ids = list(output.token_ids)
            logps = [at[token].logprob for token, at in zip(ids, output.logprobs, strict=True)]
            rows.append((ids, logps, output.finish_reason == "stop"))
        return build_groups(self, problems, prompts, rows=rows, attempt=attempt)

    def _describe(self, params, key):
        """One completion as a request. Ours are all the sampling settings there are; nothing is a default."""
        from vllm import SamplingParams

        how = {name: getattr(params, name) for name in _DRAWN}
        if params.phase:  # both phases are the processor's business, and the engine's own stay neutral
            from lib.vllm_phases import describe_phases

            how = {"temperature": 1.0, "extra_args": describe_phases(params)}
        return SamplingParams(
            **how,
            max_tokens=params.max_new_tokens,
            seed=key >> 1,  # vLLM takes 63 bits
            stop_token_ids=self.end_ids,
            ignore_eos=True,  # those above are all there are
            logit_bias=self._masked or None,
            logprobs=0,  # of the sampled token, under the raw model
            detokenize=False,
        )

    @contextlib.contextmanager
    def _awake(self):
        if not self.sleeps:
            yield
            return
        self.llm.wake_up()
        try:
            yield
        finally:
            self.llm.sleep(level=1)

    def close(self):
        """Give the memory back: for those who start another engine in the same process."""
        self.llm.llm_engine.engine_core.shutdown()
        self.llm = None
        gc.collect()
