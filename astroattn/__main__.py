"""`python -m astroattn` is the command line."""

import sys

from astroattn.cli import main

sys.argv[0] = "astroattn"  # as reports write the command down
main()
