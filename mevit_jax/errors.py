"""The one exception for what a user can cause, and can mend."""


class UserError(ValueError):
  """Bad input: the message is one line that says what, where and what to do."""
