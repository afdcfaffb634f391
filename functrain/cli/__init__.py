"""The command line, `functrain COMMAND`; the commands are listed in `_COMMANDS`.

It is thin: parse, build, run. Nothing here imports torch before a command needs it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from functrain.cli.output import UNREAD, close_streams, open_streams, print_result, say
from functrain.errors import FunctrainError, RelayedError, did_you_mean

_EXTRA = ("tyro", "cattrs", "rich", "jinja2")
_COMMANDS = {
    "init": "write a config with every key:        functrain init pretrain run.toml",
    "demo": "pretrain, fine-tune and align a small model on Python's own documentation",
    "pretrain": "train a model from scratch:           functrain pretrain run.toml",
    "sft": "fine-tune on prompts and answers:     functrain sft run.toml",
    "dpo": "align with preferences:               functrain dpo run.toml",
    "reference": "score the pairs in advance:           functrain reference run.toml",
    "generate": 'generate text:                        functrain generate RUN "prompt"',
    "evaluate": "evaluate a model on files or tasks:   functrain evaluate RUN held_out.txt",
    "plan": "predict memory and time:              functrain plan pretrain run.toml --workers 8",
    "report": "compare runs on one page:             functrain report RUN OTHER --to runs.html",
    "data": "show which tokens are trained on:     functrain data show FILE",
    "inspect": "show what a checkpoint holds:         functrain inspect CHECKPOINT",
    "export": "write a model for transformers:       functrain export RUN DIR",
    "verify": "check hashes, and replay steps:       functrain verify RUN --replay 200..400",
    "diff": "show where two runs differ:           functrain diff RUN OTHER",
    "completion": 'complete commands in a shell:         eval "$(functrain completion bash)"',
}
_HELP = f"""usage: functrain COMMAND [OPTIONS]

Training as a value passing through pure functions: state, metrics = step(state, batch)

{chr(10).join(f"  {name:<10} {what}" for name, what in _COMMANDS.items())}

functrain COMMAND --help shows what a command takes. A run is resumed with --resume, to the bit.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return the exit code.

    0: done. 1: `diff` found a difference. 2: an error that the user can fix, told in one message.
    130 and 143: stopped by SIGINT or SIGTERM, with everything saved. 141: the reader of the output
    is gone; what a run has produced is saved.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    open_streams()
    try:
        return _run(arguments)
    except RelayedError:
        return 2  # the worker that raised the error reports it
    except BrokenPipeError:
        return UNREAD
    except FunctrainError as error:
        say(f"functrain: {error}")
        return 2
    except KeyboardInterrupt:
        say("functrain: interrupted")
        return 130
    finally:
        close_streams()


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print_result(_HELP)
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        from functrain import __version__

        print_result(f"functrain {__version__}")
        return 0
    command, *rest = arguments
    if command not in _COMMANDS:
        say(f"functrain: no command {command!r}; {did_you_mean(command, _COMMANDS)}")
        return 2
    # Set before torch is loaded: how often a waiting libgomp thread spins before it sleeps. With
    # the default, 300,000, it takes the core from the very thread that it waits for: beside two
    # busy processes on two cores, a step of the demo took 1.4 s, and takes 0.36 s with this. Not 0
    # (as OMP_WAIT_POLICY=passive sets it), which makes a step 1.5 times as long on idle cores.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    try:
        from functrain.cli import commands

        run = getattr(commands, "stage" if command in ("pretrain", "sft", "dpo") else command)
        code: int = run(command, rest)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in _EXTRA:
            raise
        say(
            f"functrain: the command line needs {error.name}, which is not installed: "
            "pip install 'functrain[cli]'"
        )
        return 2
    except SystemExit as error:  # raised by tyro after --help and after a wrong option
        return error.code if isinstance(error.code, int) else 2
    return code
