"""The strict YAML reader: what scalars mean, and one-line complaints with file, line and key."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from meshwright.errors import SpecError
from meshwright.hardware_specs import Section, dump_yaml, parse_yaml, read_yaml

DOCUMENT = """\
schema_version: 1
name: test
rate: 1e-6
big: 1e3
octal: 010
clock: 1:30
answer: yes
flag: true
empty:
size: 80 GiB
tp: [1, 2, 4]
words: [a, "8"]
node:
  gpu: h100
  nic: {bandwidth: 400 Gbit/s}
levels:
  - {bits: 4}
  - {bits: 8}
"""

# (YAML text, the whole message after the file name)
MALFORMED = {
    "empty file": ("", ": is empty; write at least one 'key: value' line"),
    "only a comment": ("# nothing\n", ": is empty; write at least one 'key: value' line"),
    "null document": ("~", ": is empty; write at least one 'key: value' line"),
    "list at the top": ("- a\n", ":1: expected 'key: value' lines at the top, got a list"),
    "text at the top": ("hello", ":1: expected 'key: value' lines at the top, got the text 'hello'"),
    "number at the top": ("12", ":1: expected 'key: value' lines at the top, got the number 12"),
    "duplicate key": ("a: 1\nb: 2\na: 3\n", ":3: a: given twice (first on line 1); keep one"),
    "duplicate key below": ("a:\n  b: 1\n  b: 2\n", ":3: a.b: given twice (first on line 2); keep one"),
    "duplicate key in a list": (
        "a: [1, {b: 1, b: 2}]",
        ":1: a[1].b: given twice (first on line 1); keep one",
    ),
    "anchor": ("a: &x 1", ":1: anchor '&x' is not supported; write the value out where it is used"),
    "alias": ("a: *x", ":1: alias '*x' is not supported; write the value out"),
    "cycle": ("a: &x [*x]", ":1: anchor '&x' is not supported; write the value out where it is used"),
    "merge key": ("<<: {a: 1}", ":1: merge key '<<' is not supported; write the keys out"),
    "python tag": (
        "a: !!python/object/apply:os.system [ls]",
        ":1: tag 'tag:yaml.org,2002:python/object/apply:os.system' is not supported; write a plain value",
    ),
    "core tag": ("a: !!int 3", ":1: tag 'tag:yaml.org,2002:int' is not supported; write a plain value"),
    "two documents": (
        "a: 1\n---\nb: 2\n",
        ":2: a second document starts ('---'); keep one document per file",
    ),
    "nan": ("a: .nan", ":1: a: .nan is not a finite number"),
    "infinity": ("a:\n  b: -.inf", ":2: a.b: -.inf is not a finite number"),
    "infinity in a list": ("a: [1, .INF]", ":1: a[1]: .INF is not a finite number"),
    "number as a key": ("1: a", ":1: key '1' is not text; write it in quotes: \"1\":"),
    "boolean as a key": ("true: a", ":1: key 'true' is not text; write it in quotes: \"true\":"),
    "date as a key": (
        "2024-01-01: a",
        ":1: key '2024-01-01' is not text; write it in quotes: \"2024-01-01\":",
    ),
    "null as a key": ("~: a", ":1: key '~' is not text; write it in quotes: \"~\":"),
    "empty key": ('"": a', ":1: key '' is not a name; write a short word before the ':'"),
    "key with a line break": (
        '"a\\nb": 1',
        ":1: key 'a\\nb' is not a name; write a short word before the ':'",
    ),
    "list as a key": ("? [a]\n: b", ":1: a key is itself a list or mapping; keys must be text"),
    "list nesting": ("a: " + "[" * 3000, ":1: nested deeper than 32 levels; flatten the file"),
    "mapping nesting": ("{a: " * 3000, ":1: nested deeper than 32 levels; flatten the file"),
    "block nesting": ("a:\n" + "- " * 3000 + "b", ":2: nested deeper than 32 levels; flatten the file"),
    "NUL": ("a: 1\nb: \0", ":2: holds the control character '\\x00'; this is not a YAML text file"),
    "escaped NUL": ('a: "\\0"', ":1: a: holds the control character '\\x00'"),
    "lone surrogate": (
        "a: \ud800",
        ":1: holds the control character '\\ud800'; this is not a YAML text file",
    ),
    "tab indent": (
        "a:\n\tb: 1",
        ":2: not valid YAML: found character that cannot start any token;"
        " indent with spaces, and quote text that starts with a special character",
    ),
    "colon in text": (
        "a: b: c",
        ":1: not valid YAML: mapping values are not allowed in this context;"
        " check the indentation, and quote text that holds ': '",
    ),
    "open quote": ('a: "b', ":1: not valid YAML: found unexpected end of stream; close the quote"),
    "open bracket": (
        "a: [1, 2",
        ":2: not valid YAML: did not find expected ',' or ']'; close the bracket and put a comma between values",
    ),
    "future YAML": ("%YAML 3.0\n---\na: 1", ":1: not valid YAML: found incompatible YAML document"),
    "too many values": (
        "a: [" + "1," * 200_001 + "]",
        ":1: more than 200000 values; a spec file is far smaller",
    ),
    "too large": ("a: " + "x" * 5_000_001, ": larger than 5 MB; a spec file is a few kB"),
}

# (reader, the whole message after "f.yaml:")
MISREAD: dict[str, tuple[Callable[[Section], object], str]] = {
    "missing key": (lambda s: s.text("model"), "1: model: is required but missing"),
    "mistyped key": (lambda s: s.text("nmae"), "1: nmae: is required but missing; is 'name' meant to be it?"),
    "empty value": (lambda s: s.text("empty"), "9: empty: is empty; give it a value"),
    "number for text": (
        lambda s: s.text("octal"),
        '5: octal: expected text, got the number 010; write "010" in quotes if it is text',
    ),
    "boolean for text": (
        lambda s: s.text("flag"),
        '8: flag: expected text, got the boolean true; write "true" in quotes if it is text',
    ),
    "mapping for text": (lambda s: s.text("node"), "13: node: expected a single value, got keys and values"),
    "list for text": (lambda s: s.text("tp"), "11: tp: expected a single value, got a list"),
    "text for integer": (
        lambda s: s.integer("name"),
        "2: name: expected a whole number, got the text 'test'",
    ),
    "float for integer": (
        lambda s: s.integer("big"),
        "4: big: expected a whole number, got the number 1e3; write 1000",
    ),
    "sexagesimal": (lambda s: s.number("clock"), "6: clock: expected a number, got the text '1:30'"),
    "boolean for integer": (
        lambda s: s.integer("flag"),
        "8: flag: expected a whole number, got the boolean true",
    ),
    "boolean for number": (lambda s: s.number("flag"), "8: flag: expected a number, got the boolean true"),
    "yes for boolean": (lambda s: s.boolean("answer"), "7: answer: expected true or false, got 'yes'"),
    "below minimum": (
        lambda s: s.integer("schema_version", minimum=2),
        "1: schema_version: must be at least 2, not 1",
    ),
    "number below minimum": (
        lambda s: s.number("rate", minimum=1.0),
        "3: rate: must be at least 1.0, not 1e-06",
    ),
    "bare number for quantity": (
        lambda s: s.quantity("schema_version", "bytes"),
        "1: schema_version: '1' has no unit; write for example '80 GiB'",
    ),
    "wrong kind of unit": (
        lambda s: s.quantity("size", "seconds"),
        "10: size: '80 GiB': unknown unit 'GiB' for seconds; write for example '5 us'",
    ),
    "text for quantity": (
        lambda s: s.quantity("name", "watts"),
        "2: name: 'test' is not a quantity; write a number and a unit, e.g. '700 W'",
    ),
    "unknown choice": (
        lambda s: s.choice("name", ("tests", "other")),
        "2: name: unknown name 'test'; did you mean 'tests'? Known: tests, other.",
    ),
    "unlike any choice": (
        lambda s: s.choice("name", ("bf16",)),
        "2: name: unknown name 'test'. Known: bf16.",
    ),
    "scalar for list": (
        lambda s: s.integers("schema_version"),
        "1: schema_version: expected a list such as [a, b], got the number 1",
    ),
    "text in integers": (
        lambda s: s.integers("words"),
        "12: words[0]: expected a whole number, got the text 'a'",
    ),
    "mapping in texts": (
        lambda s: s.texts("levels"),
        "17: levels[0]: expected a single value, got keys and values",
    ),
    "scalar for section": (
        lambda s: s.section("name"),
        "2: name: expected keys and values below it, got the text 'test'",
    ),
    "missing section": (lambda s: s.section("workload"), "1: workload: is required but missing"),
    "scalars for sections": (
        lambda s: s.sections("tp"),
        "11: tp[0]: expected keys and values, got the number 1",
    ),
    "nested key": (
        lambda s: s.section("node").section("nic").integer("bandwidth"),
        "15: node.nic.bandwidth: expected a whole number, got the text '400 Gbit/s'",
    ),
    "key in a list": (
        lambda s: s.sections("levels")[1].text("bits"),
        '18: levels[1].bits: expected text, got the number 8; write "8" in quotes if it is text',
    ),
}


@pytest.mark.parametrize(("text", "message"), MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_text_gets_one_line_that_says_where(text: str, message: str) -> None:
    started = time.process_time()
    with pytest.raises(SpecError) as caught:
        parse_yaml(text, "f.yaml")
    assert str(caught.value) == "f.yaml" + message
    assert time.process_time() - started < 2


@pytest.mark.parametrize(("read", "message"), MISREAD.values(), ids=MISREAD.keys())
def test_a_value_of_the_wrong_type_is_named_by_line_and_key(
    read: Callable[[Section], object], message: str
) -> None:
    with pytest.raises(SpecError) as caught:
        read(parse_yaml(DOCUMENT, "f.yaml"))
    assert str(caught.value) == "f.yaml:" + message


def test_scalars_mean_what_yaml_1_2_says() -> None:
    section = parse_yaml(DOCUMENT, "f.yaml")
    assert section.number("rate") == 1e-6
    assert section.number("big") == 1000.0
    assert section.integer("octal") == 10
    assert section.text("clock") == "1:30"
    assert section.text("answer") == "yes"
    assert section.boolean("flag") is True
    assert section.quantity("size", "bytes") == 80 * 2**30
    assert section.texts("words") == ("a", "8")
    assert section.integers("tp") == (1, 2, 4)
    assert section.numbers("tp") == (1.0, 2.0, 4.0)


def test_absent_keys_take_the_default_and_empty_ones_count_as_absent() -> None:
    section = parse_yaml(DOCUMENT, "f.yaml")
    assert section.integer("nothing", default=3) == 3
    assert section.number("empty", default=0.5) == 0.5
    assert section.optional_text("empty") is None
    assert section.optional_integer("nothing") is None
    assert section.optional_number("nothing") is None
    assert section.optional_quantity("nothing", "bytes") is None
    assert section.optional_section("nothing") is None
    assert section.sections("nothing") == ()
    assert section.texts("nothing") == ()
    assert not section.has("empty")
    assert "empty" in section


def test_keys_keep_the_order_of_the_file_and_types_can_be_asked() -> None:
    section = parse_yaml(DOCUMENT, "f.yaml")
    assert section.keys()[:2] == ("schema_version", "name")
    assert tuple(section) == section.keys()
    assert section.is_section("node")
    assert section.is_list("tp")
    assert not section.is_section("name")
    assert section.section("node").section("nic").path == "node.nic"
    assert section.line("node") == 13


def test_close_rejects_the_first_unread_key_and_suggests_one_that_was_asked_for() -> None:
    section = parse_yaml("name: a\ngpuss: 8\n", "f.yaml")
    section.text("name")
    section.optional_integer("gpus")
    with pytest.raises(SpecError, match=r"^f\.yaml:2: gpuss: unknown key; did you mean 'gpus'\?$"):
        section.close()


def test_close_lists_the_known_keys_when_none_is_near() -> None:
    section = parse_yaml("name: a\nzzz: 8\n", "f.yaml")
    section.text("name")
    with pytest.raises(SpecError, match=r"^f\.yaml:2: zzz: unknown key; known keys: name$"):
        section.close()


def test_close_accepts_a_section_that_was_read_whole() -> None:
    section = parse_yaml("name: a\nnode: {gpu: b}", "f.yaml")
    section.text("name")
    section.section("node").text("gpu")
    section.section("node").close()
    section.close()
    assert section.keys() == ("name", "node")


def test_an_error_of_the_caller_names_the_place() -> None:
    section = parse_yaml(DOCUMENT, "f.yaml").section("node")
    assert str(section.error("gpu", "is\nodd")) == "f.yaml:14: node.gpu: is odd"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("1e999", "expected a finite number, got '1e999'"),
        ("9" * 400, "expected a finite number, got '" + "9" * 40 + "...'"),
        ("0x10", "expected a number, got the text '0x10'"),
        ("1_000", "expected a number, got the text '1_000'"),
        ("nan", "expected a number, got the text 'nan'"),
        ("2024-01-01", "expected a number, got the text '2024-01-01'"),
        ("'8'", "expected a number, got the text '8'; remove the quotes"),
        ("on", "expected a number, got the text 'on'"),
    ],
)
def test_what_only_looks_like_a_number_is_refused(value: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_yaml(f"a: {value}", "f.yaml").number("a")
    assert str(caught.value) == f"f.yaml:1: a: {message}"


def test_a_date_has_to_be_quoted() -> None:
    with pytest.raises(
        SpecError, match=r'expected text, got the date 2024-01-01; write "2024-01-01" in quotes'
    ):
        parse_yaml("a: 2024-01-01", "f.yaml").text("a")
    assert parse_yaml('a: "2024-01-01"', "f.yaml").text("a") == "2024-01-01"


def _bytes_file(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "f.yaml"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a: \xff\n", ":1: is not UTF-8 text; save the file as UTF-8"),
        ("a: 1".encode("utf-16"), ":1: is not UTF-8 text; save the file as UTF-8"),
        (b"\x7fELF\x00\x00\xff\xfe", ": is a binary file; give a YAML text file"),
        (b"a: 1\n" * 2_000_000, ": is 10.0 MB; spec files may be 5 MB at most"),
        (b"", ": is empty; write at least one 'key: value' line"),
    ],
    ids=["latin-1", "utf-16", "binary", "10 MB", "empty"],
)
def test_a_file_that_is_no_yaml_text_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = _bytes_file(tmp_path, data)
    with pytest.raises(SpecError) as caught:
        read_yaml(path)
    assert str(caught.value) == f"{path}{message}"


def test_paths_that_are_no_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"missing\.yaml: no such file; check the path$"):
        read_yaml(tmp_path / "missing.yaml")
    with pytest.raises(SpecError, match=r": is a directory; give a \.yaml file$"):
        read_yaml(tmp_path)
    with pytest.raises(SpecError, match=r": cannot be read: File name too long$"):
        read_yaml(tmp_path / ("x" * 300))
    for path in (Path("x" * 5000), Path("a\0b.yaml"), Path("a\nb.yaml")):
        with pytest.raises(SpecError, match=r": is not the path of a file$"):
            read_yaml(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_named_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(SpecError, match=r"is not a regular file"):
        read_yaml(tmp_path / "pipe.yaml")


def test_a_byte_order_mark_and_windows_line_ends_are_fine(tmp_path: Path) -> None:
    section = read_yaml(_bytes_file(tmp_path, b"\xef\xbb\xbfa: 1\r\nb: 2\r\n"))
    assert (section.integer("a"), section.integer("b")) == (1, 2)
    assert section.line("b") == 2


def test_dumped_yaml_reads_back_whatever_the_text_looks_like() -> None:
    words = [
        "1e3",
        "010",
        "true",
        "yes",
        "null",
        "",
        "~",
        "2024-01-01",
        "1:30",
        "a: b",
        "# c",
        "&x",
        "\u00e9",
    ]
    shared = ["same", "list"]
    section = parse_yaml(dump_yaml({"words": words, "one": shared, "two": shared, "number": 1e-7}), "f.yaml")
    assert section.texts("words") == tuple(words)
    assert section.texts("one") == section.texts("two") == ("same", "list")
    assert section.number("number") == 1e-7
