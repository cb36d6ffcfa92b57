"""probes.py: what can be read from features by a simple classifier, cross-validated.

    linear_probe(features, place)                        # accuracy at reading the place from the representation
    linear_probe(area, place, kernel_head)               # the same, and what is not linear too

Floor: measuring. Nothing needs to be read before. All have closed forms in float64: no randomness, nothing to tune.
Letters: n images, d numbers of each, C classes.
"""
import torch
import torch.nn.functional as F


def linear_head(x, y, classes, penalty=0.1):
    """Fit a linear classifier of y (n,) on x (n, d): ridge on one-hot targets -> function from (m, d) to scores (m, C).

    Closed form in float64, standardised features, penalty * n on the diagonal: no randomness, nothing to tune.
    """
    x, target = x.double(), F.one_hot(y, classes).double()
    mean, std, centre = x.mean(0), x.std(0).clamp_min(1e-6), target.mean(0)
    a = (x - mean) / std
    ridge = penalty * len(a) * torch.eye(a.shape[1], dtype=a.dtype)
    w = torch.linalg.solve(a.T @ a + ridge, a.T @ (target - centre))
    return lambda other: (other.double() - mean) / std @ w + centre


def kernel_head(x, y, classes, penalty=1.0):
    """linear_head's counterpart that is not linear: kernel ridge on one-hot targets -> function from (m, d) to (m, C).

    The kernel is exp(-d^2 / the mean d^2), d the distance between standardised rows.
    """
    x, target = x.double(), F.one_hot(y, classes).double()
    mean, std, centre = x.mean(0), x.std(0).clamp_min(1e-6), target.mean(0)
    a = (x - mean) / std
    width = torch.cdist(a, a).square().mean().clamp_min(1e-12)
    kernel = lambda b: (-torch.cdist(b, a).square() / width).exp()
    w = torch.linalg.solve(kernel(a) + penalty * torch.eye(len(a), dtype=a.dtype), target - centre)
    return lambda other: kernel((other.double() - mean) / std) @ w + centre


FEW = 10                   # fewer images fit no classifier


def linear_probe(x, y, head=linear_head, folds=5):
    """Cross-validated accuracy of a head at reading y (n,) from x (n, d); None for fewer than FEW."""
    if len(y) < FEW:
        return None
    fold, right = torch.arange(len(y)) % folds, 0
    for fit, test in ((fold != f, fold == f) for f in range(folds)):
        scores = head(x[fit], y[fit], int(y.max()) + 1)(x[test])
        right += (scores.argmax(1) == y[test]).sum().item()
    return right / len(y)
