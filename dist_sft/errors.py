"""The one exception that means "the user's input is wrong"."""


class UserError(ValueError):
    """Report a mistake in the recipe, the data or the model.

    The text says what was given, what is allowed and which key to change. Launchers and the
    command line print only this text, without a traceback, and exit with code 2.
    """
