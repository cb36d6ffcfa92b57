"""objectives.py: how much each training image counts: --objective, which goes with every --method.

    objective = objectives.start(cfg, samples, steps)    # None for erm: every image counts alike
    batch |= objective.of(chosen, rank, world)           # "weight": how much the class losses of each image count
    objective.update(terms)                              # group-dro: after a step, the weights of the groups move

An objective weighs both class losses, or draws some images more often, and touches nothing else.

Floor: what a run is, below its settings. Read benchmarks/samples.py before (what a group is, and in which order
training sees images). Letters: n training images, G groups, n_g images of group g, B images of a step over all
processes and portions, b_g of them in group g; l_i the cross-entropy of image i.
"""
import math
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.files import digest_of_groups, read_groups
from ifam import class_losses
from settings import UsageError, flag, read_json

ROBUST = ("group-dro", "george")                         # weights of groups that move with their losses
OBJECTIVES = ("erm", "balanced", "reweight", "jtt", *ROBUST)
TAKES = {"groups": OBJECTIVES[1:], "upweight": ("jtt",),                         # settings that only these have
         **dict.fromkeys(("dro_step", "dro_adjustment", "dro_draw"), ROBUST)}
DEFAULTS = {"george": {"dro_adjustment": 2.0}}           # as published, where it differs from runs.Config
STEP, STEPS = 0.01, 11_100                               # eta of Sagawa et al., and how long they train on Waterbirds
CROSSED = "class and place"                              # what groups are, where they tell more than classes
MAKES = {"jtt": "errors", "george": "clusters"}          # groups.py --by, of objectives that need a file of groups
ADVICE = {"right": "; without errors nothing is upweighted: train the first model for fewer epochs",
          "wrong": "; a model that errs everywhere is no classifier yet: train the first model for more epochs"}


def defaults(typed, earlier, objective):
    """-> {setting: default} of an objective. typed, earlier: settings of the command line, and of --config.

    Of `earlier`, what belongs to an objective goes if another one is typed. UsageError for a setting that was typed and
    that the objective does not have.
    """
    for name, those in TAKES.items():
        if name in typed and objective in OBJECTIVES and objective not in those:
            raise UsageError(f"{flag(name)} means nothing with --objective {objective}, only with {', '.join(those)}; "
                             "leave it out")
        if "objective" in typed:
            earlier.pop(name, None)
    return DEFAULTS.get(objective, {})


def check(cfg):
    """UsageError for an objective without the file that it needs, or for a file that none reads."""
    if cfg.groups and cfg.objective not in TAKES["groups"]:
        raise UsageError(f"--groups means nothing with --objective {cfg.objective}: leave it out")
    if cfg.objective in MAKES and not cfg.groups:
        raise UsageError(f"--objective {cfg.objective} needs --groups FILE: train with --objective erm first, then "
                         f"python groups.py --ckpt runs/<name>/best.pt --by {MAKES[cfg.objective]} writes it")


def uncrossed(samples):
    """Why the groups of a split tell no more than its classes, as text; "" where they do."""
    if len(samples.groups.unique()) > len(samples.labels.unique()):
        return ""
    return "each class is in one place only" if samples.places else "there are no places"


def said_of(groups):
    """The file in which groups.py says of which checkpoint its groups are."""
    return Path(groups).with_suffix(".json")


def are_made(groups, digest):
    """Is a groups file one of groups.py, as it wrote it? Then no label is in it, but a first model."""
    said = read_json(said_of(groups), "what groups.py says") if said_of(groups).is_file() else None
    return isinstance(said, dict) and said.get("digest") == digest


def grouping(cfg, samples):
    """-> names of the groups, the group of each image (n,) long, and what they are, as text. Groups without images go.

    They are those of --groups, else class and place. Where no class has two places that is the class again: balanced
    and reweight take it, and for group-dro it is a UsageError.
    """
    if cfg.groups:
        names, groups = read_groups(cfg.groups, samples, ADVICE if cfg.objective == "jtt" else {})
        if cfg.objective == "jtt" and names != ["right", "wrong"]:
            raise UsageError(f"{cfg.groups}: has the groups {', '.join(names[:4])}; --objective jtt reads right and "
                             f"wrong, which python groups.py --by {MAKES['jtt']} writes")
        return names, groups, f"the groups of {cfg.groups}"
    if not (why := uncrossed(samples)):
        names, groups, what = samples.group_names, samples.groups, CROSSED
    else:
        names, groups, what = samples.classes, samples.labels, f"classes, for {why} in {samples.title} train"
        if cfg.objective in ROBUST:
            raise UsageError(f"--objective {cfg.objective} needs groups that are more than the classes, and {why} in "
                             f"{samples.title} train: give --groups FILE, or take --objective balanced, by class")
    there, groups = groups.unique(return_inverse=True)
    return [names[g] for g in there.tolist()], groups, what


def start(cfg, samples, steps):
    """The Objective of a run over so many steps on these training images; None for erm."""
    return None if cfg.objective == "erm" else Objective(cfg, *grouping(cfg, samples), steps)


class Objective:
    """What each image counts. shares (n,): the chance of each at every draw, or None: each image once an epoch.

    balanced: every group is drawn as often. reweight: w_i = n / (G n_g). jtt (Liu et al., ICML 2021): `upweight` for
    images of the group wrong, 1 for the others, divided by their mean over the training set. group-dro (Sagawa et al.,
    ICLR 2020): the loss is sum_g q_g L_g with L_g the mean loss of group g in the batch (0 where there is none), that
    is w_i = B q_g / b_g; q, on the simplex, starts uniform and moves by q_g *= exp(step * (L_g + C / sqrt(n_g))).
    george (Sohoni et al., NeurIPS 2020): the same over clusters.
    differs from published: a step uses the q of the step before, because group losses of the whole batch are known only
    after the last portion and the last process; and a group that is absent does not move.
    """

    def __init__(self, cfg, names, groups, what, steps):
        self.name, self.robust = cfg.objective, cfg.objective in ROBUST
        self.names, self.groups, self.what, counts = names, groups, what, torch.bincount(groups)
        self.counts, each = counts.tolist(), 1 / (len(counts) * counts.double())             # (G,)
        draws = cfg.objective == "balanced" or self.robust and cfg.dro_draw == "balanced"
        self.shares = each[self.groups].numpy() if draws else None
        weights = {"reweight": len(groups) * each}
        if self.name == "jtt":
            up = torch.tensor([cfg.upweight if name == "wrong" else 1.0 for name in self.names]).double()
            weights["jtt"] = up / (up @ counts.double() / len(groups))
        self.weights = weights[self.name][self.groups].float() if self.name in weights else None     # (n,)
        self.step, self.scaled = cfg.dro_step or STEP * STEPS / steps, not cfg.dro_step
        self.steps, self.adjustment = steps, cfg.dro_adjustment / counts.double().sqrt()
        self.log_q = torch.full((len(counts),), -math.log(len(counts)), dtype=torch.float64)
        self.present = self.losses = None                # of the last step
        made = self.name in MAKES or cfg.groups and are_made(cfg.groups, self.digest())
        self.source = "a first model" if made else "groups" if cfg.groups or what == CROSSED else "classes"

    @property
    def q(self):
        return self.log_q.exp()

    def of(self, chosen, rank=0, world=1):
        """What this process's share of a step adds to its batch. chosen (B,): indices of the images of all processes.

        "weight" (share,): what the class losses of each image are multiplied by. "member" (share, G), of group-dro
        alone: B / b_g in the column of the image's group, so that a mean over the whole batch is one over a group.
        """
        share = len(chosen) // world
        mine = slice(rank * share, (rank + 1) * share)
        if self.weights is not None:
            return {"weight": self.weights[chosen[mine]]}
        if not self.robust:
            return {}
        member = F.one_hot(self.groups[chosen], len(self.names)).double()
        self.present = member.any(0)
        member *= len(chosen) / member.sum(0).clamp_min(1)
        return {"weight": (member @ self.q).float()[mine], "member": member.float()[mine]}

    def update(self, terms):
        """After a step of group-dro: q moves. terms: of gradients(), from which the losses of the groups are taken."""
        if self.robust:
            self.losses = torch.stack([terms.pop(f"group {g}") for g in range(len(self.names))]).double().cpu()
            self.log_q += torch.where(self.present, self.step * (self.losses + self.adjustment), 0)
            self.log_q -= self.log_q.logsumexp(0)

    def state_dict(self):
        return {"log_q": self.log_q}

    def load_state_dict(self, state):
        if state["log_q"].shape != self.log_q.shape:
            raise ValueError(f"weights of {len(state['log_q'])} groups, and there are {len(self.names)}")
        self.log_q = state["log_q"].double()

    def record(self):
        """For a line of log.jsonl: the weight that each group has now, and its loss in the last step, if it was there.
        """
        if not self.robust:
            return {}
        rows = zip(self.names, self.q.tolist(), self.losses.tolist(), self.present.tolist())
        return {"groups": {name: {"q": q, "loss": loss if there else None} for name, q, loss, there in rows}}

    def described(self):
        """For the first line of log.jsonl -> dict."""
        drawn = "with equal shares of the groups" if self.shares is not None else "each once an epoch"
        moves = {"step": self.step, "adjustment": self.adjustment.tolist()} if self.robust else {}
        counts = dict(zip(self.names, self.counts))
        return {"of": self.what, "source": self.source, "groups": counts, "draws": drawn, **moves}

    def digest(self):
        """What tells these groups from others, for --resume and for sweep.py."""
        return digest_of_groups([self.names[g] for g in self.groups.tolist()])

    def __str__(self):
        """One line for whoever starts a run."""
        few = [f"{n} {name}" for name, n in zip(self.names, self.counts)]
        groups = ", ".join(few) if len(few) <= 9 else f"{len(few)} groups of {min(self.counts)} to {max(self.counts)}"
        text = f"--objective {self.name} by {self.what} ({groups})"
        if self.name == "jtt":
            text += f": images of wrong weigh {self.weights.max():.3g}, others {self.weights.min():.3g}"
        if self.robust:
            scaled = f" = {STEP} * {STEPS:,} / {self.steps} steps: the published one, scaled to the length of the run"
            text += f": --dro-step {self.step:.4g}" + scaled * self.scaled
        return text + "; groups are drawn in equal shares" * (self.shares is not None)


def group_losses(out, labels, member):
    """The mean loss of each group, of the stage that answers -> {"group 0": scalar, ...}, to be averaged like a term.

    out: an ifam.Output; labels (b,); member (b, G) as Objective.of has it. Averaged over portions and processes it is
    the mean over the images of the group in the whole batch, and 0 for a group that is absent. No gradient.
    """
    losses = class_losses(out, labels).detach()
    return {f"group {g}": loss for g, loss in enumerate(losses @ member / len(losses))}
