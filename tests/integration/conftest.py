"""Fixtures for tests that need real servers and files."""

from tests.integration.mariadb import mariadb_server, mariadb_url
from tests.integration.postgresql import postgres_server, postgres_url

__all__ = ["mariadb_server", "mariadb_url", "postgres_server", "postgres_url"]
