"""The exception of the course tool."""


class CourseError(Exception):
    """A mistake in what the tool was asked to do: one line for the user, no traceback."""
