"""What a user can get wrong."""

import errno
import os


class UserError(ValueError):
    """One line that names the field, its value and what is allowed; main.py prints only that."""


def one_line(error):
    """The text of another library's error, without its line breaks."""
    return " ".join(str(error).split())


def is_disk_full(error):
    """Whether an error of the system, or of a library that only quotes it, means a full disk."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in full or any(os.strerror(n) in str(error) for n in full)


def printable(error):
    """An error's text in one line: what is not printable, names of files may hold."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(error))
