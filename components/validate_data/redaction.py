"""Replace secrets and personal data in a text by what they are, e.g. `[email]`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from components.validate_data import credentials, personal_data

Spans = Sequence[tuple[int, int]]
Finder = Callable[[str], Spans]

FINDERS: dict[str, Finder] = {
    "private_keys": credentials.find_private_keys,
    "access_keys": credentials.find_access_keys,
    "passwords": credentials.find_passwords,
    "card_numbers": personal_data.find_card_numbers,
    "ibans": personal_data.find_ibans,
    "social_security_numbers": personal_data.find_social_security_numbers,
    "emails": personal_data.find_emails,
    "phone_numbers": personal_data.find_phone_numbers,
    "ip_addresses": personal_data.find_ip_addresses,
}
PLACEHOLDERS = {
    "private_keys": "[private key]",
    "access_keys": "[access key]",
    "passwords": "[password]",
    "card_numbers": "[card number]",
    "ibans": "[account number]",
    "social_security_numbers": "[social security number]",
    "emails": "[email]",
    "phone_numbers": "[phone number]",
    "ip_addresses": "[IP address]",
}


def redact(text: str) -> str:
    """Return the text without any secret or personal data that a check knows."""
    for name, find in FINDERS.items():
        text = replace(text, find(text), PLACEHOLDERS[name])
    return text


def replace(text: str, spans: Spans, placeholder: str) -> str:
    """Return the text with the placeholder at each of the places."""
    parts, position = [], 0
    for start, end in sorted(spans):
        # Two forms may match at one place, e.g. a password that is also a provider's key.
        if start >= position:
            parts += [text[position:start], placeholder]
            position = end
    return "".join([*parts, text[position:]])
