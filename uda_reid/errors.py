"""The one root of everything a user is told: the command line prints it without a traceback."""


class UserError(Exception):
    """Something the user can correct: one sentence with what was expected, what was received and what to do."""
