"""From a path to a model: what is it, is it there, and what belongs to it?

A path may be a model folder, an adapter folder, a run folder (its best or newest checkpoint) or a hub id.

transformers and peft are imported inside the functions: unsloth must be imported before them (`engines`), and
a mistake in a setting should not wait for them.
"""

import contextlib
import importlib.util
import json
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from lib.settings import UserError, find_path, is_hub_id, shorten_reason

SAMPLING_FILE = "sampling.json"  # prompt style and sampling settings beside an adapter


@dataclass(frozen=True)
class ModelPlace:
    """Where a model comes from: its base (folder or hub id), its adapter if any, how it was prompted."""

    base: str
    adapter: Path | None = None
    sampling: dict | None = None


def locate_model(path):
    """Find out what `path` is, without loading it. UserError says what is missing or does not fit."""
    folder = find_path(path)
    if (folder / "checkpoints").is_dir():
        return locate_model(_newest_checkpoint(folder / "checkpoints"))
    if (folder / "adapter_config.json").is_file():
        try:
            base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        except (json.JSONDecodeError, KeyError):
            raise UserError(f"{folder / 'adapter_config.json'} is damaged: it names no base model") from None
        if not (folder / "adapter_model.safetensors").is_file():
            raise UserError(f"{folder} has an adapter_config.json but no adapter_model.safetensors")
        sampling = folder / SAMPLING_FILE
        try:
            sampled = json.loads(sampling.read_text()) if sampling.is_file() else None
        except json.JSONDecodeError:
            raise UserError(f"{sampling} is damaged: delete it, and set --prompt yourself") from None
        place = ModelPlace(locate_model(base).base, folder, sampled)
        check_adapter(place)
        return place
    if folder.is_dir():
        for needed in ("config.json", "tokenizer_config.json"):
            if not (folder / needed).is_file():
                raise UserError(f"{folder} is no model, adapter or run folder: it has no {needed}")
        if not any(folder.glob("*.safetensors")):
            raise UserError(f"{folder} has no weights: a *.safetensors file is missing")
        return ModelPlace(str(path) if Path(path).is_dir() else str(folder))
    if not is_hub_id(path):
        raise UserError(
            f"model not found: {folder} (a model, adapter or run folder, or a hub id like Qwen/Qwen3-1.7B)"
        )
    return ModelPlace(str(path))


def resolve_base(path):
    """One text for one place: the absolute path of a folder, or a hub id as it is."""
    folder = find_path(path)
    return str(folder) if folder.is_dir() else str(path)


def _newest_checkpoint(checkpoints):
    if (checkpoints / "best").is_dir():
        return checkpoints / "best"
    steps = sorted(checkpoints.glob("step_*"))
    if not steps:
        raise UserError(f"{checkpoints} has no checkpoint yet")
    return steps[-1]


def choose_device():
    """The device a run uses: the first CUDA card if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_dtype(device):
    """bfloat16 on a card, float32 on the CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def load_tokenizer(place):
    """The tokenizer of a model's base. UserError if a hub id has none or cannot be reached."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(place.base)
    except (OSError, ValueError) as error:
        raise UserError(_explain(place.base, error)) from None


def load_config(place):
    """The config of a model's base, without its weights. UserError if it has none or cannot be reached."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(place.base)
    except (OSError, ValueError) as error:
        raise UserError(_explain(place.base, error)) from None


def load_model(place, *, device=None, dtype=None, trainable=False, load_in_4bit=False, attention="sdpa"):
    """The model at a `ModelPlace`, in evaluation mode; with an adapter it is a PEFT model.

    load_in_4bit   hold the base's linear layers in 4 bits (NF4, by bitsandbytes); they compute in `dtype`
    attention      sdpa, or flash: FlashAttention on a card where it is installed. That takes no mask, which
                   learning does not need and our decode loop does
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from transformers.utils import is_flash_attn_2_available

    device = device or choose_device()
    options = {"dtype": dtype or choose_dtype(device), "attn_implementation": "sdpa"}
    if attention == "flash" and device.type == "cuda" and is_flash_attn_2_available():
        options["attn_implementation"] = "flash_attention_2"
    if load_in_4bit:
        options |= {"quantization_config": _quantise(options["dtype"]), "device_map": {"": device}}
    with _quiet():
        try:
            model = AutoModelForCausalLM.from_pretrained(place.base, **options)
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise UserError(_explain(place.base, error)) from None
        if not load_in_4bit:
            model.to(device)
        if place.adapter:
            model = PeftModel.from_pretrained(model, place.adapter, is_trainable=trainable)
    return model.eval()


def _quantise(dtype):
    """4-bit NF4 with quantised constants (Dettmers et al. 2023, QLoRA); UserError without bitsandbytes."""
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("--load-in-4bit: not installed; pip install bitsandbytes")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def load_trainable(place, targets, modules_to_save="", *, rank, alpha, seed, **base):
    """The PEFT model to train: the adapter at `place` where there is one, else the base with a fresh LoRA.

    A is drawn from `seed` and B is zero, so that a fresh adapter starts as the base.
    targets          "all-linear", or names of modules separated by blanks
    modules_to_save  names of modules that are trained whole, separated by blanks
    base             of `load_model`: how the base is held
    Dropout is 0: the two passes of the gradient must compute the same function.
    """
    model = load_model(place, trainable=True, **base)
    if place.adapter:
        return model
    torch.manual_seed(seed)
    return add_lora(model, targets, modules_to_save, rank=rank, alpha=alpha)


def add_lora(model, targets, modules_to_save="", *, rank, alpha):
    """A fresh LoRA on a plain causal LM: the PEFT model. Arguments as in `load_trainable`."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=targets if targets == "all-linear" else targets.split(),
        modules_to_save=modules_to_save.split() or None,
        task_type="CAUSAL_LM",
    )
    try:
        with _quiet():
            return get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"--lora-targets {targets}: {shorten_reason(error)}") from None


def save_adapter(model, folder):
    """Write a plain PEFT adapter: adapter_config.json and adapter_model.safetensors.

    Of a model with several adapters it is the one that is trained.
    """
    with _quiet():
        model.save_pretrained(folder, save_embedding_layers=False, selected_adapters=["default"])
    with contextlib.suppress(FileNotFoundError):
        (Path(folder) / "README.md").unlink()  # PEFT's empty model card


def load_adapter_weights(model, folder):
    """Put the weights of a saved adapter into a PEFT model of the same shape, in place."""
    from peft import set_peft_model_state_dict

    weights = safetensors.torch.load_file(Path(folder) / "adapter_model.safetensors")
    with _quiet():
        set_peft_model_state_dict(model, weights)


def check_adapter(place):
    """UserError if the adapter at `place` is of another base: told from shapes, no weight is read."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"), _quiet():
        _check_fit(AutoModelForCausalLM.from_config(load_config(place)), place.adapter)


def attach_adapter(model, folder, name):
    """Add a saved adapter to a model under `name`; returns the PEFT model. The base is not changed.

    model   a plain causal LM, or a PEFT model that has adapters already
    UserError, and the model is as before, where the adapter is damaged or belongs to another base.
    """
    from peft import PeftConfig, PeftModel

    plain = not isinstance(model, PeftModel)
    _check_fit(model if plain else model.get_base_model(), folder)
    try:
        with _quiet():
            if plain:
                model = PeftModel(model, PeftConfig.from_pretrained(folder), adapter_name=name)
            missing = model.load_adapter(folder, name).missing_keys
        reason = f"it has no {missing[0]}" if missing else ""
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        reason = shorten_reason(error)
    if reason:
        if isinstance(model, PeftModel) and name in model.peft_config:
            model.unload() if plain else model.delete_adapter(name)
        raise UserError(f"the adapter {folder} does not fit this base: {reason}")
    return model.eval()


def _check_fit(base, folder):
    """UserError if the weights of an adapter cannot be read, or a pair of them fits no layer of `base`."""
    try:
        with safetensors.safe_open(Path(folder) / "adapter_model.safetensors", "pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"the adapter {folder} is damaged: {shorten_reason(error)}") from None
    layers = {f"base_model.model.{name}": layer for name, layer in base.named_modules()}
    for name, shape in shapes.items():
        path, _, matrix = name.partition(".lora_")
        if matrix not in ("A.weight", "B.weight"):
            continue  # embeddings and whole modules: PEFT compares them
        layer = layers.get(path)
        wanted = layer and (layer.in_features if matrix[0] == "A" else layer.out_features)
        given = shape[1] if matrix[0] == "A" else shape[0]
        if wanted != given:
            found = f"{wanted} wide there" if layer else "not there"
            raise UserError(
                f"the adapter {folder} belongs to another base: {path.removeprefix('base_model.model.')} "
                f"is {given} wide in it and {found}"
            )


def _explain(base, error):
    return f"model {base} could not be loaded: {shorten_reason(error)}"


@contextlib.contextmanager
def _quiet():
    """Without the progress bars and notes that libraries print around loading and saving."""
    from transformers.utils import logging as transformers_logging

    level = logging.getLogger("transformers").level
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.getLogger("transformers").setLevel(level)
