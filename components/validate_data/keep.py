"""Leave out the rows whose fields differ from `data.keep`, and notice a name or a value that no row has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from components.validate_data.values import (
    RowFault,
    describe_type,
    did_you_mean,
    is_empty,
    leaf_paths,
    near_match,
    shorten,
    text_of,
    value_at,
)
from qlora_retrain.core.errors import UsageError

Setting = str | int | float | bool
_MAX_VALUES = 50  # that are remembered for a message; a field with more holds no category


class RowFilter:
    """Compare rows with `data.keep`."""

    def __init__(self, settings: Mapping[str, Setting]) -> None:
        self._settings = settings
        self._names: dict[str, None] = {}
        self._has_exempt = False
        self._has_value = dict.fromkeys(settings, False)
        self._matches = dict.fromkeys(settings, False)
        self._types: dict[str, Counter[str]] = {path: Counter() for path in settings}
        self._values: dict[str, set[str]] = {path: set() for path in settings}

    def is_kept(self, fields: Mapping[str, object], *, is_optional: bool = False) -> bool:
        """Return whether the row has all the values.

        Args:
            fields: The row's fields.
            is_optional: Whether a row without any of the fields is kept, as golden rows are, which someone chose.
        """
        if not self._settings:
            return True

        if len(self._names) < _MAX_VALUES:
            self._names.update((path, None) for path, _ in leaf_paths(fields))
        results = []
        for path, expected in self._settings.items():
            value = value_at(fields, path)
            results.append(is_same(value, expected))
            self._matches[path] |= results[-1]
            if not is_empty(value):
                self._has_value[path] = True
                self._types[path][describe_type(value)] += 1
                if len(self._values[path]) < _MAX_VALUES and not isinstance(value, list | Mapping | bytes):
                    self._values[path].add(text_of(value))
        is_exempt = is_optional and all(value_at(fields, path) is None for path in self._settings)
        self._has_exempt |= is_exempt
        return is_exempt or all(results)

    def check(self, source: str) -> None:
        """Refuse a setting that no row of the source met.

        Raises:
            UsageError: It names the similar field, or the types of the values and the similar value.
        """
        for path, expected in self._settings.items():
            if not self._has_value[path] and source == "raw_data":
                listing = ", ".join(shorten(name) for name in list(self._names)[:20])
                raise UsageError(
                    f"{source}: data.keep: no row has a value in the field {path}{did_you_mean(path, self._names)}; "
                    f"the fields are: {listing}"
                )
            if self._has_value[path] and not self._matches[path] and not self._has_exempt:
                types = ", ".join(f"{words} in {count:,} rows" for words, count in self._types[path].most_common())
                near = self._near_value(path, expected)
                raise UsageError(
                    f"{source}: data.keep: no row has {text_of(expected)} ({describe_type(expected)}) in the field "
                    f"{path}; its values are {types}{near}"
                )

    def _near_value(self, path: str, expected: Setting) -> str:
        values = self._values[path]
        # With this many values the field may hold texts, and a message shows none.
        if len(values) >= _MAX_VALUES:
            return ""
        match = near_match(text_of(expected), values)
        return f"; did you mean {shorten(match)}?" if match else ""


def is_same(value: object, expected: Setting) -> bool:
    """Return whether a row's value is the setting's; a CSV file's text is the number or the truth that it writes."""
    if value is None:
        return False
    if isinstance(value, str) and not isinstance(expected, str):
        return _is_written_as(value.strip(), expected)
    if isinstance(expected, str) and not isinstance(value, str):
        try:
            return text_of(value) == expected
        except RowFault:
            return False
    return value == expected


def _is_written_as(text: str, expected: bool | int | float) -> bool:
    if isinstance(expected, bool):
        return text.casefold() in (("true", "1", "yes") if expected else ("false", "0", "no"))
    try:
        return float(text) == expected
    except ValueError:
        return False
