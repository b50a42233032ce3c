"""What a user can get wrong."""


class UserError(ValueError):
    """One line that names the field, its value and what is allowed; main.py prints only that."""
