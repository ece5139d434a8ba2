"""The two errors a user can act on; everything else that is raised is a bug."""


class ConfigError(ValueError):
    """A configuration, or a file that should hold one, cannot be used.

    The message has one line per problem: the path inside the configuration, the value, and what is allowed.
    """


class UnsupportedError(ValueError):
    """A model, layer, argument or backend lies outside what this package supports.

    The message names the layer or the argument, and the reason. Nothing has been changed when it is raised.
    """
