"""The note of the tables that a run reads."""

import threading

from declip_train.tables_in_use import NOTE, hold_tables


def test_what_was_noted_is_read_and_a_torn_note_is_none(tmp_path):
    folder = tmp_path / "train"
    with hold_tables(folder) as tables:
        assert tables.read() == frozenset()
        tables.write({"captions@bb", "captions"})
        assert tables.read() == {"captions@bb", "captions"}
        tables.write(["captions"])
    with hold_tables(folder) as tables:
        assert tables.read() == {"captions"}
    (folder / NOTE).write_bytes(b'["capt')
    with hold_tables(folder) as tables:
        assert tables.read() == frozenset()


def test_who_comes_second_waits_for_the_first(tmp_path):
    seen: list[frozenset[str]] = []

    def look() -> None:
        with hold_tables(tmp_path) as tables:
            seen.append(tables.read())

    with hold_tables(tmp_path) as tables:
        other = threading.Thread(target=look)
        other.start()
        other.join(0.1)
        assert seen == []
        tables.write(["captions@aa"])
    other.join(10)
    assert seen == [{"captions@aa"}]
