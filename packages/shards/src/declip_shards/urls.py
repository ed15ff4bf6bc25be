"""The one form of a URL in which its spellings are compared."""

import ipaddress
import re
from functools import lru_cache
from urllib.parse import quote, urlsplit

SCHEMES = ("http", "https")
DEFAULT_PORTS = (80, 443)
_AROUND = "".join(map(chr, range(0x21)))
"""What is taken off both ends: space and control characters, as urlsplit does at the start."""
_BRACKETED = re.compile(r"\[([^\]]*)\](?::[0-9]*)?")
_PORT = re.compile(r":[0-9]*\Z")
_LABEL = re.compile(r"[a-z0-9_-]{1,63}")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_MAX_NAME = 253
_ESCAPE = re.compile(r"%[0-9a-fA-F]{2}")
_UNRESERVED = re.compile(r"[A-Za-z0-9._~-]")
_KEPT_BY_QUOTE = "%!#$&'()*+,/:;=?@[]~"
"""Of what has a meaning in a URL nothing is escaped; the rest (spaces, umlauts) is."""


def canonical_url(url: str) -> str:
    """The form in which URLs are compared, so that a removal does not miss by a spelling.

    http and https are one, on port 80 and 443 alike; a host is in lower case, its international
    name in ASCII (UTS #46), without a last dot, and an IPv4 address in its usual notation, also
    where it is given as one number, in octal or in hexadecimal; no fragment; escapes and dot
    segments as RFC 3986 sections 6.2.2 and 5.2.4 have them. The order of a query's parts and a
    trailing slash count. What ingest would ask one address for, in whatever spelling, is one form.

    Returns:
        The form, which is its own. What is no http URL comes back as it is, without space around.
    """
    text = url.strip(_AROUND)
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        return text
    if parts.scheme not in SCHEMES or not parts.netloc:
        return text
    user, at, netloc = parts.netloc.rpartition("@")
    host = _canonical_host(netloc)
    shown = "" if port is None or port in DEFAULT_PORTS else f":{port}"
    path = _without_dots(_escaped(parts.path or "/"))
    query = f"?{_escaped(parts.query)}" if parts.query else ""
    return f"http://{user}{at}{host}{shown}{path}{query}"


@lru_cache(4096)
def _canonical_host(netloc: str) -> str:
    """A host without its port; one that can be none in lower case."""
    if (bracketed := _BRACKETED.fullmatch(netloc)) is not None:
        try:
            return f"[{ipaddress.IPv6Address(bracketed[1])}]"
        except ValueError:
            return f"[{bracketed[1].lower()}]"
    given = name = _PORT.sub("", netloc).lower()
    if not name.isascii():
        # Loaded here alone: it has large tables, and most names need none of them.
        import idna

        try:
            name = idna.encode(name, uts46=True, transitional=False).decode("ascii")
        except (idna.IDNAError, UnicodeError):
            return given
    name = name.removesuffix(".")
    labels = name.split(".")
    if len(name) > _MAX_NAME or not all(_LABEL.fullmatch(label) for label in labels):
        return given
    return (_ipv4(labels) or given) if _NUMBER.fullmatch(labels[-1]) else name


def _ipv4(labels: list[str]) -> str | None:
    """An IPv4 address from any of the notations of ``inet_aton``; None where it is none."""
    try:
        numbers = [
            int(part[2:] or "0", 16)
            if part.startswith("0x")
            else int(part, 8 if part.startswith("0") else 10)
            for part in labels
        ]
    except ValueError:
        return None
    *head, last = numbers
    if len(numbers) > 4 or any(n > 255 for n in head) or last >= 256 ** (4 - len(head)):
        return None
    return str(ipaddress.IPv4Address(last + sum(n << (24 - 8 * i) for i, n in enumerate(head))))


def _escaped(text: str) -> str:
    """Escapes in upper case; none for a letter or digit; one for whatever ASCII has no place."""

    def normal(match: re.Match[str]) -> str:
        letter = chr(int(match[0][1:], 16))
        return letter if _UNRESERVED.fullmatch(letter) else match[0].upper()

    try:
        quoted = quote(text, safe=_KEPT_BY_QUOTE, errors="surrogateescape")
    except UnicodeError:
        quoted = quote(text, safe=_KEPT_BY_QUOTE, errors="surrogatepass")
    return _ESCAPE.sub(normal, quoted)


def _without_dots(path: str) -> str:
    """``/b/../a.jpg`` is ``/a.jpg``; RFC 3986 section 5.2.4."""
    segments = path.split("/")[1:]
    kept: list[str] = []
    for segment in segments:
        if segment == "..":
            del kept[-1:]
        elif segment != ".":
            kept.append(segment)
    if segments and segments[-1] in (".", ".."):
        kept.append("")
    return "/" + "/".join(kept)
