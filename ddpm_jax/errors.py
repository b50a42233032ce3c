"""The error for users' mistakes, and texts of other errors."""

import errno
import os


class UserError(ValueError):
    """A user's mistake. One line names the field, its value and what is allowed; the command line
    prints only this."""


def one_line(error):
    """The text of a library's error, without line breaks."""
    return " ".join(str(error).split())


def is_disk_full(error):
    """Whether an error of the system, or of a library that quotes one, means a full disk."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in full or any(os.strerror(n) in str(error) for n in full)


def require(condition, name, value, allowed):
    """Raises a UserError with a field's name, its value and what is allowed, unless it fits."""
    if not condition:
        raise UserError(f"{name}={value!r}: {allowed}")


def listed(names, most=5):
    """The first few names, and the number of the others."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def printable(error):
    """An error's text in one line, with unprintable characters (of file names) escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(error))
