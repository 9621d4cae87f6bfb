"""The pairwise losses' table, which the ops below share: `fastalign.ops.pairwise`."""

from fastalign.ops.pairwise import F_DIVERGENCES, TABLE, Margin, Options, PairwiseLoss

__all__ = ["F_DIVERGENCES", "TABLE", "Margin", "Options", "PairwiseLoss"]
