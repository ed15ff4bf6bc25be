"""Read shards back: in order, or any one sample by its place."""

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass

from declip_shards import layout
from declip_shards.errors import DeclipError
from declip_shards.store import Store
from declip_shards.writer import Sample

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
"""Members that are a sample's picture."""
TAR_BLOCK = 512
"""Bytes of a tar block; a whole archive ends with two empty ones."""


@dataclass(frozen=True, kw_only=True)
class MemberPlace:
    """Where a sample's picture lies inside its tar."""

    key: str
    offset: int
    """First byte of the picture in the tar."""
    size: int
    """Bytes of the picture."""


def _members(store: Store, path: str) -> Iterator[tuple[str, str, tarfile.TarInfo, bytes]]:
    """(key, extension, info, data) of each member; a cut or broken archive is an error.

    ``tarfile`` takes a damaged header for the end of the archive and says nothing, so the end
    marker is checked: what follows the last member must be zero blocks up to the file's end.
    """
    try:
        with store.open(path) as f:
            with tarfile.open(fileobj=f, mode="r:") as tar:
                end = 0
                for info in tar:
                    stream = tar.extractfile(info) if info.isreg() else None
                    if stream is None:
                        raise DeclipError(f"{path!r}: member {info.name!r} is not a plain file.")
                    data = stream.read()
                    if len(data) != info.size:
                        raise DeclipError(f"{path!r} is cut short at {info.name!r}.")
                    end = info.offset_data + -(-info.size // TAR_BLOCK) * TAR_BLOCK
                    key, _, extension = info.name.partition(".")
                    yield key, extension, info, data
            f.seek(end)
            tail = f.read()
            if len(tail) < 2 * TAR_BLOCK or tail.strip(b"\0"):
                raise DeclipError(
                    f"{path!r} is damaged after byte {end}: rerun ingest to fetch this shard again."
                )
    except tarfile.TarError as error:
        raise DeclipError(f"{path!r} is not a readable tar ({error}); rerun ingest.") from error


def read_samples(store: Store, shard: str) -> Iterator[Sample]:
    """Samples of a shard in the tar's order.

    Raises:
        DeclipError: the tar is cut or damaged, or a sample lacks its picture or caption.
    """
    path = layout.tar_path(shard)
    parts: dict[str, tuple[str, bytes]] = {}
    current: str | None = None

    def finish(key: str) -> Sample:
        picture = next((parts[e] for e in IMAGE_EXTENSIONS if e in parts), None)
        if picture is None or "txt" not in parts:
            raise DeclipError(f"{path!r}: sample {key!r} lacks its picture or its caption.")
        return Sample(
            key=key,
            image=picture[1],
            image_extension=picture[0],
            caption=parts["txt"][1].decode("utf-8", "surrogatepass"),
            metadata=json.loads(parts["json"][1]) if "json" in parts else {},
        )

    for key, extension, _, data in _members(store, path):
        if key != current and current is not None:
            yield finish(current)
            parts.clear()
        current = key
        parts[extension] = (extension, data)
    if current is not None:
        yield finish(current)


def image_places(store: Store, shard: str) -> list[MemberPlace]:
    """Where each sample's picture lies, for readers that jump (the trainer's loader)."""
    return [
        MemberPlace(key=key, offset=info.offset_data, size=info.size)
        for key, extension, info, _ in _members(store, layout.tar_path(shard))
        if extension in IMAGE_EXTENSIONS
    ]
