"""Fixtures for tests that need real servers and files."""

from tests.integration.postgresql import postgres_server, postgres_url

__all__ = ["postgres_server", "postgres_url"]
