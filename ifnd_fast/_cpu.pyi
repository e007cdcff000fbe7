"""Kernels for the CPU (csrc/cpu). Every array is the address of row-major contiguous memory; 0 = absent.

dtype: 0 float32, 1 bfloat16, 2 float16. strategy: 0 eliminate, 1 attract, 2 keep. L: columns of the labels.
combination: 0 mean (L losses), 1 any, 2 all (one loss; then log_normalizer and false_negative_counts are (B, 1)).
metric: 0 inner product, 1 l2.
"""

def isa() -> str: ...
def features() -> dict[str, bool]: ...
def info_nce_forward(
    query: int,
    positive: int,
    negatives: int,
    query_labels: int,
    negative_labels: int,
    query_ids: int,
    negative_ids: int,
    B: int,
    K: int,
    D: int,
    L: int,
    dtype: int,
    temperature: float,
    strategy: int,
    combination: int,
    loss: int,
    query_grad: int,
    positive_weight: int,
    log_normalizer: int,
    false_negative_counts: int,
    threads: int,
    ceiling: int = 0,
    log_hard: int = 0,
) -> None: ...
def info_nce_negatives_grad(
    query: int,
    negatives: int,
    query_labels: int,
    negative_labels: int,
    query_ids: int,
    negative_ids: int,
    B: int,
    K: int,
    D: int,
    L: int,
    dtype: int,
    temperature: float,
    strategy: int,
    combination: int,
    loss_grad: int,
    log_normalizer: int,
    false_negative_counts: int,
    negatives_grad: int,
    threads: int,
    ceiling: int = 0,
) -> None: ...
def assign_clusters(
    features: int,
    centroids: int,
    N: int,
    C: int,
    D: int,
    dtype: int,
    metric: int,
    temperature: float,
    labels: int,
    confidence: int,
    threads: int,
) -> None: ...
def reassign(
    features: int, previous: int, centroids: int, N: int, C: int, D: int, labels: int, bounds: int, threads: int
) -> int: ...
def cluster_sums(
    features: int,
    labels: int,
    centroids: int,
    N: int,
    C: int,
    D: int,
    dtype: int,
    sums: int,
    counts: int,
    distances: int,
    threads: int,
) -> None: ...
