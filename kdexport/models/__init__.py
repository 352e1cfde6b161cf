"""Networks and their folders: loading with a head, small networks, shrinking. torch lives here."""
