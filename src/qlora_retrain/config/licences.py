"""Check the licence that a line names: an SPDX expression, a licence of the Hugging Face Hub's list, or `other`."""

from __future__ import annotations

import difflib

from qlora_retrain.core.licences import HUB_LICENCES

OTHER_LICENCE, UNSPECIFIED = "other", "unspecified"


def canonical(text: str) -> str:
    """Return the licence as SPDX writes it, in whatever case it was given; one that SPDX lacks in small letters.

    Raises:
        ValueError: If neither SPDX nor the Hub knows it.
    """
    from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

    name = text.strip()
    if name.lower() in (OTHER_LICENCE, UNSPECIFIED):
        return name.lower()
    try:
        return str(canonicalize_license_expression(name))
    except InvalidLicenseExpression:
        if name.lower() in HUB_LICENCES:
            return name.lower()

    # `Apache 2.0` and `Llama-3.1` are what people write.
    matches = difflib.get_close_matches(name.lower().replace(" ", "-"), HUB_LICENCES, n=1, cutoff=0.7)
    hint = f"; did you mean {matches[0]}?" if matches else ""
    raise ValueError(
        f"{text!r} is no SPDX licence, such as Apache-2.0, and none that the Hugging Face Hub knows, such as "
        f"llama3.1{hint}. For any other licence set licence: other, and its name as licence_name"
    )
