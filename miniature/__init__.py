"""miniature/: small look-alikes of the benchmarks, drawn in the benchmarks' own layout: `python -m miniature`.

Floor: data. What miniature/metashift.py writes, benchmarks/metashift.py reads, and so for the others: read that first.
Here they are chosen by name and drawn into a cache. The folder of a miniature appears when it is complete, and a seed
draws the same bytes every time. Then read objects.py, scenes.py and one of the miniatures.
"""
import hashlib
import json
from contextlib import suppress
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

from miniature.cub import Cub, Waterbird200, Waterbirds
from miniature.imagenet import ImageNet, ImageNet9
from miniature.metashift import MetaShift
from miniature.scenes import in_parallel
from miniature.siim import Siim
from settings import RunError, UsageError, nearest, need_room, new_folder

DRAWING_VERSION = 4     # part of every cache's name: raise it when the same seed would give another picture
CACHE = Path(__file__).resolve().parent.parent / "data" / "mini"
BENCHMARKS = {"cub": Cub, "waterbirds": Waterbirds, "waterbird200": Waterbird200, "metashift": MetaShift,
              "siim": Siim, "imagenet": ImageNet, "imagenet9": ImageNet9}


def render(name, root=None, workers=None, **knobs):
    """Folder of the miniature, rendered on first use: root/<name>-<digest of the knobs>.

    Everything goes into a temporary sibling that takes the final name when complete: a process killed at any
    moment leaves nothing that could be mistaken for data. Of two processes at once the first to finish wins.
    """
    benchmark = configure(name, knobs)
    content = json.dumps([DRAWING_VERSION, asdict(benchmark)], sort_keys=True)
    digest = hashlib.sha256(content.encode()).hexdigest()[:10]
    final = Path(root or CACHE) / f"{benchmark.FOLDER or name}-{digest}"
    if final.is_dir():
        with suppress(OSError):                             # a cache that only others may write to is read as it is
            benchmark.complete(final)
        return final
    least = sum(getattr(benchmark, split) for split in benchmark.SPLITS) * benchmark.size ** 2 / 4
    need_room(final.parent, least, "this miniature")            # a JPEG has two bits a pixel at the very least
    try:
        with new_folder(final) as temporary:
            rows = benchmark.rows()
            for folder in benchmark.folders(rows):
                (temporary / folder).mkdir(parents=True)
            write = partial(benchmark.write, root=temporary)
            benchmark.finish(temporary, rows, list(in_parallel(write, rows, f"rendering {name}", workers)))
    except OSError as error:
        if not final.is_dir():                              # else another process was first: use its copy
            raise RunError(f"cannot render into {final.parent}: {error}") from error
    return final


def configure(name, knobs):
    """Name and keyword arguments -> benchmark, or one line that says what is wrong with them."""
    if name not in BENCHMARKS:
        known = ", ".join(BENCHMARKS)
        raise UsageError(f"no miniature named {name!r}{nearest(name, BENCHMARKS)} (one of: {known})")
    known = [f.name for f in fields(BENCHMARKS[name])]
    for knob in knobs:
        if knob not in known:
            raise UsageError(f"{name}: no knob {knob!r}{nearest(knob, known)} (one of: {', '.join(known)})")
    return BENCHMARKS[name](**knobs)
