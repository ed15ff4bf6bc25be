import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from declip_filter.personal_data import KINDS, find_personal_data, passes_iban, passes_luhn


@pytest.mark.parametrize(
    ("caption", "kinds"),
    [
        ("write to jane.doe+web@mail.example.org today", "email"),
        ("jane (at) example.org", "email"),
        ("<ada@exämple.de>", "email"),
        ("call +49 30 1234567 now", "phone"),
        ("+1 (415) 555-2671", "phone"),
        ("for sale, (415) 555-2671", "phone"),
        ("415.555.2671", "phone"),
        ("tel: 030 123456 78", "phone"),
        ("WhatsApp 0171/2345678", "phone"),
        ("server at 8.8.8.8", "ip"),
        ("host 2001:4860:4860::8888", "ip"),
        ("card 4111 1111 1111 1111", "card"),
        ("5500-0000-0000-0004", "card"),
        ("pay to DE89 3704 0044 0532 0130 00", "iban"),
        ("GB82WEST12345698765432", "iban"),
        ("a@b.example, +442071838750, 8.8.4.4", "email,ip,phone"),
    ],
)
def test_personal_data_is_found_by_kind(caption, kinds):
    assert find_personal_data(caption) == kinds


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a red apple @ home",
        "@jane on the beach",
        "painted in 1888-1889, oil on canvas, 73 x 92 cm",
        "resolution 1920-1080, 300 dpi",
        "2019-03-04 10:22:33",
        "isbn 978-3-16-148410-0",
        "version 4.14.0.88",
        "v1.2.3.4",
        "router 192.168.0.1 and 127.0.0.1",
        "ratio 16:9, score 3:2",
        "300.1.1.1",
        "4111 1111 1111 1112",
        "0000 0000 0000 0000",
        "DE89 3704 0044 0532 0130 01",
        "item no. 1234567890123",
        "call me maybe",
        "10 000 000 people",
        "IMG_20190304_102233.jpg",
    ],
)
def test_numbers_and_names_that_are_none(caption):
    assert find_personal_data(caption) == ""


@given(st.integers(0, 10**17))
def test_exactly_one_check_digit_passes(number):
    assert sum(passes_luhn(f"{number}{digit}") for digit in range(10)) == 1


@given(st.text(alphabet="0123456789", min_size=18, max_size=18))
def test_two_check_digits_make_an_iban_and_a_changed_digit_breaks_it(account):
    made = f"DE{98 - int(account + '131400') % 97:02d}{account}"
    assert passes_iban(made)
    other = str((int(made[-1]) + 1) % 10)
    assert not passes_iban(made[:-1] + other)
    assert find_personal_data(f"to {made}").startswith(("iban", "card,iban"))


@given(st.text())
def test_any_text_gets_known_kinds_in_order(text):
    found = [kind for kind in find_personal_data(text).split(",") if kind]
    assert found == sorted(set(found))
    assert set(found) <= set(KINDS)


@pytest.mark.parametrize(
    "piece",
    ["a", "a@", "a.", "1", "1 ", "1-", "1.", "a:", "+1", "(", "a@b.", "+1(", "AA00 ", "00", "tel ",
     "tel.1", "::", "1:", "-@", "a(at)", "4111 "],
)  # fmt: skip
def test_hostile_lengths_take_linear_time(piece):
    text = piece * (100_000 // len(piece))
    start = time.process_time()
    find_personal_data(text)
    assert time.process_time() - start < 1
