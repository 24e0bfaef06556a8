"""No secret that is known stands in what is printed, stored or sent, however the text comes."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from procworker.redaction import Mask, names_of, secrets_of_block
from procworker.system.spool import CHUNK, LINE_LIMIT, Spool


def test_secrets_are_masked_longest_first() -> None:
    mask = Mask(["secret", "secret-and-more", "and-more"])
    assert mask("secret-and-more, secret, and-more") == "***, ***, ***"


def test_short_values_are_left_alone() -> None:
    assert Mask(["", "12345", "a", "\n"])("12345 a\n") == "12345 a\n"
    assert Mask(["123456"])("123456") == "***"
    assert Mask([])("anything") == "anything"


def test_secrets_are_no_patterns() -> None:
    assert Mask([r"a.c(d|e)[f]*\1$^"])(r"say a.c(d|e)[f]*\1$^ but axcd") == "say *** but axcd"


def test_a_secret_of_several_lines_is_masked_line_by_line() -> None:
    key = "-----BEGIN KEY-----\n  MIIEvQIBADANBgk\nabc\n-----END KEY-----\n"
    mask = Mask([key])
    assert [mask(line) for line in key.splitlines()] == ["***", "  ***", "abc", "***"]


@settings(deadline=None)
@given(st.lists(st.text(st.characters(codec="ascii", categories=["L", "N", "P"]), min_size=6)), st.text(), st.text())
def test_no_masked_text_holds_a_secret(secrets: list[str], before: str, after: str) -> None:
    mask = Mask(secrets)
    for secret in secrets:
        assert secret.replace("*", "") == "" or secret not in mask(f"{before} {secret} {after}").replace("***", "")


WORDS = st.text("abcX-", min_size=6, max_size=12)
"""Of so few letters that they overlap often."""


@settings(deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=4), st.data())
def test_no_text_of_overlapping_secrets_shows_one(secrets: list[str], data: st.DataObject) -> None:
    parts = data.draw(st.lists(st.one_of(st.sampled_from(secrets), st.text("abcX-", max_size=5)), max_size=8))
    shown = Mask(secrets)("".join(parts))
    assert not [secret for secret in secrets if secret in shown]


def test_of_two_that_overlap_no_end_is_left() -> None:
    assert Mask(["abcdef", "defghi"])("<abcdefghi>") == "<***>"


def test_a_secret_is_known_as_json_repr_and_urls_spell_it() -> None:
    secret = 'pa"ss\\wörd/1'
    mask = Mask([secret])
    for spelt in ('"pa\\"ss\\\\w\\u00f6rd/1"', f"{secret!r}", "u:pa%22ss%5Cw%C3%B6rd%2F1@host"):
        assert "***" in mask(spelt), spelt
        assert "ss" not in mask(spelt)


LONG = "".join(f"{number:03}" for number in range(100))
SECRETS = ["hunter2-hunter2", "2-hunter2-tail", LONG]


def shows(text: str) -> bool:
    """Is a recognizable part of a secret left?"""
    return "hunter2" in text or any(LONG[start : start + 12] in text for start in range(len(LONG) - 11))


def written_in_pieces(text: bytes, cuts: list[int], mask: Mask, cap: int | None = None) -> str:
    """What a reader sees of a text without line ends that is written piece by piece, read after each."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "stdout")
        path.touch()
        spool, lines = Spool("stdout", path, cap, mask=mask), []
        edges = [0, *sorted(cuts), len(text)]
        for start, end in itertools.pairwise(edges):
            with path.open("ab") as file:
                file.write(text[start:end])
            lines += spool.read()[0]
        spool.stop()
        more = True
        while more:
            new, more = spool.read()
            lines += new
    # What stands in two lines side by side could be put together again.
    return "".join(map(mask, lines))


@settings(deadline=None, max_examples=60)
@given(
    st.integers(LINE_LIMIT - 400, LINE_LIMIT + 400),
    st.lists(st.sampled_from(SECRETS), min_size=1, max_size=6),
    st.lists(st.integers(0, LINE_LIMIT + 2000), max_size=12),
)
def test_wherever_a_line_is_parted_no_secret_is(before: int, secrets: list[str], cuts: list[int]) -> None:
    text = "." * before + "".join(secrets) + "." * LINE_LIMIT
    shown = written_in_pieces(text.encode(), [min(cut, len(text)) for cut in cuts], Mask(SECRETS))
    assert not shows(shown)
    assert shown.count(".") == text.count(".")


def test_without_a_mask_a_line_parts_secrets() -> None:
    """The control."""
    text = "." * (LINE_LIMIT - 7) + SECRETS[0] + "." * CHUNK

    class Parted(Mask):
        def seam(self, data: bytes, at: int) -> tuple[int, int]:
            return at, at

    assert shows(written_in_pieces(text.encode(), [], Parted(SECRETS)))


@pytest.mark.parametrize("shift", range(0, 300, 25))
def test_what_is_dropped_parts_no_secret_either(shift: int) -> None:
    """One endless line of secrets, of which the oldest part goes."""
    text = "." * shift + LONG * (3 * 4 * CHUNK // len(LONG))
    shown = written_in_pieces(text.encode(), [len(text) - 1], Mask(SECRETS), cap=4 * CHUNK)
    assert "bytes of stdout were dropped" in shown
    assert not shows(shown)


def test_an_adopted_line_begins_with_no_half_secret(tmp_path: Path) -> None:
    path = tmp_path / "stdout"
    path.write_text(LONG * 1000 + " end")
    mask = Mask(SECRETS)
    spool = Spool("stdout", path, None, mask=mask)
    first = spool.prime()
    spool.stop()
    shown = "".join(map(mask, [*first, *spool.read()[0]]))
    assert shown.endswith("*** end")
    assert not shows(shown)


def test_a_block_tells_what_of_it_is_secret() -> None:
    document = SimpleNamespace(
        data={"user": "bob", "nested": {"pin": "1234567", "all": {"a": ["xxxxxx"]}}, "api_token": "yyyyyy", "url": "z"},
        model_extra={"block_schema": {"fields": {"secret_fields": ["nested.pin", "nested.all.*"]}}},
    )
    assert secrets_of_block(document) == {"1234567", "xxxxxx", "yyyyyy"}
    document.model_extra = {"block_type": {"slug": "secret"}}
    document.data = {"value": {"a": "b"}}
    assert secrets_of_block(document) == {"b"}
    assert secrets_of_block(SimpleNamespace(data="text", model_extra=None)) == frozenset()


def test_an_environment_tells_its_secrets_if_they_stand_there_alone() -> None:
    environ = {"API_TOKEN": "tttttt", "PLACE": "ssssss", "URL": "db://x?p=rrrrrr"}
    assert names_of(frozenset({"tttttt"}), environ) == []
    assert names_of(frozenset({"tttttt", "ssssss"}), environ) == ["PLACE"]
    assert names_of(frozenset({"rrrrrr"}), environ) is None
