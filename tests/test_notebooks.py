"""The notebooks run, and what is committed is in order: outputs of one clean run, nothing of a machine, no models."""
import ast
import re

import nbformat
import pytest
from nbclient import NotebookClient

from tiny import ROOT

BOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)


def cells(path, kind="code"):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def texts(cell):
    """What a cell printed or displayed, as text."""
    for output in cell.outputs:
        yield output.get("text", "") or "".join(output.get("data", {}).get("text/plain", ""))


@pytest.fixture(scope="session")
def workplace(tmp_path_factory):
    """A folder for runs that all notebooks share, so that each model is trained once, and not in the repository."""
    folder = tmp_path_factory.mktemp("notebooks") / "notebooks"
    folder.mkdir()
    return folder


@every_notebook
def test_a_notebook_runs(path, workplace, monkeypatch):
    monkeypatch.setenv("IFAM_FAST", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    client = NotebookClient(nbformat.read(path, as_version=4), timeout=600, resources={"metadata": {"path": str(workplace)}})
    client.execute()


def test_there_is_one_for_each_question_of_the_readme():
    listed = re.findall(r"\]\(notebooks/(\w+\.ipynb)\)", (ROOT / "README.md").read_text())
    assert sorted(set(listed)) == [path.name for path in BOOKS]


@every_notebook
def test_committed_outputs_are_of_one_run_from_top_to_bottom(path):
    code = cells(path)
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert all(output.output_type != "error" for cell in code for output in cell.outputs)
    assert not any(output.get("name") == "stderr" for cell in code for output in cell.outputs)
    assert path.stat().st_size < 1.5e6


@every_notebook
def test_committed_outputs_tell_nothing_of_the_machine_or_the_clock(path):
    for cell in cells(path):
        assert "execution" not in cell.metadata          # time stamps
        for text in texts(cell):
            assert not re.search(r"(?:^|[\s'\"(=])/[\w.-]+/[\w.-]+", text), text
            assert not re.search(r"images/s|it/s|\d(?: ?s| seconds| min(?:utes)?)\b", text), text


@every_notebook
def test_no_cell_defines_a_model_or_is_long(path):
    for cell in cells(path):
        tree = ast.parse(cell.source)
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
        assert not re.search(r"\bnn\.(?!functional)[A-Z]|\boptim\b", cell.source)
        lines = [line for line in cell.source.splitlines() if line.strip() and not line.startswith(("import ", "from "))]
        assert len(lines) <= 16, f"{len(lines)} lines: {lines[0]}"
        assert max(map(len, lines)) <= 120


@every_notebook
def test_a_notebook_opens_with_a_claim_reads_every_figure_and_ends_with_asserts(path):
    book = nbformat.read(path, as_version=4).cells
    assert book[0].source.startswith("# ") and "**Claim.**" in book[0].source
    for cell, following in zip(book, [*book[1:], None]):
        if cell.cell_type == "code" and any("image/jpeg" in output.get("data", {}) for output in cell.outputs):
            assert following is not None and following.cell_type == "markdown"
    assert "assert" in cells(path)[-1].source
