"""The rows of benchmarks/papers.py: what each paper published, and the recipes that train the same."""

from dataclasses import dataclass

from uda_reid.data.catalogue import CATALOGUE

ADAPTATION, SUPERVISED = "adaptation", "supervised"
TABLES = {
    ADAPTATION: "Adaptation: tested on a data set whose labels are not read",
    SUPERVISED: "Supervised: trained and tested on one labelled data set",
}
FUSIONREID = "Wang et al., arXiv 2412.17239"
SAM_IBN = "An et al., Fusion Self-Attention Feature Clustering Mechanism Network"
X_REID = "Shen et al., arXiv 2302.02075"
LF2 = "Ding and Zhou, arXiv 2205.09495"
PPLR = "Cho et al., arXiv 2203.14675"
MMT = "Ge et al., arXiv 2001.01526"
SPCL = "Ge et al., arXiv 2006.02713"
CLUSTER_CONTRAST = "Dai et al., arXiv 2103.11568"
CA_JACCARD = "Chen et al., arXiv 2311.10605"


@dataclass(frozen=True)
class Stage:
    """One training of a row.

    Attributes:
        data: key of the data set; empty for none at all, where an adaptation starts from the trunk's own weights.
        recipe: its name.
        changes: "key.path=value" over the recipe.
    """

    data: str
    recipe: str
    changes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        name: of --rows.
        source: the training with labels, or the model alone.
        target: the adaptation; None in the supervised table.
        published: mAP and Rank-1 in percent, None where they are not given.
        paper: where that was published.
        remark: what a reader must know to compare.
        needs: setting for a file of weights that cannot be downloaded.
    """

    name: str
    system: str
    source: Stage
    published: tuple[float | None, float | None]
    paper: str
    target: Stage | None = None
    remark: str = ""
    needs: str = ""

    @property
    def table(self) -> str:
        return ADAPTATION if self.target else SUPERVISED

    @property
    def data(self) -> list[str]:
        """Keys of the data sets that it reads."""
        stages = [self.source, self.target] if self.target else [self.source]
        return [stage.data for stage in stages if stage.data]

    @property
    def data_title(self) -> str:
        start = "" if self.source.data else "ImageNet -> "
        return start + " -> ".join(CATALOGUE[key].title for key in self.data)


def lf2_rows() -> list[Row]:
    """Market <-> Duke."""
    pairs = {"lf2-duke2market": ("duke", "market", (83.2, 92.8)), "lf2-market2duke": ("market", "duke", (73.5, 83.7))}
    best = "The released code keeps the epoch that the target's test labels choose; here the last one counts."
    rows = []
    for name, (source, target, published) in pairs.items():
        kinds = {
            name: (name, "LF2, DBSCAN", f"The released code clusters by k-means. {best}"),
            name.replace("lf2", "lf2-kmeans"): ("lf2-kmeans", "LF2 as released, k-means", best),
        }
        for key, (recipe, system, remark) in kinds.items():
            stages = Stage(source, recipe), Stage(target, recipe)
            rows.append(Row(key, system, stages[0], published, LF2, stages[1], remark))
    return rows


def mmt_rows() -> list[Row]:
    """Market <-> Duke, and both to MSMT17, as OpenUnReID's leaderboard quotes the paper."""
    remark = (
        "k-means; which number of clusters the quoted figures belong to could not be looked up. The paper pre-trains "
        "two source models of different seeds, where both networks start from one here, and quotes the epoch and the "
        "teacher that the target's test labels choose."
    )
    published = {
        ("duke", "market"): (500, (71.2, 87.7)),
        ("market", "duke"): (700, (65.1, 78.0)),
        ("market", "msmt17"): (1500, (22.9, 49.2)),
        ("duke", "msmt17"): (1500, (23.3, 50.1)),
    }
    rows = []
    for (source, target), (clusters, numbers) in published.items():
        changes = ("adapt.cluster.method=kmeans", f"adapt.cluster.clusters={clusters}", "adapt.steps=800")
        trained = Stage(source, "lf2-market2duke" if source == "market" else "lf2-duke2market")
        adapted = Stage(target, "mmt", changes)
        rows.append(Row(f"mmt-{source}2{target}", f"MMT-{clusters}", trained, numbers, MMT, adapted, remark))
    return rows


def spcl_rows() -> list[Row]:
    """Without a source domain on Market-1501 and Duke, and from source models to all three."""
    alone = "Without a source domain, as published."
    beside = "The paper trains with the source's images beside the target's; here the target's alone are used."
    published = {
        ("", "market"): (72.6, 87.7),
        ("", "duke"): (65.3, 81.2),
        ("duke", "market"): (76.7, 90.3),
        ("market", "duke"): (68.8, 82.9),
        ("market", "msmt17"): (25.4, 51.6),
        ("duke", "msmt17"): (26.5, 53.1),
    }
    rows = []
    for (source, target), numbers in published.items():
        name = f"spcl-{source}2{target}" if source else f"spcl-{target}"
        adapted = Stage(target, "spcl", ("adapt.steps=800",) if target == "msmt17" else ())
        remark = beside if source else alone
        rows.append(Row(name, "SpCL", Stage(source, "spcl"), numbers, SPCL, adapted, remark))
    return rows


def unsupervised_rows(
    name: str,
    system: str,
    paper: str,
    source: tuple[str, ...],
    adaptation: tuple[str, ...],
    market: float,
    msmt17: float,
    on_msmt17: tuple[str, ...] = (),
) -> list[Row]:
    """Rows of a method that was published without a source domain: as published, and on MSMT17 from a source model.

    Args:
        source, adaptation: a recipe and its changes.
        market, msmt17: published mAP.
        on_msmt17: further changes there.
    """
    model = Stage("", source[0], source[1:])
    changes = {"market": adaptation[1:], "msmt17": (*adaptation[1:], *on_msmt17)}
    adapt = {key: Stage(key, adaptation[0], own) for key, own in changes.items()}
    alone = "Purely unsupervised, as published: from ImageNet weights, without a source model."
    other = (
        f"No number is published for this start. The paper's {msmt17:.1f} mAP starts from ImageNet weights, not from a "
        f"source model; {name}-msmt17 is its row."
    )
    trained = Stage("market", source[0], source[1:])
    return [
        Row(f"{name}-market", system, model, (market, None), paper, adapt["market"], alone),
        Row(f"{name}-msmt17", system, model, (msmt17, None), paper, adapt["msmt17"], alone),
        Row(f"{name}-market2msmt17", system, trained, (None, None), paper, adapt["msmt17"], other),
    ]


def pplr_rows() -> list[Row]:
    """PPLR with and without camera proxies; the paper's images are 384x128."""
    source = ("lf2-market2duke", "images.height=384")
    without = ("pplr", "adapt.camera_proxies.weight=0")
    return [
        *unsupervised_rows("pplr", "PPLR", PPLR, source, without, 81.5, 31.4),
        *unsupervised_rows("pplr-cameras", "PPLR with camera proxies", PPLR, source, ("pplr",), 84.4, 42.2),
    ]


def cluster_contrast_rows() -> list[Row]:
    """Cluster Contrast, alone and with CA-Jaccard; eps as published, epochs on MSMT17 twice as long."""
    source, longer = ("cluster-contrast",), ("adapt.steps=400",)
    cameras = ("cluster-contrast", "adapt.cluster.camera_jaccard=true", "adapt.cluster.eps=0.4")
    title = "Cluster Contrast"
    return [
        *unsupervised_rows("cluster-contrast", title, CLUSTER_CONTRAST, source, source, 83.0, 33.0, longer),
        *unsupervised_rows(
            "ca-jaccard",
            f"{title} with CA-Jaccard",
            CA_JACCARD,
            source,
            cameras,
            84.8,
            42.8,
            (*longer, "adapt.cluster.eps=0.6"),
        ),
    ]


def fusionreid_rows() -> list[Row]:
    """Three data sets and three forms of input."""
    published = {
        "market": ((91.7, 96.3), (90.9, 95.9), (91.6, 96.2)),
        "duke": ((83.5, 91.0), (82.9, 90.3), (83.7, 91.0)),
        "msmt17": ((69.5, 86.7), (68.3, 86.1), (70.5, 87.3)),
    }
    forms = {
        "stride12": ("FusionReID, stride 12", ()),
        "stride16": ("FusionReID, stride 16", ("model.transformer.patch_stride=16",)),
        "384": ("FusionReID, 384x128", ("images.height=384",)),
    }
    return [
        Row(f"fusionreid-{key}-{form}", system, Stage(key, f"fusionreid-{key}", changes), values[i], FUSIONREID)
        for key, values in published.items()
        for i, (form, (system, changes)) in enumerate(forms.items())
    ]


def sam_ibn_rows() -> list[Row]:
    """Table 1 of the paper, and its ablation on Market-1501."""
    weights = "model.sam_ibn.weights"
    fusion, attention, eca = (f"model.sam_ibn.{part}=false" for part in ("fusion", "attention", "eca"))
    whole = (
        "Table 1 of the paper, which contradicts itself: mAP 84.9 in its abstract, 81.5 / 92.7 for the same model in "
        "Table 2."
    )
    ablation = "Table 2 of the paper, whose column titles are wrong; read as Market-1501."
    rows: list[tuple[str, str, str, tuple[str, ...], tuple[float, float], str]] = [
        ("sam-ibn-market", "SAM-IBN", "market", (), (82.4, 94.8), whole),
        ("sam-ibn-duke", "SAM-IBN", "duke", (), (65.9, 84.5), ""),
        ("sam-ibn-attention", "SAM-IBN without fusion", "market", (fusion,), (76.3, 89.6), ablation),
        ("sam-ibn-baseline", "ResNet50-IBN-a", "market", (fusion, attention, eca), (71.7, 82.4), ablation),
    ]
    return [
        Row(name, system, Stage(data, "sam-ibn", changes), published, SAM_IBN, remark=remark, needs=weights)
        for name, system, data, changes, published, remark in rows
    ]


def x_reid_rows() -> list[Row]:
    """X-ReID and its ViT alone, on MSMT17."""
    claim = (
        "The abstract claims 1.1 mAP over the runner-up of its day on MSMT17 and gives no absolute number, so there is "
        "nothing to compare with but the ViT alone, in the other row."
    )
    off = tuple(f"pretrain.cross_instance.{module}=0" for module in ("intra", "inter"))
    rows = {"x-reid-msmt17": ("X-ReID on a ViT", ()), "x-reid-msmt17-off": ("the same ViT alone", off)}
    return [
        Row(name, system, Stage("msmt17", "xreid-msmt17", changes), (None, None), X_REID, remark=claim)
        for name, (system, changes) in rows.items()
    ]


ADAPTED = (*lf2_rows(), *mmt_rows(), *spcl_rows(), *cluster_contrast_rows(), *pplr_rows())
TRAINED = (*fusionreid_rows(), *sam_ibn_rows(), *x_reid_rows())
ROWS = {row.name: row for row in (*ADAPTED, *TRAINED)}
