"""sweep.py: train and evaluate a set of methods or ablations, seed after seed, then print their table.

    python sweep.py ladder --data waterbirds --mini --seeds 3       # every method
    python sweep.py ablations --data cub --also waterbird200        # every ablation of iFAM
    python sweep.py objectives --data waterbirds --mini --seeds 3   # GroupDRO, JTT, ...: with erm, and with ifam
    python sweep.py erm ifam --data metashift --epochs 30 --list    # two runs: what is left to do; flags are train.py's

Runs lie in runs/<data>-sweep/<name>-<seed> (-mini-sweep for miniatures), which all sets share: ifam is trained once.
The same command again skips what is finished and resumes what is not. The table is <set>.md, .tex, .csv and .json
beside the runs. A flag that only some of the methods have is left out for the others. Runs of two passes (JTT, GEORGE)
get their groups from another run of the same seed, which comes first. A run that fails stops no other; the exit status
then is 1. What the benchmark refuses of a set, such as GroupDRO without places, is left out, and the last line names
it. SIGTERM and Ctrl-C are passed on to the run, which saves where it is, and end the sweep.

Floor: commands, the highest: it starts train.py, groups.py and evaluate.py, and reads nothing but their files. Read
docs/methods.md first.
"""
import os
import re
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import MISSING, dataclass, replace
from pathlib import Path

from tqdm import tqdm

import data
from baselines import TAKES
from measure import tables
from measure.retrain import TITLES
from objectives import said_of
from runs import Config as RunConfig
from runs import check, differences, hash_of, left_out, of_best, pick_device, preset, read_config, read_log, trained
from settings import RunError, UsageError, flag, nearest, opt, parse, read_json, run_script


@dataclass
class Config:
    what: list[str] = opt(MISSING, "sets or single runs of them (--list prints what they are)", positional=True)
    seeds: int = opt(1, "training seeds 0, 1, ... of each", at_least=1)
    processes: int = opt(1, "processes that train, through torchrun", at_least=1)
    leakage: int = opt(500, "of evaluate.py: images for leakage; finished runs stay as they are", at_least=0)
    fitted: bool = opt(True, "of evaluate.py: also measure what is fitted on the training images")
    also: list[str] = opt((), "evaluate on these as well: waterbird200 for cub, imagenet9 for imagenet",
                          choices=tuple(name for name, benchmark in data.BENCHMARKS.items() if benchmark.trained_on))
    retrain: list[str] = opt((), "evaluate with these new last layers as well, as evaluate.py --retrain has them",
                             choices=tuple(TITLES))
    list: bool = opt(False, "print the commands and what is finished, run nothing")


METHODS = {     # in the order of the paper's table; early and late masks pool alike, so that one thing differs
    name: ["--method", name] for name in ("early-truth", "late-truth", "bbox-erm", "seg-erm", "frozen", "erm",
                                          "late-found", "ep", "aim", "pdiscoformer", "early-found", "ifam")}
REFUSED = 2                                              # exit status of a UsageError, see settings.run_script
FIFTH = "a fifth"                                        # of --epochs: JTT's first model, as published for Waterbirds
WORST = ["--select", "worst_group"]                      # as published, where validation has such groups


def objectives(method):
    """{name of a run: flags of train.py}: a method with each objective, and with other backgrounds in its images.

    --groups RUN:BY is what groups.py --by BY writes of the run of that name and seed, which comes first; RUN: is its
    folder.
    """
    weighed = {"": [], "-balanced": ["--objective", "balanced", *WORST],
               "-reweight": ["--objective", "reweight", *WORST], "-group-dro": ["--objective", "group-dro", *WORST],
               "-jtt": ["--objective", "jtt", "--groups", "erm-first:errors", *WORST],
               "-george": ["--objective", "george", "--groups", f"{method}:clusters"],
               "-background-dro": ["--objective", "group-dro", "--groups", "ifam:background"]}
    masks = ("true", "found", *["own"] * (method == "ifam"))
    swapped = {f"-swap-{mask}": ["--swap", "0.5", "--swap-mask", mask] for mask in masks}
    swapped["-masktune"] = ["--masktune", f"{method}:"]
    return {method + name: [*METHODS[method], *flags] for name, flags in {**weighed, **swapped}.items()}


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
        "late-found-all": [*METHODS["late-found"], "--pooling", "mean-all"]},
    "sources": {                                         # choices where the literature, or its code, does otherwise
        **{f"{name}-norm": [*METHODS[name], "--head", "norm"] for name in ("erm", "frozen", "early-truth",
                                                                           "late-truth")},
        "late-truth-all": [*METHODS["late-truth"], "--pooling", "mean-all"],
        "late-truth-all-norm": [*METHODS["late-truth"], "--pooling", "mean-all", "--head", "norm"],
        "early-truth-centre": [*METHODS["early-truth"], "--mask-rule", "centre"],
        "early-truth-pixels": [*METHODS["early-truth"], "--mask-with", "pixels"],
        "early-found-view": [*METHODS["early-found"], "--find-in", "view"],
        **{f"{name}-head": [*METHODS[name], "--finder", "head"] for name in ("early-found", "late-found")},
        "ep-norm": [*METHODS["ep"], "--probe-norm"]},
    "selectors": {                                       # a smaller stage 1
        "ifam": METHODS["ifam"], "fast": ["--recipe", "fast"], "faster": ["--recipe", "faster"]},
    "masks": {                                           # what is done against what a mask still tells
        "ifam": METHODS["ifam"],
        "trim-found": ["--trim", "found"], "trim-truth": ["--trim", "truth"],
        "largest": ["--mask-largest"],
        "dilate": ["--mask-dilate", "always"], "dilate-random": ["--mask-dilate", "random"],
        "early-truth-cls": [*METHODS["early-truth"], "--pooling", "cls"],
        "early-truth-trim": [*METHODS["early-truth"], "--pooling", "cls", "--trim", "truth"],
        "early-random": ["--method", "early-random"]},   # the judge of what a selection encodes
    "objectives": {"erm-first": [*METHODS["erm"], "--epochs", FIFTH], **objectives("erm"), **objectives("ifam"),
                   "ifam-supervised": ["--supervise", "masks"], "ifam-complement": ["--weight-complement", "4"]}}


def choose(names):
    """Names of sets or of single runs -> {name of a run: flags}; before a run, the one that its groups come from.

    UsageError for a name that is neither.
    """
    single = {name: flags for runs in SETS.values() for name, flags in runs.items()}
    known = {name: {name: flags} for name, flags in single.items()} | SETS
    if odd := [name for name in names if name not in known]:
        raise UsageError(f"no set or run is called {odd[0]!r}{nearest(odd[0], known)} (sets: {', '.join(SETS)}; runs: "
                         f"{', '.join(single)}; the names come before the flags)")
    chosen = [(run, flags) for name in names for run, flags in known[name].items()]
    first = lambda flags: [word.partition(":")[0] for word in flags if ":" in word]
    return {run: single[run] for name, flags in chosen for run in (*first(flags), name)}


def filled_in(own, cfg, folders):
    """Flags of a run of SETS as train.py knows them. cfg: its settings without them; folders: {name of a run: its own}.
    """
    own = own if tables.crossed(cfg.data, "val") else [word for word in own if word not in WORST]
    known = {FIFTH: str(max(1, cfg.epochs // 5))}
    for word in own:
        run, colon, by = word.partition(":")
        if colon:
            known[word] = f"{folders[run]}/groups-{by}.csv" if by else folders[run]
    return [known.get(word, word) for word in own]


def method_of(own):
    """The method of a run of SETS."""
    return own[own.index("--method") + 1] if "--method" in own else RunConfig.method


def share_out(chosen, flags):
    """Flags of train.py for each of the chosen runs, {name: flags} -> {name: those of the flags that its method has}.

    A flag that some methods of the sweep have is left out for the others, and a line says so. One that none has stays,
    so that train.py's settings refuse it.
    """
    starts = [i for i, word in enumerate(flags) if word.startswith("--")]
    words = [flags[start:end] for start, end in zip(starts, [*starts[1:], len(flags)])]
    given = {name: flags[:starts[0]] if starts else flags for name in chosen}
    for typed in words:
        setting = typed[0].split("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_")
        without = [name for name, own in chosen.items() if method_of(own) not in TAKES.get(setting, (method_of(own),))]
        if 0 < len(without) < len(chosen):
            print(f"{' '.join(typed)}: left out for {', '.join(without)}, which have no such setting")
        for name in chosen:
            if name not in without or len(without) == len(chosen):
                given[name] = [*given[name], *typed]
    return given


def plan(names, seeds, flags, folder="sweep"):
    """-> [(RunConfig, flags of train.py)], a run each, seeds outermost: a sweep that is cut off has whole seeds.

    folder: the runs are runs/<data>-<folder>/<name>-<seed>. All flags are read here, so that a mistake shows before the
    first run. A run that equals its method as it is (--k 8 where 8 is the default) is the run of that name. UsageError
    if a folder holds a run with other settings.
    """
    def parsed(typed):
        """--masktune reads the settings of a run, which need not be there yet: they are those that are typed here."""
        at = typed.index("--masktune") if "--masktune" in typed else len(typed)
        cfg = parse(RunConfig, __doc__, [*typed[:at], *typed[at + 2:]], preset)
        return replace(cfg, masktune=typed[at + 1]) if at < len(typed) else cfg
    chosen, runs = choose(names), {}
    given = share_out(chosen, flags)
    for seed in map(str, range(seeds)):
        folders = {}
        for run, own in chosen.items():
            name, own = run, filled_in(own, parsed([*given[run], "--method", method_of(own)]), folders)
            cfg = parsed(typed := [*given[run], *own, "--seed", seed])
            if cfg == parsed(plain := [*given[run], *METHODS.get(cfg.method, own), "--seed", seed]):
                name, typed = cfg.method, plain
            folders[run] = cfg.out = f"runs/{cfg.title}-{folder}/{name}-{seed}"
            check(cfg)
            refuse_other_settings(cfg)
            runs[cfg.out] = cfg, [*typed, "--out", cfg.out]
    for line in dict.fromkeys(f"--recipe {cfg.recipe}: {left}" for cfg, _ in runs.values() if (left := left_out(cfg))):
        print(line)
    return list(runs.values())


def refuse_other_settings(cfg):
    """UsageError if the folder of a run holds a run with other settings, or what is none."""
    path = Path(cfg.out) / "config.json"
    if not path.is_file():
        return
    for name, (then, now) in differences(read_config(path), cfg).items():
        raise UsageError(f"{cfg.out} was made with {flag(name)} {then}, not {now}: give the old value, "
                         f"or move {Path(cfg.out).parent} away")


def commands(cfg, flags, processes=1, measure=(), also=(), retrain=()):
    """What is left to do for a run, as command lines: none if it is finished. A run that was begun is resumed.

    measure: flags of evaluate.py; also: other benchmarks to evaluate on; retrain: last layers, of --retrain. Reports of
    a run that is not trained to its end, or of another best.pt than the present one, are made again. So are groups of
    another run, and a run that was trained with other groups than these starts again: train.py moves the old one aside.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] * (processes > 1)
    folder, here = Path(cfg.out), Path(__file__).parent
    first, grouping, anew = first_pass(cfg), [], False
    if first and cfg.groups and not (are_current(Path(cfg.groups)) and trained(first / "log.jsonl")):
        by = Path(cfg.groups).stem.removeprefix("groups-")
        grouping, anew = [[sys.executable, str(here / "groups.py"), "--ckpt", str(first / "best.pt"), "--by", by,
                           "--device", cfg.device]], True
    elif first and cfg.groups:
        anew = trained_with(folder) not in (None, read_json(said_of(cfg.groups), "what groups.py says")["digest"])
    training = [sys.executable, *torchrun, str(here / "train.py"), *flags,
                *["--resume"] * ((folder / "config.json").is_file() and not anew)]
    measure = [sys.executable, str(here / "evaluate.py"), "--ckpt", str(folder / "best.pt"), "--device", cfg.device,
               *measure]
    named = lambda name: ["--out", str(folder / name)] * ("--limit" in measure)     # it is this report, whole or not
    left = {"report.json": [*measure, *named("report.json")],
            **{f"report-{name}.json": [*measure, flag, name, *named(f"report-{name}.json")]
               for flag, names in (("--data", also), ("--retrain", retrain)) for name in names}}
    if anew or not trained(folder / "log.jsonl"):
        return [*grouping, training, *left.values()]
    return [command for name, command in left.items() if not is_current(folder / name)]


def is_current(path):
    """Is there a report, and is it of the best.pt beside it? Without best.pt nothing can be newer.

    A report from before reports named their checkpoint is current if it was written after training ended.
    """
    report = read_json(path, "a report of evaluate.py") if path.is_file() else None
    if not isinstance(report, dict) or not report:
        return False
    if (known := of_best(report, path.parent)) is not None or not (path.parent / "best.pt").is_file():
        return known is not False
    return (path.parent / "log.jsonl").stat().st_mtime <= path.stat().st_mtime


def first_pass(cfg):
    """The folder of the run of the same sweep that a run goes on from, or that its groups come from; or None."""
    first = Path(cfg.masktune) if cfg.masktune else Path(cfg.groups).parent
    return first if (cfg.masktune or cfg.groups) and first.parent == Path(cfg.out).parent else None


def are_current(groups):
    """Is there a file of groups, as groups.py wrote it, and of the best.pt beside it?"""
    return groups.is_file() and is_current(said_of(groups)) and \
        read_json(said_of(groups), "what groups.py says").get("sha256") == hash_of(groups)


def trained_with(folder):
    """The digest of the groups that a run was started with, by its log; None where it does not say."""
    log = folder / "log.jsonl"
    lines = read_log(log) if log.is_file() else []
    return next((line["images"].get("groups") for line in lines if "images" in line), None)


def run(command):
    """Run a command to its end -> its exit status. What would end the sweep goes to the command, and then ends both.

    SIGTERM, SIGHUP and Ctrl-C are passed on, and the command is waited for: training saves last.pt. The sweep's exit
    status is 128 + the signal's number then. The command has a session of its own, so that Ctrl-C reaches it once, from
    here, and not from the terminal as well: a second one would end it at once.
    """
    process, got, waiting = None, [], []

    def pass_on(number=None, frame=None):
        if number:
            got.append(number)
            waiting.append(number)
        while process and waiting:
            process.send_signal(waiting.pop(0))

    numbers = signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGTERM)
    before = {number: signal.signal(number, pass_on) for number in set(numbers)
              if signal.getsignal(number) != signal.SIG_IGN}                     # as nohup has it
    try:
        process = subprocess.Popen(command, start_new_session=True)
        pass_on()                                        # what came before there was a process
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if got:
        print(f"{signal.Signals(got[0]).name}: the run was told, and has ended; the same command goes on from there",
              file=sys.stderr)
        sys.exit(128 + got[0])
    return status


def finished(names, flags, folder="sweep", measure=("--leakage", "100"), also=(), retrain=()):
    """For notebooks: runs of seed 0, trained and evaluated now unless they were before -> {name: folder of the run}.

    names and flags as on the command line, measure, also and retrain as in `commands`. On CPU runs go side by side,
    each with its share of the cores; one that needs another waits for it. A bar shows how far they are; what the
    scripts print is shown only where one fails. RunError then.
    """
    runs = plan(names, 1, flags, folder)
    left = [(cfg, todo) for cfg, typed in runs if (todo := commands(cfg, typed, 1, measure, also, retrain))]
    if left:
        cfg = runs[0][0]
        data.find_root(cfg.data, cfg.root, cfg.mini)     # draws a miniature, before several want it
        side_by_side = min(len(left), os.cpu_count() if pick_device(cfg.device).type == "cpu" else 1)
        threads = {"OMP_NUM_THREADS": str(os.cpu_count() // side_by_side)} if side_by_side > 1 else {}

        def work(out, todo, first):
            if first in jobs:
                jobs[first].result()                     # it was submitted before, so somebody works on it
            for command in todo:
                done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **threads})
                if done.returncode:
                    raise RunError(f"{out} failed: {done.stderr.strip()[-500:]}")
        jobs = {}
        with ThreadPoolExecutor(side_by_side) as pool:
            for cfg, todo in left:
                jobs[Path(cfg.out)] = pool.submit(work, cfg.out, todo, first_pass(cfg))
            watch(list(jobs.values()), [cfg for cfg, _ in left])
    return {Path(cfg.out).name.removesuffix("-0"): Path(cfg.out) for cfg, _ in runs}


def watch(jobs, cfgs):
    """Show how far runs are while they are trained and measured, from their log.jsonl; raises what a job raises."""
    names = ", ".join(Path(cfg.out).name.removesuffix("-0") for cfg in cfgs)
    bar = tqdm(total=sum(cfg.epochs for cfg in cfgs), desc=f"training {names}: minutes, but only once",
               bar_format="{desc} {percentage:3.0f}% |{bar:20}| {elapsed}, {remaining} left", dynamic_ncols=True)
    with bar:
        while not all(job.done() for job in jobs):
            bar.n = sum(cfg.epochs if trained(Path(cfg.out) / "log.jsonl") else epochs_done(cfg) for cfg in cfgs)
            if bar.n >= bar.total:
                bar.set_description(f"measuring {names}", refresh=False)
            bar.refresh()
            wait(jobs, timeout=1)
        bar.n = bar.total
    for job in jobs:
        job.result()


def epochs_done(cfg):
    """How many epochs of a run are done, by the last whole line of its log; 0 before there is one."""
    log = Path(cfg.out) / "log.jsonl"
    found = re.findall(rb'"epoch": ([0-9.]+)', log.read_bytes()) if log.is_file() else []
    return min(float(found[-1]), cfg.epochs) if found else 0


def work_through(runs, left, asked, only_list=False):
    """Run what is left to do, run after run -> (folders of those that failed, of those that were refused).

    left: a function from a run of `plan` to its commands. asked: names of runs for which to be refused is to fail.
    """
    failed, refused = [], []
    for number, (cfg, typed) in enumerate(runs, 1):
        todo, first = left(cfg, typed), first_pass(cfg)
        print(f"[{number}/{len(runs)}] {cfg.out}" + ": finished" * (not todo), flush=True)
        if todo and first and not only_list and not trained(first / "log.jsonl"):
            print(f"left out, for it needs {first}, which is not trained", file=sys.stderr)
            failed.append(cfg.out)
            continue
        for command in todo:
            if only_list:
                print("  " + shlex.join(command))
            elif status := run(command):
                named = Path(cfg.out).name.removesuffix(f"-{cfg.seed}") in asked
                by_train = any(word.endswith("train.py") for word in command)
                (refused if by_train and status == REFUSED and not named else failed).append(cfg.out)
                break
    return failed, refused


def main(argv=None):
    given, flags = parse(Config, __doc__, argv, rest=True)
    if refused := {"--method", "--seed", "--out", "--resume"} & {flag.split("=")[0] for flag in flags}:
        raise UsageError(f"{min(refused)} is decided by the sweep: leave it out")
    runs = plan(given.what, given.seeds, flags)
    for name in given.also:
        if (of := data.BENCHMARKS[name].trained_on) != runs[0][0].data:
            raise UsageError(f"--also {name} evaluates models of {of}, not of {runs[0][0].data}: leave it out")
    measure = ["--leakage", str(given.leakage), *["--no-fitted"] * (not given.fitted)]
    left = lambda cfg, typed: commands(cfg, typed, given.processes, measure, given.also, given.retrain)
    failed, refused = work_through(runs, left, given.what, given.list)
    done = [Path(cfg.out) for cfg, typed in runs if not left(cfg, typed)]
    if done and not given.list:
        tables.write_tables(done, done[0].parent / "-".join(given.what))
    if failed:
        raise RunError(f"{len(failed)} of {len(runs)} runs failed, above is why: {', '.join(failed)}; "
                       "the same command tries them again")
    if refused and not done:
        raise UsageError(f"every run was refused, above is why; python sweep.py {given.what[0]} --list names them")
    if refused:
        print(f"left out, as they were refused (above is why): {', '.join(refused)}", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
