"""Signals that ask a program to end: it saves first, and all its processes stop together."""

import collections
import contextlib
import os
import signal
import sys

import jax

from ddpm_jax import parallel

# Ctrl-C, what schedulers send, and what a terminal sends that is closed.
CAUGHT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(Exception):
    """A signal ended what was being done."""

    def __init__(self, number):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class Stop:
    """stop() is the number of the signal that asks to stop, or 0.

    All processes must ask equally often, and are answered alike. With `behind`, the answer is that
    of so many calls ago, for which they need not wait.
    """

    def __init__(self):
        self.caught, self.agreed = 0, 0
        self._asked = collections.deque()

    def __call__(self, behind=0):
        if jax.process_count() == 1:
            self.agreed = self.caught
        elif not self.agreed:
            self._asked.append(parallel.largest(self.caught))
            while len(self._asked) > behind and not self.agreed:
                self.agreed = int(self._asked.popleft())
        return self.agreed


def never():
    """A stop() of what no signal is caught for."""
    return 0


def check(stop):
    """Raises Stopped if stop() asks for it."""
    if number := stop():
        raise Stopped(number)


@contextlib.contextmanager
def catch():
    """Yields a Stop that the first of CAUGHT sets; a second one acts as it would have without this.

    A signal that is ignored already, as SIGHUP by nohup, stays so.
    """
    stop = Stop()
    terminals = [stream for stream in (sys.stdout, sys.stderr) if stream and stream.isatty()]

    def handle(number, _):
        stop.caught = number
        restore()
        for stream in terminals:
            if not stream.isatty():  # it is closed; what would be written there raises an error
                with open(os.devnull, "w") as nowhere:
                    os.dup2(nowhere.fileno(), stream.fileno())

    def restore():
        for number, handler in previous.items():
            signal.signal(number, handler)

    wanted = [number for number in CAUGHT if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, handle) for number in wanted}
    try:
        yield stop
    finally:
        restore()
