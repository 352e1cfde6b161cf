"""The protocols of the server, a file each."""
