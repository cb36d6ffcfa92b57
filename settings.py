"""settings.py: what every script shares: a dataclass is the command line, an error is one line, a file is whole.

Floor: the ground; it needs tqdm and the standard library alone. Nothing needs to be read before. Every script's Config
shows what `opt` is for.
"""
import argparse
import csv
import difflib
import functools
import glob
import io
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import MISSING, asdict, field, fields
from pathlib import Path
from typing import get_args, get_origin

from tqdm import tqdm


class UsageError(Exception):
    """Something the user can put right: one line (what, where, what to do), exit status 2."""


class RunError(Exception):
    """The run itself failed, for example a loss that is not finite: one line, exit status 1."""


# ---------------------------------------------------------------- command line
def opt(default, help, choices=None, group="", positional=False, refused=None, **bounds):
    """A dataclass field that is also a flag; default=MISSING makes it required, choices refuses anything else.

    group: heading of --help, for this flag and those after it. positional: no flag, but the words before the flags.
    refused: {value: why}, of values that people will try and that are no choices. bounds: at_least, at_most, above,
    below, a_multiple_of; they hold for every number of a pair or list. A number is always finite.
    """
    return field(default=default, metadata=dict(help=help, choices=choices, group=group, positional=positional,
                                                refused=refused or {}, bounds=bounds))


def flag(name):
    """The name of a setting as it is typed: "save_every" -> "--save-every"."""
    return "--" + name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line that names the nearest thing we know."""

    def __init__(self, **how):
        spec = getattr(sys.modules["__main__"], "__spec__", None)                # of python -m, whose argv[0] is a path
        super().__init__(prog=f"python -m {spec.name.removesuffix('.__main__')}" if spec else None, **how)

    def error(self, message):
        if message.startswith("unrecognized arguments:"):
            word = next(w for w in message.split(": ", 1)[1].split() if w)
            message = f"unknown flag {word}" + nearest(word.split("=")[0], self._option_string_actions)
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def nearest(word, known):
    """", did you mean X?" for the closest of the known words, or "" when none is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f", did you mean {close[0]}?" if close else ""


def grouped(cls):
    """[(group, field)] of a dataclass of opt()s, in order."""
    group, found = "", []
    for f in fields(cls):
        group = f.metadata["group"] or group
        found.append((group, f))
    return found


def default_text(f):
    """What --help and the docs say of a default."""
    empty = f.default in ("", ()) and "none"
    return "required" if f.default is MISSING else f"default {empty or f.default}"


def parser_of(cls, doc):
    """The argparse parser of a dataclass. Booleans become --flag / --no-flag, pairs take two values, lists any."""
    parser = Parser(description=doc, argument_default=argparse.SUPPRESS, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = {"": parser}
    for group, f in grouped(cls):
        kind = dict(type=f.type)
        if f.type is bool:
            kind = dict(action=argparse.BooleanOptionalAction)
        elif f.type is tuple:
            kind = dict(type=type(f.default[0]), nargs=len(f.default))
        elif get_origin(f.type) is list:
            kind = dict(type=get_args(f.type)[0], nargs="+")
        known = f" [{', '.join(filter(None, f.metadata['choices']))}]" if f.metadata["choices"] else ""
        text = f"{f.metadata['help']}{known} ({default_text(f)})".replace("%", "%%")
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        if f.metadata["positional"]:
            groups[group].add_argument(f.name, help=f.metadata["help"].replace("%", "%%"), **kind)
        else:
            groups[group].add_argument(flag(f.name), required=f.default is MISSING, help=text, **kind)
    return parser


def parse(cls, doc, argv=None, preset=None, recorded=None, rest=False):
    """Command line -> cls. Values: the field's default, then preset's, then those of --config, then what was typed.

    preset: what was typed and the settings of --config, {name: value} both -> settings that replace defaults. recorded:
    reads the file of --config, a flag that there is with it only. rest: -> (cls, flags that it does not know). "" and
    () mean "not given". UsageError for a value that is none of the choices or is out of bounds.
    """
    parser, unknown, earlier = parser_of(cls, doc), [], {}
    if recorded:
        parser.add_argument("--config", help="start with the settings of another run (its config.json), but for the "
                                             "folder; flags that are typed replace them")
    if rest:
        typed, unknown = parser.parse_known_args(argv)
    else:
        typed = parser.parse_args(argv)
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(typed).items()}
    if empty := next((name for name, value in given.items() if value == ""), None):
        parser.error(f"{flag(empty)} is empty; give a value, or leave it out")
    if path := given.pop("config", ""):
        earlier = recorded(path)
    settings = cls(**{**(preset(given, earlier) if preset else {}), **earlier, **given})
    check_bounds(settings)
    return (settings, unknown) if rest else settings


def check_bounds(settings):
    """UsageError for the first setting of a dataclass of opt()s that is not one of its choices or out of its bounds."""
    for f in fields(settings):
        value, name = getattr(settings, f.name), f.name if f.metadata["positional"] else flag(f.name)
        choices, bounds = f.metadata["choices"], f.metadata["bounds"]
        for x in value if isinstance(value, (tuple, list)) else [value]:
            if x in f.metadata["refused"]:
                raise UsageError(f"{name} {x} is refused: {f.metadata['refused'][x]}")
            if choices and x not in choices:
                raise UsageError(f"unknown {name} {x!r}{nearest(str(x), filter(None, choices))} "
                                 f"(one of: {', '.join(filter(None, choices))})")
            if isinstance(x, (int, float)) and not isinstance(x, bool):
                if not math.isfinite(x):
                    raise UsageError(f"{name} must be a finite number, not {x}")
                holds = {"at_least": x >= bounds.get("at_least", x), "at_most": x <= bounds.get("at_most", x),
                         "above": "above" not in bounds or x > bounds["above"],
                         "below": "below" not in bounds or x < bounds["below"],
                         "a_multiple_of": not x % bounds.get("a_multiple_of", x or 1)}
                if not all(holds.values()):
                    wanted = " and ".join(f"{kind.replace('_', ' ')} {bound}" for kind, bound in bounds.items())
                    raise UsageError(f"{name} must be {wanted}, not {x}")


def check_range(name, pair):
    """UsageError unless a setting is a smaller and a larger number."""
    if pair[0] > pair[1]:
        raise UsageError(f"{flag(name)} must be a smaller and a larger number, not {pair[0]} {pair[1]}")


def recorded(cls, content, where):
    """Settings that a file holds -> {name: value} of those that cls has, checked like typed ones.

    UsageError that names the file, the setting and what was expected.
    """
    if not isinstance(content, dict):
        raise UsageError(f"{where}: expected an object of settings, found {type(content).__name__}")
    found = {}
    for f in fields(cls):
        if f.name in content:
            value, kind = content[f.name], get_origin(f.type) or f.type
            kinds = {float: (int, float), tuple: (tuple, list), list: (tuple, list)}.get(kind, (kind,))
            if not isinstance(value, kinds) or isinstance(value, bool) and kind is not bool:
                raise UsageError(f"{where}: {f.name} is {value!r}, expected {kind.__name__}; restore the file")
            found[f.name] = tuple(value) if isinstance(value, list) else value
    try:
        check_bounds(cls(**found))
    except UsageError as error:
        raise UsageError(f"{where}: {error}; restore the file") from None
    return found


def flags_table(cls):
    """The flags of a script as Markdown tables, a heading for each group: docs/training.md has that of train.py."""
    lines, last = [], None
    for group, f in grouped(cls):
        if group != last:
            lines += ["", f"### {group.capitalize()}", "", "| flag | what it is | default |", "|---|---|---|"]
            last = group
        known = f" ({', '.join(f'`{c}`' for c in f.metadata['choices'] if c)})" if f.metadata["choices"] else ""
        help = f.metadata["help"].replace("<", "&lt;")
        lines.append(f"| `{flag(f.name)}` | {help}{known} | {default_text(f).removeprefix('default ')} |")
    return "\n".join(lines).strip()


# ---------------------------------------------------------------- a script from its start to its exit status
class Stopped(Exception):
    """A signal asked the script to end, and it has saved what it had: exit status 128 + the signal's number."""


WORKER = ("a process that loads data was killed (%s): give the container more shared memory (docker run --shm-size=2g) "
          "or take fewer of them (--workers 0)")
MEMORY = "%s: take a smaller --batch, --micro or --size"
DISK = "a file could not be written whole (%s): is the disk full? The file that was there is as it was"
KNOWN = {       # what libraries raise as RuntimeError where the machine has too little of something, and our line
    "Bus error": WORKER, "DataLoader worker": WORKER, "out of memory": MEMORY, "can't allocate memory": MEMORY,
    "Too many open files": "%s: raise the limit (ulimit -n 4096), or take fewer --workers",
    "PytorchStreamWriter": DISK, "unexpected pos": DISK}


def world():
    """How many processes torchrun started; 1 alone."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def rank():
    """This process's number among those of torchrun; 0 alone, whatever a job script left in RANK."""
    return int(os.environ.get("RANK", 0)) if world() > 1 else 0


def run_script(main):
    """Run a script's main(); turn what can go wrong into one line on standard error and an exit status.

    UsageError 2; RunError, any OSError and what KNOWN explains 1; a signal 128 + its number. Whoever reads us may stop
    reading (train.py | head): the script goes on, it writes files.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")         # a terminal of Latin-1 has no dash
    sys.stdout = Unbroken(sys.stdout)
    try:
        main()
        sys.stdout.flush()
        return
    except UsageError as error:
        text, status = said(error), 2
    except RunError as error:
        text, status = said(error), 1
    except Stopped as error:
        text, status = None, 128 + error.args[0]
    except KeyboardInterrupt:
        text, status = "interrupted", 130
    except OSError as error:
        where = f"{os.fspath(error.filename)}: " if error.filename is not None else ""
        text, status = f"{where}{error.strerror or error}", 1
    except (RuntimeError, MemoryError) as error:
        line = next((line for words, line in KNOWN.items() if words in str(error)), None)
        if line is None and not isinstance(error, MemoryError):
            raise
        text, status = (line or KNOWN["out of memory"]) % (str(error).strip().splitlines() or ["out of memory"])[0], 1
    finally:
        sys.stdout = sys.stdout.stream
    if text:
        print(f"[rank {rank()}] " * (world() > 1) + f"error: {' '.join(text.split())}", file=sys.stderr, flush=True)
    sys.exit(status)


def said(error):
    """What an error says. A data worker wraps it in its traceback: then it is what follows the name of the error."""
    return str(error).rsplit(f"{type(error).__name__}: ", 1)[-1]


class Unbroken:
    """A stream to which one can write after its reader has gone: what is written is lost."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        return self.attempt(self.stream.write, text)

    def flush(self):
        return self.attempt(self.stream.flush)

    def attempt(self, do, *what):
        try:
            return do(*what)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def leave_signals(worker):
    """A process that loads data leaves Ctrl-C to the one that trains."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def signals(ends=(signal.SIGTERM, signal.SIGINT)):
    """Inside, the first of these signals does not end the process: it is noted in the list that this gives.

    A second one ends it at once, but for a SIGTERM of the same moment: schedulers signal every process of a job, and
    sweep.py passes its own on. Only the main thread may listen; elsewhere the list stays empty.
    """
    noted, before = [], {}

    def note(number, frame):
        if noted and not (number == signal.SIGTERM == noted[0] and time.monotonic() < noted[1] + 2):
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        noted[:] = noted or [number, time.monotonic()]
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, note) for number in ends}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------- long work
@functools.cache
def bounded(workers):
    """How many processes load data where so many were asked for: more than cores would only fill the memory."""
    cores = max(4, os.cpu_count() or 1)
    if workers > cores:
        print(f"--workers {workers} is more than this machine has cores: {cores} processes load data")
    return min(workers, cores)


def progress(steps, title, total=None, every=30.0):
    """Pass on what is iterated over, and show how far it is: a bar on a terminal, elsewhere a line every 30 seconds.

    total: how many there are, where `steps` has no length. Only rank 0 talks.
    """
    total = len(steps) if total is None else total
    if rank():
        yield from steps
    elif sys.stderr.isatty():
        yield from tqdm(steps, title, total, leave=False, dynamic_ncols=True)
    else:
        start = last = time.monotonic()
        for done, step in enumerate(steps, 1):
            yield step
            now = time.monotonic()
            if now - last >= every and done < total:
                left = (now - start) / done * (total - done)
                print(f"{title}: {done} of {total}, {left / 60:.0f} min left", file=sys.stderr, flush=True)
                last = now


# ---------------------------------------------------------------- files
def unfinished(path):
    """The name beside path that this process gives to what is not whole yet."""
    return path.with_name(f".{path.name}.{os.getpid()}@{platform.node()}")


def owner_of(path):
    """The number of the process of this machine that gave such a name; None for any other name."""
    match = re.fullmatch(r"\..+\.(\d+)@(.+)", path.name)
    return int(match[1]) if match and match[2] == platform.node() else None


def write_whole(path, write):
    """Call write(temporary path), then rename it to path: readers see the old file or the new one, never half.

    Temporary files of this path that processes of this machine left when they were killed go too.
    """
    path = Path(path)
    for other in path.parent.glob(f".{glob.escape(path.name)}.*@{glob.escape(platform.node())}"):
        if (owner := owner_of(other)) and not alive(owner):
            other.unlink(missing_ok=True)
    temporary = unfinished(path)
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(final):
    """Inside, a temporary sibling to write into; it takes the name `final` at the end, unless a folder has it by then.

    A process killed at any moment leaves nothing that could be mistaken for the whole; what killed processes of this
    machine left goes when the next one starts.
    """
    final = Path(final)
    temporary = unfinished(final)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(final.parent)
        temporary.mkdir()
        yield temporary
        if not final.is_dir():
            temporary.rename(final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_stale(root):
    """Delete what killed processes of this machine left half written, one that had our number included."""
    for folder in root.iterdir():
        if (owner := owner_of(folder)) and (owner == os.getpid() or not alive(owner)):
            shutil.rmtree(folder, ignore_errors=True)


def need_room(folder, least, what):
    """UsageError unless the disk of a folder, or of the first one above it that is there, has `least` bytes free."""
    there = next(p for p in (folder, *folder.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(there).free
    if least > free:
        raise UsageError(f"{what} needs at least {least / 2 ** 30:,.0f} GiB, and {there} has {free / 2 ** 30:,.0f} "
                         "free: make fewer or smaller pictures")


def alive(pid):
    """Is there a process of this number on this machine?"""
    try:
        os.kill(pid, 0)                                  # signal 0 only asks
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def may_write(path, ours, force=False):
    """UsageError unless a file can be written at path: its folder is there, and nobody else's file is replaced.

    ours: a function of an existing file's path -> did this program write it, and of this kind? force: replace anything
    but a folder. Called before work starts.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise UsageError(f"{path}: {path.parent} is no folder; name a file in a folder that exists")
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name a file")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"{path}: no permission to write in {path.parent}; name another place")
    try:
        known = not os.path.lexists(path) or force or ours(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        known = False
    if not known:
        raise UsageError(f"{path} was not written by this script, and it would be lost; name another file, or --force")


def write_json(path, content):
    """Plain dict or dataclass -> indented JSON, whole or not at all."""
    content = content if isinstance(content, dict) else asdict(content)
    write_whole(path, lambda temporary: temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n"))


def write_csv(path, rows):
    """Dicts with the same keys -> a csv with a header, UTF-8, whole or not at all."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, lambda temporary: temporary.write_text(text.getvalue(), encoding="utf-8"))


def read_text(path, what):
    """The text of a file; UsageError that says what it should be where there is none or it is not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; expected {what}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text (byte {error.start}); expected {what}") from None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; expected {what}") from None


def read_json(path, what):
    """The content of a JSON file; UsageError that says what it should be, and where it is torn."""
    try:
        return json.loads(read_text(path, what))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not whole JSON ({error}); expected {what}") from None
