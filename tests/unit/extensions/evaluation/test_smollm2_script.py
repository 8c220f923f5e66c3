"""scripts/studies/plot_smollm2_context.py: reading the book out of its package; its message if that fails."""

from __future__ import annotations

import json
import struct
import zlib


def r_object(strings: list[str | None], version: int) -> bytes:
    """A vector of strings in a lazy-load database of R: length, zlib of the XDR format."""
    data = b"X\n" + struct.pack(">iii", version, 0x040201, 0x020300)
    data += struct.pack(">i", 5) + b"UTF-8" if version == 3 else b""
    data += struct.pack(">ii", 16, len(strings))
    for text in strings:
        content = b"" if text is None else text.encode()
        data += struct.pack(">ii", 0x40009, -1 if text is None else len(content)) + content
    return struct.pack(">i", len(data)) + zlib.compress(data)


def test_strings_are_read_out_of_an_r_database(script):
    books = [["EMMA", "", "Émile\r", None], ["Persuasion", "by", "Jane Austen"]]
    for version in (2, 3):
        found = script("studies/plot_smollm2_context").character_vectors(b"".join(r_object(b, version) for b in books))
        assert found == [["EMMA", "", "Émile", ""], books[1]]


def test_without_apt_get_the_user_is_told_to_name_a_text(script, tmp_path, monkeypatch, capsys):
    module = script("studies/plot_smollm2_context")
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    assert module.main([str(tmp_path), "--model", str(tmp_path)]) == 1
    assert "name a text with --text" in capsys.readouterr().err


def test_what_is_measured_is_a_table_and_a_picture(script, folder, tmp_path, capsys):
    module = script("studies/plot_smollm2_context")
    text = tmp_path / "book.txt"
    text.write_text("It was a bright cold day in April, and the clocks were striking thirteen. " * 100)
    what = [str(tmp_path), "--model", str(folder), "--text", str(text), "--length", "600", "--dtype", "float32"]
    what += ["--runs", "theta_2", "yarn_4"]
    assert module.main(what) == 0
    results = [json.loads((tmp_path / f"{name}_600.json").read_text()) for name in ("theta_2", "yarn_4")]
    assert results[0]["edges"] == [0, 512, 600] and results[1]["rope"]["scaling"]["factor"] == 4
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3].startswith("| 512 to 600 | ") and lines[-1].startswith("| seconds |")
    assert (tmp_path / "ppl_by_position.png").read_bytes()[:4] == b"\x89PNG"
    before = (tmp_path / "yarn_4_600.json").stat().st_mtime_ns
    assert module.main(what) == 0 and (tmp_path / "yarn_4_600.json").stat().st_mtime_ns == before
