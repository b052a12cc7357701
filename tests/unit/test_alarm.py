"""Whoever waits for an alarm is woken, wherever it is rung."""

from __future__ import annotations

import asyncio
import threading
import time

from dtkit.alarm import Alarm

LONG_S = 60.0
"""A wait that is not ended by a ring would run into the test's own time limit."""


def test_a_thread_is_woken() -> None:
    alarm = Alarm()
    ringer = threading.Timer(0.05, alarm.ring)
    ringer.start()
    alarm.wait(LONG_S)
    ringer.join()


def test_a_coroutine_is_woken_from_another_thread() -> None:
    alarm = Alarm()

    async def sleep() -> None:
        ringer = threading.Timer(0.05, alarm.ring)
        ringer.start()
        await alarm.wait_async(LONG_S)
        ringer.join()

    asyncio.run(sleep())


def test_a_ring_is_kept_until_somebody_waits_and_then_used_up() -> None:
    alarm = Alarm()
    alarm.ring()
    alarm.wait(LONG_S)
    alarm.ring()
    asyncio.run(alarm.wait_async(LONG_S))
    begun_s = time.monotonic()
    alarm.wait(0.02)
    assert time.monotonic() - begun_s > 0.01


def test_a_wait_is_over_after_its_time() -> None:
    alarm = Alarm()
    alarm.wait(0.0)
    asyncio.run(alarm.wait_async(0.001))


def test_nobody_is_harmed_by_a_ring_after_the_loop_has_ended() -> None:
    alarm = Alarm()
    asyncio.run(alarm.wait_async(0.001))
    alarm.ring()
