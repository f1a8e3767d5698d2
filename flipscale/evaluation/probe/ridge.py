"""Ridge regression in closed form on a few labelled features: big_vision's few-shot probe (`fewshot_lsr`).

Each feature is brought to mean 0 and deviation 1 over the training rows, a constant feature of 100 stands for the
intercept, the targets are 1 for a row's class and -1 for the others, and the penalty is 1,024.
"""

import torch

from flipscale.evaluation.probe.rows import Classifier, Rows, Total

L2 = 1024.0
CONSTANT = 100.0
_LEAST_DEVIATION = 1e-5  # added to each feature's


def ridge(rows: Rows, num_classes: int, total: Total) -> Classifier:
    """Collective. Return the classifier of the rows of all processes, fp64: sums of the features meet, rows do not."""
    features = rows.features.double()
    count = total(features.new_tensor([len(rows)]))
    mean = total(features.sum(dim=0)) / count
    deviation = (total((features - mean).square().sum(dim=0)) / count).sqrt() + _LEAST_DEVIATION
    inputs = torch.cat([(features - mean) / deviation, features.new_full((len(rows), 1), CONSTANT)], dim=1)
    targets = features.new_full((len(rows), num_classes), -1.0)
    targets.scatter_(1, rows.labels[:, None], 1.0)
    left, right = total(inputs.t() @ inputs), total(inputs.t() @ targets)
    left.diagonal().add_(L2)
    solved = torch.cholesky_solve(right, torch.linalg.cholesky(left))
    weight = solved[:-1].t() / deviation
    return Classifier(weight, CONSTANT * solved[-1] - weight @ mean)
