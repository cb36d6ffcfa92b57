"""sweep.py: train and evaluate a set of methods or ablations, seed after seed, then print their table.

    python sweep.py ladder --data waterbirds --mini --seeds 3       # every method
    python sweep.py ablations --data cub --also waterbird200        # every ablation of iFAM
    python sweep.py erm ifam --data metashift --epochs 30 --list    # two runs: what is left to do; flags are train.py's

Runs lie in runs/<data>-sweep/<name>-<seed> (-mini-sweep for miniatures), which all sets share: ifam is trained once.
The same command again skips what is finished and resumes what is not. The table is <set>.md and <set>.json beside the
runs. A run that fails stops no other; the exit status then is 1.

Floor: commands, the highest: it starts train.py and evaluate.py, and reads nothing but their files.
"""
import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, dataclass
from pathlib import Path

import data
from measure import tables
from runs import Config as RunConfig
from runs import check, differences, pick_device, preset
from settings import RunError, UsageError, flag, nearest, opt, parse, run_script


@dataclass
class Config:
    what: list[str] = opt(MISSING, "sets or single runs of them (--list prints what they are)", positional=True)
    seeds: int = opt(1, "training seeds 0, 1, ... of each", at_least=1)
    processes: int = opt(1, "processes that train, through torchrun", at_least=1)
    leakage: int = opt(500, "of evaluate.py: images for leakage; finished runs stay as they are", at_least=0)
    also: list[str] = opt((), "evaluate on these as well: waterbird200 for cub, imagenet9 for imagenet",
                          choices=tuple(name for name, benchmark in data.BENCHMARKS.items() if benchmark.trained_on))
    list: bool = opt(False, "print the commands and what is finished, run nothing")


METHODS = {     # in the order of the paper's table; early and late masks pool alike, so that one thing differs
    name: ["--method", name] for name in ("early-truth", "late-truth", "frozen", "erm", "late-found", "ep", "aim",
                                          "pdiscoformer", "early-found", "ifam")}
SETS = {        # {name of a set: {name of a run: flags of train.py}}
    "ladder": METHODS,
    "ablations": {
        "ifam": METHODS["ifam"],
        "pdiscoformer": METHODS["pdiscoformer"],         # no second stage
        "soft": ["--hardness", "soft"],
        **{name: [f"--{name}"] for name in ("no-shaping", "no-stage1-class", "freeze-stage2", "no-joint")},
        "frozen-tokens": ["--no-train-tokens"],
        "mean": ["--pooling", "mean"],                   # what the late mask is compared with
        "late": ["--masking", "late", "--pooling", "mean"],
        **{f"k{k}": ["--k", str(k)] for k in (1, 2, 4, 8, 16)},
        **{f"no-{name}": [f"--{name}", "0"] for name in ("part-dropout1", "part-dropout2")}},
    "losses": {                                          # stage 1 alone, because that is where parts come from
        "pdiscoformer": METHODS["pdiscoformer"],
        **{f"without-{loss}": [*METHODS["pdiscoformer"], f"--weight-{loss}", "0"] for loss in
           ("presence", "background", "orthogonality", "equivariance", "variation", "entropy")},
        **{f"stage1-k{k}": [*METHODS["pdiscoformer"], "--k", str(k)] for k in (1, 2, 8, 16)}},
    "published": {                                       # given masks, pooled as in the literature
        "early-truth-cls": [*METHODS["early-truth"], "--pooling", "cls"],
        "late-truth-all": [*METHODS["late-truth"], "--pooling", "mean-all"],
        "early-found-cls": [*METHODS["early-found"], "--pooling", "cls"],
        "late-found-all": [*METHODS["late-found"], "--pooling", "mean-all"]}}


def choose(names):
    """Names of sets or of single runs -> {name of a run: flags}. UsageError for a name that is neither."""
    single = {name: flags for runs in SETS.values() for name, flags in runs.items()}
    known = {name: {name: flags} for name, flags in single.items()} | SETS
    if odd := [name for name in names if name not in known]:
        raise UsageError(f"no set or run is called {odd[0]!r}{nearest(odd[0], known)} (sets: {', '.join(SETS)}; runs: "
                         f"{', '.join(single)}; the names come before the flags)")
    return {run: flags for name in names for run, flags in known[name].items()}


def plan(names, seeds, flags, folder="sweep"):
    """-> [(RunConfig, flags of train.py)], a run each, seeds outermost: a sweep that is cut off has whole seeds.

    folder: the runs are runs/<data>-<folder>/<name>-<seed>. All flags are read here, so that a mistake shows before the
    first run. A run that equals its method as it is (--k 8 where 8 is the default) is the run of that name. UsageError
    if a folder holds a run with other settings.
    """
    parsed = lambda typed: parse(RunConfig, __doc__, typed, preset)
    runs = {}
    for seed in map(str, range(seeds)):
        for name, own in choose(names).items():
            cfg = parsed(typed := [*flags, *own, "--seed", seed])
            if cfg == parsed(plain := [*flags, *METHODS[cfg.method], "--seed", seed]):
                name, typed = cfg.method, plain
            cfg.out = f"runs/{cfg.data}{'-mini' * cfg.mini}-{folder}/{name}-{seed}"
            check(cfg)
            refuse_other_settings(cfg)
            runs[cfg.out] = cfg, [*typed, "--out", cfg.out]
    return list(runs.values())


def refuse_other_settings(cfg):
    path = Path(cfg.out) / "config.json"
    try:
        there = json.loads(path.read_text()) if path.is_file() else None
    except ValueError:
        raise UsageError(f"{path} is damaged: move {cfg.out} away") from None
    for name, (then, now) in (differences(there, cfg) if there else {}).items():
        raise UsageError(f"{cfg.out} was made with {flag(name)} {then}, not {now}: give the old value, "
                         f"or move {Path(cfg.out).parent} away")


def commands(cfg, flags, processes=1, measure=(), also=()):
    """What is left to do for a run, as command lines: none if it is finished. A run that was begun is resumed.

    measure: flags of evaluate.py; also: other benchmarks to evaluate on. Reports of a run that is not trained to its
    end are made again.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] * (processes > 1)
    folder, here = Path(cfg.out), Path(__file__).parent
    training = [sys.executable, *torchrun, str(here / "train.py"), *flags,
                *["--resume"] * (folder / "config.json").is_file()]
    measure = [sys.executable, str(here / "evaluate.py"), "--ckpt", str(folder / "best.pt"), "--device", cfg.device,
               *measure]
    left = {"report.json": measure, **{f"report-{name}.json": [*measure, "--data", name] for name in also}}
    if not trained(folder / "log.jsonl"):
        return [training, *left.values()]
    return [command for name, command in left.items() if not (folder / name).is_file()]


def trained(log):
    """Did training reach its end? It writes one last line then."""
    return log.is_file() and '"finished": true' in log.read_text().rpartition("\n{")[2]


def finished(names, flags, folder="sweep", measure=("--leakage", "100"), also=()):
    """For notebooks: runs of seed 0, trained and evaluated now unless they were before -> {name: folder of the run}.

    names and flags as on the command line, measure and also as in `commands`. On CPU runs go side by side, each with
    its share of the cores. What the scripts print is shown only where one fails. RunError then.
    """
    runs = plan(names, 1, flags, folder)
    left = [(cfg.out, todo) for cfg, typed in runs if (todo := commands(cfg, typed, measure=measure, also=also))]
    if left:
        cfg = runs[0][0]
        data.find_root(cfg.data, cfg.root, cfg.mini)     # draws a miniature, before several want it
        side_by_side = min(len(left), os.cpu_count() if pick_device(cfg.device).type == "cpu" else 1)
        threads = {"OMP_NUM_THREADS": str(os.cpu_count() // side_by_side)} if side_by_side > 1 else {}

        def work(out, todo):
            print(f"{out}: this takes minutes, but only once; its log.jsonl says how far it is", flush=True)
            for command in todo:
                done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **threads})
                if done.returncode:
                    raise RunError(f"{out} failed: {done.stderr.strip()[-500:]}")
        with ThreadPoolExecutor(side_by_side) as pool:
            list(pool.map(work, *zip(*left)))
    return {Path(cfg.out).name.removesuffix("-0"): Path(cfg.out) for cfg, _ in runs}


def main(argv=None):
    given, flags = parse(Config, __doc__, argv, rest=True)
    if refused := {"--method", "--seed", "--out", "--resume"} & {flag.split("=")[0] for flag in flags}:
        raise UsageError(f"{min(refused)} is decided by the sweep: leave it out")
    runs, failed = plan(given.what, given.seeds, flags), []
    for name in given.also:
        if (trained := data.BENCHMARKS[name].trained_on) != runs[0][0].data:
            raise UsageError(f"--also {name} evaluates models of {trained}, not of {runs[0][0].data}: leave it out")
    left = lambda cfg, typed: commands(cfg, typed, given.processes, ["--leakage", str(given.leakage)], given.also)
    for number, (cfg, typed) in enumerate(runs, 1):
        todo = left(cfg, typed)
        print(f"[{number}/{len(runs)}] {cfg.out}" + ": finished" * (not todo), flush=True)
        for command in todo:
            if given.list:
                print("  " + shlex.join(command))
            elif subprocess.run(command).returncode:
                failed.append(cfg.out)
                break
    done = [Path(cfg.out) for cfg, typed in runs if not left(cfg, typed)]
    if done and not given.list:
        tables.write_tables(done, done[0].parent / "-".join(given.what))
    if failed:
        raise RunError(f"{len(failed)} of {len(runs)} runs failed, above is why: {', '.join(failed)}; "
                       "the same command tries them again")


if __name__ == "__main__":
    run_script(main)
