"""What the processes tell: logs and metrics. Declarations and set-up only; imports nothing of ours but errors."""
