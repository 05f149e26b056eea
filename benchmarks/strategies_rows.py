"""The rows and tables of benchmarks/strategies.py, and which of them are measured once for both budgets."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from common import PLAIN_CLUSTERS

from uda_reid.recipe import load_recipe
from uda_reid.settings import Recipe

Pair = tuple[str, str]
FORWARDS, SECONDS = "forwards", "seconds"
BUDGETS = (FORWARDS, SECONDS)
ANY = "any"  # of rows that no budget changes
REFERENCE = "lf2"  # whose cost is the budget
DIRECT, SUPERVISED = "direct", "supervised"
RING: tuple[Pair, ...] = (("plaza", "station"), ("station", "campus"), ("campus", "plaza"))
REVERSED: tuple[Pair, ...] = tuple((target, source) for source, target in RING)
HARD: tuple[Pair, ...] = (("plaza-hard", "station-hard"),)
CHOSEN_ON = "plaza -> campus"  # a reversed pair, none of the ring

# Published settings that count epochs or steps, scaled from some 32,000 steps to some 500: a teacher that keeps 0.999
# of itself would hardly have moved at the end, and 5 warm-up epochs of 50 are less than 1 of 6.
SHORT_RUN = {
    "lf2": ("adapt.lf2.teacher_momentum=0.98",),
    "mmt": ("adapt.mmt.teacher_momentum=0.98",),
    "best": ("adapt.best.teacher_momentum=0.98",),
    "pplr": ("adapt.pplr.warmup_epochs=1",),
}
LF2_PARTS = "adapt.lf2.part_weight=0.2"  # found for the demo, taken for every recipe
CENTERED = ("adapt.cluster.center_cameras=true",)
CAMERAS = (*CENTERED, "adapt.cluster.camera_whitening=0.5")
WITHOUT_LABELS = ("adapt.cluster.eps=auto", "adapt.cluster.k1=auto")
SPLIT = ("adapt.cluster.split_depth=0.2",)
CLUSTERS_OF_BEST = (*CAMERAS, *WITHOUT_LABELS, *SPLIT)


@dataclass(frozen=True)
class Row:
    """What is compared.

    Attributes:
        strategy: empty for the supervised row, which adapts nothing.
        overrides: of the table's recipe; "{people}" is the number of people in the target's training split.
        remark: what a reader has to know of the row.
    """

    name: str
    strategy: str
    overrides: tuple[str, ...] = ()
    remark: str = ""

    @property
    def has_budget(self) -> bool:
        """Whether its steps depend on a budget; the others train nothing, or are the budget."""
        return self.strategy not in ("", "direct", "adabn") and self.name != REFERENCE

    @property
    def settings(self) -> tuple[str, ...]:
        """All overrides, those of a short run first."""
        return (*SHORT_RUN.get(self.strategy, ()), *self.overrides)


AS_RELEASED = (
    LF2_PARTS,
    "adapt.cluster.method=kmeans",
    "adapt.cluster.clusters={people}",
    "model.neck_feature=after",
    "evaluate.mirror=true",
)
STRATEGIES = (
    Row(DIRECT, "direct", remark="the source model as it is"),
    Row("adabn", "adabn", remark="batch-norm statistics of the target, with which every row below begins"),
    Row("baseline", "baseline"),
    Row(REFERENCE, "lf2", (LF2_PARTS,), "one shared batch; its cost is the budget"),
    Row(
        "lf2-kmeans",
        "lf2",
        AS_RELEASED,
        "as released: k-means with the number of the target's people, which no user knows; features after the "
        "neck, mirrored images added at the test; the pooling is that of the source model (GeM), not avg+max",
    ),
    Row("mmt", "mmt"),
    Row("spcl", "spcl", remark="without source images"),
    Row("cluster-contrast", "cluster-contrast", remark="16 x 4 images a batch, as every row, not 16 x 16"),
    Row("pplr", "pplr", ("adapt.camera_proxies.weight=0.5",), "with its camera proxies"),
    Row(
        "best",
        "best",
        CLUSTERS_OF_BEST,
        "with each camera's mean subtracted and its spread evened out, eps and k1 chosen without labels, and clusters "
        "that fall apart split",
    ),
    Row(
        SUPERVISED,
        "",
        remark="trained on the target's labelled training split from random weights, as the source models are on "
        "theirs; no source image is used",
    ),
)
LF2_PIECES = (
    Row("lf2, frozen", "lf2", (LF2_PARTS, "adapt.lf2.train_fusion=false"), "its Fusion Module keeps random weights"),
    Row(
        "lf2, no Fusion Module",
        "lf2",
        (LF2_PARTS, "adapt.lf2.fusion_module=false"),
        "parts are clustered by their local embeddings",
    ),
    Row(
        "lf2, agreement",
        "lf2",
        (LF2_PARTS, "adapt.lf2.part_labels=agreement"),
        "parts have the clusters of the whole image, each image weighed by how far its part agrees with it",
    ),
    Row("lf2, no parts", "lf2", ("adapt.lf2.parts=0",), "the global level alone"),
)
BEST_PIECES = (
    Row("best, no parts", "best", (*CLUSTERS_OF_BEST, "adapt.best.parts=0"), "the global feature alone"),
    Row("best, no teacher", "best", (*CLUSTERS_OF_BEST, "adapt.best.teacher_momentum=0"), "the student itself"),
    Row(
        "best, no outliers",
        "best",
        (*CLUSTERS_OF_BEST, "adapt.best.outlier_negatives=false"),
        "outliers are no classes of the contrast",
    ),
    Row("best, no split", "best", (*CAMERAS, *WITHOUT_LABELS), "clusters of DBSCAN as they are"),
    Row("best, eps fixed", "best", (*CAMERAS, *SPLIT), "with the eps and k1 that all other strategies have"),
    Row(
        "best, no whitening",
        "best",
        (*CENTERED, *WITHOUT_LABELS, *SPLIT),
        "with each camera's mean subtracted, not its spread evened out",
    ),
    Row("best, no cameras", "best", (*WITHOUT_LABELS, *SPLIT), "clusters of the features as they are"),
)
WITH_CAMERAS = (
    Row("baseline + cameras", "baseline", CAMERAS, "with the camera options of best"),
    Row("lf2 + cameras", "lf2", (LF2_PARTS, *CAMERAS), "likewise"),
    Row("cluster-contrast + cameras", "cluster-contrast", CAMERAS, "likewise"),
    Row("pplr + cameras", "pplr", ("adapt.camera_proxies.weight=0.5", *CAMERAS), "likewise"),
    Row("baseline + clusters", "baseline", CLUSTERS_OF_BEST, "with all that best does to clusters"),
)
GIVEN_EPS = tuple(
    Row(f"best, eps {eps}", "best", (*CAMERAS, *SPLIT, "adapt.cluster.k1=auto", f"adapt.cluster.eps={eps}"))
    for eps in (0.4, 0.5, 0.6, 0.7)
)
ROWS = {row.name: row for row in (*STRATEGIES, *LF2_PIECES, *BEST_PIECES, *WITH_CAMERAS, *GIVEN_EPS)}


@dataclass(frozen=True)
class Table:
    """Rows that are measured on the same pairs with one recipe.

    Attributes:
        overrides: of the recipe, for the source models and all rows.
        limits: one sentence on what the table cannot say.
    """

    name: str
    title: str
    recipe: str
    overrides: tuple[str, ...]
    pairs: tuple[Pair, ...]
    seeds: tuple[int, ...]
    rows: tuple[str, ...]
    budgets: tuple[str, ...]
    limits: str

    def recipe_of(self, row: Row, people: int) -> Recipe:
        """Returns the recipe of a row for a target with that many people."""
        settings = [override.format(people=people) if "{people}" in override else override for override in row.settings]
        return load_recipe(self.recipe, [*self.overrides, *settings], row.strategy or "direct")


CNN = "model.backbone=cnn"
# Every row says itself how its clusters differ from these.
CLUSTERS = (*PLAIN_CLUSTERS["demo"], "adapt.cluster.eps=0.5")
# Chosen on plaza -> campus with `best`, where the baseline gained by it too.
CHOSEN = (CNN, "adapt.optim.learning_rate=1.2e-3", *CLUSTERS)
# 5 x 80 steps on 6,500 images are some minutes of one core.
HARD_LENGTH = (
    *PLAIN_CLUSTERS["small"],
    "pretrain.epochs=10",
    "adapt.epochs=5",
    "adapt.steps=80",
    "adapt.mirror=false",
    "adapt.shared_batch=true",
)
TINY = (
    CNN,
    *CLUSTERS,
    "images.height=32",
    "images.width=16",
    "model.cnn.options={channels=[8,16,24,32], stem_width=8}",
    "pretrain.epochs=1",
    "pretrain.steps=2",
    "pretrain.identities=4",
    "adapt.epochs=1",
    "adapt.steps=2",
    "adapt.identities=4",
    "adapt.cluster.k1=8",
    "adapt.cluster.k2=2",
    "adapt.cluster.min_samples=2",
)
RENDERED = "people are rendered and the networks start at random: which row leads may differ on photographs"
TABLES = {
    table.name: table
    for table in (
        Table(
            "small",
            "Every strategy: the demo's small CNN, around the ring",
            "demo",
            CHOSEN,
            RING,
            (0, 1, 2),
            tuple(row.name for row in STRATEGIES),
            BUDGETS,
            f"A CNN of 64 x 32 pixels with 128 channels has little room for parts, and {RENDERED}.",
        ),
        Table(
            "reversed",
            "The reversed pairs, which confirm the ring",
            "demo",
            CHOSEN,
            REVERSED,
            (0,),
            (DIRECT, "baseline", REFERENCE, "cluster-contrast", "pplr", "best", SUPERVISED),
            (FORWARDS,),
            f"One seed, and one of the pairs is {CHOSEN_ON}, on which settings were chosen; {RENDERED}.",
        ),
        Table(
            "lf2-pieces",
            "What LF2's Fusion Module and parts are worth",
            "demo",
            CHOSEN,
            RING,
            (0, 1, 2),
            (DIRECT, REFERENCE, *(row.name for row in LF2_PIECES)),
            (FORWARDS,),
            f"A row that saves forward passes is given more steps; {RENDERED}.",
        ),
        Table(
            "best-pieces",
            "What the pieces of best are worth, and its clusters elsewhere",
            "demo",
            CHOSEN,
            RING,
            (0, 1, 2),
            (DIRECT, "best", *(row.name for row in (*BEST_PIECES, *WITH_CAMERAS))),
            (FORWARDS,),
            f"A row that saves forward passes is given more steps; {RENDERED}.",
        ),
        Table(
            "eps",
            "eps without labels against given ones",
            "demo",
            CHOSEN,
            RING,
            (0,),
            (DIRECT, "best", *(row.name for row in GIVEN_EPS)),
            (FORWARDS,),
            f"One seed, so that differences of two points may be its luck; {RENDERED}.",
        ),
        Table(
            "weak",
            "From source models stopped at a tenth of their training",
            "demo",
            (*CHOSEN, "pretrain.epochs=2"),
            RING,
            (0,),
            (DIRECT, "adabn", "baseline", REFERENCE, "best"),
            (FORWARDS,),
            f"One seed; {RENDERED}.",
        ),
        Table(
            "hybrid",
            "The demo's hybrid, around the ring",
            "demo",
            PLAIN_CLUSTERS["demo"],
            RING,
            (0,),
            (DIRECT, "baseline", REFERENCE, "best", SUPERVISED),
            (FORWARDS,),
            f"One seed, so that differences of a few points may be its luck; {RENDERED}.",
        ),
        Table(
            "hard",
            "The harder stage: uneven crowds, distractors, detector errors, 128 x 64 pixels",
            "small",
            HARD_LENGTH,
            HARD,
            (0,),
            (DIRECT, "baseline", REFERENCE, "cluster-contrast", "best", SUPERVISED),
            (FORWARDS,),
            f"One pair and one seed, and all models are far from trained out; {RENDERED}.",
        ),
        Table(
            "quick",
            "A check that the benchmark runs",
            "demo",
            TINY,
            RING[:1],
            (0,),
            (DIRECT, "baseline", REFERENCE, SUPERVISED),
            (FORWARDS,),
            "These figures mean nothing.",
        ),
    )
}


@dataclass(frozen=True)
class Job:
    """One row of a table on one pair with one seed."""

    table: str
    budget: str
    row: str
    source: str
    target: str
    seed: int

    @property
    def key(self) -> str:
        """Its name among the stored rows."""
        return f"{self.table} / {self.budget} / {self.row} / {self.source} -> {self.target} / {self.seed}"

    @property
    def command(self) -> str:
        """What measures it again."""
        return f"{command(self.table, self.budget, self.row)} --pairs {self.source}:{self.target} --seeds {self.seed}"


def command(table: str, budget: str, row: str) -> str:
    """Returns what measures a row again on every pair and seed of its table."""
    budgets = "" if budget == ANY else f" --budgets {budget}"
    return f"python benchmarks/strategies.py --tables {table}{budgets} --rows {repr(row) if ' ' in row else row}"


def jobs_of(table: Table, **chosen: Any) -> Iterator[Job]:
    """Yields the jobs of a table; rows without a budget are measured once for all budgets.

    Args:
        chosen: of pairs, seeds, rows and budgets, those to keep to; None for all of the table.
    """
    kept = {part: chosen.get(part) or getattr(table, part) for part in ("rows", "pairs", "seeds", "budgets")}
    for seed in kept["seeds"]:
        for source, target in kept["pairs"]:
            for row in kept["rows"]:
                for budget in kept["budgets"] if ROWS[row].has_budget else (ANY,):
                    yield Job(table.name, budget, row, source, target, seed)
