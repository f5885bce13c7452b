"""Replace secrets and personal data in a text by what they are, e.g. `[email]`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from components.validate_data import credentials, personal_data
from qlora_retrain.core.errors import UsageError

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
# Exceptions whose messages name the value that they are about.
_WITH_VALUES = (LookupError, ValueError, TypeError, AttributeError, AssertionError, ArithmeticError)
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


@contextmanager
def redacted_errors() -> Iterator[None]:
    """Take secrets and personal data out of an error's message: where names should be, a file may have a row's text.

    The message of an error that is our own bug can be any value of a row, e.g. the key of a `KeyError`. It is left out;
    the traceback, which has lines of code, stays.
    """
    try:
        yield
    except UsageError as error:
        text = redact(str(error))
        if text == str(error):
            raise
        raise type(error)(text) from None
    except _WITH_VALUES as error:
        text = f"{type(error).__name__}; its message is left out, since it may hold the text of a row"
        raise RuntimeError(text).with_traceback(error.__traceback__) from None


def replace(text: str, spans: Spans, placeholder: str) -> str:
    """Return the text with the placeholder at each of the places."""
    parts, position = [], 0
    for start, end in sorted(spans):
        # Two forms may match at one place, e.g. a password that is also a provider's key.
        if start >= position:
            parts += [text[position:start], placeholder]
            position = end
    return "".join([*parts, text[position:]])
