"""What is wrong with a folder or a request, in one message."""


class PipelineError(ValueError):
    """A folder that cannot be used, or a picture that cannot be made with it."""
