"""Signals that stop the program: it saves first, and all its processes stop together."""

import collections
import contextlib
import os
import signal
import sys
import threading

import jax

from ddpm_jax import parallel

# Sent by Ctrl-C, by cluster schedulers, and by a terminal that is closed.
CAUGHT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(Exception):
    """A signal interrupted the program."""

    def __init__(self, number):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class Stop:
    """stop() returns the number of the signal that was caught, or 0.

    All processes must call it equally often; it returns the same number in all of them.
    stop(behind) returns the result of that many calls ago, for which the processes need not wait.
    """

    def __init__(self):
        self.caught, self.agreed = 0, 0
        self._pending = collections.deque()

    def __call__(self, behind=0):
        if jax.process_count() == 1:
            self.agreed = self.caught
        elif not self.agreed:
            self._pending.append(parallel.max_over_processes(self.caught))
            while len(self._pending) > behind and not self.agreed:
                self.agreed = int(self._pending.popleft())
        return self.agreed


def never():
    """A stop() for code that catches no signal."""
    return 0


def check(stop):
    """Raises Stopped if stop() is the number of a signal."""
    if number := stop():
        raise Stopped(number)


@contextlib.contextmanager
def catch():
    """Yields a Stop, which records the first of the signals CAUGHT; a second one acts as usual.

    A signal that is already ignored, as SIGHUP under nohup, stays ignored.
    """
    stop = Stop()
    terminals = [stream for stream in (sys.stdout, sys.stderr) if stream and stream.isatty()]

    def handle(number, _):
        stop.caught = number
        restore()
        for stream in terminals:
            if not stream.isatty():  # the terminal is closed; writing to it would raise an error
                with open(os.devnull, "w") as nowhere:
                    os.dup2(nowhere.fileno(), stream.fileno())
        # The steps that are being computed may take minutes. (Not by print: it may be interrupted.)
        with contextlib.suppress(OSError):
            os.write(2, f"\n{signal.Signals(number).name}: finishing the current steps\n".encode())

    def restore():
        for number, handler in previous.items():
            signal.signal(number, handler)

    numbers = [number for number in CAUGHT if signal.getsignal(number) is not signal.SIG_IGN]
    if threading.current_thread() is not threading.main_thread():
        numbers = []  # only Python's main thread can catch signals
    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield stop
    finally:
        restore()
