"""The one exception that the command line prints without a traceback."""


class UserError(Exception):
    """Something the user can put right: one sentence with what was expected, what came and what to do."""
