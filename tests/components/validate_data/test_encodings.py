"""Bytes that are not UTF-8: read where the file says so, else refused with the command that mends this very file."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from components.validate_data.files import Record

ReadFiles = Callable[..., list[Record]]
RefuseFiles = Callable[..., str]
LETTER = "text,label\nfirst,refund\ncaf\u00e9,refund\n"


def run_command(message: str, folder: Path) -> None:
    """Run the command that a message gives, in the source's folder."""
    commands = re.findall("`([^`]*)`", message)
    subprocess.run(commands[-1], shell=True, cwd=folder, check=True)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "text,label\nh\u00e9\u2028\U0001f600,a\n"),
        ("a.jsonl", '{"text": "h\u00e9\u2028\U0001f600", "label": "a"}\n'),
        ("a.json", '[{"text": "h\u00e9\u2028\U0001f600",\n "label": "a"}]'),
    ],
)
def test_unicode_is_read_whatever_its_form(read_files: ReadFiles, name: str, text: str, encoding: str) -> None:
    fields = [record.fields for record in read_files({name: text.encode(encoding)})]
    assert fields == [{"text": "h\u00e9\u2028\U0001f600", "label": "a"}]


def test_utf_16_that_is_cut_off_is_refused(refuse_files: RefuseFiles) -> None:
    assert "a.csv: the file is UTF-16" in refuse_files({"a.csv": LETTER.encode("utf-16")[:-1]})


WHOLE_FILES = [
    # Bytes of 0x80 to 0x9f are Windows-1252: curly quotes, dashes, the euro sign.
    ("cp1252", "WINDOWS-1252", "I can’t pay – it costs 5 €"),
    # Letters alone are the same in ISO-8859-1, and the conversion too.
    ("latin-1", "WINDOWS-1252", "Le café est fermé. Für die Größe?"),
    ("cp1250", "WINDOWS-1250", "Zażółć gęślą jaźń"),
    ("cp1254", "WINDOWS-1254", "Şifremi unuttum nasıl değiştirebilirim"),
    ("mac_roman", "MACINTOSH", "Le café est fermé et ça coûte déjà"),
    ("cp850", "CP850", "Le café est fermé à midi"),
    ("cp1251", "WINDOWS-1251", "Привет я забыл пароль"),
    ("koi8_r", "KOI8-R", "Привет я забыл пароль"),
    ("cp1253", "WINDOWS-1253", "Καλημέρα ξέχασα τον κωδικό μου"),
    ("cp932", "CP932", "パスワードを忘れました"),
    ("euc_jp", "EUC-JP", "パスワードを忘れました"),
    ("gb18030", "GB18030", "我忘记了密码，这是我的卡"),
    ("big5", "BIG5", "我忘記了密碼，這是我的卡"),
    ("cp949", "CP949", "비밀번호를 잊어버렸습니다"),
]


@pytest.mark.parametrize(("encoding", "iconv_name", "sentence"), WHOLE_FILES, ids=[case[0] for case in WHOLE_FILES])
def test_a_file_of_an_older_encoding_is_refused_with_the_command_that_converts_it(
    tmp_path: Path, read_files: ReadFiles, refuse_files: RefuseFiles, encoding: str, iconv_name: str, sentence: str
) -> None:
    message = refuse_files({"a.csv": f"text,label\n{sentence},a\n".encode(encoding)})
    assert f"iconv -f {iconv_name} -t UTF-8" in message
    # The command gives back the text.
    run_command(message, tmp_path / "source")
    (tmp_path / "source" / "a.csv").unlink()
    assert [record.fields for record in read_files({})] == [{"text": sentence, "label": "a"}]


def test_the_line_and_the_byte_are_named(refuse_files: RefuseFiles) -> None:
    data = LETTER.encode("latin-1")
    message = refuse_files({"a.csv": data})
    assert message.startswith(f"a.csv:3: byte {data.index(0xE9)} of the file (0xe9, byte 4 of the line) is not UTF-8")


def test_a_packed_file_is_converted_through_its_own_program(
    tmp_path: Path, read_files: ReadFiles, refuse_files: RefuseFiles
) -> None:
    message = refuse_files({"my data.csv.gz": gzip.compress(LETTER.encode("latin-1"))})
    assert "`gzip -dc 'my data.csv.gz' | iconv -f WINDOWS-1252 -t UTF-8 > 'my data.utf8.csv'`" in message
    run_command(message, tmp_path / "source")
    assert (tmp_path / "source" / "my data.utf8.csv").read_text(encoding="utf-8") == LETTER


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_file_that_is_utf_8_but_for_a_byte_is_mixed_and_never_converted_as_a_whole(
    tmp_path: Path, read_files: ReadFiles, refuse_files: RefuseFiles, place: int
) -> None:
    """A conversion of the whole would turn each caf\u00e9 into caf\u00c3\u00a9, which nobody would notice."""
    texts = ["caf\u00e9", "na\u00efve", "\u65e5\u672c"]
    rows = [json.dumps({"text": text}, ensure_ascii=False).encode() for text in texts]
    rows[place] = rows[place].replace(texts[place].encode(), b"\x93caf\xe9\x94")
    message = refuse_files({"a.jsonl": b"\n".join(rows)})
    assert message.startswith(f"a.jsonl:{place + 1}: byte ")
    assert "it mixes encodings" in message
    assert "1 of 3 lines are concerned" in message
    assert "iconv -f" not in message

    # The command mends the odd bytes and leaves the others as they are.
    run_command(message, tmp_path / "source")
    (tmp_path / "source" / "a.jsonl").unlink()
    texts[place] = "\u201ccaf\u00e9\u201d"
    assert [record.fields for record in read_files({})] == [{"text": text} for text in texts]


def test_the_command_that_finds_the_lines_finds_them(tmp_path: Path, refuse_files: RefuseFiles) -> None:
    message = refuse_files({"a.csv": b"text,label\ncaf\xc3\xa9,a\ncaf\xe9,b\nx,c\n"})
    command = next(c for c in re.findall("`([^`]*)`", message) if "grep" in c)
    output = subprocess.run(command, shell=True, cwd=tmp_path / "source", capture_output=True, check=False).stdout
    assert output == b"3:caf\xe9,b\n"


def test_halves_of_pairs_that_are_written_as_characters_are_put_together(
    tmp_path: Path, read_files: ReadFiles, refuse_files: RefuseFiles
) -> None:
    data = "text,label\n\ud83d\ude00 h\u00e9,a\n".encode("utf-8", "surrogatepass")
    message = refuse_files({"a.csv": data})
    assert "CESU-8" in message
    run_command(message, tmp_path / "source")
    (tmp_path / "source" / "a.csv").unlink()
    assert [record.fields for record in read_files({})] == [{"text": "\U0001f600 h\u00e9", "label": "a"}]


def test_bytes_of_no_encoding_have_a_message_too(refuse_files: RefuseFiles) -> None:
    message = refuse_files({"a.csv": b"text,label\n" + bytes(range(0x80, 0x100)) + b",a\n"})
    assert "the file reads well in no common encoding" in message


def test_a_binary_file_is_refused_by_name(refuse_files: RefuseFiles) -> None:
    assert "a.csv: the file is binary: byte 9 is zero" in refuse_files({"a.csv": b"text,labe\0\0\0l\nx,y\n"})
