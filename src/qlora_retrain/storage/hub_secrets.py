"""Keep what opens the Hugging Face Hub out of logs and errors: the token, and the signatures of uploads and downloads.

Its client logs the address of every request that it tries again, and that of a large file holds a signature. The error
for a token that cannot be sent quotes it.
"""

from __future__ import annotations

import logging

from qlora_retrain.core import uris

# The second is the library below the client: it logs every request where the log takes in more than warnings.
_PACKAGES = ("huggingface_hub", "httpx2")
# Instead of the error's own text.
UNSENDABLE = (
    "HF_TOKEN or HF_ENDPOINT cannot be sent; expected a token of letters and digits, and an address such as "
    "https://huggingface.co"
)


def mask_log() -> None:
    """Have those of the client's modules that are loaded log addresses without their queries."""
    # A logger's filters do not see what the loggers below it log.
    for name in list(logging.root.manager.loggerDict):
        if name.partition(".")[0] in _PACKAGES:
            logging.getLogger(name).addFilter(_mask)


def is_unsendable(error: BaseException) -> bool:
    """Return whether no try could send the request."""
    from httpx2 import InvalidURL, LocalProtocolError, UnsupportedProtocol

    # Of this type is also the error for a server that hangs up during an upload.
    if isinstance(error, LocalProtocolError):
        return "header" in str(error)
    return isinstance(error, InvalidURL | UnicodeError | UnsupportedProtocol)


def _mask(record: logging.LogRecord) -> bool:
    record.msg, record.args = uris.mask_secrets_of_errors(record.getMessage()), None
    return True
