"""python -m miniature: draw a miniature of a benchmark.

    python -m miniature --data waterbirds --sheet scenes.png

renders a miniature Waterbirds under data/mini (10 to 20 seconds on two cores), prints its folder and group
sizes, and draws some scenes to look at. Each benchmark has knobs of its own: --data NAME --help.
"""
import argparse
import inspect
from dataclasses import fields, make_dataclass

from PIL import Image

from miniature import BENCHMARKS, Waterbirds, configure, render
from settings import opt, parse, run_script


def main(argv=None):
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)      # the benchmark has the knobs
    peek.add_argument("--data", default="waterbirds")
    knobs = BENCHMARKS.get(peek.parse_known_args(argv)[0].data, Waterbirds)
    command = make_dataclass("Command", bases=(knobs,), frozen=True, fields=[
        ("data", str, opt("waterbirds", "which benchmark", choices=tuple(BENCHMARKS))),
        ("out", str, opt("", "folder for miniatures, if not data/mini beside this file")),
        ("sheet", str, opt("", "also draw some scenes into this picture file"))])
    args = parse(command, __doc__ + "\n" + inspect.cleandoc(knobs.__doc__), argv)
    chosen = {f.name: getattr(args, f.name) for f in fields(knobs)}
    benchmark = configure(args.data, chosen)
    print(render(args.data, args.out or None, **chosen))
    print(benchmark.summary())
    if args.sheet:
        Image.fromarray(benchmark.sheet()).save(args.sheet)


if __name__ == "__main__":
    run_script(main)
