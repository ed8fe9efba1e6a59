"""Which models the library can take hold of, and whether what it reports of them is so."""
