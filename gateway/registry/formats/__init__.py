"""Files of devices, in the formats of other products and in our own: one module per format, and this table.

A format turns a file into `FileDevice`s and back, and knows nothing of databases. What it cannot say is in `Format.carries`.
"""

from typing import Final

from gateway.registry.formats.azure_dps import AzureDps
from gateway.registry.formats.base import Format
from gateway.registry.formats.emqx import Emqx
from gateway.registry.formats.gnutls import GnuTls
from gateway.registry.formats.hono import Hono
from gateway.registry.formats.json_lines import JsonLines
from gateway.registry.formats.mosquitto import Mosquitto
from gateway.registry.formats.own_csv import OwnCsv
from gateway.registry.formats.stunnel import Stunnel

__all__ = ["FORMATS"]

FORMATS: Final[dict[str, Format]] = {
    each.name: each
    for each in (Stunnel(), Mosquitto(), Emqx(), GnuTls(), Hono(), AzureDps(), OwnCsv(), JsonLines())
}
"""By the name that `--format` takes."""
