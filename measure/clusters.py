"""clusters.py: rows that lie together, found without labels.

    cluster(features)                                    # a mixture of Gaussians; how many, the silhouette decides
    k_means(features, 5, generator)                      # centres

Floor: measuring. Nothing needs to be read before. Letters: n rows, d numbers of each, k clusters.
"""
import torch
import torch.nn.functional as F

from benchmarks.samples import evenly

MOST, STARTS, STEPS = 5, 3, 300                          # clusters that are tried, starts of each, rounds of a start
FITTED, COMPARED = 20_000, 500                           # images that clusters are fitted on; of each, for a silhouette


def far_apart(x, k, generator):
    """k rows of x (n, d) to start clusters from -> (k, d): k-means++ (Arthur and Vassilvitskii, 2007).

    The first is drawn at random, each further one with chances by its squared distance to those before.
    """
    centres = x[torch.randperm(len(x), generator=generator)[:1]]
    while len(centres) < k:
        distance = torch.cdist(x, centres).amin(1) ** 2 + 1e-9                   # where all rows are one, any will do
        centres = torch.cat([centres, x[torch.multinomial(distance, 1, generator=generator)]])
    return centres


def k_means(x, k, generator, rounds=25):
    """Centres (k, d) of x (n, d): from far_apart ones, Lloyd's steps."""
    centres = far_apart(x, k, generator)
    for _ in range(rounds):
        nearest = torch.cdist(x, centres).argmin(1)
        centres = torch.stack([x[nearest == j].mean(0) if (nearest == j).any() else centres[j] for j in range(k)])
    return centres


def log_density(x, mixture):
    """log(share * density) of rows x (n, d) under each Gaussian of a mixture, but for one constant -> (n, k)."""
    share, mean, variance = mixture
    distance = x.square() @ (1 / variance).T - 2 * x @ (mean / variance).T + (mean.square() / variance).sum(1)
    return share.log() - 0.5 * (distance + variance.log().sum(1))


def fit_mixture(x, k, generator):
    """One start of a mixture of k Gaussians with diagonal covariance -> (mean log likelihood, the mixture).

    Expectation-maximisation in float64 from far_apart centres. No variance falls below a thousandth of that of all
    rows, so that none shrinks to a point.
    """
    belongs = F.one_hot(torch.cdist(x, far_apart(x, k, generator)).argmin(1), k).double()
    least, last = 1e-3 * x.var(0, correction=0) + 1e-12, -torch.inf
    for _ in range(STEPS):
        weight = belongs.sum(0).clamp_min(1e-9)[:, None]
        mean = belongs.T @ x / weight
        variance = torch.maximum(belongs.T @ x.square() / weight - mean.square(), least)
        mixture = weight[:, 0] / len(x), mean, variance
        dense = log_density(x, mixture)
        each = dense.logsumexp(1, keepdim=True)
        likelihood, belongs = each.mean().item(), (dense - each).exp()
        if likelihood - last < 1e-7:
            break
        last = likelihood
    return likelihood, mixture


def silhouette(x, clusters):
    """Mean over clusters of the mean silhouette in each (Rousseeuw, 1987) of rows x (n, d), clusters (n,) from 0 on.

    So a small cluster counts as much as a large one; a row that is alone has 0. Of each cluster COMPARED rows are
    taken, spread evenly.
    """
    chosen = [evenly((clusters == c).nonzero()[:, 0], COMPARED) for c in range(int(clusters.max()) + 1)]
    x, own = x[sum(chosen, [])], torch.cat([torch.full((len(rows),), c) for c, rows in enumerate(chosen)])
    member = F.one_hot(own).double()
    size, total = member.sum(0), torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") @ member
    inside = total.gather(1, own[:, None])[:, 0] / (size[own] - 1).clamp_min(1)
    outside = (total / size).masked_fill(member > 0, torch.inf).amin(1)
    value = (outside - inside) / torch.maximum(outside, inside).clamp_min(1e-12)
    return (torch.where(size[own] > 1, value, 0.) @ member / size).mean().item()


def cluster(x, count=0):
    """Rows x (n, d) -> (cluster of each (n,), numbered from the largest; their silhouette). All in one: (zeros, None).

    Channels are standardised. count: how many; 0 tries 2 to MOST and takes those with the best silhouette. A number
    that leaves a cluster empty is no candidate.
    """
    x = x.double()
    x = (x - x.mean(0)) / x.std(0, correction=0).clamp_min(1e-6)
    fitted, best, score = x[evenly(torch.arange(len(x)), FITTED)], torch.zeros(len(x), dtype=torch.long), None
    for k in [count] if count else range(2, MOST + 1):
        if k >= len(x):
            break
        generator = torch.Generator().manual_seed(0)
        _, mixture = max((fit_mixture(fitted, k, generator) for _ in range(STARTS)), key=lambda found: found[0])
        found = torch.cat([log_density(part, mixture).argmax(1) for part in x.split(FITTED)])
        sizes = found.bincount(minlength=k)
        if sizes.min() and (score is None or silhouette(x, found) > score):
            best, score = sizes.argsort(descending=True, stable=True).argsort()[found], silhouette(x, found)
    return best, score
