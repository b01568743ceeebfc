"""What is wrong with data, as opposed to with settings (`experiments.config.ConfigError`)."""


class DataError(Exception):
    """A file that cannot be used; its message names it and is all that the user has to read."""


class CorruptImageError(DataError):
    """An image that cannot be decoded."""
