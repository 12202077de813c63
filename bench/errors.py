"""What can keep a benchmark from running; one line that says what to do."""


class BenchError(Exception):
    """The run cannot go on; the text is meant for the person who started it."""
