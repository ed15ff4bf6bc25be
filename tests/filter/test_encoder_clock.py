import time

from declip_filter.encoder_clock import EncoderClock


def test_what_is_not_encoding_is_waiting():
    clock = EncoderClock()
    time.sleep(0.06)
    with clock.encoding():
        time.sleep(0.02)
    figures = clock.figures(10)
    assert figures["rows"] == 10
    assert 0.02 <= figures["encoding_seconds"] <= figures["seconds"] - 0.06
    share = 1 - figures["encoding_seconds"] / figures["seconds"]
    assert abs(figures["waiting_share"] - share) < 0.02
    assert abs(figures["rows_per_second"] * figures["seconds"] - 10) < 1


def test_time_counts_where_the_encoder_fails_too():
    clock = EncoderClock()
    try:
        with clock.encoding():
            time.sleep(0.01)
            raise ValueError
    except ValueError:
        pass
    assert clock.encoding_seconds >= 0.01
