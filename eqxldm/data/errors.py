"""What is raised for data that cannot be used."""


class DataError(ValueError):
    """Data that cannot be used or found; the message says what, why and what to do."""
