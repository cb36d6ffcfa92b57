"""Shared by the tests: the modules of the repository, one thread for each process, and the golden numbers."""
import functools
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
torch.set_num_threads(1)                                 # as many test processes run as there are cores (pytest.ini)
os.environ.setdefault("OMP_NUM_THREADS", "1")            # and so for those that they start


LONG = ["test_notebooks", "test_run_edges", "test_train", "test_retrain"]        # minutes each


def pytest_collection_modifyitems(items):
    """Files that take long begin first, so that no process works on one alone in the end (a file stays in one process).
    """
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@functools.cache
def golden(name):
    """Numbers computed by the published code (golden/README.md): array name -> tensor. Read them, never write."""
    with np.load(HERE / "golden" / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def below(prefix, arrays):
    """The arrays whose name starts with prefix, under the rest of their name."""
    return {key[len(prefix):]: array for key, array in arrays.items() if key.startswith(prefix)}


def agrees(ours, theirs, rel=1e-5):
    """Same shape, and no entry off by more than rel times the largest entry of theirs."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    assert ours.shape == theirs.shape
    error, scale = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    assert error <= rel * scale, f"off by {error:.2e}, largest entry {scale:.2e}"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty folder of downloads without a network behind it -> (folder, what was asked for)."""
    asked = []

    def download(url, path, **how):
        asked.append(url)
        raise OSError("Network is unreachable")
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    (tmp_path / "hub" / "checkpoints" / "rad-dino").mkdir(parents=True)
    return tmp_path / "hub" / "checkpoints", asked
