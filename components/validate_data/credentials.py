"""Find secrets: private keys, keys in the form of a provider, and passwords behind their names.

Every function returns the places in a text as pairs of a start and an end.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from math import log2

Spans = Sequence[tuple[int, int]]

_PRIVATE_KEY = re.compile(
    r"-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----(?:[\w+/=\s:,.\\-]*?-----END [A-Z0-9 ]*-----)?"
)
# Prefixes and lengths as the providers document them.
_PROVIDERS = (
    r"(?:AKIA|ASIA|AROA|AIDA)[A-Z2-7]{12}[A-Z0-9]{4}",  # Amazon
    r"gh[pousr]_[A-Za-z0-9]{30,255}",  # GitHub
    r"github_pat_[A-Za-z0-9_]{30,255}",
    r"glpat-[A-Za-z0-9_-]{18,64}",  # GitLab
    r"xox[abeoprs]-[A-Za-z0-9-]{10,250}",  # Slack
    r"hooks\.slack\.com/services/[A-Za-z0-9/]{20,80}",
    r"(?:sk|rk|pk)_(?:live|test)_[A-Za-z0-9]{14,250}",  # Stripe
    r"whsec_[A-Za-z0-9]{20,100}",
    r"sk-(?:proj-|ant-|svcacct-|or-v1-)?[A-Za-z0-9_-]{20,250}",  # OpenAI, Anthropic, OpenRouter
    r"AIza[A-Za-z0-9_-]{30,40}",  # Google
    r"ya29\.[A-Za-z0-9_-]{20,400}",
    r"GOCSPX-[A-Za-z0-9_-]{20,40}",
    r"hf_[A-Za-z0-9]{30,50}",  # Hugging Face
    r"npm_[A-Za-z0-9]{30,50}",
    r"pypi-[A-Za-z0-9_-]{40,300}",
    r"dop_v1_[a-f0-9]{40,80}",  # DigitalOcean
    r"SG\.[A-Za-z0-9_-]{16,32}\.[A-Za-z0-9_-]{16,64}",  # SendGrid
    r"key-[a-f0-9]{32}",  # Mailgun
    r"(?:AC|SK)[a-f0-9]{32}",  # Twilio
    r"shp(?:at|ca|pa|ss)_[A-Fa-f0-9]{32}",  # Shopify
    r"dapi[a-f0-9]{32}",  # Databricks
    r"hvs\.[A-Za-z0-9_-]{20,200}",  # Vault
    r"eyJ[A-Za-z0-9_-]{8,2000}\.eyJ[A-Za-z0-9_-]{8,8000}\.[A-Za-z0-9_-]{8,2000}",  # JSON web tokens
    r"\d{8,10}:AA[A-Za-z0-9_-]{30,40}",  # Telegram
    r"AccountKey=[A-Za-z0-9+/]{40,100}={0,2}",  # Azure
    r"AGE-SECRET-KEY-1[A-Z0-9]{50,70}",
)
_ACCESS_KEY = re.compile(rf"(?<![A-Za-z0-9_])(?:{'|'.join(_PROVIDERS)})(?![A-Za-z0-9])")
# A text without a long run of such characters has no key, and most texts have none.
_LONG_RUN = re.compile(r"[A-Za-z0-9_+/=.:-]{18}")

_NAMED = re.compile(
    r"(?i)\b[\w.-]{0,30}?(?:passw(?:or)?d|passwort|passphrase|pwd|secret(?:[_ -]?access)?(?:[_ -]?key)?"
    r"|(?:api|access|account|auth|private|encryption|signing)[_ -]?(?:key|token)|client[_ -]?secret|bearer)"
    r"[\"'`]?(?:\s{0,3}(?:[:=]|=>|is\b|was\b)\s{0,3}|\s)[\"'`]?([^\s\"'`,;<>(){}\[\]]{6,200})"
)
_NAMED_TOKEN = re.compile(r"(?i)\btoken[\"'`]?\s{0,3}[:=]\s{0,3}[\"'`]?([^\s\"'`,;<>(){}\[\]]{12,200})")
_HINTS = ("pass", "pwd", "secret", "key", "token", "bearer")
_IN_URL = re.compile(r"[a-z][a-z0-9+.-]{1,20}://[^\s/:@]{1,80}:([^\s/@]{3,200})@[\w.-]")
_MIN_ENTROPY_BITS = 3.0  # per character: words of six or more letters have 2 to 3


def find_private_keys(text: str) -> Spans:
    """Return the private keys in PEM form, from their first line to their last one where they have it."""
    return [m.span() for m in _PRIVATE_KEY.finditer(text)] if "PRIVATE KEY" in text else ()


def find_access_keys(text: str) -> Spans:
    """Return what has the form of a provider's keys and tokens."""
    return [m.span() for m in _ACCESS_KEY.finditer(text)] if _LONG_RUN.search(text) else ()


def find_passwords(text: str) -> Spans:
    """Return the passwords and keys that stand behind such a word or in a URL, without the word."""
    return list(_passwords(text))


def _passwords(text: str) -> Iterator[tuple[int, int]]:
    if "://" in text:
        yield from (m.span(1) for m in _IN_URL.finditer(text))
    folded = text.casefold()
    if any(hint in folded for hint in _HINTS):
        matches = [*_NAMED.finditer(text), *_NAMED_TOKEN.finditer(text)]
        yield from (m.span(1) for m in matches if _is_random(m.group(1)))


def _is_random(value: str) -> bool:
    """Return whether the value is no word: letters and digits, or letters and signs, of a certain variety."""
    value = value.rstrip(".!?")
    has_letter, has_digit = any(map(str.isalpha, value)), any(map(str.isdecimal, value))
    has_case = value.lower() != value and not value[:1].isupper()
    is_mixed = has_letter and (has_digit or (has_case and len(value) >= 16))
    counts = Counter(value)
    entropy = -sum(n / len(value) * log2(n / len(value)) for n in counts.values()) if value else 0.0
    return is_mixed and entropy >= min(_MIN_ENTROPY_BITS, log2(max(2, len(value))) - 0.6)
