"""Run a train script in a forked child and kill it for real (SIGKILL) at its n-th event, many times over.

    python tests/resume_driver.py SCRIPT KILLS SEED [script arguments]

Everything is imported once, before the first fork, so that a kill costs seconds and not the time of imports.
An event is a forward pass, an fsync or a rename: between any two of them a kill leaves another state behind.
After KILLS kills (fewer if the run gets to its end before) a last child runs undisturbed. Prints what
happened to each child.
"""

import os
import random
import runpy
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"

import peft  # noqa: E402, F401  once here, for every child
import transformers  # noqa: E402, F401

import train_adpo  # noqa: E402, F401
import train_grdpo  # noqa: E402, F401
from lib.sampler import TransformersSampler  # noqa: E402


def die_at_event(number):
    """Make the number-th event of this process its last."""
    left = [number]

    def counted(function):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    os.fsync, os.replace = counted(os.fsync), counted(os.replace)
    TransformersSampler._logits = counted(TransformersSampler._logits)


def run_child(script, arguments, *, kill_at=None):
    """The exit status of one run of the script, as `os.waitstatus_to_exitcode` gives it."""
    pid = os.fork()
    if pid == 0:
        if kill_at:
            die_at_event(kill_at)
        sys.argv = [script, *arguments]
        runpy.run_path(str(ROOT / script), run_name="__main__")
        sys.stdout.flush()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    script, kills, seed, *arguments = sys.argv[1:]
    rng = random.Random(int(seed))
    statuses = [run_child(script, arguments, kill_at=rng.randrange(3, 75)) for _ in range(int(kills))]
    statuses.append(run_child(script, arguments))
    print("statuses", *statuses)
