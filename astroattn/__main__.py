"""`python -m astroattn` is the command line."""

from astroattn.cli import main

main()
