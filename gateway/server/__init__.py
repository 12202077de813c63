"""The running gateway. Each room says in its first line what lives there; docs/architecture.md has their order."""
