"""``declip doctor ingest``: figures of the ledger, and the ranked causes of a low success rate."""

import asyncio
import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from declip_ingest import causes, content_causes
from declip_ingest.causes import Cause, Evidence
from declip_ingest.ledger_stats import LedgerStats, gather_stats
from declip_ingest.probe import FailedHost, Probe, Resolver, proxy_variables, run_probe
from declip_ingest.repeats import RepeatedImage, repeated_images
from declip_ingest.stages import DownloadShards, stored_ingest
from declip_shards import Store

PROBED_GROUPS = ("dns", "connection", "timeout", "tls", "url", "answer", "http")
"""Families of reasons that another request can tell something about."""
NOT_PROBED = ("bad_url", "bad_scheme", "forbidden_port")
"""Reasons of these families that lie in the URL alone."""
MAX_REPEATS = 20
"""Suspected placeholders that are listed."""

CAUSES: tuple[Callable[[Evidence], Cause | None], ...] = (
    causes.no_network,
    causes.rewritten_names,
    causes.own_certificates,
    content_causes.wrong_hashes,
    causes.resolver_overloaded,
    causes.throttled,
    causes.slow_line,
    content_causes.decoder_trouble,
    content_causes.placeholders,
    content_causes.strict_sizes,
    content_causes.bad_list,
    causes.hosts_down,
    causes.failing_servers,
    content_causes.no_pictures,
    causes.foreign_certificates,
    content_causes.opted_out,
    causes.dead_links,
)
"""Those that the user can mend first: of two that explain as much, the earlier is named first."""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What the doctor found."""

    stats: LedgerStats
    causes: tuple[Cause, ...]
    """Those that explain most rows first; none for a healthy dataset."""
    probe: Probe | None
    repeats: tuple[RepeatedImage, ...]
    """Pictures that came from many URLs and are still in the dataset."""
    notes: tuple[str, ...]
    """What else should be known of this machine."""


def rank_causes(evidence: Evidence) -> list[Cause]:
    """The causes that show, those that explain most rows first."""
    found = [cause for judge in CAUSES if (cause := judge(evidence)) is not None]
    return sorted(found, key=lambda cause: -cause.num_rows)


def diagnose(
    root: str,
    *,
    num_probes: int = 200,
    probe_seconds: float = 120.0,
    resolver: Resolver | None = None,
    on_host: Callable[[], None] = lambda: None,
    **probe_options: Any,
) -> Diagnosis:
    """Read a dataset's ledger, look at the network from here, and judge.

    Args:
        root: folder or URL of the dataset.
        num_probes: failed hosts that are asked once more; 0 makes no connection at all.
        probe_seconds: for the look in all.
        resolver: instead of this machine's.
        on_host: told of each host that was asked.
        probe_options: of :func:`declip_ingest.probe.run_probe`.

    Raises:
        DeclipError: no dataset, or no ledger there.
    """
    store, ingest = Store(root), stored_ingest(root)
    stats = gather_stats(store)
    limit = ingest.placeholder_repeats or DownloadShards.placeholder_repeats
    repeats = repeated_images(store, min_urls=limit)
    probe = None
    if num_probes:
        # One look a host and no second try: what counts is whether a slow asker is answered.
        policy = dataclasses.replace(ingest.fetch_policy(), retries=0, host_connections=1)
        probe = asyncio.run(
            run_probe(
                failed_hosts(stats, num_probes),
                policy,
                seconds=probe_seconds,
                resolver=resolver,
                on_host=on_host,
                **probe_options,
            )
        )
    evidence = Evidence(
        stats=stats,
        ingest=ingest,
        probe=probe,
        repeats=repeats,
        proxies=probe.proxies if probe else proxy_variables(os.environ),
    )
    return Diagnosis(
        stats=stats,
        causes=tuple(rank_causes(evidence)),
        probe=probe,
        repeats=tuple(repeats),
        notes=tuple(_notes(stats, ingest, probe)),
    )


def failed_hosts(stats: LedgerStats, limit: int) -> list[FailedHost]:
    """At most ``limit`` failed hosts, in proportion to the rows of each reason, no host twice."""
    reasons = [r for r in stats.in_group(*PROBED_GROUPS) if r not in NOT_PROBED]
    total = stats.count(*reasons)
    chosen: list[FailedHost] = []
    seen: set[str] = set()
    for reason in sorted(reasons, key=lambda r: (stats.count(r), r)):
        places = min(math.ceil(limit * stats.count(reason) / total), limit - len(chosen))
        for host, url in stats.sample_urls(reason):
            if places > 0 and host not in seen:
                seen.add(host)
                chosen.append(FailedHost(reason=reason, host=host, url=url))
                places -= 1
    return chosen


def _notes(stats: LedgerStats, ingest: DownloadShards, probe: Probe | None) -> list[str]:
    notes: list[str] = []
    if probe is None:
        return notes
    if not probe.has_network:
        notes.append("this machine reaches no public address: it has no network, or a proxy only")
    elif not probe.names_resolve:
        notes.append(
            "this machine reaches public addresses, but resolves no name: see its resolver"
        )
    if probe.proxies:
        notes.append(f"{', '.join(probe.proxies)} is set; ingest uses no proxy")
    wanted = 2 * ingest.thread_count + 256
    if 0 < probe.descriptor_limit < wanted:
        notes.append(
            f"a process may have {probe.descriptor_limit} files open, and {ingest.thread_count} "
            f"downloads at a time may want {wanted}: raise it with ulimit -n"
        )
    if probe.num_left:
        notes.append(f"{probe.num_left} hosts were not asked for want of time")
    if stats.num_forgotten_hosts:
        notes.append(
            f"{stats.num_forgotten_hosts:,} hosts with few rows each are not in the figures by host"
        )
    return notes


def diagnosis_text(found: Diagnosis) -> str:
    """The diagnosis for a person."""
    stats = found.stats
    lines = [
        f"{stats.num_success:,} of {stats.num_rows:,} rows are pictures "
        f"({100 * stats.share(stats.num_success):.1f} %)",
        "",
        *_reason_lines(stats),
    ]
    for number, cause in enumerate(found.causes, start=1):
        share = 100 * cause.num_rows / max(stats.num_failed, 1)
        of = f"{cause.num_rows:,} rows, {share:.0f} % of the failed ones"
        if cause.name == "placeholders":
            of = f"{cause.num_rows:,} rows"
        lines += ["", f"{number}. {cause.title} ({of})"]
        lines += [f"   - {text}" for text in cause.evidence]
        lines += [f"   > {text}" for text in cause.remedy]
    if not found.causes:
        lines += ["", "No cause stands out: single failures of many kinds are the web's."]
    if found.repeats:
        lines += ["", *_repeat_lines(found.repeats)]
    if found.probe:
        lines += ["", *_probe_lines(found.probe)]
    if found.notes:
        lines += ["", *(f"Note: {note}." for note in found.notes)]
    return "\n".join(lines)


def _reason_lines(stats: LedgerStats) -> list[str]:
    width = max([len(r) for r in stats.reasons] + [10]) + 2
    lines = [f"{'reason':<{width}}{'rows':>12}{'share':>9}{'median':>10}{'95 %':>10}  hosts"]
    for reason in sorted(stats.reasons, key=lambda r: (-stats.count(r), r)):
        about = stats.reasons[reason]
        times = (about.milliseconds.quantile(q) for q in (0.5, 0.95))
        shown = "".join(f"{'-' if ms is None else f'{ms:,} ms':>10}" for ms in times)
        top = [(h, n) for h, n in about.hosts.most_common(4) if h][:3]
        hosts = ", ".join(f"{host} {count:,}" for host, count in top)
        share = f"{100 * stats.share(about.count):.2f} %"
        lines.append(
            f"{reason or 'success':<{width}}{about.count:>12,}{share:>9}{shown}  {hosts}".rstrip()
        )
    return lines


def _repeat_lines(repeats: Sequence[RepeatedImage]) -> list[str]:
    """As a file of digests has them, which ingest and ``declip optout`` read."""
    lines = ["The same picture from many URLs; these lines make a list of placeholders:"]
    for image in repeats[:MAX_REPEATS]:
        lines.append(f"# {image.num_urls:,} URLs, such as {image.key} {image.url}")
        lines.append(image.sha256)
    if len(repeats) > MAX_REPEATS:
        lines.append(f"# ... and {len(repeats) - MAX_REPEATS:,} more (--json has them all)")
    return lines


def _probe_lines(probe: Probe) -> list[str]:
    """What failed hosts say now, by what they had failed for."""
    lines = [
        f"Looked for {probe.seconds:.0f} s: names {'resolve' if probe.names_resolve else 'fail'}, "
        f"public addresses {'answer' if probe.is_reachable else 'do not answer'}"
    ]
    for reason in sorted({host.reason for host in probe.hosts}):
        hosts = probe.of_reason(reason)
        good = sum(not host.now for host in hosts)
        lines.append(f"  {reason}: {len(hosts)} hosts asked again, {good} sent a file now")
    return lines


def diagnosis_json(found: Diagnosis) -> dict[str, Any]:
    """The diagnosis for a program: plain JSON values."""
    stats = found.stats
    return {
        "num_rows": stats.num_rows,
        "num_success": stats.num_success,
        "reasons": {
            reason or "success": {
                "count": about.count,
                "share": stats.share(about.count),
                "median_milliseconds": about.milliseconds.quantile(0.5),
                "p95_milliseconds": about.milliseconds.quantile(0.95),
                "hosts": dict(about.hosts.most_common(10)),
            }
            for reason, about in sorted(stats.reasons.items())
        },
        "causes": [dataclasses.asdict(cause) for cause in found.causes],
        "repeated_images": [dataclasses.asdict(image) for image in found.repeats],
        "probe": dataclasses.asdict(found.probe) if found.probe else None,
        "notes": list(found.notes),
    }
