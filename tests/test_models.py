"""From a path to a model: what is found, what is refused before anything is loaded, and adapters that survive
a save.
"""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lib.models import load_adapter_weights, load_model, load_trainable, locate_model, save_adapter
from lib.policy import Policy
from lib.settings import UserError
from tests.conftest import ROOT, TINY

ORIGINAL = "gate_proj up_proj down_proj lm_head"


def load(place, targets="all-linear", whole="", **options):
    return load_trainable(place, targets, whole, **({"rank": 4, "alpha": 8.0, "seed": 1} | options))


def logps(model, groups):
    return (
        Policy(model, None, tokens_per_microbatch=10**6).logprobs(groups, keep_graph=False).logp_NT.detach()
    )


@pytest.mark.parametrize(("targets", "whole"), [("all-linear", ""), (ORIGINAL, "embed_tokens norm")])
def test_a_fresh_adapter_is_the_base_and_a_saved_one_comes_back(tmp_path, make_groups, targets, whole):
    place, groups = locate_model(TINY), make_groups([[5, 9], [3, 3]])
    base = logps(load_model(place), groups)
    model = load(place, targets, whole)
    torch.testing.assert_close(logps(model, groups), base, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
                assert "lora_" in name or "modules_to_save" in name
    trained = logps(model, groups)
    assert (trained - base).abs().max() > 0.1
    save_adapter(model, tmp_path / "adapter")
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}
    found = locate_model(tmp_path / "adapter")
    assert found.adapter == tmp_path / "adapter"
    assert torch.equal(logps(load_model(found), groups), trained)
    other = load(place, targets, whole, seed=2)
    load_adapter_weights(other, tmp_path / "adapter")
    assert torch.equal(logps(other, groups), trained)


def test_training_goes_on_from_an_adapter(tmp_path):
    save_adapter(load(locate_model(TINY)), tmp_path / "adapter")
    model = load(locate_model(tmp_path / "adapter"), rank=16)
    assert model.peft_config["default"].r == 4, "the adapter's own shape"
    assert any(parameter.requires_grad for parameter in model.parameters())


def test_the_seed_decides_the_adapter():
    first, same, other = (dict(load(locate_model(TINY), seed=seed).named_parameters()) for seed in (1, 1, 2))
    name = next(name for name in first if "lora_A" in name)
    assert torch.equal(first[name], same[name])
    assert not torch.equal(first[name], other[name])


def test_the_shipped_model_is_small_and_complete(tiny_tokenizer):
    model = load_model(locate_model(TINY))
    assert model.config.model_type == "qwen3"
    assert sum(p.numel() for p in model.parameters()) <= 1_900_000
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert model.config.head_dim in (32, 64), "what vLLM's CPU attention takes"
    assert len(tiny_tokenizer) < model.config.vocab_size, "some ids must be masked, as in Qwen2.5"
    ends = tiny_tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert sorted(model.generation_config.eos_token_id) == sorted(ends)
    for text in ("<think>\n7 + 8 = 15.</think>", "çé 漢字 🙂\t{}", "<answer>42</answer>"):
        assert tiny_tokenizer.decode(tiny_tokenizer(text)["input_ids"]) == text


def test_a_run_folder_is_its_best_or_newest_checkpoint(tmp_path):
    checkpoints = tmp_path / "run" / "checkpoints"
    for step in ("step_000010", "step_000020"):
        save_adapter(load(locate_model(TINY)), checkpoints / step)
    (checkpoints / "step_000020" / "sampling.json").write_text(json.dumps({"prompt": "boxed"}))
    found = locate_model(tmp_path / "run")
    assert found.adapter.name == "step_000020"
    assert found.sampling == {"prompt": "boxed"}
    (checkpoints / "best").symlink_to("step_000010")
    assert locate_model(tmp_path / "run").adapter.name == "best"


def copy_of_the_model(folder, *, without):
    shutil.copytree(TINY, folder)
    (folder / without).unlink()
    return folder


def test_refusals(tmp_path):
    for missing, message in (
        ("config.json", "has no config.json"),
        ("tokenizer_config.json", "has no tokenizer_config.json"),
        ("model.safetensors", "has no weights"),
    ):
        with pytest.raises(UserError, match=message):
            locate_model(copy_of_the_model(tmp_path / missing, without=missing))
    with pytest.raises(UserError, match=r"model not found: /.*nowhere"):
        locate_model("./nowhere")
    empty = tmp_path / "run" / "checkpoints"
    empty.mkdir(parents=True)
    with pytest.raises(UserError, match="has no checkpoint yet"):
        locate_model(tmp_path / "run")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="is damaged: it names no base model"):
        locate_model(adapter)
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(TINY)}))
    with pytest.raises(UserError, match=r"no adapter_model\.safetensors"):
        locate_model(adapter)


def test_an_adapter_of_another_base_is_told_from_shapes_alone(tmp_path, toy_model, monkeypatch):
    model = get_peft_model(
        toy_model, LoraConfig(r=2, target_modules=["q_proj"], base_model_name_or_path=str(TINY))
    )
    model.peft_config["default"].base_model_name_or_path = str(TINY)
    save_adapter(model, tmp_path / "adapter")
    monkeypatch.chdir(ROOT)
    with pytest.raises(
        UserError, match=r"belongs to another base: .*q_proj is 32 wide in it and 128 wide there"
    ):
        locate_model(tmp_path / "adapter")


def test_damaged_files_are_named(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    (model / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match="could not be loaded"):
        load_model(locate_model(model))
    save_adapter(load(locate_model(TINY)), tmp_path / "adapter")
    (tmp_path / "adapter" / "sampling.json").write_text("{")
    with pytest.raises(UserError, match=r"sampling\.json is damaged"):
        locate_model(tmp_path / "adapter")
