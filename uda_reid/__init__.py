"""Unsupervised domain adaptation of person re-identification.

The names in `__all__` are the public Python API: models from checkpoints, and clustering, re-ranking and metrics for
features from any framework. A name is imported when it is first used, so `import uda_reid` alone does not import torch.

Shape letters, used in every docstring of the package:

    B  images in a batch (B = P * K)       N  images in a bank
    P  identities in a batch               Q  queries
    K  instances of each identity          G  gallery images
    C  channels                            D  embedding size
    H  rows of an image or a map           M  clusters or classes
    W  columns of an image or a map        L  stacked blocks
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Public name -> the module that defines it.
_MODULES = {
    "ClusterSettings": "settings",
    "UserError": "errors",
    "centroids": "clustering.pseudo_labels",
    "dbscan": "clustering.dbscan",
    "evaluate_ranking": "retrieval.ranking",
    "jaccard_graph": "retrieval.jaccard",
    "load_model": "build",
    "nearest_neighbours": "retrieval.neighbours",
    "normalize": "retrieval.normalize",
    "pair_similarities": "retrieval.search.similarity",
    "pseudo_labels": "clustering.pseudo_labels",
    "rerank": "retrieval.reranking",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
