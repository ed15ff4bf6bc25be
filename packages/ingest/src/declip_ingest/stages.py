"""Ingest as a stage: one task downloads one shard."""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from declip_ingest.digests import read_digests
from declip_ingest.fetch import FetchPolicy
from declip_ingest.image_policy import ImagePolicy
from declip_ingest.table import PairTable, open_pairs, plan_shards, table_digest
from declip_shards import DeclipError, Store, TaskStats, layout
from declip_shards.errors import did_you_mean
from declip_shards.manifest import canonical_json, settings_of

NOT_HASHED = {"fingerprint": False}
"""Of settings that cannot change a byte of the output."""
HASH_COLUMN = "expected_hash"
"""What the step that reads lists calls a column of digests; taken where the table has it."""
BOXES_COLUMN = "boxes"
"""What that step calls a column of boxes to blur; taken where the table has it."""
SHARD_FILE = re.compile(r"(\d{5,})(?:\.tar|\.tar\.idx|\.parquet|_stats\.json)")
"""Names of a shard's files."""
SETTINGS_PATH = "ledger/ingest/settings.json"
"""All settings of the last ingest, for commands that go on with its work."""
START_SECONDS = 300.0
"""For a worker to load what it needs, on top of what a shard may take."""


@dataclass(frozen=True, kw_only=True)
class DownloadShards:
    """Download a table's pictures into shards of img2dataset's layout, a shard a task."""

    num_cpus: ClassVar[float] = 1
    num_gpus: ClassVar[float] = 0

    root: str = field(default="", metadata=NOT_HASHED)
    """Folder of the dataset: a path or any fsspec URL."""
    # Where the list lies cannot change a byte; what it says is known by table_sha256, or by the
    # manifest of the step that wrote it.
    table: str = field(default="source/pairs.parquet", metadata=NOT_HASHED)
    """Table of URLs and captions: a path within the dataset, an absolute path, or a URL."""
    table_format: Literal["auto", "parquet", "csv", "tsv", "json", "jsonl"] = "auto"
    """What the table is; auto goes by the ending of its name."""
    table_sha256: str = ""
    """Digest of the table's file that the run was planned for; another one is refused."""
    url_column: str = "url"
    """The table's column of URLs."""
    caption_column: str = "caption"
    """The table's column of captions."""
    extra_columns: tuple[str, ...] = ("*",)
    """Further columns carried into the shards; * for all of them."""
    shard_size: int = 1000
    """Rows of a shard, failed ones included."""
    image_size: int = 256
    """Pixels of the stored pictures' side or sides, as resize_mode says."""
    resize_mode: Literal["border", "keep_ratio", "keep_ratio_largest", "center_crop", "no"] = (
        "keep_ratio"
    )
    """img2dataset's modes: pad to a square, shorter side, longer side, crop a square, leave."""
    resize_only_if_bigger: bool = False
    """Leave pictures that are already small enough at their size."""
    resizer: Literal["scaled", "exact", "img2dataset"] = "scaled"
    """scaled: JPEG decoded at a fraction where exact enough; exact: img2dataset's pixels."""
    skip_reencode: bool = False
    """Keep a baseline JPEG that needs no resize as it was encoded, without its metadata."""
    encode_quality: int = 90
    """JPEG quality of the stored pictures, 1 to 100."""
    optimize_huffman: bool = True
    """Huffman tables made for each picture: 2 to 4 % fewer bytes for 0.4 ms of processor time."""
    boxes_column: str = ""
    """Column of boxes to blur (left, top, right, bottom, 0 to 1); empty: boxes, if there; none."""
    min_image_size: int = 0
    """Pixels that the shorter side must have at least."""
    max_aspect_ratio: float | None = 20.0
    """Longer side over shorter side at most; none is no limit."""
    max_pixels: int = 64_000_000
    """Width times height at most, judged before decoding."""
    formats: tuple[str, ...] = ("jpeg", "png", "webp", "gif")
    """Picture formats taken (avif and bmp can be added); of an animation the first frame."""
    decode_processes: int = field(default=1, metadata=NOT_HASHED)
    """Child processes that decode, in one task."""
    decode_timeout_seconds: float = 20.0
    """For one picture to be decoded and resized."""
    decode_memory_bytes: int = 1 << 30
    """Memory that one decoder may take; a picture that wants more fails."""
    hash_column: str = ""
    """Column of digests (hex, or sha256:hex); empty: expected_hash, if there; none."""
    verify_hash: bool = True
    """Refuse files whose bytes are not those that the list's digest names."""
    # Where the files lie cannot change a byte; what they say is known by lists_sha256.
    blocklists: tuple[str, ...] = field(default=(), metadata=NOT_HASHED)
    """Files of sha256, md5 or sha512 digests whose bytes are never written."""
    placeholders: tuple[str, ...] = field(default=(), metadata=NOT_HASHED)
    """Files of digests of pictures that stand for a photo that is gone."""
    placeholder_repeats: int = 10
    """The same bytes from so many URLs of one shard are a placeholder; 0 is never."""
    lists_sha256: tuple[str, ...] = ()
    """Digests of blocklists and placeholders that the run was planned for; others are refused."""
    thread_count: int = field(default=64, metadata=NOT_HASHED)
    """Downloads at the same time in one task."""
    host_connections: int = field(default=16, metadata=NOT_HASHED)
    """Downloads at the same time from one host, in one task."""
    host_requests_per_second: float = field(default=0.0, metadata=NOT_HASHED)
    """Requests a second to one host at most, in one task; 0 is no limit."""
    robots: Literal["obey", "ignore"] = "obey"
    """Whether a host's robots.txt is asked, once, and obeyed."""
    timeout_seconds: float = 10.0
    """Of work for one URL in all: look-up, connections, redirects, retries and body."""
    connect_timeout_seconds: float = 5.0
    """For one connection to be made."""
    first_byte_timeout_seconds: float = 10.0
    """For one request until its headers are there."""
    retries: int = 2
    """Further attempts after a passing failure, while timeout_seconds lasts."""
    max_redirects: int = 5
    """Redirects that are followed, each checked like the URL itself."""
    max_retry_after_seconds: float = 60.0
    """Longest pause that a server may ask for (Retry-After) and is given."""
    max_body_bytes: int = 20_000_000
    """Bytes of a picture's file at most."""
    min_bytes_per_second: int = 1024
    """A body slower than this after two seconds counts as a timeout; 0 is no limit."""
    allow_addresses: tuple[str, ...] = ()
    """host:port that may be reached though not public or of another port than 80 and 443."""
    insecure_tls: bool = False
    """Accept certificates that are not valid."""
    user_agent_contact: str = field(default="", metadata=NOT_HASHED)
    """Your e-mail address or URL, told to every web server in the User-Agent header."""
    disallowed_header_directives: tuple[str, ...] = ("noai", "noimageai", "noindex", "noimageindex")
    """X-Robots-Tag directives that forbid a picture's use."""
    max_dns_failure_share: float = 0.3
    """A shard in which more of the host names than this do not resolve fails, for a later run."""
    memory_bytes: int = field(default=1_000_000_000, metadata=NOT_HASHED)
    """Memory that Ray keeps free for one task; 0 asks for none."""
    task_timeout_seconds: float = field(default=0.0, metadata=NOT_HASHED)
    """For one shard, after which its task is started anew; 0 is what its URLs may take."""

    def __post_init__(self) -> None:
        # The policies' own checks: a wrong setting is refused before anything is fetched.
        self.fetch_policy()
        self.image_policy()
        plan_shards(0, self.shard_size)
        limits = (
            ("thread_count", 1, 4096, 64),
            ("decode_processes", 1, 256, 1),
            ("decode_memory_bytes", 256 << 20, 1 << 40, 1 << 30),
            ("placeholder_repeats", 0, 1 << 30, 10),
            ("max_dns_failure_share", 0, 1, 0.3),
            ("memory_bytes", 0, 1 << 50, 1_000_000_000),
        )
        for name, least, most, advice in limits:
            if not least <= getattr(self, name) <= most:
                raise DeclipError(
                    f"{name} is {getattr(self, name)} but must lie between {least} and {most}; "
                    f"try {advice}."
                )
        if self.placeholder_repeats == 1:
            raise DeclipError(
                "placeholder_repeats is 1, which would take every picture for a placeholder; give "
                "0 for none, or 2 and more."
            )
        for name in ("decode_timeout_seconds", "task_timeout_seconds"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0) or (name[0] == "d" and not value):
                raise DeclipError(f"{name} is {value}; give seconds above 0, such as 20.")
        if self.table_sha256 and len(self.table_sha256) != 64:
            raise DeclipError(
                f"table_sha256 is {self.table_sha256!r}, not a sha256 of 64 hex digits; leave it "
                "out or take it from sha256sum."
            )

    @property
    def task_seconds(self) -> float:
        """How long a shard may take: were all its URLs of one slow host that asks for pauses."""
        if self.task_timeout_seconds:
            return self.task_timeout_seconds
        rounds = math.ceil(self.shard_size / min(self.thread_count, self.host_connections))
        each = self.timeout_seconds + self.max_retry_after_seconds
        paced = self.shard_size / (self.host_requests_per_second or math.inf)
        return START_SECONDS + rounds * each + paced + 2 * self.shard_size

    def fetch_policy(self) -> FetchPolicy:
        """The limits of a fetch."""
        return FetchPolicy(**self._shared_with(FetchPolicy))

    def image_policy(self) -> ImagePolicy:
        """What pictures are taken and how they are stored."""
        return ImagePolicy(**self._shared_with(ImagePolicy))

    def _shared_with(self, policy: type[Any]) -> dict[str, Any]:
        """A policy's settings bear the same names here; a test holds that none is left out."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(policy)}

    def table_location(self) -> str:
        """The table's full path or URL."""
        if "://" in self.table or self.table.startswith("/"):
            return self.table
        store = Store(self.root)
        try:
            path = store.path(self.table)
        except ValueError as error:
            raise DeclipError(
                f"table {self.table!r} is taken from the dataset's folder {self.root!r} and leaves "
                "it; give an absolute path."
            ) from error
        return path if store.is_local else str(store.fs.unstrip_protocol(path))

    def open_table(self) -> PairTable:
        """Open and check the table.

        Raises:
            DeclipError: as :func:`declip_ingest.table.open_pairs`; or the file has changed.
        """
        location = self.table_location()
        if self.table_sha256:
            digest = table_digest(location)
            if digest != self.table_sha256.lower():
                raise DeclipError(
                    f"table {location!r} has changed: its sha256 is {digest[:12]}... but this run "
                    f"was planned for {self.table_sha256[:12]}...; restore it or start a new run."
                )
        return open_pairs(
            location,
            table_format=self.table_format,
            url_column=self.url_column,
            caption_column=self.caption_column,
            extra_columns=self.extra_columns,
        )

    def find_hash_column(self, names: Sequence[str]) -> str:
        """The table's column of digests to compare with; empty where there is none to compare.

        Raises:
            DeclipError: the named column is not carried.
        """
        return self._find("hash_column", HASH_COLUMN, names) if self.verify_hash else ""

    def find_boxes_column(self, names: Sequence[str]) -> str:
        """The table's column of boxes to blur; empty where nothing is blurred.

        Raises:
            DeclipError: the named column is not carried.
        """
        return self._find("boxes_column", BOXES_COLUMN, names)

    def _find(self, setting: str, usual: str, names: Sequence[str]) -> str:
        column: str = getattr(self, setting)
        if column == "none":
            return ""
        if column and column not in names:
            raise DeclipError(
                f"there is no carried column {column!r} (set by {setting})."
                f"{did_you_mean(column, names)}"
            )
        return column or (usual if usual in names else "")

    def digest_lists(self) -> tuple[str, ...]:
        """sha256 of each file of digests, as they are now."""
        return tuple(table_digest(f) for f in (*self.blocklists, *self.placeholders))

    def check_lists(self) -> None:
        """Read the files of digests.

        Raises:
            DeclipError: one is missing or damaged, or not the one that the run was planned for.
        """
        read_digests(self.blocklists, "blocklists")
        read_digests(self.placeholders, "placeholders")
        if self.lists_sha256 and self.lists_sha256 != self.digest_lists():
            raise DeclipError(
                "a file of blocklists or placeholders has changed since this run was planned; "
                "give the same command again, which plans it anew."
            )

    def tasks(self) -> Sequence[str]:
        """Shard numbers; the table is checked on the way, before anything is fetched."""
        pairs = self.open_table()
        self.find_hash_column(pairs.schema.names)
        self.find_boxes_column(pairs.schema.names)
        self.check_lists()
        return plan_shards(pairs.num_rows, self.shard_size)

    def is_done(self, task: str) -> bool:
        """Whether the shard's three files stand; its stats file is written last."""
        store = Store(self.root)
        paths = (layout.shard_stats_path(task), layout.tar_path(task))
        return all(store.exists(p) for p in (*paths, layout.shard_parquet_path(task)))

    def sweep(self, tasks: Sequence[str]) -> None:
        """Remove what earlier runs of other settings left of shards that are none of ``tasks``.

        A worker that outlives a killed driver finishes its shard, and nobody writes a receipt.
        """
        store, kept = Store(self.root), set(tasks)
        for folder in ("shards", layout.ledger_path("").rpartition("/")[0]):
            for name in store.list(folder):
                match = SHARD_FILE.fullmatch(name)
                if match and match[1] not in kept:
                    store.remove(f"{folder}/{name}")

    def worker(self) -> Callable[[str], TaskStats]:
        """Open the table; connections and decoders follow with the first shard."""
        # Where nothing is downloaded, the libraries that decode are not loaded.
        from declip_ingest.download import ShardDownloader

        self.check_lists()
        store_settings(self)
        return ShardDownloader(self)


def store_settings(stage: DownloadShards) -> None:
    """Keep all settings in the dataset, those too that its manifest leaves out."""
    store, settings = Store(stage.root), settings_of(stage, hashed_only=False)
    del settings["root"]  # the dataset may be moved
    data = canonical_json(settings)
    if not store.exists(SETTINGS_PATH) or store.read_bytes(SETTINGS_PATH) != data:
        store.write_bytes(SETTINGS_PATH, data)


def stored_ingest(root: str) -> DownloadShards:
    """The ingest that made the dataset at ``root``, with all its settings.

    Raises:
        DeclipError: there is none.
    """
    store = Store(root)
    try:
        settings: dict[str, Any] = json.loads(store.read_bytes(SETTINGS_PATH))
    except (FileNotFoundError, ValueError) as error:
        raise DeclipError(
            f"{root!r} holds no dataset that declip has begun to download ({SETTINGS_PATH} is "
            "missing); name its folder with --out."
        ) from error
    known = {f.name for f in dataclasses.fields(DownloadShards)}
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in settings.items()
        if name in known
    }
    return DownloadShards(**{**values, "root": root})
