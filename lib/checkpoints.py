"""Files that are whole or not there: atomic writes, and checkpoints that know whether they are intact.

A checkpoint is a plain PEFT adapter (any PEFT, vLLM or unsloth loads it) plus

    sampling.json               prompt style and sampling settings, for those who talk to it
    trainer_state.safetensors   optimizer moments, random states, and what other parts of a run keep
    trainer_state.json          step, counters, and the SHA-256 of every other file here

It is written under a temporary name, synced and renamed, and `trainer_state.json` is its last file: whatever
a kill or a full disk leaves behind is recognised. Nothing is pickled.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import safetensors
import safetensors.torch

from lib.models import SAMPLING_FILE, save_adapter
from lib.settings import UserError

STATE_JSON, STATE_TENSORS = "trainer_state.json", "trainer_state.safetensors"
ROW_GROUP = 1000  # rows of a parquet file that are read together, by those who need a few of them
_TEMPORARY = ".writing-"


@contextlib.contextmanager
def disk_errors_named(path):
    """Turn a full disk (or quota, or file-size limit) while writing `path` into one line for the user."""
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        number = getattr(error, "errno", None)
        full = number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if not full and not any(
            f"os error {code}" in str(error) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        ):
            raise
        raise UserError(
            f"no space left while writing {path}; what was saved before is intact: "
            "free some space and start the same command again"
        ) from None


def write_file(path, data):
    """Write bytes or text so that `path` is either as before or complete, even after a power cut."""
    path = Path(path)
    temporary = path.with_name(_TEMPORARY + path.name)
    data = data.encode() if isinstance(data, str) else data
    with disk_errors_named(path):
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)


def write_json(path, value):
    """`write_file` of indented JSON."""
    write_file(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_parquet(path, rows, *, metadata=None):
    """`write_file` of a list of dicts as parquet; `metadata` (texts by name) goes into its schema."""
    table = pyarrow.Table.from_pylist(rows).replace_schema_metadata(metadata)
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink, compression="zstd", row_group_size=ROW_GROUP)
    write_file(path, sink.getvalue().to_pybytes())


def write_checkpoint(folder, policy, *, state, sampling, parts=None):
    """Write one checkpoint to `folder` (which must not exist as a complete one): all of it or nothing.

    state      JSON values to continue with; at least {"step": int}
    sampling   JSON values: prompt style and sampling settings
    parts      by name, what else has a `state_tensors()`; `read_part` finds it again
    """
    folder = Path(folder)
    temporary = folder.with_name(_TEMPORARY + folder.name)
    shutil.rmtree(temporary, ignore_errors=True)
    with disk_errors_named(folder):
        temporary.mkdir(parents=True)
        save_adapter(policy.model, temporary)
        (temporary / SAMPLING_FILE).write_text(json.dumps(sampling, indent=1))
        tensors = policy.state_tensors()
        for name, part in (parts or {}).items():
            tensors |= {f"{name}.{key}": value.contiguous() for key, value in part.state_tensors().items()}
        (temporary / STATE_TENSORS).write_bytes(safetensors.torch.save(tensors))
        hashes = {file.name: _hash(file) for file in sorted(temporary.iterdir())}
        (temporary / STATE_JSON).write_text(json.dumps({**state, "files": hashes}, indent=1))
        for file in temporary.iterdir():
            _sync_file(file)
        if folder.exists():  # damaged, or from before a cut-back: a complete one takes its place
            shutil.rmtree(folder)
        os.replace(temporary, folder)
        _sync_folder(folder.parent)


def find_damage(folder):
    """What is wrong with a checkpoint, in a few words; None if it is intact."""
    try:
        state = json.loads((Path(folder) / STATE_JSON).read_text())
        files = state["files"].items()
    except FileNotFoundError:
        return f"{STATE_JSON} is missing"
    except (json.JSONDecodeError, KeyError, UnicodeDecodeError):
        return f"{STATE_JSON} is not readable"
    for name, expected in files:
        if not (Path(folder) / name).is_file():
            return f"{name} is missing"
        if _hash(Path(folder) / name) != expected:
            return f"{name} has changed"
    return None


def read_state(folder):
    """(JSON state, tensors) of an intact checkpoint."""
    state = json.loads((Path(folder) / STATE_JSON).read_text())
    return state, safetensors.torch.load_file(Path(folder) / STATE_TENSORS)


def read_part(tensors, name):
    """The tensors that the part called `name` gave to a checkpoint."""
    return {key.partition(".")[2]: value for key, value in tensors.items() if key.startswith(f"{name}.")}


def point_to(link, target):
    """Make `link` a symbolic link to the sibling folder `target`, replacing the old one at once."""
    link = Path(link)
    temporary = link.with_name(_TEMPORARY + link.name)
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, link)
    _sync_folder(link.parent)


def remove_leftovers(folder):
    """Delete what interrupted writes left in `folder`."""
    for leftover in Path(folder).glob(_TEMPORARY + "*"):
        shutil.rmtree(leftover) if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink()


def _hash(file):
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _sync_file(file):
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


_sync_folder = _sync_file
