"""Where a result comes from: versions, commit, device, and the hashes of what was read."""

import hashlib
import importlib.metadata
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from lib.settings import find_path

PACKAGES = (
    *("torch", "transformers", "peft", "datasets", "math-verify", "safetensors"),
    *("unsloth", "vllm", "bitsandbytes"),
)


def hash_input(path):
    """A short hash of what a run reads: a file, or config and sizes of a model; a hub id stays itself."""
    file = find_path(path)
    if file.is_dir():
        sizes = sorted((weights.name, weights.stat().st_size) for weights in file.glob("*.safetensors"))
        configs = b"".join(config.read_bytes() for config in sorted(file.glob("*config.json")))
        return hashlib.sha256(configs + str(sizes).encode()).hexdigest()[:16]
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.is_file() else str(path)


def describe_surroundings():
    """Versions, commit, device and command, for settings.json."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    git = shutil.which("git")
    here = Path(__file__).resolve().parent
    commit = git and subprocess.run([git, "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True)
    on_cuda = torch.cuda.is_available()
    return {
        "versions": versions,
        "commit": commit.stdout.strip() if commit and commit.returncode == 0 else None,
        "device": torch.cuda.get_device_name() if on_cuda else platform.machine() + " CPU",
        "threads": torch.get_num_threads(),
        "command": sys.argv,
    }
