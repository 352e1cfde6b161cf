"""How texts, pictures and sound become arrays."""
