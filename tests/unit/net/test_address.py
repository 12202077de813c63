import pytest

from gateway.net.address import address_text


@pytest.mark.parametrize(
    ("host", "text"),
    [
        ("gateway.example", "gateway.example:8883"),
        ("192.0.2.1", "192.0.2.1:8883"),
        ("2001:db8::1", "[2001:db8::1]:8883"),
        ("fe80::1%eth0", "[fe80::1%eth0]:8883"),
    ],
)
def test_an_address_is_written_as_people_write_it(host: str, text: str) -> None:
    assert address_text(host, 8883) == text
