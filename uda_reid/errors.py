"""The base of every error that the command line prints as one sentence, without a traceback."""


class UserError(Exception):
    """Something the user can correct: one sentence with what was expected, what was received and what to do."""
