"""The house: rooms on floors, imports run down and nowhere in a circle; functions of one screen."""
import ast
import graphlib
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from tiny import ROOT

# From the top to the ground; a module imports from lines below its own, and from its own line only to the right of it.
# A folder stands for its files: inside one, imports may run either way, but in no circle.
FLOORS = """
notebooks
sweep
evaluate intervene groups speed compose miniature.pretrain
train
augment
predict
measure
interventions
runs
objectives
data
miniature
benchmarks
baselines
ifam
vit
weights
settings
"""
ORDER = [name for line in FLOORS.split("\n") for name in line.split()]
# miniature/pretrain.py is a command: it trains, and stands beside the weights that it made


def modules():
    """{module: its file}: everything but tests."""
    paths = [*ROOT.glob("*.py"), *(p for folder in ("measure", "benchmarks", "miniature", "notebooks") for p in (ROOT / folder).glob("*.py"))]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in paths}


def imports(source, known):
    """Modules of ours that a source imports, those inside functions included."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{name.name}" for name in node.names}
            found |= (inner & known) | ({node.module} if inner - known else set())
    return found & known


def room(module):
    """The entry of ORDER that a module belongs to: the longest."""
    fits = [name for name in ORDER if module == name or module.startswith(name + ".")]
    assert fits, f"{module} has no place in the house: add it to FLOORS"
    return max(fits, key=len)


def broken(graph):
    """The arrows {module: imported modules} that do not run down, as text."""
    return [f"{module} -> {other}" for module, others in graph.items() for other in others
            if room(module) != room(other) and ORDER.index(room(other)) < ORDER.index(room(module))]


@pytest.fixture(scope="module")
def graph():
    known = modules()
    return {name: imports(path.read_text(), known.keys()) for name, path in known.items()}


def test_imports_run_down_the_house(graph):
    assert not broken(graph)


def test_the_map_of_the_readme_goes_down_the_same_floors():
    section = (ROOT / "README.md").read_text().partition("## Map\n")[2].partition("\n## ")[0]
    rooms = [room for room in re.findall(r"^\| `(\w+)(?:\.py|/)` \|", section, re.M) if room != "tests"]
    floor = {name: i for i, line in enumerate(FLOORS.strip().split("\n")) for name in line.split()}
    assert [floor[room] for room in rooms] == sorted(floor[room] for room in rooms)
    assert set(rooms) == set(ORDER) - {"miniature.pretrain"}


def test_no_import_closes_a_circle(graph):
    graphlib.TopologicalSorter(graph).prepare()          # CycleError names the circle


def test_an_arrow_up_and_a_circle_would_be_named():
    assert broken({"ifam": {"train"}, "train": {"ifam"}}) == ["ifam -> train"]
    assert imports("def f():\n    from measure import figures\n    import train", {"measure.figures", "train"}) == {"measure.figures", "train"}
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()


def test_the_lesson_needs_torch_alone(graph):
    for name in ("vit", "ifam"):
        tree = ast.parse((ROOT / f"{name}.py").read_text())
        outside = {(node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
                   for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))}
        assert outside <= {"torch", "copy", "math", "functools", "itertools", "typing", "vit"}, (name, outside)


@pytest.mark.parametrize("name", modules())
def test_no_function_is_longer_than_60_lines_and_each_room_says_its_floor_and_what_to_read_before(name):
    tree = ast.parse(modules()[name].read_text())
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < 60, f"{name}.{node.name}: {node.end_lineno - node.lineno + 1} lines"
    says = ast.get_docstring(tree)
    assert "loor:" in says, f"{name}: its docstring does not say on which floor it is"
    assert re.search(r"\b[Rr]ead\b", says), f"{name}: its docstring does not say what to read before"


def test_an_installation_has_every_room_and_what_lies_in_it():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {name.partition(".")[0] for name in modules() if "." in name} - {"notebooks"}        # they stay in the clone
    assert set(setuptools["packages"]) == folders
    assert set(setuptools["py-modules"]) == {name for name in modules() if "." not in name} - folders
    files = {p.relative_to(ROOT) for folder in folders for p in (ROOT / folder).iterdir() if p.is_file() and p.suffix != ".py"}
    listed = {p.relative_to(ROOT) for folder, patterns in setuptools["package-data"].items() for x in patterns for p in (ROOT / folder).glob(x)}
    assert files == listed
    for kind, file in (("dependencies", "requirements.txt"), ("optional-dependencies", "requirements-dev.txt")):
        assert file in str(setuptools["dynamic"][kind]) and (ROOT / file).is_file()
    assert setuptools["package-dir"] == {"": "."}        # else a folder `data` or `runs` hides the module of its name


def test_modules_are_found_where_folders_have_their_names(tmp_path):
    for name in ("data", "runs", "measure"):
        (tmp_path / name).mkdir()
    code = f"import sys; sys.path.append({str(ROOT)!r}); import ifam, runs, predict, measure.tables; print(runs.load, ifam.loss)"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)       # as the .pth of `pip install -e .` does it


def test_pip_installs_it_as_the_clone_on_the_python_path(tmp_path):
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.partition(".")[0]) < 77:
        pytest.skip("pyproject.toml asks for setuptools 77")
    for path in (*ROOT.glob("*.*"), *(p for folder in ("measure", "benchmarks", "miniature") for p in (ROOT / folder).glob("*.*"))):
        if path.is_file():
            (tmp_path / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
            (tmp_path / path.relative_to(ROOT)).symlink_to(path)
    (tmp_path / "LICENSE").symlink_to(ROOT / "LICENSE")
    code = "from setuptools import build_meta; print(build_meta.build_editable('wheel'))"
    (tmp_path / "wheel").mkdir()
    built = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True).stdout.split()[-1]
    with zipfile.ZipFile(tmp_path / "wheel" / built) as wheel:
        path, = (wheel.read(name).decode().strip() for name in wheel.namelist() if name.endswith(".pth"))
        metadata = next(wheel.read(name).decode() for name in wheel.namelist() if name.endswith("METADATA"))
    assert path == str(tmp_path)
    for line in (ROOT / "requirements.txt").read_text().split():
        assert f"Requires-Dist: {line}\n" in metadata
