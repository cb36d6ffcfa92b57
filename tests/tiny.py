"""A miniature small enough for every test, drawn once per test session, and ways to run the scripts."""
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--data", "waterbirds", "--mini", "--limit", "64", "--batch", "16", "--epochs", "1", "--device", "cpu"]


def train(out, *flags, **kw):
    """Run train.py in this process."""
    import train
    train.main([*TINY, "--out", str(out), *map(str, flags)], **kw)
    return Path(out)


def fails(main, *flags, status=2):
    """Run a script's main, which must end with this status and one line on standard error; returns the line."""
    from settings import run_script

    def call(capsys):
        with pytest.raises(SystemExit) as end:
            run_script(lambda: main([str(f) for f in flags]))
        assert end.value.code == status
        line = re.sub(r".*: [\d,]+ of [\d,]+, \d+ min left\n", "", capsys.readouterr().err)     # a slow machine says how far it is
        assert line.count("\n") == 1 and line.endswith("\n"), line
        return line
    return call


def killed_while_drawing(command, folder, patience=60):
    """Start a command, and kill it once it has written 20 pictures below a folder, with the workers that draw for it.

    A worker that outlives it would write one more picture, perhaps while the test looks or tidies.
    """
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.time() + patience
    while len(list(folder.rglob("*.png"))) < 20 and time.time() < deadline:
        time.sleep(.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def together(rank, world, path):
    """Join the other processes of mp.spawn, with one thread; they meet in a file beside path."""
    import torch
    torch.set_num_threads(1)
    if world > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{path}.meet", rank=rank, world_size=world)


def torchrun(processes, *arguments, nodes=1, node=0, port=29511):
    """Start torchrun on this machine, one thread per process; returns the Popen."""
    where = ["--standalone"] if nodes == 1 else [f"--nnodes={nodes}", f"--node_rank={node}", "--master_addr=127.0.0.1", f"--master_port={port}"]
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", *where, *map(str, arguments)],
                            cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
