"""What several tests need: a real gateway in its own processes, and real peers."""
