"""Why so many rows failed, the network's side: each cause is a small function of the figures.

A function returns None where its cause does not show. Without a probe the ledger alone decides.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from declip_ingest.ledger_stats import LedgerStats
from declip_ingest.probe import Probe, host_name, is_address
from declip_ingest.repeats import RepeatedImage
from declip_ingest.stages import DownloadShards

MIN_ROWS = 5
"""Fewer rows are no pattern."""
MIN_SHARE = 0.02
"""Of all rows: what explains less is not worth a word."""
DEAD_SHARE = 0.05
"""Links die; fewer than these are in every list."""
CROWD = 0.5
"""Share of rows above which a few hosts, or one reason, are said to dominate."""
NO_ANSWER_GROUPS = ("dns", "connection", "timeout")
THROTTLES = ("http_429", "http_503", "http_403")
GONE = ("http_404", "http_410", "http_451")


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """All that a cause may be judged by."""

    stats: LedgerStats
    """Figures of the ledger."""
    ingest: DownloadShards
    """Settings that the last ingest ran with."""
    probe: Probe | None = None
    """What a look from this machine found."""
    repeats: Sequence[RepeatedImage] = ()
    """Pictures that came from many URLs."""
    proxies: tuple[str, ...] = ()
    """Variables of the environment that name a proxy."""


@dataclass(frozen=True, kw_only=True)
class Cause:
    """Something that explains failed rows."""

    name: str
    """Stable, for programs."""
    title: str
    """One line."""
    num_rows: int
    """Failed rows that it explains."""
    evidence: tuple[str, ...]
    """What speaks for it, with figures."""
    remedy: tuple[str, ...]
    """What to do; commands begin with ``declip``."""


def matters(stats: LedgerStats, count: int, share: float = MIN_SHARE) -> bool:
    """Whether so many rows are worth a word."""
    return count >= MIN_ROWS and stats.share(count) >= share


def percent(count: int, total: int) -> str:
    """``1,200 of 4,000 (30 %)``."""
    return f"{count:,} of {total:,} ({100 * count / max(total, 1):.0f} %)"


def is_offline(stats: LedgerStats) -> bool:
    """Nothing answered, ever."""
    asked = stats.count(*stats.in_group(*NO_ANSWER_GROUPS))
    return stats.num_answered == 0 and asked >= MIN_ROWS


def no_network(e: Evidence) -> Cause | None:
    """Not one host answered."""
    if not is_offline(e.stats):
        return None
    reasons = e.stats.in_group(*NO_ANSWER_GROUPS)
    count = e.stats.count(*reasons)
    evidence = [f"none of {count:,} rows had an answer from any host"]
    again = f"declip refetch --reason {','.join(sorted(reasons))}"
    proxies = e.probe.proxies if e.probe else e.proxies
    if e.probe and e.probe.has_network:
        evidence.append("the network works now")
        return Cause(
            name="no_network",
            title="there was no network while this was ingested; there is now",
            num_rows=count,
            evidence=tuple(evidence),
            remedy=(again,),
        )
    if e.probe:
        evidence.append("no public address takes a connection from this machine")
    if proxies:
        return Cause(
            name="proxy_only",
            title="this machine reaches the web by a proxy alone, and none is used",
            num_rows=count,
            evidence=(*evidence, f"a proxy is set by {', '.join(proxies)}"),
            remedy=(
                "run ingest where direct connections are allowed: a proxy would choose the "
                "addresses itself, past the guard against private ones",
                again,
            ),
        )
    return Cause(
        name="no_network",
        title="this machine has no network",
        num_rows=count,
        evidence=tuple(evidence),
        remedy=("connect it, or ingest where there is a network", again),
    )


def resolver_overloaded(e: Evidence) -> Cause | None:
    """Names that exist did not resolve."""
    failed = e.stats.count("dns_failure")
    if is_offline(e.stats) or not matters(e.stats, failed):
        return None
    hosts = e.stats.hosts_with(["dns_failure"])
    alive = sum(count for host, count in hosts.items() if e.stats.is_alive(host))
    evidence = [f"{percent(failed, e.stats.num_rows)} rows failed in the look-up of their host"]
    if alive:
        evidence.append(f"{alive:,} of them on hosts that answered other rows: the names exist")
    probed = e.probe.of_reason("dns_failure") if e.probe else []
    resolved = sum(bool(host.addresses) for host in probed)
    explained = failed if e.stats.share(failed) > e.ingest.max_dns_failure_share else alive
    if probed:
        evidence.append(f"asked slowly, {resolved} of {len(probed)} such names resolve")
        explained = max(alive, round(failed * resolved / len(probed)))
    if not matters(e.stats, explained):
        return None
    fewer = max(1, e.ingest.thread_count // 4)
    return Cause(
        name="resolver_overloaded",
        title="the resolver of this machine does not keep up with the look-ups",
        num_rows=explained,
        evidence=tuple(evidence),
        remedy=(
            "run a caching resolver on this machine (knot-resolver, bind9 or unbound) and name it "
            "in /etc/resolv.conf",
            f"declip refetch --reason dns --ingest.thread-count {fewer}",
        ),
    )


def rewritten_names(e: Evidence) -> Cause | None:
    """Public names lead to private addresses, or pages come in place of pictures everywhere."""
    refused = e.stats.hosts_with(["forbidden_address"])
    named = {host: n for host, n in refused.items() if not is_address(host_name(host))}
    count = sum(named.values())
    false = e.probe.false_addresses if e.probe else ()
    probed = e.probe.of_reason("forbidden_address") if e.probe else []
    seen = {address for host in probed for address in host.addresses}
    pages = e.stats.count("not_image")
    hosts = e.stats.hosts_with(["not_image"])
    is_portal = len(hosts) >= MIN_ROWS and pages > CROWD * max(e.stats.num_answered, 1)
    if not (matters(e.stats, count) and len(named) >= MIN_ROWS) and not (
        matters(e.stats, pages) and (is_portal or false)
    ):
        return None
    evidence = []
    if named:
        evidence.append(f"{len(named):,} names resolved to addresses that are not public")
    if seen:
        evidence.append(f"they resolve to {', '.join(sorted(seen)[:3])}")
    if false:
        evidence.append(f"a name that cannot exist resolves to {', '.join(false[:3])}")
    if is_portal:
        evidence.append(f"{len(hosts):,} hosts sent a page in place of the picture")
    return Cause(
        name="rewritten_names",
        title="somebody answers in the web's place: a captive portal, or a resolver that lies",
        num_rows=count + (pages if is_portal or false else 0),
        evidence=tuple(evidence),
        remedy=(
            "log in to the network, or use a resolver that answers truthfully (run your own)",
            "declip refetch --reason forbidden_address,not_image",
        ),
    )


def own_certificates(e: Evidence) -> Cause | None:
    """Every certificate is refused: this machine's clock or its list of authorities."""
    failed = e.stats.count("tls_error")
    hosts = e.stats.hosts_with(["tls_error"])
    reached = failed + e.stats.num_https_success
    if not matters(e.stats, failed) or failed < 0.9 * reached or len(hosts) < 3:
        return None
    return Cause(
        name="own_certificates",
        title="this machine takes no host's certificate: its clock or its authorities are wrong",
        num_rows=failed,
        evidence=(
            f"{percent(failed, reached)} handshakes failed, with {len(hosts):,} hosts",
            f"{e.stats.num_https_success:,} pictures came by https",
        ),
        remedy=(
            "set the clock, and install the system's CA certificates (ca-certificates)",
            "declip refetch --reason tls",
        ),
    )


def foreign_certificates(e: Evidence) -> Cause | None:
    """Some hosts' certificates are not valid."""
    failed = e.stats.count("tls_error")
    if not matters(e.stats, failed) or own_certificates(e):
        return None
    return Cause(
        name="foreign_certificates",
        title="certificates of some hosts are not valid",
        num_rows=failed,
        evidence=(f"{failed:,} rows of {len(e.stats.hosts_with(['tls_error'])):,} hosts",),
        remedy=("nothing is to be done here: those hosts let them lapse",),
    )


def throttled(e: Evidence) -> Cause | None:
    """Hosts that we asked too often."""
    reasons = [r for r in THROTTLES if e.stats.count(r)]
    hosts = e.stats.hosts_with(reasons)
    # A lone 403 is one picture's matter; many of one host are its answer to us.
    asked = {h: n for h, n in hosts.items() if n >= MIN_ROWS or e.stats.rows_of(h, ["http_429"])}
    count = sum(asked.values())
    if not matters(e.stats, count):
        return None
    top = sorted(asked.items(), key=lambda item: (-item[1], item[0]))[:3]
    codes = ", ".join(f"{e.stats.count(r):,} times {r[5:]}" for r in reasons)
    remedy = [
        f"declip refetch --reason {','.join(reasons)} --ingest.host-requests-per-second 2 "
        "--ingest.host-connections 2"
    ]
    if not e.ingest.user_agent_contact:
        remedy.insert(0, "say who you are with --ingest.user-agent-contact: it is empty")
    return Cause(
        name="throttled",
        title="hosts refuse us: they were asked too often, or want to know who asks",
        num_rows=count,
        evidence=(
            f"status codes: {codes}",
            f"{percent(count, count + e.stats.num_success)} of what such hosts and good ones "
            f"answered; most by {', '.join(f'{h} ({n:,})' for h, n in top)}",
        ),
        remedy=tuple(remedy),
    )


def slow_line(e: Evidence) -> Cause | None:
    """Timeouts everywhere, while what succeeds is slow too."""
    failed = e.stats.count("timeout")
    hosts = e.stats.hosts_with(["timeout"])
    alive = sum(n for host, n in hosts.items() if e.stats.is_alive(host))
    late = e.stats.reasons[""].milliseconds.quantile(0.95) if e.stats.num_success else None
    if is_offline(e.stats) or not matters(e.stats, failed) or late is None:
        return None
    limit = 1000 * e.ingest.timeout_seconds
    is_spread = hosts.most_common(1)[0][1] <= CROWD * failed and len(hosts) >= MIN_ROWS
    if not (is_spread and alive >= CROWD * failed and late >= limit / 2):
        return None
    rate = e.stats.bytes_per_second.quantile(0.5) or 0
    longer = 3 * e.ingest.timeout_seconds
    return Cause(
        name="slow_line",
        title="the line is too slow for so many downloads at a time",
        num_rows=failed,
        evidence=(
            f"{failed:,} rows of {len(hosts):,} hosts timed out, {alive:,} on hosts that answer",
            f"even of the successes 1 in 20 took over {late / 1000:.1f} s of "
            f"{e.ingest.timeout_seconds:g} s; half of them came at under {rate:,} bytes a second",
        ),
        remedy=(
            "run fewer tasks at a time (fewer cores for Ray)",
            f"declip refetch --reason timeout --ingest.timeout-seconds {longer:g} "
            f"--ingest.thread-count {max(1, e.ingest.thread_count // 4)}",
        ),
    )


def hosts_down(e: Evidence) -> Cause | None:
    """Hosts none of whose rows had an answer, while others did."""
    reasons = e.stats.in_group("connection", "timeout")
    hosts = e.stats.hosts_with(reasons)
    down = {host: n for host, n in hosts.items() if not e.stats.is_alive(host)}
    count = sum(down.values())
    if is_offline(e.stats) or not matters(e.stats, count, DEAD_SHARE):
        return None
    top = sorted(down.items(), key=lambda item: (-item[1], item[0]))[:3]
    evidence = [
        f"{count:,} rows of {len(down):,} hosts that never answered; most of "
        f"{', '.join(f'{host} ({n:,})' for host, n in top)}"
    ]
    probed = [h for h in (e.probe.of_reason(*reasons) if e.probe else []) if h.host in down]
    if probed:
        back = sum(not h.now or h.now.startswith("http_") for h in probed)
        evidence.append(f"{back} of {len(probed)} such hosts answer now")
    return Cause(
        name="hosts_down",
        title="some hosts are down, or were while this was ingested",
        num_rows=count,
        evidence=tuple(evidence),
        remedy=("try again another day", "declip refetch --reason timeout,connection"),
    )


def failing_servers(e: Evidence) -> Cause | None:
    """Hosts with faults of their own, and broken transfers."""
    reasons = [r for r in e.stats.reasons if r[:6] == "http_5" and r != "http_503"]
    reasons += [r for r in ("short_body", "empty_body", "bad_response") if e.stats.count(r)]
    reasons += [r for r in e.stats.in_group("connection") if r == "connection_reset"]
    hosts = e.stats.hosts_with(reasons)
    count = sum(n for host, n in hosts.items() if e.stats.is_alive(host))
    if not matters(e.stats, count, DEAD_SHARE):
        return None
    return Cause(
        name="failing_servers",
        title="servers had faults of their own",
        num_rows=count,
        evidence=(", ".join(f"{e.stats.count(r):,} times {r}" for r in sorted(reasons)),),
        remedy=(f"declip refetch --reason {','.join(sorted(reasons))}",),
    )


def dead_links(e: Evidence) -> Cause | None:
    """Pages and names that are gone."""
    gone = e.stats.count(*GONE)
    overload = resolver_overloaded(e)
    names = e.stats.count("dns_failure") - (overload.num_rows if overload else 0)
    count = gone + (0 if is_offline(e.stats) else names)
    if not matters(e.stats, count, DEAD_SHARE) or is_offline(e.stats):
        return None
    return Cause(
        name="dead_links",
        title="pictures that are gone from the web",
        num_rows=count,
        evidence=(
            f"{gone:,} rows answered 404, 410 or 451, {names:,} names do not exist",
            "for comparison: of CC3M's 3,318,333 pairs one crawl of 2021 had 2,905,954; of CC12M's "
            "12 million, 10 to 11 million can still be had; of DeCLIP's YFCC15M list 2 % were gone "
            "by 2023",
        ),
        remedy=("nothing is to be done: fetching again does not bring them back",),
    )
