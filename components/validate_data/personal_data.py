"""Find personal data: addresses and numbers of people, by their form and their check digits.

Every function returns the places in a text as pairs of a start and an end. Numbers from documentation, such as
4111 1111 1111 1111, count: a model that learns one writes numbers of this form.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Sequence

Spans = Sequence[tuple[int, int]]

_LOCAL_PART = re.compile(r"[\w.+%'-]*[\w+%-]$")
_DOMAIN = re.compile(r"(?:[^\W_][\w-]{0,62}\.)+(?:[^\W\d_]{2,24}|xn--[\w-]{2,20})(?![\w-])")
_IN_URL = re.compile(r"://[^\s/@]*@$")
_LONGEST_LOCAL_PART = 64  # RFC 5321

# A number in groups; what separates them is decided by each kind of number.
_NUMBER = re.compile(r"(?<![\w.,/-])\+?[(]?\d(?:[ ().\-/\u00a0\u2011\u2013]{0,2}\d){6,22}(?![\w])")
_SEVEN_DIGITS = re.compile(r"\d(?:\D{0,2}\d){6}")
_NON_DIGITS = re.compile(r"\D")
# Payment cards: the first digits and the lengths of the networks (ISO/IEC 7812).
_CARD = re.compile(
    r"(?:4\d{12}(?:\d{3}){0,2}|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}|3[47]\d{13}"
    r"|3(?:0[0-5]|[68]\d)\d{11}|6(?:011|5\d\d|4[4-9]\d)\d{12}|35(?:2[89]|[3-8]\d)\d{12}|62\d{14,17})"
)
# A date, or a date with a time: its digits look like a phone number's.
_DATE = re.compile(
    r"(?:19|20)\d\d[-./ ](?:0?[1-9]|1[0-2])[-./ ](?:0?[1-9]|[12]\d|3[01])|\d{1,2}[-./]\d{1,2}[-./](?:19|20)\d\d"
)
_NORTH_AMERICAN = re.compile(r"(?:\+?1[ .\-]?)?(?:\([2-9]\d\d\) ?|[2-9]\d\d[ .\-])[2-9]\d\d[ .\-]\d{4}")
_PHONE_WORDS = re.compile(
    r"(?i)\b(?:phone|mobile|cell|telephone|tel|call|text|sms|whatsapp|fax|reach|ring|handy|telefon)\b[^.!?\d]*$"
)
_SSN = re.compile(r"(?<![\d-])(?!000|666|9)\d{3}([- ])(?!00)\d\d\1(?!0000)\d{4}(?![\d-])")
_NINE_DIGITS = re.compile(r"(?<!\d)(?!000|666|9)\d{3}(?!00)\d\d(?!0000)\d{4}(?!\d)")
_SSN_NAME = re.compile(r"(?i)\b(?:ssn|social security(?: number| no\.?)?)\D{0,12}$")

_IBAN_START = re.compile(r"(?<![A-Za-z0-9])[A-Za-z]{2}\d\d")
_IBAN_BODY = re.compile(r"(?:[ \u00a0-]?[A-Za-z0-9])+")
# The length of a country's account numbers, as SWIFT registers them.
_IBAN_LENGTHS = {
    length: countries.split()
    for length, countries in {
        15: "NO",
        16: "BE",
        18: "DK FI FK FO GL NL SD",
        19: "MK SI",
        20: "AT BA EE KZ LT LU MN XK",
        21: "CH HR LI LV",
        22: "BG BH CR DE GB GE IE ME RS VA",
        23: "AE GI IL IQ OM SO TL",
        24: "AD CZ ES MD PK RO SA SE SK TN VG",
        25: "LY PT ST",
        26: "IS TR",
        27: "BI DJ FR GR IT MC MR SM",
        28: "AL AZ BY CY DO GT HU LB NI PL SV",
        29: "BR EG PS QA UA",
        30: "JO KW MU YE",
        31: "MT SC",
        33: "RU",
    }.items()
}
_IBAN_LENGTH = {country: length for length, countries in _IBAN_LENGTHS.items() for country in countries}

_IPV4 = re.compile(r"(?<![\w.:/=<>~^-])(?:\d{1,3}\.){3}\d{1,3}(?![\w-]|\.\d)")
# The first group of an address in use has four digits; slices of a program, such as 0::2, have fewer.
_IPV6 = re.compile(r"(?<![\w:.])[0-9A-Fa-f]{4}:(?:[0-9A-Fa-f]{0,4}:){1,6}[0-9A-Fa-f]{0,4}(?![\w:])")
_VERSION = re.compile(r"(?i)(?:version|release|build|firmware|\bv|section|chapter)[ :.]*$")


def find_emails(text: str) -> Spans:
    """Return the e-mail addresses; any domain counts."""
    return list(_emails(text)) if "@" in text else ()


def _emails(text: str) -> Iterator[tuple[int, int]]:
    # From each @ to both sides, so that the work does not grow with the text around it.
    position = text.find("@")
    while position >= 0:
        domain = _DOMAIN.match(text, position + 1)
        if domain:
            start = max(0, position - _LONGEST_LOCAL_PART)
            local = _LOCAL_PART.search(text[start:position])
            # The password of a URL, as in ://name:password@host, is no address.
            if local and not _IN_URL.search(text[start : position + 1]):
                yield start + local.start(), domain.end()
        position = text.find("@", position + 1)


def find_card_numbers(text: str) -> Spans:
    """Return the numbers of payment cards, with single spaces or hyphens or without."""
    return [span for span, number in _numbers(text) if _is_card(number)]


def find_phone_numbers(text: str) -> Spans:
    """Return the phone numbers that their form shows: international, North American, or with a leading 0 in groups."""
    return [
        span
        for span, number in _numbers(text)
        if _is_phone(number) or (number.isdecimal() and 9 <= len(number) <= 15 and _is_named_phone(text, span[0]))
    ]


def _is_named_phone(text: str, start: int) -> bool:
    """Return whether the words before a number without groups say what it is."""
    return _PHONE_WORDS.search(text[max(0, start - 40) : start]) is not None


def find_social_security_numbers(text: str) -> Spans:
    """Return US social security numbers in groups of 3, 2 and 4 digits, or of 9 digits behind their name."""
    if not _SEVEN_DIGITS.search(text):
        return ()
    spans = [m.span() for m in _SSN.finditer(text)]
    for m in _NINE_DIGITS.finditer(text):
        if _SSN_NAME.search(text[max(0, m.start() - 40) : m.start()]):
            spans.append(m.span())
    return spans


def find_ibans(text: str) -> Spans:
    """Return the account numbers whose country, length and check digits (ISO 7064, mod 97) are right."""
    spans = []
    for start in _IBAN_START.finditer(text):
        length = _IBAN_LENGTH.get(start.group()[:2].upper())
        # Groups of four with a separator behind each: a fourth more characters at most.
        body = _IBAN_BODY.match(text, start.start(), start.start() + 2 * (length or 0))
        end = _iban_end(body.group(), length) if body and length else None
        if end is not None and not text[start.start() + end : start.start() + end + 1].isalnum():
            spans.append((start.start(), start.start() + end))
    return spans


def find_ip_addresses(text: str) -> Spans:
    """Return the IP addresses but for those that name no machine, such as 0.0.0.0, 127.0.0.1 and network masks."""
    matches = (list(_IPV4.finditer(text)) if text.count(".") > 2 else []) + (
        list(_IPV6.finditer(text)) if text.count(":") > 1 else []
    )
    return [
        m.span()
        for m in matches
        if _is_address(m.group()) and not _VERSION.search(text[max(0, m.start() - 12) : m.start()])
    ]


def _numbers(text: str) -> Iterator[tuple[tuple[int, int], str]]:
    return ((m.span(), m.group()) for m in _NUMBER.finditer(text)) if _SEVEN_DIGITS.search(text) else iter(())


def _is_card(number: str) -> bool:
    groups = re.split(r"[ \-\u00a0]", number)
    digits = "".join(groups)
    if not digits.isdecimal() or not _CARD.fullmatch(digits) or len(set(digits)) == 1:
        return False
    # Numbers in columns of their own have the groups of no card.
    return (len(groups) == 1 or len(groups) in (3, 4, 5)) and _luhn(digits)


def _luhn(digits: str) -> bool:
    """Return whether the check digit is right (ISO/IEC 7812-1, annex B)."""
    doubled = (sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return (sum(map(int, digits[-1::-2])) + sum(doubled)) % 10 == 0


def _is_phone(number: str) -> bool:
    digits = _NON_DIGITS.sub("", number)
    if _DATE.match(number) or _is_card(number) or len(set(digits)) < 3:
        return False
    if number.startswith("+"):
        return 8 <= len(digits) <= 15 and digits[0] != "0"
    if _NORTH_AMERICAN.fullmatch(number):
        return True
    has_groups = number != digits
    # 00 before a country's code, or the 0 of a national number.
    return (
        not digits.startswith("000")
        and number.lstrip("(").startswith("0")
        and has_groups
        and 9 <= len(digits) <= 15
        and "." not in number[:3]
    )


def _iban_end(body: str, length: int) -> int | None:
    """Return the length of the text of an IBAN of so many characters at its beginning; None where it is none."""
    positions = [i for i, character in enumerate(body) if character.isalnum()][:length]
    if len(positions) < length:
        return None
    characters = "".join(body[i] for i in positions).upper()
    number = "".join(str(int(character, 36)) for character in characters[4:] + characters[:4])
    return positions[-1] + 1 if int(number) % 97 == 1 else None


def _is_address(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    is_mask = address.version == 4 and (text.startswith("255.") or text.startswith("0."))
    return not (address.is_unspecified or address.is_loopback or address.is_multicast or is_mask)
