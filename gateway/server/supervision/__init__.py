"""What the supervisor does: start, watch and replace the other processes, reload, upgrade, and answer operators and scrapers."""
