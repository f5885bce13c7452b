"""The frame of the pages: addresses, navigation, tables of links and forms, in the style of the reports.

As in `core.html`, only `Html` is markup, and every other value is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated
from urllib.parse import quote, urlencode

from fastapi import Depends, Request

from qlora_retrain.core.html import Html, join
from qlora_retrain.core.html_style import STYLE

# Added to the style of the reports; the pages have no style attribute, so that the policy can name this sheet alone.
PAGE_STYLE = (
    STYLE
    + """
a{color:var(--s0)}:focus-visible{outline:2px solid var(--s0);outline-offset:2px}
.path{color:var(--soft);margin:0}.path a{text-decoration:none}h1{margin-top:.3rem}
nav{display:flex;flex-wrap:wrap;gap:.3rem;border-bottom:1px solid var(--line);margin:1rem 0}
nav a,nav span{padding:.35rem .8rem;text-decoration:none;border-bottom:3px solid transparent}
nav span{color:var(--soft)}nav a[aria-current]{border-color:var(--s0);color:var(--text);font-weight:600}
iframe{box-sizing:border-box;width:100%;height:calc(100vh - 15rem);min-height:24rem;border:1px solid var(--line)}
button,input{font:inherit;color:inherit;background:var(--back);border:1px solid var(--soft);border-radius:.3rem;
padding:.3rem .7rem}input[type=text]{width:min(34rem,100%);box-sizing:border-box}
input[type=radio]{accent-color:var(--s0)}button{cursor:pointer;border-color:var(--s0);font-weight:600}
button.caution{border-color:var(--s1)}label{display:block;color:var(--soft);margin:.6rem 0 .2rem}
form p{margin:.6rem 0}.wide td{vertical-align:middle}
"""
)


@dataclass(frozen=True, slots=True)
class Urls:
    """The addresses of the pages, below the path at which Airflow has mounted them."""

    root: str

    def models(self) -> str:
        """Return the address of the list of lines."""
        return f"{self.root}/models"

    def line(self, line: str) -> str:
        """Return the address of a line."""
        return f"{self.root}/models/{_segment(line)}"

    def version(self, line: str, version: str, tab: str = "") -> str:
        """Return the address of a version, and of one of its tabs."""
        return f"{self.line(line)}/{_segment(version)}{_query(tab=tab)}"

    def version_report(self, line: str, version: str, report: str) -> str:
        """Return the address of a version's report."""
        return f"{self.version(line, version)}/reports/{_segment(report)}"

    def diff(self, line: str, first: str = "", second: str = "") -> str:
        """Return the address at which two versions are compared."""
        return f"{self.line(line)}/diff{_query(a=first, b=second)}"

    def move(self, line: str) -> str:
        """Return the address to which a form is sent that moves the alias of a line."""
        return f"{self.line(line)}/move"

    def run(self, dag_id: str, run_id: str, tab: str = "") -> str:
        """Return the address of a DAG run, and of one of its tabs."""
        return f"{self.root}/runs/{_segment(dag_id)}/{_segment(run_id)}{_query(tab=tab)}"

    def task(self, dag_id: str, run_id: str, task_id: str) -> str:
        """Return the address of the report of a task."""
        return f"{self.run(dag_id, run_id)}/{_segment(task_id)}"


def urls_of(request: Request) -> Urls:
    """Return the addresses as the browser knows them."""
    return Urls(str(request.scope.get("root_path", "")))


UrlsDep = Annotated[Urls, Depends(urls_of)]


def document(title: str, sentence: str, *blocks: str, path: Iterable[Html] = ()) -> str:
    """Return a whole page.

    Args:
        title: Its heading.
        sentence: What a person reads first.
        blocks: The content; a plain string becomes a paragraph.
        path: Links to the pages above it.
    """
    body = "\n".join(block if isinstance(block, Html) else f"<p>{join(block)}</p>" for block in blocks)
    crumbs = " › ".join(path)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f"<title>{join(title)}</title>\n<style>{PAGE_STYLE}</style>\n</head>\n<body>\n"
        + (f'<p class="path">{crumbs} ›</p>\n' if crumbs else "")
        + f'<h1>{join(title)}</h1>\n<p class="sentence">{join(sentence)}</p>\n{body}\n</body>\n</html>\n'
    )


def error_page(title: str, sentence: str) -> str:
    """Return the page of an error."""
    return document(title, sentence)


def link(href: str, text: str) -> Html:
    """Return a link to one of the pages."""
    return Html(f'<a href="{join(href)}">{join(text)}</a>')


def tabs(entries: Sequence[tuple[str, str | None]], current: str) -> Html:
    """Return links beside each other; one without an address is shown as text alone."""
    parts = []
    for text, href in entries:
        mark = ' aria-current="page"' if text == current else ""
        parts.append(f'<a href="{join(href)}"{mark}>{join(text)}</a>' if href else f"<span>{join(text)}</span>")
    return Html(f'<nav aria-label="Reports">{"".join(parts)}</nav>')


def frame(href: str, title: str) -> Html:
    """Return a report inside a frame in which nothing runs and from which nothing opens."""
    return Html(f'<iframe sandbox="" src="{join(href)}" title="{join(title)}"></iframe>')


def radio(name: str, value: str, label: str, *, is_checked: bool) -> Html:
    """Return one of several choices of a form."""
    checked = " checked" if is_checked else ""
    attributes = f'name="{join(name)}" value="{join(value)}" aria-label="{join(label)}"'
    return Html(f'<input type="radio" {attributes}{checked}>')


def form(href: str, fields: Mapping[str, str], *blocks: str, method: str = "post") -> Html:
    """Return a form with hidden fields; its button is among the blocks."""
    hidden = "".join(
        f'<input type="hidden" name="{join(name)}" value="{join(value)}">' for name, value in fields.items()
    )
    body = "\n".join(block if isinstance(block, Html) else f"<p>{join(block)}</p>" for block in blocks)
    return Html(f'<form method="{join(method)}" action="{join(href)}">{hidden}\n{body}\n</form>')


def _segment(text: str) -> str:
    return quote(text, safe="")


def _query(**values: str) -> str:
    pairs = {name: value for name, value in values.items() if value}
    return f"?{urlencode(pairs)}" if pairs else ""
