"""Wire formats: bytes to values and back. Pure; time and randomness are arguments, nothing here does I/O."""
