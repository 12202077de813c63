"""A device's connection from accept to close, and what a worker lends to all of them."""
