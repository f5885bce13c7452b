"""A licence is one that SPDX or the Hugging Face Hub knows, or `other` with a name."""

from __future__ import annotations

import re

import pytest

from qlora_retrain.config.sections import PublishConfig


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Apache-2.0", "Apache-2.0"),
        ("apache-2.0", "Apache-2.0"),
        ("MIT", "MIT"),
        (" mit ", "MIT"),
        ("gpl-3.0-or-later", "GPL-3.0-or-later"),
        ("CC-BY-NC-SA-4.0", "CC-BY-NC-SA-4.0"),
        ("MIT OR Apache-2.0", "MIT OR Apache-2.0"),
        ("LicenseRef-acme", "LicenseRef-acme"),
        ("llama3.1", "llama3.1"),
        ("Gemma", "gemma"),
        ("openrail++", "openrail++"),
        ("unspecified", "unspecified"),
    ],
)
def test_a_licence_is_written_as_its_list_has_it(text: str, expected: str) -> None:
    assert PublishConfig(licence=text).licence == expected


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"licence": "Apache 2.0"}, "did you mean apache-2.0?"),
        ({"licence": "apache2"}, "did you mean apache-2.0?"),
        ({"licence": "Llama-3.1"}, "did you mean llama3.1?"),
        ({"licence": "proprietary"}, "'proprietary' is no SPDX licence"),
        ({"licence": "foo: bar"}, "is no SPDX licence"),
        ({"licence": "MIT\n---\n"}, "is no SPDX licence"),
        ({"licence": ""}, "is no SPDX licence"),
        ({"licence": "MIT AND"}, "is no SPDX licence"),
        ({"licence": "other"}, "licence: other needs licence_name"),
        ({"licence": "other", "licence_name": " "}, "licence: other needs licence_name"),
        ({"licence": "MIT", "licence_name": "ours"}, "licence_name goes with licence: other, and the licence is MIT"),
        ({"licence_name": "ours"}, "licence_name goes with licence: other, and the licence is unspecified"),
        ({"licence": "MIT", "licence_link": "https://me:secret@host/x"}, "user"),
        ({"licence": "MIT", "licence_link": "LICENSE"}, "expected a URL that begins with https://, found 'LICENSE'"),
        ({"licence": "MIT", "licence_link": "https://host/a b"}, "expected a URL"),
    ],
)
def test_what_no_list_knows_is_refused_with_the_way_out(fields: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        PublishConfig(**fields)


def test_another_licence_has_a_name_and_a_link() -> None:
    config = PublishConfig(licence="Other", licence_name="acme-1.0", licence_link="https://acme.example/licence")
    assert (config.licence, config.licence_name) == ("other", "acme-1.0")
    # The plan's copy is read again by the step.
    assert PublishConfig.model_validate(config.model_dump(mode="json")) == config
