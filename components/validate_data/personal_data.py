"""Find personal data: addresses and numbers of people, by their form and their check digits.

Every function returns the places in a text as pairs of a start and an end. Numbers from documentation, such as
4111 1111 1111 1111, count: a model that learns one writes numbers of this form.
"""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache

Spans = Sequence[tuple[int, int]]

_LOCAL_PART = re.compile(r"(?:[\w.+%'-]*[\w+%-]|\"[^\"\n]{1,60}\")$")
_DOMAIN = re.compile(r"(?:[^\W_][\w-]{0,62}\.)+(?:[^\W\d_]{2,24}|xn--[\w-]{2,20})(?![\w-])|\[\d{1,3}(?:\.\d{1,3}){3}\]")
_IN_URL = re.compile(r"://[^\s/@]*@$")
_LONGEST_LOCAL_PART = 64  # RFC 5321
# Addresses that are written for people alone: name (at) host.example, name at host dot example, name @ gmail.com.
_MARKED_EMAIL = re.compile(
    r"(?i)[\w.+-]{1,64} ?(?:[\[({<] ?(?:at|@|ät) ?[\])}>]|&#0?64;|&commat;|%40) ?[\w-]{1,63}"
    r"(?: ?(?:\.|[\[({<] ?(?:dot|punkt) ?[\])}>]| dot ) ?[\w-]{2,63}){1,4}"
)
_MARKS = re.compile(r"[(\[{<] ?(?:[Aa][Tt]\b|@|[äÄ][tT]\b)|&#0?64|&com|%40")
_WORDS_EMAIL = re.compile(
    r"(?i)\b[\w.+-]{1,64} at [\w-]{2,63}(?: dot [\w-]{2,63}){0,3} dot (?:[a-z]{2}|com|org|net|edu|gov|info|biz)\b"
)
_SPACED_EMAIL = re.compile(
    r"(?i)\b[\w.+-]{1,64}(?: @ ?|@ )(?:gmail|googlemail|yahoo|hotmail|outlook|live|icloud|aol|gmx|web|proton(?:mail)?"
    r"|mail|yandex|qq|163)\.[a-z]{2,4}\b"
)

# A number in groups; what separates them is decided by each kind of number.
_NUMBER = re.compile(r"(?<![\w.,/-])(?:[\[(]?\+ ?)?\(?\d(?:[ ().\-/\]]{0,3}\d){6,17}(?!\w)")
_SEVEN_DIGITS = re.compile(r"\d(?:\D{0,3}\d){6}")
_NON_DIGITS = re.compile(r"\D")
# Payment cards, whole or in the groups in which they are printed, each with the same separator between them.
_CARD_GROUPS = re.compile(
    r"(?<![\w.-])(?:\d{4}(?P<a>[ ._/-]{1,2})\d{4}(?P=a)\d{4}(?:(?P=a)\d{1,4})?(?P<last>(?P=a)\d{1,3})?(?!(?P=a)?\d{4})"
    r"|\d{4}(?P<b>[ ._/-]{1,2})\d{6}(?P=b)\d{4,5}|\d{8}[ -]\d{8}|\d{13,19})(?!\w|[.-]\d)"
)
# The first digits and the lengths of the networks (ISO/IEC 7812).
_CARD = re.compile(
    r"(?:4\d{12}(?:\d{3}){0,2}|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}|3[47]\d{13}"
    r"|3(?:0[0-5]|[68]\d)\d{11}|6(?:011|5\d\d|4[4-9]\d)\d{12}|35(?:2[89]|[3-8]\d)\d{12}|62\d{14,17}"
    r"|220[0-4]\d{12}|9792\d{12}|(?:50|5[6-8]|6[037])\d{14,17})"
)
# A barcode has 13 digits too.
_MIN_BARE_CARD_DIGITS = 14
# A date, or a date with a time: its digits look like a phone number's.
_DATE = re.compile(
    r"(?:19|20)\d\d[-./ ](?:0?[1-9]|1[0-2])[-./ ](?:0?[1-9]|[12]\d|3[01])|\d{1,2}[-./]\d{1,2}[-./](?:19|20)\d\d"
)
# Forms of national numbers that nothing else has.
_NATIONAL = re.compile(
    r"(?:(?:\+?1|001)[ .\-]?)?(?:\([2-9]\d\d\) ?|[2-9]\d\d[ .\-/])[2-9]\d\d[ .\-]\d{4}"  # North America
    r"|0[1-9](?:[ .\-]\d\d){4}|0[1-9]\d{8,10}|00[1-9]\d{9,12}"  # France; national numbers of most of Europe
    r"|8[ \-]?\(?\d{3}\)?[ \-]\d{3}[ \-]?\d\d[ \-]?\d\d"  # Russia
    r"|1[3-9]\d(?:[ \-]?\d{4}){2}|[6-9]\d{4}[ \-]\d{5}"  # China, India
    r"|\(\d\d\) ?9?\d{4}-\d{4}|[1-9]\d\d-\d{3}-\d{3}"  # Brazil, Poland
)
_ZIP_CODE = re.compile(r"\d{5}-\d{4}")
_PHONE_WORDS = re.compile(
    r"(?i)(?:\b(?:phone|mobile|cell|cellphone|telephone|tel|call|text|sms|whatsapp|signal|fax|reach|ring|dial|handy|mobil"
    r"|telefon|telefono|tel[eé]fono|m[oó]vil|celular|t[eé]l[eé]phone|t[eé]l|portable|nummer|erreichbar"
    r"|my number is|телефон)\b|电话|電話)(?:\.:|[^.!?\d])*$"
)
_SSN = re.compile(
    r"(?<![\d-])(?:(?!000|666|9)\d{3}([- ])(?!00)\d\d\1(?!0000)\d{4}"
    r"|9\d\d-(?:5\d|6[0-5]|[78]\d|9[0-24-9])-\d{4})(?![\d-])"
)
_NINE_DIGITS = re.compile(r"(?<!\d)(?!000|666|9)\d{3}[.]?(?!00)\d\d[.]?(?!0000)\d{4}(?!\d)")
_SSN_NAME = re.compile(
    r"(?i)\b(?:ssn|ss#|social(?: security)?(?: number| no\.?| #)?|soc\. ?sec\.?(?: no\.?)?|itin|taxpayer id)\D{0,12}$"
)

_TWO_DIGITS = re.compile(r"\d[ -]?\d")
_IBAN_BODY = re.compile(r"(?:[ ._-]{0,2}[A-Za-z0-9])+")
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
        28: "AL AZ BY CY DO GT HN HU LB NI PL SV",
        29: "BR EG PS QA UA",
        30: "JO KW MU YE",
        31: "MT SC",
        33: "RU",
    }.items()
}
_IBAN_LENGTH = {country: length for length, countries in _IBAN_LENGTHS.items() for country in countries}

_IPV4 = re.compile(
    r"(?:(?<![\w.:/=<>~^-])|(?<=://)|(?<=[iI][pP][=:])|(?<=host=)|(?<=addr=)|(?<=::ffff:))"
    r"(?:(?:\d{1,3}\.){3}|(?:\d{1,3}\[\.\]){3})\d{1,3}(?![\w-]|\.\d)"
)
_DOTTED = re.compile(r"\d(?:\.|\[\.\])\d{1,3}(?:\.|\[\.\])\d")
# The first group of an address in use has four digits; slices of a program, such as 0::2, have fewer.
_IPV6 = re.compile(r"(?<![\w:.])[0-9A-Fa-f]{4}:(?:[0-9A-Fa-f]{0,4}:){1,6}[0-9A-Fa-f]{0,4}(?![\w:])")
_VERSION = re.compile(r"(?i)(?:version|release|build|firmware|\bv|section|chapter)[ :.]*$")


class _PlainCharacters(dict[int, int]):
    """Map digits, spaces and dashes of every script, and wide letters, to those of ASCII; each to one character."""

    def __missing__(self, code_point: int) -> int:
        character = chr(code_point)
        category = unicodedata.category(character)
        if category == "Nd":
            self[code_point] = ord("0") + unicodedata.decimal(character)
        elif category in ("Zs", "Pd"):
            self[code_point] = ord(" " if category == "Zs" else "-")
        else:
            is_wide = 0xFF01 <= code_point <= 0xFF5E
            self[code_point] = code_point - 0xFEE0 if is_wide else code_point
        return self[code_point]


_PLAIN_CHARACTERS = _PlainCharacters()


@lru_cache(1)  # each check of a text asks for it
def _plain(text: str) -> str:
    """Return a text of the same length in which numbers are written with ASCII digits, spaces and hyphens."""
    return text if text.isascii() else text.translate(_PLAIN_CHARACTERS)


def find_emails(text: str) -> Spans:
    """Return the e-mail addresses, also those spelt as name (at) host.example; any domain counts."""
    text = _plain(text)
    spans = list(_emails(text)) if "@" in text else []
    # Each pattern is tried only where its mark stands, since most texts have none.
    has_mark = "(" in text or "[" in text or "{" in text or "<" in text or "&" in text or "%" in text
    if has_mark and _MARKS.search(text):
        spans += [m.span() for m in _MARKED_EMAIL.finditer(text)]
    if " dot " in text or " DOT " in text:
        spans += [m.span() for m in _WORDS_EMAIL.finditer(text)]
    if " @" in text or "@ " in text:
        spans += [m.span() for m in _SPACED_EMAIL.finditer(text)]
    return spans


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
    """Return the numbers of payment cards, whole or in groups as they are printed."""
    text = _plain(text)
    if not _SEVEN_DIGITS.search(text):
        return ()
    spans = []
    for m in _CARD_GROUPS.finditer(text):
        # What looks like a last group may be what follows the card, such as its expiry.
        ends = (m.end(), m.start("last")) if m["last"] else (m.end(),)
        spans += [(m.start(), end) for end in ends if _is_card(text[m.start() : end])][:1]
    return spans


def find_phone_numbers(text: str) -> Spans:
    """Return the phone numbers that their form shows, and any number of 7 to 15 digits behind a word for a phone."""
    text = _plain(text)
    return [
        span
        for span, number in _numbers(text)
        if _is_phone(number) or (_may_be_phone(number) and _PHONE_WORDS.search(text[max(0, span[0] - 40) : span[0]]))
    ]


def find_social_security_numbers(text: str) -> Spans:
    """Return US social security numbers in groups of 3, 2 and 4 digits, or of 9 digits behind their name."""
    text = _plain(text)
    if not _SEVEN_DIGITS.search(text):
        return ()
    spans = [m.span() for m in _SSN.finditer(text)]
    for m in _NINE_DIGITS.finditer(text):
        if _SSN_NAME.search(text[max(0, m.start() - 40) : m.start()]):
            spans.append(m.span())
    return spans


def find_ibans(text: str) -> Spans:
    """Return the account numbers whose country, length and check digits (ISO 7064, mod 97) are right."""
    text = _plain(text)
    spans = []
    for digits in _TWO_DIGITS.finditer(text):
        # The country stands right in front of the two check digits, or one separator before them.
        end_of_country = digits.start() - (text[max(0, digits.start() - 1) : digits.start()] in (" ", "-"))
        start = max(0, end_of_country - 2)
        length = _IBAN_LENGTH.get(text[start:end_of_country].upper())
        before = text[max(0, start - 4) : start]
        if length is None or (before[-1:].isalnum() and before.upper() != "IBAN"):
            continue
        # Groups of four with up to two separators behind each: half as many characters more at most.
        body = _IBAN_BODY.match(text, start, start + 2 * length)
        end = _iban_end(body.group(), length) if body else None
        if end is not None and not text[start + end : start + end + 1].isalnum():
            spans.append((start, start + end))
    return spans


def find_ip_addresses(text: str) -> Spans:
    """Return the IP addresses but for those that name no machine, such as 0.0.0.0, 127.0.0.1 and network masks."""
    text = _plain(text)
    matches = (list(_IPV4.finditer(text)) if _DOTTED.search(text) else []) + (
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
    digits = _NON_DIGITS.sub("", number)
    if number == digits and len(digits) < _MIN_BARE_CARD_DIGITS:
        return False
    return _CARD.fullmatch(digits) is not None and len(set(digits)) > 1 and _luhn(digits)


def _luhn(digits: str) -> bool:
    """Return whether the check digit is right (ISO/IEC 7812-1, annex B)."""
    doubled = (sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return (sum(map(int, digits[-1::-2])) + sum(doubled)) % 10 == 0


def _may_be_phone(number: str) -> bool:
    digits = _NON_DIGITS.sub("", number)
    return 7 <= len(digits) <= 15 and len(set(digits)) > 2 and not _DATE.match(number) and not _is_card(number)


def _is_phone(number: str) -> bool:
    number = number.strip("[ ")
    digits = _NON_DIGITS.sub("", number)
    if number.startswith(("+", "(+")):
        return 8 <= len(digits) <= 15 and digits[0] != "0" and len(set(digits)) > 2
    if not _may_be_phone(number):
        return False
    # A bracket before the whole number is none of its own.
    if _NATIONAL.fullmatch(number) or _NATIONAL.fullmatch(number.lstrip("(")):
        return True
    # The postal code of a town in the United States has the form of a national number.
    if _ZIP_CODE.fullmatch(number):
        return False
    # 00 before a country's code, or the 0 of a national number; in groups, since other numbers begin with 0 as well.
    has_zero = number.lstrip("(").startswith("0") and not digits.startswith("000")
    return has_zero and number != digits and len(digits) >= 9 and "." not in number[:3]


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
        address = ipaddress.ip_address(text.replace("[.]", "."))
    except ValueError:
        return False
    is_mask = address.version == 4 and (text.startswith("255.") or text.startswith("0."))
    return not (address.is_unspecified or address.is_loopback or address.is_multicast or is_mask)
