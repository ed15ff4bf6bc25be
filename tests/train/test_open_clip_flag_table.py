"""The table of flags: each stands once, and each says something."""

from declip_train.open_clip_flag_table import OBEYED, REFUSED


def test_a_flag_is_obeyed_or_refused_and_says_why() -> None:
    obeyed = [flag for flag, *_ in OBEYED]
    assert len(set(obeyed)) == len(obeyed)
    assert not set(obeyed) & set(REFUSED)
    assert all(flag.startswith("--") and "_" not in flag for flag in (*obeyed, *REFUSED))
    assert all(text and not text.endswith(".") for *_, text in OBEYED)
    assert all(reason and not reason.endswith(".") for reason in REFUSED.values())
    # A flag that takes a value says what kind; a switch has none.
    assert all((kind is None) == (metavar == "") for _, kind, metavar, _ in OBEYED)
