"""Globs mean what Bash with `globstar` means: asked of Bash itself, for patterns and trees made by chance."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from qlora_retrain.core import braces
from qlora_retrain.storage import globs

# Reads a pattern a line, and writes the words that it stands for, each pattern's behind a line `=`.
SCRIPT = """
while IFS= read -r pattern; do
  printf '=\\0'
  eval "printf '%s\\0' $pattern"
done
"""
TREE = (
    *("a.jsonl", "b.csv", "sub/a.jsonl", "sub/deep/a.jsonl", "sub/.hidden.jsonl", ".top.jsonl", ".dir/a.jsonl"),
    *("data/x.csv", "data/y/z.csv", "1.txt", "2.txt", "03.txt", "rows[1].csv", "A.JSONL", "a-b.txt", "a]b.txt"),
    *("\u00e9.txt", "a b.txt", "*.txt", "{a}.txt"),
)


def ask_bash(folder: Path, patterns: Sequence[str]) -> list[set[str]]:
    """Return the files of the folder that each pattern expands to."""
    output = subprocess.run(
        ["bash", "-O", "globstar", "-O", "nullglob", "-c", SCRIPT],
        input="".join(f"{pattern}\n" for pattern in patterns).encode(),
        cwd=folder,
        env={"LC_ALL": "C.UTF-8", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        check=True,
    )
    assert not output.stderr, output.stderr.decode()
    answers = [answer.split("\0") for answer in os.fsdecode(output.stdout).split("=\0")[1:]]
    assert len(answers) == len(patterns)
    # A word without a star stands for itself, whether there is such a file or not.
    return [
        {Path(word).as_posix() for word in words if is_below(word) and (folder / word).is_file()} for words in answers
    ]


def is_below(word: str) -> bool:
    return bool(word) and not word.startswith("/") and not word.endswith("/") and ".." not in word.split("/")


def ask_globs(tree: Sequence[str], pattern: str) -> set[str]:
    return {path for path in tree if globs.matches(path, pattern)}


def write_tree(folder: Path, tree: Sequence[str]) -> Path:
    for name in tree:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    return folder


PATTERNS = (
    "*.jsonl **/*.jsonl ** **/a.jsonl sub/** sub/**/*.jsonl **/deep/** **/**/a.jsonl */*.jsonl */*/* **/* ***.jsonl "
    "a** **a.jsonl [ab].* [!a].csv [^a].csv [[:digit:]].txt [[:digit:]]*.txt [[:upper:]].* [[:lower:]].txt ?.txt "
    "[a-c].jsonl [z-a].jsonl []a]*.txt a[]]b.txt a[-x]b.txt [0-9].txt [[:foo:]].txt [[:digit:].txt [a.jsonl a[.csv "
    "*.{jsonl,csv} {a,b}.{jsonl,csv} {,sub/}a.jsonl {sub,data}/{,deep/,y/}*.* {1..3}.txt {01..3}.txt {3..1}.txt "
    "{1..9..2}.txt {a..c}.jsonl {c..a..2}.jsonl {a}.txt {a,{b,c}}.* {{a,b},1}.* {a,b .* .*.jsonl .dir/* .*/* "
    "sub/.* **/.* **/.*.jsonl \\*.txt \\a.jsonl rows\\[1\\].csv \\{a\\}.txt {a,\\{a\\}}.txt a\\ b.txt ./*.jsonl "
    "./sub/./*.jsonl sub//*.jsonl */ sub/*/ **/ ../* /*.none */../* [.]top.jsonl ?top.jsonl {}.txt {a,b}} {{a,b}.csv "
    "{a,b}{,}.* {a..b,1}.* {1..2}{,x}.txt {a,b\\,c}.csv [[:alpha:]].txt [![:ascii:]].txt [[:punct:]].txt "
    "[[=a=]].jsonl [[.a.]].jsonl [\\]a].jsonl [!\\]]*.csv {-1..2}.txt {1..2..0}.txt {1..}.txt {..2}.txt"
)


def patterns_by_space() -> list[str]:
    return [p.replace("\0", "\\ ") for p in PATTERNS.replace("\\ ", "\0").split()]


def test_patterns_take_the_files_that_bash_says(tmp_path: Path) -> None:
    folder = write_tree(tmp_path, TREE)
    patterns = patterns_by_space()
    for pattern, expected in zip(patterns, ask_bash(folder, patterns), strict=True):
        # The exact name of a file takes it; that is ours.
        assert ask_globs(TREE, pattern) - {pattern} == expected - {pattern}, pattern


NAMES = st.text("ab.1-]", min_size=1, max_size=3).filter(lambda name: name.strip("."))
PIECES = st.sampled_from(
    "* ** ? a b . / / **/ /** [ab] [!a] [^b] [a-b] [[:digit:]] 1 - { } , {a,b} {,a} {1..3} .. [ ] \\* \\a \\{ "
    "{a,{b,*}} []] [!]a]".split()
)


def stays_in_the_folder(pattern: str) -> bool:
    """Say whether Bash would not walk through the whole machine; `**//a` is `/a` for it."""
    words = [word.replace("\\", "") for word in braces.expand(pattern, 5**5)]
    return len(words) <= globs.MAX_CHOICES and not any(
        word.startswith("/") or "//" in word or ".." in word.split("/") for word in words
    )


# Without the search for the shortest example, which asks Bash for minutes.
@settings(max_examples=80, deadline=None, phases=(Phase.explicit, Phase.generate))
@given(
    tree=st.lists(st.lists(NAMES, min_size=1, max_size=3).map("/".join), min_size=1, max_size=12),
    patterns=st.lists(
        st.lists(PIECES, min_size=1, max_size=5).map("".join).filter(stays_in_the_folder), min_size=20, max_size=60
    ),
)
def test_patterns_made_by_chance_take_the_files_that_bash_says(
    tmp_path_factory: pytest.TempPathFactory, tree: list[str], patterns: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("tree")
    files = []
    for path in tree:
        # A name cannot be a file's and a folder's.
        if not any((folder / part).is_file() for part in Path(path).parents) and not (folder / path).exists():
            write_tree(folder, [path])
            files.append(path)
    for pattern, expected in zip(patterns, ask_bash(folder, patterns), strict=True):
        ours = ask_globs(files, pattern)
        plain = {path for path in ours - expected if is_below_a_plain_name(path, pattern)}
        assert ours - plain - {pattern} == expected - {pattern}, pattern


def is_below_a_plain_name(path: str, pattern: str) -> bool:
    """Say whether a word of the pattern names a folder above the path without any wildcard."""
    words = [word.replace("\\", "") for word in braces.expand(pattern, globs.MAX_CHOICES) if not set("*?") & {*word}]
    folders = {parent.as_posix() for parent in Path(path).parents}
    return any(Path(word).as_posix() in folders for word in words if word)
