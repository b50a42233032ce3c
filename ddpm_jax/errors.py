"""What a user can get wrong."""


class UserError(ValueError):
    """One line that names the field, its value and what is allowed; main.py prints only that."""


def one_line(error):
    """The text of another library's error, without its line breaks."""
    return " ".join(str(error).split())
