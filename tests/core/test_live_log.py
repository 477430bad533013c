"""A server that fails is left alone for a while, and training does not notice."""

from collections.abc import Callable

from moesaic.core.live_log import LiveLog


def test_after_a_failure_nothing_is_sent_for_five_minutes() -> None:
    clock, sent, down = [0.0], [], [True]

    def send(step: int) -> Callable[[], None]:
        def to_server() -> None:
            sent.append(step)
            if down[0]:
                raise ConnectionError("refused")

        return to_server

    live = LiveLog(lambda: clock[0])
    for step, now_s in enumerate((0.0, 1.0, 299.0, 301.0)):
        clock[0] = now_s
        live.attempt(send(step))
    assert sent == [0, 3]
    down[0] = False
    for step, now_s in enumerate((302.0, 602.0, 603.0), 4):
        clock[0] = now_s
        live.attempt(send(step))
    assert sent == [0, 3, 5, 6]
