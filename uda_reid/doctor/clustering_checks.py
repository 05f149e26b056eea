"""Checks of clustering, re-ranking and metrics: sparse and on the device, against dense matrices in float64."""

from functools import partial

import numpy as np
import torch
from sklearn.cluster import DBSCAN
from torch import Tensor

from uda_reid.clustering.kmeans import lloyd
from uda_reid.clustering.pseudo_labels import centroids, pseudo_labels
from uda_reid.doctor import plain
from uda_reid.doctor.check import Check, Scene, compare, figure, require
from uda_reid.retrieval.jaccard import jaccard_graph
from uda_reid.retrieval.neighbours import nearest_neighbours
from uda_reid.retrieval.normalize import normalize
from uda_reid.retrieval.ranking import evaluate_ranking
from uda_reid.retrieval.reranking import rerank
from uda_reid.retrieval.search.similarity import pair_similarities
from uda_reid.settings import ClusterSettings

ROWS, WIDTH = 300, 32
K1, K2, EPS, MIN_SAMPLES = 20, 6, 0.6, 4
CLUSTERS = 12
UNORDERED = 6  # labels that may differ because a GPU sums the rows of a cluster in another order each time
# Rounding of V to integers and of the distance to float32 (`retrieval.encoding`); the last place decides no pair. Ties
# at eps count (`retrieval.jaccard.is_within`).
MOST, TIE, LAST_PLACE = 1e-5, 2.0**-20, 1e-6
QUERIES, GALLERY = 30, 150


def jaccard(scene: Scene) -> str:
    """The sparse graph of the k-reciprocal Jaccard distance."""
    rows = normalize(plain.people(ROWS, WIDTH, seed=2))
    expected = torch.from_numpy(plain.jaccard_distances(rows, K1, K2))
    own = rows.to(scene.device)
    similarities_of = partial(pair_similarities, own, own)
    graph = jaccard_graph(similarities_of, nearest_neighbours(own, K1), k1=K1, k2=K2, eps=EPS)
    graph_rows, columns = torch.repeat_interleave(graph.indptr.diff()).cpu(), graph.indices.cpu()
    held = torch.eye(ROWS, dtype=torch.bool)
    held[graph_rows, columns] = True
    missing = int((expected[~held] <= EPS - LAST_PLACE).sum())
    require(missing == 0, f"{missing} pairs within eps are missing")
    difference = compare(graph.distances, expected[graph_rows, columns], MOST, "distances")
    extra = int((expected[graph_rows, columns] > EPS + TIE + LAST_PLACE).sum())
    require(extra == 0, f"{extra} pairs are farther apart than eps")
    return f"{graph.edges:,} pairs, largest difference {figure(difference)}"


def dbscan(scene: Scene) -> str:
    """Pseudo-labels by DBSCAN, against scikit-learn on the dense distances."""
    features = plain.people(ROWS, WIDTH, seed=3)
    expected = DBSCAN(eps=EPS + TIE, min_samples=MIN_SAMPLES, metric="precomputed").fit_predict(
        plain.jaccard_distances(normalize(features), K1, K2)
    )
    settings = ClusterSettings(k1=K1, k2=K2, eps=EPS, min_samples=MIN_SAMPLES)
    found = pseudo_labels(features.to(scene.device), settings, seed=0)
    wrong = int((found.labels.numpy() != expected).sum())
    require(wrong == 0, f"{wrong} of {ROWS} labels are not those of scikit-learn")
    return f"{found.clusters} clusters and {found.outliers} outliers, as scikit-learn"


def kmeans(scene: Scene) -> str:
    """Pseudo-labels by k-means: valid, repeatable, and every row beside the mean of its own cluster."""
    features = plain.people(ROWS, WIDTH, seed=4)
    settings = ClusterSettings(method="kmeans", clusters=CLUSTERS)
    first, second = (pseudo_labels(features.to(scene.device), settings, seed=5).labels for _ in range(2))
    unlike, most = int((first != second).sum()), 0 if scene.device.type == "cpu" else UNORDERED
    require(unlike <= most, f"the same seed gave {unlike} other labels, at most {most} expected")
    require(first.unique().tolist() == list(range(CLUSTERS)), f"not every label of 0..{CLUSTERS - 1} is used")
    rows = normalize(features).double()
    means = torch.stack([rows[first == label].mean(dim=0) for label in range(CLUSTERS)])
    strays = int((torch.cdist(rows, means).argmin(dim=1) != first).sum())
    require(strays <= ROWS // 50, f"{strays} of {ROWS} rows are nearer to the mean of another cluster")
    return f"{CLUSTERS} clusters, {strays} rows nearer to another mean"


def kmeans_iterations(scene: Scene) -> str:
    """The iterations that GPUs use, from given centers."""
    rows = normalize(plain.people(ROWS, WIDTH, seed=4))
    expected = plain.lloyd(rows, rows[:CLUSTERS])
    found = lloyd(rows.to(scene.device), rows[:CLUSTERS].to(scene.device)).cpu()
    wrong, most = int((found != expected).sum()), 0 if scene.device.type == "cpu" else UNORDERED
    require(wrong <= most, f"{wrong} of {ROWS} labels differ, at most {most} expected")
    return f"{ROWS - wrong} of {ROWS} labels equal"


def means(scene: Scene) -> str:
    """The centroids with which a classifier over the clusters starts."""
    features, labels = plain.people(ROWS, WIDTH, seed=6), torch.arange(ROWS) % 9 - 1
    found = centroids(features.to(scene.device), labels)
    rows = normalize(features).double()
    expected = torch.stack([rows[labels == label].mean(dim=0) for label in range(8)])
    expected = expected / expected.norm(dim=1, keepdim=True)
    return f"largest difference {figure(compare(found, expected, 1e-6, 'centroids'))}"


def reranking(scene: Scene) -> str:
    """k-reciprocal re-ranking."""
    query, gallery = _people_twice()
    expected = torch.from_numpy(plain.reranked_distances(normalize(query), normalize(gallery), K1, K2, 0.3))
    found = rerank(query.to(scene.device), gallery.to(scene.device), K1, K2, 0.3)(0, QUERIES)
    return f"largest difference {figure(compare(found, expected, MOST, 're-ranked distances'))}"


def ranking(scene: Scene) -> str:
    """mAP, CMC and mINP, with distractors, junk and the query's own camera left out."""
    query, gallery = _people_twice()
    generator = np.random.default_rng(0)
    query_ids, ids = generator.integers(1, 9, QUERIES), generator.integers(-1, 9, GALLERY)
    query_cameras, cameras = generator.integers(1, 4, QUERIES), generator.integers(1, 4, GALLERY)
    distances = 1 - (normalize(query).double() @ normalize(gallery).double().T).numpy()
    expected = plain.ranking_metrics(distances, query_ids, query_cameras, ids, cameras)
    query_people, query_places, people, places = (
        torch.from_numpy(each) for each in (query_ids, query_cameras, ids, cameras)
    )
    own_query, own_gallery = query.to(scene.device), gallery.to(scene.device)
    found = evaluate_ranking(own_query, query_people, query_places, own_gallery, people, places).as_dict()
    wrong = [name for name, value in expected.items() if not abs(found[name] - value) <= 1e-6]
    require(not wrong, f"{', '.join(f'{n} is {found[n]:.3f}, not {expected[n]:.3f}' for n in wrong)}")
    return f"mAP {expected['mAP']:.2f}, all five equal"


def _people_twice() -> tuple[Tensor, Tensor]:
    query, gallery = plain.people(QUERIES + GALLERY, WIDTH, seed=7).split([QUERIES, GALLERY])
    return query, gallery


CHECKS = (
    Check("k-reciprocal Jaccard distance", jaccard),
    Check("DBSCAN", dbscan),
    Check("k-means", kmeans),
    Check("k-means: iterations", kmeans_iterations),
    Check("centroids", means),
    Check("re-ranking", reranking),
    Check("ranking metrics", ranking),
)
