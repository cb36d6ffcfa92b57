"""python -m miniature: draw a miniature of a benchmark.

    python -m miniature --data waterbirds --sheet scenes.png

renders a miniature Waterbirds under data/mini (10 to 20 seconds on two cores), prints its folder and group
sizes, and draws some scenes to look at. Each benchmark has knobs of its own: --data NAME --help.
Floor: data, as all of miniature/; read miniature/__init__.py first.
"""
import argparse
import inspect
from dataclasses import fields, make_dataclass

from PIL import Image

from benchmarks.files import check_sheet, write_sheet
from miniature import BENCHMARKS, Waterbirds, render
from settings import opt, parse, run_script


def main(argv=None):
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)      # the benchmark has the knobs
    peek.add_argument("--data", default="waterbirds")
    benchmark = BENCHMARKS.get(peek.parse_known_args(argv)[0].data, Waterbirds)
    command = make_dataclass("Command", bases=(benchmark,), frozen=True, fields=[
        ("data", str, opt("waterbirds", "which benchmark", choices=tuple(BENCHMARKS))),
        ("out", str, opt("", "folder for miniatures, if not data/mini beside this file")),
        ("sheet", str, opt("", "also draw some scenes into this picture file")),
        ("force", bool, opt(False, "replace a picture that this program did not draw"))])
    args = parse(command, __doc__ + "\n" + inspect.cleandoc(benchmark.__doc__), argv)
    knobs = {f.name: getattr(args, f.name) for f in fields(benchmark)}
    if args.sheet:
        check_sheet(args.sheet, args.force)
    print(render(args.data, args.out or None, **knobs))
    print(benchmark(**knobs).summary())
    if args.sheet:
        write_sheet(args.sheet, Image.fromarray(benchmark(**knobs).sheet()))


if __name__ == "__main__":
    run_script(main)
