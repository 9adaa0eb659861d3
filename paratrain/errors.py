"""Errors a person can act on.

A `UserError` names the key or call at fault, the value, the reason and the fix. The command line prints it alone, without a
stack trace, and exits with code 2; from Python it is an ordinary `ValueError`.
"""


class UserError(ValueError):
    """A mistake of the person who runs the job: reported without a stack trace, exit code 2."""


class ConfigError(UserError):
    """Every fault found in a configuration, reported together.

    Args:
        problems: one line a fault, each naming the key, the value, the reason and the fix.
    """

    def __init__(self, problems: list[str]):
        self.problems = list(problems)
        count = len(self.problems)
        title = f"invalid configuration ({count} problem{'s' if count != 1 else ''})"
        super().__init__("\n".join([title, *(f"  {line}" for line in self.problems)]))

    def __reduce__(self):
        return type(self), (self.problems,)


class PeerError(RuntimeError):
    """Another rank failed, ended or stands still; the message names it and what is known of its error.

    Such an error has nothing to say of the rank that raises it; where a rank refused, its peers raise a `UserError` instead.
    """
