"""Errors that are the user's to mend, apart from errors that are ours."""


class UserError(ValueError):
    """Bad input. The message says what is wrong, where, the value, what is allowed and what to do; the CLI prints it
    without a traceback and exits 2."""


class AlreadyRunning(UserError):
    """Another process works on the same stage with the same settings; the CLI exits 3."""


class Interrupted(Exception):
    """The stage was asked to stop and saved its work first; the CLI exits 75 (try again)."""


EXIT_USER_ERROR = 2
EXIT_ALREADY_RUNNING = 3
EXIT_INTERRUPTED = 75  # sysexits' EX_TEMPFAIL: nothing is wrong, the next run goes on from here
