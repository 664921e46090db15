"""A BatchNorm that also trains on a batch of one row.

    y = (x - mean(x)) / sqrt(var(x) + e) * w + b          over the batch, and the running statistics follow
    y = (x - m) / sqrt(v + e) * w + b                     m, v the running ones, where each channel has one value

One value is its own mean, so a batch of it would train nothing, and torch refuses it. The last batch of an epoch has
one row whenever the rows leave a remainder of one. What it uses is in every checkpoint, so a resumed run is the same.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class BatchNorm(nn.BatchNorm1d):
    """nn.BatchNorm1d on [N, C] that takes its running statistics, and leaves them alone, where N is 1."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training and len(input) == 1:
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(input)
