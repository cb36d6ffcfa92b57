"""The notebooks run, and what is committed is in order: outputs of one clean run, nothing of a machine, no models."""
import ast
import os
import re
import subprocess
import sys

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


def solutions(path):
    """The code that is folded away in the exercises of a notebook."""
    found = [re.findall(r"<details>.*?</details>", cell.source, re.S) for cell in cells(path, "markdown")]
    return [code for part in sum(found, []) for code in re.findall(r"^```python\n(.*?)^```$", part, re.M | re.S)]


@every_notebook
def test_a_notebook_runs_and_so_do_the_solutions_of_its_exercises(path, workplace, monkeypatch):
    monkeypatch.setenv("IFAM_FAST", "1")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'notebooks'}")
    book = nbformat.read(path, as_version=4)
    book.cells += [nbformat.v4.new_code_cell(code) for code in solutions(path)]
    client = NotebookClient(book, timeout=600, resources={"metadata": {"path": str(workplace)}})
    client.execute()


@every_notebook
def test_a_notebook_asks_before_it_shows_and_ends_with_two_or_three_exercises_that_have_solutions(path):
    text = [cell.source for cell in cells(path, "markdown")]
    assert sum("**What do you expect?**" in source for source in text) >= 3
    exercises = re.search(r"^## Exercises\n(.*?)<details>", text[-1], re.M | re.S)[1]
    count = len(re.findall(r"^\d\. ", exercises, re.M))
    assert 2 <= count <= 3 and len(solutions(path)) == count == text[-1].count("<summary>Solution ")


def test_the_real_benchmark_is_taken_only_when_it_is_asked_for_by_name(tmp_path):
    """IFAM_DATA=real; files of a real benchmark that lie there change nothing."""
    code = "import start; print(start.MINI, start.CLAIMS)"
    (tmp_path / "data" / "CUB_200_2011").mkdir(parents=True)
    def run(**more):
        env = {k: v for k, v in os.environ.items() if not k.startswith("IFAM")} | {"PYTHONPATH": str(ROOT / "notebooks")} | more
        return subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run().stdout == "True True\n" and run(IFAM_DATA="real").stdout == "False False\n"
    assert run(IFAM_DATA="real", IFAM_FAST="1").stdout == "True False\n"
    assert "take mini, or real" in run(IFAM_DATA="reel").stderr


def test_what_a_notebook_measured_is_measured_anew_for_another_checkpoint_or_setting_and_where_the_file_is_damaged(tmp_path):
    code = """if True:
        import start, torch
        run, calls = start.Path("."), []
        def measure():
            calls.append(0)
            return {"x": torch.arange(3), ("drop", None): [0.1]}
        def measured(*settings):
            before = len(calls)
            found = start.once("some", run, measure, *settings)
            assert torch.equal(found["x"], torch.arange(3)) and found["drop", None] == [0.1]
            return len(calls) - before
        (run / "best.pt").write_bytes(b"one")
        print(measured(8), measured(8), measured(16), measured(16))
        (run / "best.pt").write_bytes(b"two")
        print(measured(16), measured(16))
        file = run / "measured-some.pt"
        file.write_bytes(file.read_bytes()[:-100])
        print(measured(16), measured(16))
        torch.save([], file)
        print(measured(16), measured(16))
        start.FAST = not start.FAST
        print(measured(16), measured(16))
        print(*sorted(path.name for path in run.iterdir()))"""
    env = {k: v for k, v in os.environ.items() if not k.startswith("IFAM")} | {"PYTHONPATH": str(ROOT / "notebooks")}
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.stdout.splitlines() == ["1 0 1 0", *["1 0"] * 4, "best.pt measured-some.pt"], run.stderr


def test_formulas_are_what_jupyterlab_and_github_both_draw():
    for path in BOOKS:
        for cell in cells(path, "markdown"):
            text = re.sub(r"```.*?```|`[^`\n]*`", "", cell.source, flags=re.S)
            assert r"\(" not in text and r"\[" not in text and r"\begin" not in text       # $ and $$ alone
            assert text.count("$$") % 2 == 0 and text.replace("$$", "").count("$") % 2 == 0, (path.name, text)
            for block in re.findall(r"\$\$(.*?)\$\$", text, re.S):
                assert block.count("{") == block.count("}") and "\n\n" not in block


def test_links_between_notebooks_and_to_the_docs_lead_somewhere():
    for path in BOOKS:
        for cell in cells(path, "markdown"):
            for target in re.findall(r"\]\(([^)\s#]+)(?:#[^)]*)?\)", re.sub(r"```.*?```", "", cell.source, flags=re.S)):
                assert target.startswith("http") or (path.parent / target).exists(), (path.name, target)


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
        assert len(lines) <= 18, f"{len(lines)} lines: {lines[0]}"
        assert max(map(len, lines), default=0) <= 120


@every_notebook
def test_a_notebook_opens_with_a_question_reads_every_figure_and_ends_with_what_it_claims(path):
    book = nbformat.read(path, as_version=4).cells
    assert book[0].source.startswith("# ") and "**Question.**" in book[0].source and "**Claim.**" in book[0].source
    assert book[1].source.startswith("import start")
    first = " ".join(texts(cells(path)[0]))              # what a newcomer reads first is no error
    assert not re.search("error|not there|looked for|Unpack", first)
    for cell, following in zip(book, [*book[1:], None]):
        if cell.cell_type == "code" and any("image/jpeg" in output.get("data", {}) for output in cell.outputs):
            assert following is not None and following.cell_type == "markdown"
    assert "start.claim(" in cells(path)[-1].source
