"""The public Python API: every name resolves, and importing the package alone imports nothing heavy."""

import subprocess
import sys

import pytest

import uda_reid


@pytest.mark.parametrize("name", uda_reid.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(uda_reid, name).__name__ == name
    assert name in dir(uda_reid)


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, uda_reid; uda_reid.__version__; dir(uda_reid); print(*sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "timm", "sklearn", "faiss"} & set(ended.stdout.split())


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'load_modle'"):
        uda_reid.load_modle  # noqa: B018
