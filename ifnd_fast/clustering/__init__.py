"""Features in, labels out; knows nothing of images."""

from ifnd_fast.clustering.kmeans import KMeans
from ifnd_fast.clustering.levels import cluster_levels, scale_levels
from ifnd_fast.clustering.pseudo_labels import PseudoLabels

__all__ = ["KMeans", "PseudoLabels", "cluster_levels", "scale_levels"]
