"""Input images: their size, normalization, storage and augmentation."""

from dataclasses import dataclass

from uda_reid.errors import UserError
from uda_reid.settings.checks import check_choice, check_fraction, check_least

STORES = ("auto", "device", "pinned", "memory", "file")
ERASE_FILLS = ("noise", "mean")


@dataclass(frozen=True)
class ImageSettings:
    """Input size, normalization, and where decoded images are kept.

    Attributes:
        height, width: pixels.
        mean, std: per channel, of values in [0, 1].
        store: "device" (on a CPU, memory), "pinned" (memory that a GPU reads by itself), "memory", "file" (a
            memory-mapped file), or "auto", which chooses by the size of the set (`data.image_store`).
        memory_limit_gib: size above which "auto" uses a memory-mapped file.
    """

    height: int = 256
    width: int = 128
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    store: str = "auto"
    memory_limit_gib: float = 8.0

    def __post_init__(self) -> None:
        check_least("images", 1, height=self.height, width=self.width)
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise UserError("images.mean and images.std must be three numbers each, one per channel, std above 0.")
        check_choice("images.store", self.store, STORES)

    def bytes_of(self, images: int) -> int:
        """Returns the size in bytes of that many decoded images."""
        return images * 3 * self.height * self.width


@dataclass(frozen=True)
class AugmentSettings:
    """Training augmentation.

    Attributes:
        flip, erase: probabilities; pad: pixels added on each side before the random crop.
        erase_fill: "noise" (a normal draw per pixel) or "mean" (zero after normalization).
    """

    flip: float = 0.5
    pad: int = 10
    erase: float = 0.5
    erase_fill: str = "noise"

    def __post_init__(self) -> None:
        check_fraction("augment", flip=self.flip, erase=self.erase)
        check_least("augment", 0, pad=self.pad)
        check_choice("augment.erase_fill", self.erase_fill, ERASE_FILLS)
