"""`python -m minigrpo`: list the commands, or print the version."""

import sys

from minigrpo.commands import COMMANDS
from minigrpo.version import __version__

if __name__ == "__main__":
    if "--version" in sys.argv[1:]:
        sys.stdout.write(f"minigrpo {__version__}\n")
    else:
        rows = "\n".join(f"  python -m minigrpo.{name:<9} {about.does}" for name, about in COMMANDS.items())
        sys.stdout.write(f"minigrpo {__version__}\n\n{rows}\n\nEach has --help.\n")
