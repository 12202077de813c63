"""What the backends' tests share: certificates, and the one server that takes long to start."""

from collections.abc import Iterator

import pytest

from tests.support.backends import AmqpSubject
from tests.support.servers import Certificates


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="session")
def amqp(tmp_path_factory: pytest.TempPathFactory, certificates: Certificates) -> Iterator[AmqpSubject]:
    subject = AmqpSubject(tmp_path_factory.mktemp("amqp"), certificates)
    with subject.server:
        yield subject
