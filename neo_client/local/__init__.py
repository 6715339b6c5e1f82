"""The three services as child processes of one command, on loopback."""
