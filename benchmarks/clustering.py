"""Clustering of a bank of features: this package against the dense form that is in use, same features, one run.

    python benchmarks/clustering.py --sizes 12936 --dimension 2048          # against the dense form
    python benchmarks/clustering.py --sizes 10000,20000,40000,80000 --dimension 256 --no-dense
    python benchmarks/clustering.py --sizes 12936 --dimension 2048 --device cuda

Every contender runs in a process of its own, so that its peak memory is its own. Features are drawn from a seed. The
dense form computes on the CPU whatever --device says; where faiss is not installed, it searches with torch. The last
line is JSON.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np

K1, K2, EPS, MIN_SAMPLES = 30, 6, 0.6, 4
TIE = 1e-6  # above eps by which rounding may lift a distance that is exactly eps
WARM_UP = 50_000  # rows at most of the call that starts a GPU and does not count


def draw_features(n: int, dimension: int, seed: int, images_per_person: int = 17) -> np.ndarray:
    """[n, dimension] float32 like a network's: people and cameras in 64 directions, mixed, rectified, unit length.

    Seventeen images a person are those of Market-1501; some people are seen clearly, some are not.
    """
    generator = np.random.default_rng(seed)
    people, cameras, latent = max(1, n // images_per_person), 6, 64
    centres = generator.normal(size=(people, latent))
    shifts = 0.4 * generator.normal(size=(cameras, latent))
    mixing = generator.normal(size=(latent, dimension)).astype(np.float32)
    features = np.empty((n, dimension), dtype=np.float32)
    for start in range(0, n, 8192):
        size = min(8192, n - start)
        noise = generator.uniform(0.3, 1.3, size=(size, 1)) * generator.normal(size=(size, latent))
        seen = centres[generator.integers(people, size=size)] + shifts[generator.integers(cameras, size=size)] + noise
        block = np.maximum(seen.astype(np.float32) @ mixing, 0)
        features[start : start + size] = block / np.linalg.norm(block, axis=1, keepdims=True)
    return features


def flat_search(features: np.ndarray) -> np.ndarray:
    """[n, K1] rows of largest inner product, on the CPU: by faiss, or by blocks of products where it is missing."""
    if find_spec("faiss"):
        import faiss

        index = faiss.IndexFlatIP(features.shape[1])
        index.add(features)
        return index.search(features, K1)[1]
    import torch

    bank = torch.from_numpy(features)
    return torch.cat([(block @ bank.T).topk(K1).indices for block in bank.split(1024)]).numpy()


def dense_loops(features: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
    """The definition as commonly programmed: dense N x N arrays, Python loops over rows, scikit-learn's DBSCAN."""
    from sklearn.cluster import DBSCAN

    since = time.perf_counter()
    n = len(features)
    rank = flat_search(features)
    neighbours_done = time.perf_counter()

    half = round(K1 / 2) + 1

    def mutual(i: int, columns: int) -> np.ndarray:
        ahead = rank[i, :columns]
        return ahead[(rank[ahead, :columns] == i).any(axis=1)]

    full = [mutual(i, K1) for i in range(n)]
    core = [mutual(i, half) for i in range(n)]
    weights = np.zeros((n, n), dtype=np.float32)
    for i in range(n):
        members = full[i]
        for q in full[i]:
            if len(np.intersect1d(core[q], full[i])) > 2 / 3 * len(core[q]):
                members = np.append(members, core[q])
        members = np.unique(members)
        weight = np.exp(2 * (features[members] @ features[i]) - 2)
        weights[i, members] = weight / weight.sum()
    del full, core
    averaged = np.zeros_like(weights)
    for i in range(n):
        averaged[i] = weights[rank[i, :K2]].mean(axis=0)
    del weights
    holders = [np.flatnonzero(averaged[:, column]) for column in range(n)]
    distances = np.zeros((n, n), dtype=np.float32)
    for i in range(n):
        shared = np.zeros(n, dtype=np.float32)
        for column in np.flatnonzero(averaged[i]):
            rows = holders[column]
            shared[rows] += np.minimum(averaged[i, column], averaged[rows, column])
        distances[i] = 1 - shared / (2 - shared)
    del averaged, holders
    np.maximum(distances, 0, out=distances)
    jaccard_done = time.perf_counter()
    labels = DBSCAN(eps=EPS + TIE, min_samples=MIN_SAMPLES, metric="precomputed", n_jobs=-1).fit_predict(distances)
    done = time.perf_counter()
    return labels, {
        "neighbours": neighbours_done - since,
        "jaccard": jaccard_done - neighbours_done,
        "dbscan": done - jaccard_done,
    }


def ours(features: np.ndarray, device: str, backend: str, repeats: int) -> tuple[np.ndarray, dict[str, object]]:
    """Labels by this package and its figures over `repeats` calls, after one that starts a GPU and does not count.

    The seconds are those of the call whose total is the median (the lower one of two).
    """
    import torch

    from uda_reid.clustering.dbscan import dbscan
    from uda_reid.clustering.stages import StageTimer, build_graph
    from uda_reid.settings import ClusterSettings

    settings = ClusterSettings(k1=K1, k2=K2, eps=EPS, min_samples=MIN_SAMPLES, backend=backend)
    bank = torch.from_numpy(features).to(device)
    recall = [1.0]

    def cluster(rows: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        timer = StageTimer(bank.device)
        graph = build_graph(rows, settings, timer, on_recall=recall.append)
        labels = dbscan(graph, eps=EPS, min_samples=MIN_SAMPLES).cpu()
        timer.stop("dbscan")
        return labels, timer.seconds

    if bank.is_cuda:
        cluster(bank[:WARM_UP])
        torch.cuda.reset_peak_memory_stats(bank.device)
    runs = [cluster(bank) for _ in range(repeats)]
    totals = [sum(seconds.values()) for _, seconds in runs]
    labels, seconds = runs[totals.index(statistics.median_low(totals))]
    figures: dict[str, object] = {"seconds": seconds, "totals": totals, "recall": recall[-1]}
    if bank.is_cuda:
        figures["peak_device_bytes"] = torch.cuda.max_memory_allocated(bank.device)
    return labels.numpy(), figures


def held_bytes() -> int:
    """What this process holds now: libraries and features, which are the same for both contenders (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmRSS")).split()[1])


def contender(arguments: argparse.Namespace) -> None:
    """Runs one contender and writes labels and figures; the body of the subprocess."""
    import sklearn.cluster  # noqa: F401
    import torch  # noqa: F401

    if find_spec("faiss"):
        import faiss  # noqa: F401

    features = np.load(arguments.features)
    before, cpu_before, calls = held_bytes(), time.process_time(), 1
    figures: dict[str, object]
    if arguments.contender == "dense":
        labels, seconds = dense_loops(features)
        figures = {"seconds": seconds, "search": "faiss" if find_spec("faiss") else "torch"}
    else:
        calls = arguments.repeats
        labels, figures = ours(features, arguments.device, arguments.backend, calls)
        seconds = figures["seconds"]
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    figures |= {
        "total": sum(seconds.values()),
        "cpu_seconds": (time.process_time() - cpu_before) / calls,
        "peak_bytes": peak,
        "peak_bytes_of_the_work": peak - before,
    }
    np.save(arguments.out, labels)
    print(json.dumps(figures))


def run(which: str, features: Path, out: Path, arguments: argparse.Namespace) -> dict[str, object]:
    """Starts a contender in its own process and returns its figures."""
    command = [sys.executable, __file__, "--contender", which, "--features", str(features), "--out", str(out)]
    command += ["--device", arguments.device, "--backend", arguments.backend, "--repeats", str(arguments.repeats)]
    root = str(Path(__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    # Threads that wait give their core away, for both: on a machine with other work, spinning costs many times more.
    environment.setdefault("OMP_WAIT_POLICY", "passive")
    ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(ended.stdout.splitlines()[-1])


def agreement(one: np.ndarray, other: np.ndarray) -> float:
    """Adjusted Rand index of two labellings."""
    from sklearn.metrics import adjusted_rand_score

    return float(adjusted_rand_score(one, other))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="4000", help="numbers of features, separated by commas")
    parser.add_argument("--dimension", type=int, default=2048)
    parser.add_argument("--device", default="cpu", help="where this package works: cpu or cuda")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--dense", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--repeats", type=int, default=1, help="calls of this package that are timed")
    parser.add_argument("--images-per-person", type=int, default=17)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--contender", choices=["ours", "dense"], help=argparse.SUPPRESS)
    parser.add_argument("--features", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender:
        contender(arguments)
        return

    rows = []
    print("       N     D   form  neighbours   jaccard   dbscan   total s    cpu s  work GB")
    for size in map(int, arguments.sizes.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            features = Path(folder) / "features.npy"
            np.save(features, draw_features(size, arguments.dimension, arguments.seed, arguments.images_per_person))
            row: dict[str, object] = {"n": size, "dimension": arguments.dimension}
            for which in ["ours", "dense"] if arguments.dense else ["ours"]:
                row[which] = figures = run(which, features, Path(folder) / f"{which}.npy", arguments)
                stages = figures["seconds"]
                print(
                    f"{size:>8} {arguments.dimension:>5} {which:>6} {stages['neighbours']:>11.2f} "
                    f"{stages['jaccard']:>9.2f} {stages['dbscan']:>8.2f} {figures['total']:>9.2f} "
                    f"{figures['cpu_seconds']:>8.2f} {figures['peak_bytes_of_the_work'] / 1e9:>8.2f}",
                    flush=True,
                )
            labels = np.load(Path(folder) / "ours.npy")
            row["clusters"], row["outliers"] = int(labels.max()) + 1, int((labels < 0).sum())
            if arguments.dense:
                dense_labels = np.load(Path(folder) / "dense.npy")
                row["times_faster"] = row["dense"]["total"] / row["ours"]["total"]
                # Of the work, and of the whole process with its libraries and features.
                for key in ("peak_bytes_of_the_work", "peak_bytes"):
                    row[f"times_less_{key}"] = row["dense"][key] / row["ours"][key]
                row["times_less_cpu"] = row["dense"]["cpu_seconds"] / row["ours"]["cpu_seconds"]
                row["labels_equal"] = bool((labels == dense_labels).all())
                row["adjusted_rand_index"] = agreement(labels, dense_labels)
                print(
                    f"{size:>8} {row['times_faster']:.1f} times faster, "
                    f"{row['times_less_peak_bytes_of_the_work']:.1f} times less memory, "
                    f"{row['clusters']} clusters, labels equal: {row['labels_equal']}"
                )
            rows.append(row)
    import torch

    print(
        json.dumps(
            {
                "benchmark": "clustering",
                "device": arguments.device,
                "backend": arguments.backend,
                "cpus": os.cpu_count(),
                "processor": platform.machine(),
                "torch": torch.__version__,
                "rows": rows,
            }
        )
    )


if __name__ == "__main__":
    main()
