"""`python -m minigrpo`: list the commands, or print the version."""

import sys

from minigrpo import __version__

COMMANDS = {
    "check": "try a run's rewards, prompts and machine before it starts",
    "train": "train a model with GRPO on sampled or scored responses",
    "sft": "warm-start a base model on prompt/completion rows",
    "evaluate": "measure accuracy, pass@k and majority@k on held-out problems",
    "generate": "answer a prompt, a file of prompts, or a chat",
    "plan": "compile a run for TPU chips you do not have, and say whether it fits",
    "report": "draw a run's plots and page",
    "tiny": "write the config and tokenizer that builtin:tiny starts from",
}

if __name__ == "__main__":
    if "--version" in sys.argv[1:]:
        sys.stdout.write(f"minigrpo {__version__}\n")
    else:
        rows = "\n".join(f"  python -m minigrpo.{name:<9} {does}" for name, does in COMMANDS.items())
        sys.stdout.write(f"minigrpo {__version__}\n\n{rows}\n\nEach has --help.\n")
