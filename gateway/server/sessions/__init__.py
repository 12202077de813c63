"""What live sessions of a worker share: their index, the routes they take, commands to them, dead letters, and which are one too many."""
