"""Find secrets: private keys, keys in the form of a provider, and passwords behind their names.

Every function returns the places in a text as pairs of a start and an end.
"""

from __future__ import annotations

import base64
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from math import log2

Spans = Sequence[tuple[int, int]]

_PRIVATE_KEY = re.compile(
    r"-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----(?:[\w+/=\s:,.\\-]*?-----END [A-Z0-9 ]*-----)?"
    r"|---- BEGIN SSH2 (?:ENCRYPTED )?PRIVATE KEY ----|PuTTY-User-Key-File-\d: [\w-]+"
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
    r"(?:Account|SharedAccess)Key=[A-Za-z0-9+/]{40,100}={0,2}",  # Azure
    r"[A-Za-z0-9]{3}\dQ~[A-Za-z0-9_.~-]{31,34}",
    r"sig=[A-Za-z0-9%]{40,90}",
    r"AGE-SECRET-KEY-1[A-Z0-9]{50,70}",
    r"gl(?:rt|dt|ptt|ft|soat|cbt|imt|agent)-[A-Za-z0-9_-]{18,64}",  # GitLab
    r"xapp-\d-[A-Za-z0-9-]{20,250}",  # Slack
    r"[a-f0-9]{32}-us\d{1,2}",  # Mailchimp
    r"[\w-]{23,28}\.[\w-]{6,7}\.[\w-]{27,38}",  # Discord
    r"discord(?:app)?\.com/api/webhooks/\d{15,20}/[\w-]{50,80}",
    r"EAA[A-Za-z0-9_-]{32,250}",  # Facebook, Square
    r"sq0[a-z]{3}-[A-Za-z0-9_-]{22,50}",
    r"access_token\$(?:production|sandbox)\$[a-z0-9]{16}\$[a-f0-9]{32}",  # Braintree
    r"NRAK-[A-Z0-9]{27}|NRJS-[a-f0-9]{19}|NRI[IQ]-[A-Za-z0-9_-]{32}",  # New Relic
    r"glsa_[A-Za-z0-9]{32}_[a-f0-9]{8}|glc_[A-Za-z0-9+/]{32,400}",  # Grafana
    r"lin_api_[A-Za-z0-9]{40}|secret_[A-Za-z0-9]{43}|ntn_[A-Za-z0-9]{40,50}",  # Linear, Notion
    r"pat[A-Za-z0-9]{14}\.[a-f0-9]{64}|PMAK-[a-f0-9]{24}-[a-f0-9]{34}",  # Airtable, Postman
    r"[A-Za-z0-9]{14}\.atlasv1\.[A-Za-z0-9_=-]{60,70}|dp\.(?:pt|st|ct|sa|scim|audit)\.[A-Za-z0-9.]{40,80}",
    r"ATATT3[A-Za-z0-9_=-]{100,250}|ATCTT3[A-Za-z0-9_=-]{100,250}",  # Atlassian
    r"sl\.[A-Za-z0-9_-]{130,1500}|figd_[A-Za-z0-9_-]{38,50}|r8_[A-Za-z0-9]{36,40}",  # Dropbox, Figma, Replicate
    r"gsk_[A-Za-z0-9]{48,56}|xai-[A-Za-z0-9]{70,90}|pplx-[A-Za-z0-9]{46,56}",  # Groq, xAI, Perplexity
    r"sntry[su]_[A-Za-z0-9+/=_]{60,300}|pscale_(?:tkn|pw|oauth)_[A-Za-z0-9_.-]{32,64}",  # Sentry, PlanetScale
    r"sbp_[a-f0-9]{40}|rubygems_[a-f0-9]{48}|dckr_pat_[A-Za-z0-9_-]{20,40}",  # Supabase, RubyGems, Docker
    r"LTAI[A-Za-z0-9]{16,24}|AKID[A-Za-z0-9]{32}",  # Alibaba, Tencent
)
_ACCESS_KEY = re.compile(rf"(?<![A-Za-z0-9_])(?:{'|'.join(_PROVIDERS)})(?![A-Za-z0-9])")
# A text without a long run of such characters has no key, and most texts have none.
_LONG_RUN = re.compile(r"[A-Za-z0-9_+/=.:-]{18}")

# The patterns are for text in small letters: a search for one of two cases takes three times as long.
_VALUE = r"([^\s\"'`,;<>(){}\[\]]"
# The name of a secret; then a sign or a verb, between which a few words may stand ("the password for my account is").
_NAMED = re.compile(
    r"(?:passw(?:or)?d|passwort|pass[ -]?phrase|pass[ -]?code|pwd|secret(?:[_ -]?access)?(?:[_ -]?key)?"
    r"|(?:api|access|account|auth|private|encryption|signing)[_ -]?(?:key|token)|client[_ -]?secret|\bbearer"
    r"|contrase(?:ñ|n)a|\bclave|mot de passe|\bsenha|wachtwoord|\bparola|hasło|пароль)"
    r"(?:'s\s|[\"'`]?(?:(?: [a-zäöüß]{2,12}){0,4}?\s{0,3}"
    r"(?:[:=]|=>|→|->|\b(?:is|was|ist|lautet|war|es|est|é|è|to)\b:?)\s{0,3}|\s))"
    rf"[\"'`]?{_VALUE}{{6,200}})"
)
_NAMED_TOKEN = re.compile(
    rf"(?<![A-Za-z])(?:token|sessionid|session_id)[\"'`]?\s{{0,3}}[:=]\s{{0,3}}[\"'`]?{_VALUE}{{12,200}})"
)
_NAMED_PASS = re.compile(
    r"(?:(?<![a-z])(?:pass|pw|mdp|kennwort)\s?(?:[:=]|ist)\s?[\"'`]?|密码(?:是|为)?\s?[:：]?\s?"
    r"|(?:\s-u|--user)[ =][\"']?[\w.@-]{1,60}:|(?:login|user(?:name)?)\s?[:=]\s?[\w.@-]{1,60} ?/ ?"
    rf"|(?:sshpass|mysql\w{{0,10}}) [^\n]{{0,60}}?-p ?){_VALUE}{{6,200}})"
)
# Short numbers are secrets behind such words only.
_NAMED_PIN = re.compile(
    r"\b(?:pin(?: code| number)?|pass ?code|otp|cvv2?|cvc2?|security code|one[- ]time (?:code|password))\b"
    r"(?: [a-z]{2,10}){0,3}?\s?(?:\bis|\bwas|[:=])\s?(\d{3,8})\b(?![.,]?\d)"
)
_BASIC = re.compile(r"\bBasic ([A-Za-z0-9+/]{12,400}={0,2})")
# Of each pattern; most texts have none of these words.
_PATTERNS = (
    (_NAMED, ("pass", "pwd", "secret", "key", "token", "bearer", "contrase", "clave", "mot de passe",
              "senha", "wachtwoord", "parola", "hasło", "пароль")),
    (_NAMED_TOKEN, ("token", "session")),
    (_NAMED_PASS, ("pass", "pw", "mdp", "kennwort", "login", "user", "mysql", "密码", "-u ")),
)  # fmt: skip
_PIN_HINTS = (
    "pin",
    "passcode",
    "pass code",
    "otp",
    "cvv",
    "cvc",
    "security code",
    "time code",
    "time password",
    "time-",
)
_IN_URL = re.compile(r"[a-z][a-z0-9+.-]{1,20}://[^\s/:@]{0,80}:([^\s/@]{3,200})@[\w.-]")
_NAME_OF_CODE = re.compile(r"[A-Za-z_]+(?:\.[A-Za-z_]+)+")
_PHRASE = re.compile(r"[a-z]{3,}(?:-[a-z]{3,}){3,}")  # words that make a passphrase
_MIN_ENTROPY_BITS = 3.0  # per character: words of six or more letters have 2 to 3


def find_private_keys(text: str) -> Spans:
    """Return the private keys in PEM form, from their first line to their last one where they have it."""
    has_one = "PRIVATE KEY" in text or "PuTTY-User-Key" in text
    return [m.span() for m in _PRIVATE_KEY.finditer(text)] if has_one else ()


def find_access_keys(text: str) -> Spans:
    """Return what has the form of a provider's keys and tokens."""
    return [m.span() for m in _ACCESS_KEY.finditer(text)] if _LONG_RUN.search(text) else ()


def find_passwords(text: str) -> Spans:
    """Return the passwords and keys that stand behind such a word or in a URL, without the word."""
    return list(_passwords(text))


def _passwords(text: str) -> Iterator[tuple[int, int]]:
    if "://" in text:
        yield from (m.span(1) for m in _IN_URL.finditer(text))
    folded = _lower(text)
    # Written out, since a loop takes ten times as long, and most texts have none of these.
    if not (
        "pass" in folded or "key" in folded or "token" in folded or "secret" in folded or "pwd" in folded
        or "bearer" in folded or "session" in folded or "pin" in folded or "otp" in folded or "cv" in folded
        or "code" in folded or "-u" in folded or "basic" in folded or "clave" in folded or "senha" in folded
        or "pw" in folded or "mdp" in folded or "kennwort" in folded or "login" in folded or "user" in folded
        or "mysql" in folded or "parola" in folded or "wachtwoord" in folded or not folded.isascii()
    ):  # fmt: skip
        return
    for pattern, hints in _PATTERNS:
        if any(hint in folded for hint in hints):
            yield from (m.span(1) for m in pattern.finditer(folded) if _is_random(text[m.start(1) : m.end(1)]))
    if any(hint in folded for hint in _PIN_HINTS):
        yield from (m.span(1) for m in _NAMED_PIN.finditer(folded))
    if "Basic " in text:
        yield from (m.span(1) for m in _BASIC.finditer(text) if _is_login(m.group(1)))


def _lower(text: str) -> str:
    """Return the text in small letters, and as long as before: one letter of Turkish becomes two."""
    return text.replace("\u0130", "i").lower()


def _is_login(encoded: str) -> bool:
    """Return whether the text is a name and a password in base64, as a browser sends them."""
    try:
        return ":" in base64.b64decode(encoded, validate=True).decode()
    except (ValueError, UnicodeDecodeError):
        return False


def _is_random(value: str) -> bool:
    """Return whether the value is no word: letters and digits, or letters and signs, of a certain variety."""
    has_sign = any(sign in value for sign in "!@#$%^&*")
    value = value.rstrip(".!?")
    has_letter, has_digit = any(map(str.isalpha, value)), any(map(str.isdecimal, value))
    has_case = value.lower() != value and not value[:1].isupper()
    is_long_name = len(value) >= 16 and not _NAME_OF_CODE.fullmatch(value)
    is_mixed = has_letter and (has_digit or (has_case and (has_sign or is_long_name)))
    counts = Counter(value)
    entropy = -sum(n / len(value) * log2(n / len(value)) for n in counts.values()) if value else 0.0
    is_varied = entropy >= min(_MIN_ENTROPY_BITS, log2(max(2, len(value))) - 0.6)
    return (is_mixed and is_varied) or _PHRASE.fullmatch(value) is not None
