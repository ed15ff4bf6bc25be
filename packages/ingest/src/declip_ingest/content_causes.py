"""Why so many rows failed, the side of the list, the pictures and the settings.

As in :mod:`declip_ingest.causes`, each cause is a small function of the figures.
"""

from declip_ingest.causes import (
    CROWD,
    DEAD_SHARE,
    MIN_SHARE,
    Cause,
    Evidence,
    matters,
    percent,
    rewritten_names,
)


def opted_out(e: Evidence) -> Cause | None:
    """Owners who do not want it."""
    reasons = e.stats.in_group("opt_out")
    count = e.stats.count(*reasons)
    if not matters(e.stats, count):
        return None
    remedy = ["it is respected, and nothing is to be done"]
    if e.stats.count("robots_unavailable"):
        remedy.append("declip refetch --reason robots_unavailable")
    return Cause(
        name="opted_out",
        title="owners forbid the use, by robots.txt, by a header, or by asking for removal",
        num_rows=count,
        evidence=(", ".join(f"{e.stats.count(r):,} times {r}" for r in sorted(reasons)),),
        remedy=tuple(remedy),
    )


def placeholders(e: Evidence) -> Cause | None:
    """Notices in place of photos, found ones and suspected ones."""
    found = e.stats.count("placeholder", "repeated_image")
    suspected = sum(image.num_urls for image in e.repeats)
    if not matters(e.stats, found) and not e.repeats:
        return None
    evidence = [f"{found:,} rows failed as such"] if found else []
    if e.repeats:
        worst = e.repeats[0]
        evidence.append(
            f"pictures that came from many URLs and are still in the dataset: {len(e.repeats):,}, "
            f"from {suspected:,} URLs in all; {worst.sha256[:12]}... from {worst.num_urls:,}, see "
            f"{worst.key}"
        )
    return Cause(
        name="placeholders",
        title="notices such as 'photo unavailable' in place of photos",
        num_rows=found + suspected,
        evidence=tuple(evidence),
        remedy=(
            "look at the samples named below; write the digests of notices to a file",
            "declip optout FILE --out FOLDER drops them from this dataset",
            "--ingest.placeholders FILE refuses them in the next",
        ),
    )


def wrong_hashes(e: Evidence) -> Cause | None:
    """Bytes that are not those of the list."""
    other = e.stats.count("hash_mismatch")
    if not matters(e.stats, other):
        return None
    compared = other + e.stats.num_success
    column = e.ingest.hash_column or "expected_hash"
    figures = f"{percent(other, compared)} pictures have other bytes than column {column!r} says"
    if other > CROWD * compared:
        return Cause(
            name="wrong_hash_column",
            title=f"column {column!r} is probably no digest of the picture's file",
            num_rows=other,
            evidence=(figures,),
            remedy=(
                "name the right column with --ingest.hash-column, or switch off "
                "--ingest.verify-hash; then ingest again",
            ),
        )
    return Cause(
        name="changed_pictures",
        title="pictures were changed since the list was made",
        num_rows=other,
        evidence=(
            figures,
            "for comparison: about 5 % of LAION-400M, 14 % of DataComp-1B, 15 % of LAION-5B",
        ),
        remedy=("nothing is to be done: the picture of the list is not there any more",),
    )


def strict_sizes(e: Evidence) -> Cause | None:
    """Settings that refuse pictures by their size."""
    reasons = e.stats.in_group("size")
    count = e.stats.count(*reasons)
    if not matters(e.stats, count, DEAD_SHARE):
        return None
    settings = {
        "image_too_small": f"--ingest.min-image-size is {e.ingest.min_image_size}",
        "aspect_ratio_too_large": f"--ingest.max-aspect-ratio is {e.ingest.max_aspect_ratio}",
        "too_many_pixels": f"--ingest.max-pixels is {e.ingest.max_pixels}",
    }
    ordered = sorted(reasons, key=lambda r: (-e.stats.count(r), r))
    return Cause(
        name="strict_sizes",
        title="pictures are refused by their size, as the settings say",
        num_rows=count,
        evidence=tuple(f"{e.stats.count(r):,} times {r}; {settings[r]}" for r in ordered),
        remedy=("if that is not what you want: change the setting and ingest again",),
    )


def decoder_trouble(e: Evidence) -> Cause | None:
    """Pictures that kill the decoder, or that it has too little time or memory for."""
    reasons = [r for r in e.stats.in_group("decoder") if r != "bad_boxes"]
    count = e.stats.count(*reasons)
    if not matters(e.stats, count, MIN_SHARE / 20):
        return None
    return Cause(
        name="decoder_trouble",
        title="the decoder was killed, or had too little time or memory",
        num_rows=count,
        evidence=(
            ", ".join(f"{e.stats.count(r):,} times {r}" for r in sorted(reasons)),
            "the files lie in quarantine/",
        ),
        remedy=(
            "declip refetch --reason decoder "
            f"--ingest.decode-timeout-seconds {3 * e.ingest.decode_timeout_seconds:g} "
            f"--ingest.decode-memory-bytes {2 * e.ingest.decode_memory_bytes}",
        ),
    )


def no_pictures(e: Evidence) -> Cause | None:
    """Answers that are pages, or pictures that are broken or of another kind."""
    if rewritten_names(e):
        return None
    reasons = e.stats.in_group("image")
    count = e.stats.count(*reasons)
    if not matters(e.stats, count, DEAD_SHARE):
        return None
    hosts = e.stats.hosts_with(reasons).most_common(3)
    return Cause(
        name="no_pictures",
        title="what came was no picture, a broken one, or of a format that is not taken",
        num_rows=count,
        evidence=(
            ", ".join(f"{e.stats.count(r):,} times {r}" for r in sorted(reasons)),
            f"most from {', '.join(f'{host} ({n:,})' for host, n in hosts)}",
        ),
        remedy=("look at some of the URLs; more formats: --ingest.formats, then ingest again",),
    )


def bad_list(e: Evidence) -> Cause | None:
    """Rows that could not be asked for."""
    reasons = e.stats.in_group("row")
    reasons += [r for r in ("bad_url", "bad_scheme", "bad_boxes") if e.stats.count(r)]
    count = e.stats.count(*reasons)
    if not matters(e.stats, count):
        return None
    return Cause(
        name="bad_list",
        title="rows of the list have no URL or caption that can be used",
        num_rows=count,
        evidence=(", ".join(f"{e.stats.count(r):,} times {r}" for r in sorted(reasons)),),
        remedy=("look at the list (declip sources), and at --ingest.url-column and its like",),
    )
