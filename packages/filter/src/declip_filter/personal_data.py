"""Patterns of personal data in a caption: which kinds, never the data itself.

Every pattern is bounded in length and starts at a place that no longer match could contain, so a
hostile caption costs linear time. What has a checksum (cards, IBAN) must pass it; addresses must
be ones that the public internet routes. A person's name or street is not found: that takes a model.
"""

import ipaddress

import regex

KINDS = ("card", "email", "iban", "ip", "phone")
"""In the order in which they are listed."""

MIN_DIGITS = 7
"""Fewest digits of a telephone number, area code included; ITU-T E.164 allows up to 15."""
MAX_DIGITS = 15

_EMAIL = regex.compile(
    r"(?<![\p{L}\p{N}.!#$%&'*+/=?^_`{|}~\-])[\p{L}\p{N}.!#$%&'*+/=?^_`{|}~\-]{1,64}+"
    r"(?:@|\s?[\[(]at[\])]\s?)"
    r"(?:[\p{L}\p{N}](?:[\p{L}\p{N}\-]{0,61}[\p{L}\p{N}])?\.){1,8}\p{L}{2,63}",
    regex.IGNORECASE,
)
_AT = regex.compile(r"@|[\[(]at[\])]", regex.IGNORECASE)
_CARD = regex.compile(r"(?<![\d.,])(?<!\d[ \-])[2-6](?:[ \-]?\d){12,18}(?![ \-]?\d)")
_IBAN = regex.compile(
    r"(?<![A-Z0-9])[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![A-Z0-9])"
)
_IPV4 = regex.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w]|\.\d)")
_IPV6 = regex.compile(r"(?<![\w:.])(?:[0-9a-f]{0,4}:){2,7}[0-9a-f]{0,4}(?![\w:])", regex.IGNORECASE)
_VERSION = regex.compile(r"(?:\bv|\bver|\bversion|\brelease)[. ]{0,2}$", regex.IGNORECASE)
_SEPARATOR = r"[ .\-/\u2010-\u2013]?"
_PHONE = regex.compile(
    # International, by its plus or 00.
    rf"(?<![\w+])(?:\+|(?<!\d[ \-])00){_SEPARATOR}[1-9](?:{_SEPARATOR}\(?\d\)?){{6,14}}(?!\d)"
    # North American: three, three, four, with separators, area code and exchange from 2 on.
    r"|(?<![\w.\-/])(?:1[ .\-])?(?:\([2-9]\d\d\)[ ]?|[2-9]\d\d[ .\-])[2-9]\d\d[ .\-]\d{4}(?![\w\-])"
    # Any number that is called one.
    r"|\b(?:tel|phone|telephone|mobile|mob|cell|fax|call|whatsapp|telefon|handy|t[ée]l[ée]phone)"
    r"(?:\s?(?:no|nr|number|us))?[.:]{0,2}\s?(?:\+|\()?\d(?:[ .\-/()\u2010-\u2013]{0,2}\d){6,14}"
    r"(?!\d)",
    regex.IGNORECASE,
)


def passes_luhn(digits: str) -> bool:
    """Whether the last digit is the check digit of ISO/IEC 7812-1, annex B (the Luhn formula)."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + place % 2)
        total += value - 9 * (value > 9)
    return total % 10 == 0


def passes_iban(number: str) -> bool:
    """Whether the check digits of ISO 13616 are right: modulo 97 of the rearranged number is 1."""
    turned = number[4:] + number[:4]
    return int("".join(str(int(character, 36)) for character in turned)) % 97 == 1


def _has_card(text: str) -> bool:
    for match in _CARD.finditer(text):
        digits = regex.sub(r"\D", "", match.group())
        if len(set(digits)) > 1 and passes_luhn(digits):
            return True
    return False


def _has_iban(text: str) -> bool:
    return any(passes_iban(match.group().replace(" ", "")) for match in _IBAN.finditer(text))


def _has_address(text: str) -> bool:
    for pattern in (_IPV4, _IPV6):
        for match in pattern.finditer(text):
            try:
                address = ipaddress.ip_address(match.group())
            except ValueError:
                continue
            before = text[max(0, match.start() - 10) : match.start()]
            if address.is_global and not _VERSION.search(before):
                return True
    return False


def _has_phone(text: str) -> bool:
    for match in _PHONE.finditer(text):
        if MIN_DIGITS <= sum(c.isdigit() for c in match.group()) <= MAX_DIGITS:
            return True
    return False


def find_personal_data(caption: str) -> str:
    """Kinds of personal data that the caption holds, by comma; empty where there is none.

    ``email``; ``phone`` (international with a plus or 00, North American, or any number that is
    called a telephone); ``ip`` (public addresses, versions 4 and 6); ``card`` (13 to 19 digits
    that pass the Luhn formula); ``iban`` (by its checksum).
    """
    num_digits = sum(map(caption.count, "0123456789"))
    found = []
    if num_digits >= 13 and _has_card(caption):
        found.append("card")
    if _AT.search(caption) and _EMAIL.search(caption):
        found.append("email")
    if num_digits >= 2 and _has_iban(caption):
        found.append("iban")
    if (num_digits >= 4 or caption.count(":") >= 2) and _has_address(caption):
        found.append("ip")
    if num_digits >= MIN_DIGITS and _has_phone(caption):
        found.append("phone")
    return ",".join(found)
