"""What processes and gatewayctl say to each other: the messages, and the channel that carries them."""
