"""MSMT17, versions 1 and 2 (which masks faces), read by the lists that come with it."""

from pathlib import Path

from uda_reid.data.records import UNKNOWN, Records, ReIDDataset, TestSplit, make_records
from uda_reid.errors import UserError

# The versions are told apart by their image folders, which version 2 renamed.
FOLDERS = {"V1": ("train", "test"), "V2": ("mask_train_v2", "mask_test_v2")}
LAYOUT = (
    "list_train.txt, list_val.txt, list_query.txt and list_gallery.txt beside train/ and test/ (V1) or "
    "mask_train_v2/ and mask_test_v2/ (V2)"
)


def version_of(folder: Path) -> str:
    """Returns "V1" or "V2", by the names of the image folders.

    Raises:
        UserError: the folder holds the image folders of neither version.
    """
    for version, splits in FOLDERS.items():
        if all((folder / split).is_dir() for split in splits):
            return version
    raise UserError(f"MSMT17 needs {LAYOUT}, but {folder} has the image folders of neither version; check the folder.")


def read_msmt17(folder: Path, name: str, *, labelled_train: bool) -> ReIDDataset:
    """Reads MSMT17; the training split is train + val, as in published results.

    The lists number identities from 0. They are shifted by one, since 0 is a distractor in the retrieval protocol.

    Raises:
        UserError: a list or an image folder is missing, or a line cannot be read.
    """
    version = version_of(folder)
    train_folder, test_folder = (folder / split for split in FOLDERS[version])
    lists = [_read_list(folder / f"list_{part}.txt", train_folder, labelled_train) for part in ("train", "val")]
    train = make_records(
        [path for part in lists for path in part.paths],
        [int(i) for part in lists for i in part.person_ids],
        [int(i) for part in lists for i in part.camera_ids],
    )
    query = _read_list(folder / "list_query.txt", test_folder, True)
    gallery = _read_list(folder / "list_gallery.txt", test_folder, True)
    return ReIDDataset(name, folder, train, TestSplit(query, gallery), (f"{folder.name} is MSMT17 {version}.",))


def _read_list(path: Path, images: Path, labelled: bool) -> Records:
    if not path.is_file():
        raise UserError(f"The list {path} is missing; MSMT17 needs {LAYOUT}.")
    paths, person_ids, camera_ids = [], [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            file, label = line.split()
            camera = int(Path(file).name.split("_")[2])
            person = int(label) + 1 if labelled else UNKNOWN
        except (ValueError, IndexError) as error:
            raise UserError(
                f"Line {number} of {path} must hold a file and an identity, as in "
                f"'0000/0000_000_01_0303morning_0008_0.jpg 0', got '{line[:80]}'; restore the list."
            ) from error
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise UserError(
                f"Line {number} of {path} names a file outside the data set, '{file[:80]}'; restore the list."
            )
        paths.append(images / file)
        person_ids.append(person)
        camera_ids.append(camera)
    if not paths:
        raise UserError(f"The list {path} is empty; MSMT17 needs {LAYOUT}.")
    return make_records(paths, person_ids, camera_ids)
