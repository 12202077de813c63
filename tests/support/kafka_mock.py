"""The Kafka cluster that librdkafka carries for its own tests, as a program: `python kafka_mock.py FOLDER`.

It writes its address into FOLDER/address, and obeys what it reads from stdin, line by line: `down`, `up`, `refuse` (every
batch of records is answered with an error that says who may write, not that a message is bad), `accept`. To each it
answers with the same line. confluent-kafka exposes none of this, so the library's C interface is called
(rdkafka_mock.h); it speaks neither SASL nor TLS.
"""

import ctypes
import sys
from pathlib import Path

from confluent_kafka import cimpl

PRODUCER = 0
BROKER = 1
PRODUCE_REQUEST = 0
TOPIC_AUTHORIZATION_FAILED = 29
REFUSALS = 100_000
"""More than are asked for until `accept`."""


def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(cimpl.__file__)  # finds the symbols of what it is linked with
    pointer, text = ctypes.c_void_p, ctypes.c_char_p
    for name, result, arguments in (
        ("rd_kafka_conf_new", pointer, []),
        ("rd_kafka_new", pointer, [ctypes.c_int, pointer, text, ctypes.c_size_t]),
        ("rd_kafka_mock_cluster_new", pointer, [pointer, ctypes.c_int]),
        ("rd_kafka_mock_cluster_bootstraps", text, [pointer]),
        ("rd_kafka_mock_broker_set_down", ctypes.c_int, [pointer, ctypes.c_int32]),
        ("rd_kafka_mock_broker_set_up", ctypes.c_int, [pointer, ctypes.c_int32]),
        ("rd_kafka_mock_clear_request_errors", None, [pointer, ctypes.c_int16]),
        (
            "rd_kafka_mock_push_request_errors_array",
            None,
            [pointer, ctypes.c_int16, ctypes.c_size_t, ctypes.POINTER(ctypes.c_int)],
        ),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def main(folder: Path) -> None:
    """Serve until stdin ends."""
    library = _library()
    reason = ctypes.create_string_buffer(512)
    client = library.rd_kafka_new(PRODUCER, library.rd_kafka_conf_new(), reason, len(reason))
    assert client, reason.value
    cluster = library.rd_kafka_mock_cluster_new(client, BROKER)
    new = folder / "address.new"
    new.write_bytes(library.rd_kafka_mock_cluster_bootstraps(cluster))
    new.rename(folder / "address")
    errors = (ctypes.c_int * REFUSALS)(*[TOPIC_AUTHORIZATION_FAILED] * REFUSALS)
    orders = {
        "down": lambda: library.rd_kafka_mock_broker_set_down(cluster, BROKER),
        "up": lambda: library.rd_kafka_mock_broker_set_up(cluster, BROKER),
        "refuse": lambda: library.rd_kafka_mock_push_request_errors_array(
            cluster, PRODUCE_REQUEST, REFUSALS, errors
        ),
        "accept": lambda: library.rd_kafka_mock_clear_request_errors(cluster, PRODUCE_REQUEST),
    }
    for order in map(str.strip, sys.stdin):
        orders[order]()
        print(order, flush=True)


main(Path(sys.argv[1]))
