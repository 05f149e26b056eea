"""How facts and errors are written: paths without the home folder, errors as clauses, sizes in GiB."""

from pathlib import Path


def shorten(text: str | Path) -> str:
    """Returns a path or a value with the home folder as "~", which a public report need not name."""
    home = str(Path.home())
    return str(text).replace(home, "~") if home != "/" else str(text)


def clause(error: Exception) -> str:
    """Returns the first sentence of an error without its full stop, as part of a sentence of ours."""
    text = str(error).strip() or type(error).__name__
    return shorten(text.splitlines()[0].split(". ")[0].rstrip("."))


def gib(size: int) -> float:
    """Returns bytes in GiB, to a tenth."""
    return round(size / 2**30, 1)
