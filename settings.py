"""settings.py: what every script shares: a dataclass is the command line, an error is one line, a file is whole."""
import argparse
import difflib
import json
import os
import sys
from dataclasses import MISSING, asdict, field, fields
from typing import get_args, get_origin


class UsageError(Exception):
    """Something the user can put right: one line (what, where, what to do), exit status 2."""


class RunError(Exception):
    """The run itself failed, for example a loss that is not finite: one line, exit status 1."""


# ---------------------------------------------------------------- command line
def opt(default, help, choices=None):
    """A dataclass field that is also a flag; default=MISSING makes it required, choices refuses anything else."""
    return field(default=default, metadata={"help": help, "choices": choices})


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line that names the nearest thing we know."""

    def error(self, message):
        if message.startswith("unrecognized arguments:"):
            flag = next(w for w in message.split(": ", 1)[1].split() if w)
            message = f"unknown flag {flag}" + nearest(flag.split("=")[0], self._option_string_actions)
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def nearest(word, known):
    """", did you mean X?" for the closest of the known words, or "" when none is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f", did you mean {close[0]}?" if close else ""


def parse(cls, doc, argv=None, preset=None):
    """Command line -> cls. Values: the field's default, then preset(what was typed), then what was typed.

    Booleans become --flag / --no-flag, pairs take two values, lists one or more; "" and () mean "not given".
    """
    parser = Parser(description=doc, argument_default=argparse.SUPPRESS, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(cls):
        kind = dict(type=f.type)
        if f.type is bool:
            kind = dict(action=argparse.BooleanOptionalAction)
        elif f.type is tuple:
            kind = dict(type=type(f.default[0]), nargs=len(f.default))
        elif get_origin(f.type) is list:
            kind = dict(type=get_args(f.type)[0], nargs="+")
        default = "required" if f.default is MISSING else f"default {'none' if f.default == () else f.default}"
        known = f" [{', '.join(filter(None, f.metadata['choices']))}]" if f.metadata["choices"] else ""
        text = f"{f.metadata['help']}{known} ({default})".replace("%", "%%")
        parser.add_argument("--" + f.name.replace("_", "-"), required=f.default is MISSING, help=text, **kind)
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(parser.parse_args(argv)).items()}
    for f in fields(cls):
        value, choices = given.get(f.name), f.metadata["choices"]
        if choices and value is not None and value not in choices:
            parser.error(f"unknown --{f.name.replace('_', '-')} {value!r}{nearest(value, choices)} "
                         f"(one of: {', '.join(filter(None, choices))})")
    return cls(**{**(preset(given) if preset else {}), **given})


def at_least(settings, **bounds):
    """UsageError for the first of these settings that is below its bound (or NaN)."""
    for name, least in bounds.items():
        if not getattr(settings, name) >= least:
            raise UsageError(f"--{name} must be at least {least}, not {getattr(settings, name)}")


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
