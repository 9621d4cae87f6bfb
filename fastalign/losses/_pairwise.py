"""The pairwise losses' table, which the ops below share: `fastalign._pairwise`."""

from fastalign._pairwise import F_DIVERGENCES, TABLE, Margin, Options, PairwiseLoss

__all__ = ["F_DIVERGENCES", "TABLE", "Margin", "Options", "PairwiseLoss"]
