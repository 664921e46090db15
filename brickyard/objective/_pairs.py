"""Sums over the answers of preference pairs, which DPO and its relatives share."""

from __future__ import annotations

from torch import Tensor, nn

from brickyard.core.errors import BadData
from brickyard.core.objective import Reference
from brickyard.objective._tokens import token_terms


def pair_terms(
    hidden_BTD: Tensor, head: nn.Linear, labels_BT: Tensor, reference: Reference | None, *, divergence: bool
) -> tuple[Tensor, Tensor]:
    """Return m [B] and k [B]: the sums of `token_terms` over the positions of each text that have a label.

    Raises BadData where a text has no such position.
    """
    asked_BT = labels_BT >= 0
    row_N = asked_BT.nonzero()[:, 0]
    if not bool(asked_BT.any(1).all()):
        raise BadData("a text of the batch has no token to be judged; its answer is empty.")
    known = None
    if reference is not None:
        known = (reference.hidden[asked_BT], reference.head.weight, reference.head.bias)
    m_N, k_N = token_terms(
        hidden_BTD[asked_BT], head.weight, head.bias, labels_BT[asked_BT], known, divergence=divergence
    )
    zero_B = m_N.new_zeros(len(labels_BT))
    return zero_B.index_add(0, row_N, m_N), zero_B.index_add(0, row_N, k_N)
