"""The README's table of methods is the one that `steer methods --markdown` prints."""

from __future__ import annotations

from pathlib import Path

from steer.method_table import markdown

BEGIN, END = "<!-- table:begin -->", "<!-- table:end -->"


def test_table_is_the_generated_one() -> None:
    readme = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
    assert readme.count(BEGIN) == 1 and readme.count(END) == 1
    block = readme.split(BEGIN)[1].split(END)[0]
    assert block.strip() == markdown().strip(), "put the output of `steer methods --markdown` there"
