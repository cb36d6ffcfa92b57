"""settings.py: what every script shares: a dataclass is the command line, an error is one line, a file is whole.

Floor: the ground; it needs tqdm and the standard library alone. Every script's Config shows what `opt` is for.
"""
import argparse
import difflib
import json
import math
import os
import sys
import time
from dataclasses import MISSING, asdict, field, fields
from typing import get_args, get_origin

from tqdm import tqdm


class UsageError(Exception):
    """Something the user can put right: one line (what, where, what to do), exit status 2."""


class RunError(Exception):
    """The run itself failed, for example a loss that is not finite: one line, exit status 1."""


# ---------------------------------------------------------------- command line
def opt(default, help, choices=None, group="", positional=False, **bounds):
    """A dataclass field that is also a flag; default=MISSING makes it required, choices refuses anything else.

    group: heading of --help, for this flag and those after it. positional: no flag, but the words before the flags.
    bounds: at_least, at_most, above, below; they hold for every number of a pair or list. A number is always finite.
    """
    return field(default=default, metadata=dict(help=help, choices=choices, group=group, positional=positional,
                                                bounds=bounds))


def flag(name):
    """The name of a setting as it is typed: "save_every" -> "--save-every"."""
    return "--" + name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line that names the nearest thing we know."""

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
            if choices and x not in choices:
                raise UsageError(f"unknown {name} {x!r}{nearest(str(x), filter(None, choices))} "
                                 f"(one of: {', '.join(filter(None, choices))})")
            if isinstance(x, (int, float)) and not isinstance(x, bool):
                if not math.isfinite(x):
                    raise UsageError(f"{name} must be a finite number, not {x}")
                holds = {"at_least": x >= bounds.get("at_least", x), "at_most": x <= bounds.get("at_most", x),
                         "above": "above" not in bounds or x > bounds["above"],
                         "below": "below" not in bounds or x < bounds["below"]}
                if not all(holds.values()):
                    wanted = " and ".join(f"{kind.replace('_', ' ')} {bound}" for kind, bound in bounds.items())
                    raise UsageError(f"{name} must be {wanted}, not {x}")


def flags_table(cls):
    """The flags of a script as Markdown tables, a heading for each group: docs/training.md has the table of train.py."""
    lines, last = [], None
    for group, f in grouped(cls):
        if group != last:
            lines += ["", f"### {group.capitalize()}", "", "| flag | what it is | default |", "|---|---|---|"]
            last = group
        known = f" ({', '.join(f'`{c}`' for c in f.metadata['choices'] if c)})" if f.metadata["choices"] else ""
        help = f.metadata["help"].replace("<", "&lt;")
        lines.append(f"| `{flag(f.name)}` | {help}{known} | {default_text(f).removeprefix('default ')} |")
    return "\n".join(lines).strip()


def run_script(main):
    """Run a script's main(); turn our two kinds of error into one line on standard error and an exit status."""
    rank = f"[rank {os.environ['RANK']}] " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:                 # whoever reads us, such as head, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (UsageError, RunError) as error:
        # a data worker wraps the line in its traceback; the line is what follows the name of the error
        text = str(error).rsplit(f"{type(error).__name__}: ", 1)[-1]
        print(f"{rank}error: {' '.join(text.split())}", file=sys.stderr, flush=True)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt:
        print(f"{rank}interrupted", file=sys.stderr)
        sys.exit(130)


# ---------------------------------------------------------------- long work
def progress(steps, title, total=None, every=30.0):
    """Pass on what is iterated over, and show how far it is: a bar on a terminal, elsewhere a line every 30 seconds.

    total: how many there are, where `steps` has no length. Only rank 0 talks.
    """
    total = len(steps) if total is None else total
    if int(os.environ.get("RANK", 0)):
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
def write_whole(path, write):
    """Call write(temporary path), then rename it to path: readers see the old file or the new one, never half."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, content):
    """Plain dict or dataclass -> indented JSON, whole or not at all."""
    content = content if isinstance(content, dict) else asdict(content)
    write_whole(path, lambda temporary: temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n"))
