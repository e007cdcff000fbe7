"""The operators, each with a definition in plain torch and fused backends."""

from ifnd_fast.ops.assign_clusters import assign_clusters
from ifnd_fast.ops.info_nce import info_nce
from ifnd_fast.ops.symmetric import symmetric_info_nce

__all__ = ["assign_clusters", "info_nce", "symmetric_info_nce"]
