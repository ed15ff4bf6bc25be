"""``declip search``: what an index finds for a text or a picture, in the terminal and as a page."""

import argparse
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from declip_filter.encoders import Encoder, load_encoder
from declip_filter.index_files import LoadedIndex, info_path, load_index, search
from declip_filter.vectors import side_kinds
from declip_shards import DeclipError, Store, layout, sidecars
from declip_shards.errors import did_you_mean
from pipelines.arguments import ArgumentParser
from pipelines.evaluate import FACTORY
from pipelines.runner import check_location
from pipelines.sheets import Cell, pictures_of, sheet_html

PAGE = "report/search.html"
CAPTION_CHARS = 60
"""Of a caption in the terminal; the page has all of it."""


@dataclass(frozen=True, kw_only=True)
class Hit:
    """One sample that was found."""

    key: str
    shard: str
    score: float
    """Cosine, as the index has it: of codes where it holds codes."""
    caption: str
    url: str


def build_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="declip search",
        description="Search an index of a dataset: the nearest samples in the terminal, and with "
        f"their pictures in {PAGE}. The query is embedded by the encoder that the index names.",
    )
    parser.add_argument("index", metavar="INDEX", help="name of the index, such as captions")
    parser.add_argument("text", nargs="?", metavar="TEXT", help="what to look for, in words")
    parser.add_argument("--image", metavar="FILE", help="what to look for, as a picture")
    parser.add_argument("--out", metavar="FOLDER", required=True, help="folder of the dataset")
    parser.add_argument(
        "-k", metavar="N", type=int, default=10, dest="num_hits", help="how many hits (10)"
    )
    parser.add_argument("--device", default="cpu", metavar="cpu|cuda", help="of the encoder (cpu)")
    parser.add_argument(
        "--encoder-factory", default="", metavar="MODULE:FUNCTION", help="of an encoder of your own"
    )
    parser.add_argument("--no-page", action="store_true", help="write no page")
    return parser


def main(argv: Sequence[str]) -> int:
    """Entry point of ``declip search``; returns the exit status.

    Raises:
        DeclipError: a wrong option, no such index, or an encoder that cannot read the query.
    """
    arguments = build_parser().parse_args(list(argv))
    check_location(arguments.out)
    store = Store(arguments.out)
    if (arguments.text is None) == (arguments.image is None):
        raise DeclipError("give either a TEXT or --image FILE: what to look for.")
    if arguments.text is not None and not arguments.text.strip():
        raise DeclipError("TEXT is empty; say in words what to look for.")
    if arguments.num_hits < 1:
        raise DeclipError(f"-k is {arguments.num_hits}; it must be at least 1.")
    picture = None if arguments.image is None else _read_picture(arguments.image)
    loaded = open_index(store, arguments.index)
    encoder = encoder_of(
        store, loaded.info, device=arguments.device, factory=arguments.encoder_factory
    )
    vector = query_vector(encoder, loaded, text=arguments.text, picture=picture)
    hits = find(store, loaded, vector, arguments.num_hits)
    print("\n".join(hit_lines(hits)))
    if not _is_exact(loaded):
        print("Scores are of the codes in the index, near the cosines of the vectors.")
    if not arguments.no_page:
        store.write_bytes(PAGE, page_of(store, loaded, hits, arguments.text or "", picture))
        print(f"Page: {store.path(PAGE)}")
    return 0


def _is_exact(loaded: LoadedIndex) -> bool:
    return str(loaded.info["index_key"]).rpartition(",")[2] in ("Flat", "SQfp16")


def _read_picture(name: str) -> bytes:
    try:
        data = Path(name).read_bytes()
    except OSError as error:
        raise DeclipError(f"--image is {name!r}: {error.strerror}; name a picture file.") from error
    return data


def open_index(store: Store, name: str) -> LoadedIndex:
    """The index of that name; the nearest is offered for a misspelt one.

    Raises:
        DeclipError: there is none, or it is damaged.
    """
    known = [n for n in store.list_folders("index") if store.exists(info_path(n))]
    if name not in known:
        near = did_you_mean(name, known) if known else " There is none; run the index stage first."
        raise DeclipError(f"{store.url!r} has no index {name!r}.{near}")
    return load_index(store, name)


def encoder_of(
    store: Store, info: Mapping[str, Any], *, device: str = "cpu", factory: str = ""
) -> Encoder:
    """The encoder by which the rows of an index were embedded.

    Raises:
        DeclipError: it cannot be loaded, or has other weights now.
    """
    name = str(info["encoder"])
    if name.startswith("checkpoint:"):
        factory = factory or FACTORY
    encoder = load_encoder(name, root=store.url, device=device, factory=factory)
    if encoder.digest != info["encoder_digest"]:
        raise DeclipError(
            f"encoder {name!r} has other weights now than when the index was built: scores would "
            "mean nothing; embed and index again, or put the old weights back."
        )
    return encoder


def query_vector(
    encoder: Encoder, loaded: LoadedIndex, *, text: str | None, picture: bytes | None
) -> npt.NDArray[np.float32]:
    """The query as a row of the index would be: (1, dim), unit length.

    Raises:
        DeclipError: the encoder does not read such queries, or the picture cannot be read.
    """
    is_text = text is not None
    if not (encoder.supports_text if is_text else encoder.supports_image):
        what = "texts" if is_text else "pictures"
        raise DeclipError(
            f"the index is of encoder {encoder.name!r}, which does not "
            f"read {what}; search for {'a picture' if is_text else 'a TEXT'} instead, or index "
            "embeddings of an encoder that reads both, such as open_clip:MODEL/PRETRAINED."
        )
    if text is not None:
        own = encoder.encode_text([text])
    else:
        assert picture is not None
        try:
            own = encoder.encode_image([picture])
        except (OSError, ValueError, DeclipError) as error:
            reason = str(error).rstrip(".")
            raise DeclipError(
                f"--image cannot be read as a picture ({reason}); name a picture file."
            ) from error
    # A row of both sides is text and picture one after the other; the query stands for either.
    num_sides = len(side_kinds(str(loaded.info["kind"])))
    whole = np.concatenate([own] * num_sides, axis=1).astype(np.float32)
    if whole.shape != (1, loaded.faiss_index.d):
        raise DeclipError(
            f"encoder {encoder.name!r} gives vectors of {own.shape[1]} numbers, the index holds "
            f"{loaded.faiss_index.d}; rerun the stages that embed and index."
        )
    norm = float(np.linalg.norm(whole))
    if not np.isfinite(norm) or norm == 0:
        raise DeclipError(f"encoder {encoder.name!r} gives no usable vector for this query.")
    return np.ascontiguousarray(whole / norm)


def find(
    store: Store, loaded: LoadedIndex, vector: npt.NDArray[np.float32], num_hits: int
) -> list[Hit]:
    """The nearest samples, best first; fewer where the index has fewer within its lists."""
    scores, rows = search(loaded.faiss_index, vector, min(num_hits, loaded.num_rows))
    found = [(int(row), float(score)) for row, score in zip(rows[0], scores[0], strict=True)]
    found = sorted(((r, s) for r, s in found if r >= 0), key=lambda hit: (-hit[1], hit[0]))
    named = {row: (str(loaded.keys[row]), str(loaded.shards[row])) for row, _ in found}
    known: dict[str, dict[str, Any]] = {}
    for shard in sorted({shard for _, shard in named.values()}):
        keys = pa.array([key for key, own in named.values() if own == shard], pa.string())
        known |= _rows_of(store, shard, keys)
    return [
        Hit(
            key=named[row][0],
            shard=named[row][1],
            score=score,
            caption=str(known.get(named[row][0], {}).get("caption") or ""),
            url=str(known.get(named[row][0], {}).get("url") or ""),
        )
        for row, score in found
    ]


def _rows_of(store: Store, shard: str, keys: pa.Array) -> dict[str, dict[str, Any]]:
    """Caption and URL by key; empty for an index that was handed on without its shards."""
    path = layout.shard_parquet_path(shard)
    if not store.exists(path):
        return {}
    table = sidecars.read_table(store, path)
    columns = [name for name in ("key", "caption", "url") if name in table.column_names]
    chosen = table.select(columns).filter(pc.is_in(table.column("key"), value_set=keys))
    return {row["key"]: row for row in chosen.to_pylist()}


def hit_lines(hits: Sequence[Hit]) -> list[str]:
    """A table for the terminal."""
    if not hits:
        return ["nothing found: the index is empty."]
    width = max(len(hit.key) for hit in hits)
    lines = [f"{'':>4} {'score':>7}  {'key':<{width}}  {'caption':<{CAPTION_CHARS}}  url"]
    for number, hit in enumerate(hits, 1):
        caption = textwrap.shorten(hit.caption, CAPTION_CHARS, placeholder="...")
        row = f"{number:>3}. {hit.score:>7.4f}  {hit.key:<{width}}  {caption:<{CAPTION_CHARS}}"
        lines.append(f"{row}  {hit.url}".rstrip())
    return lines


def page_of(
    store: Store, loaded: LoadedIndex, hits: Sequence[Hit], text: str, picture: bytes | None
) -> bytes:
    """The hits with their pictures, as one HTML file."""
    by_shard: dict[str, list[str]] = {}
    for hit in hits:
        if store.exists(layout.tar_path(hit.shard)):
            by_shard.setdefault(hit.shard, []).append(hit.key)
    pictures = pictures_of(store, by_shard)
    cells = [
        Cell(
            image=pictures.get(hit.key, (None, ""))[0],
            caption=hit.caption,
            note=f"{hit.score:.4f} {hit.key}",
        )
        for hit in hits
    ]
    rows, titles = [cells], ["Nearest first"]
    if picture is not None:
        rows, titles = [[Cell(image=picture, caption="")], cells], ["Looked for", "Nearest first"]
    info = loaded.info
    summary = (
        f"Index {info['index_key']} of {loaded.num_rows:,} rows ({info['kind']}) by "
        f"{info['encoder']}; recall@10 {info['recall@10']:.3f}.",
    )
    title = f"Search: {text}" if text else "Search for a picture"
    return sheet_html(title, rows, summary=summary, row_titles=titles)
