"""`python -m minigrpo`: list the commands, or print the version."""

import sys

from minigrpo.commands import COMMANDS
from minigrpo.config import EXIT_USAGE
from minigrpo.version import __version__

if __name__ == "__main__":
    words = sys.argv[1:]
    if "--version" in words:
        sys.stdout.write(f"minigrpo {__version__}\n")
    elif words and words[0] not in ("--help", "-h"):
        command = words[0] if words[0] in COMMANDS else "COMMAND"
        sys.stderr.write(f"error: {words[0]}: commands are written python -m minigrpo.{command}\n")
        sys.exit(EXIT_USAGE)
    else:
        rows = "\n".join(f"  python -m minigrpo.{name:<9} {about.does}" for name, about in COMMANDS.items())
        sys.stdout.write(f"minigrpo {__version__}\n\n{rows}\n\nEach has --help.\n")
